"""The conformance suite against every kind of store, and against stores that break a promise."""

import shutil
from pathlib import Path

import pytest

from batch_scorer.errors import OutputError
from batch_scorer.storage import (
    Conformance,
    ObjectChanged,
    PlaceMissing,
    examine,
    require_conditional_writes,
)
from tests.helpers.gcs import GcsServer, Lie, gcs_server
from tests.helpers.places import Place
from tests.helpers.stores import AnyStore


def problems(found: Conformance) -> dict[str, str]:
    return {check.name: check.problem for check in found.checks if not check.holds}


def test_every_store_keeps_what_the_protocol_needs(any_store: AnyStore) -> None:
    place = any_store.place
    place.write({"there before": b"1"})
    found = examine(place.url, place.options)
    assert found.holds and not problems(found)
    assert found.to_json()["holds"] and len(found.to_json()["checks"]) == len(found.checks) == 10
    keeps = {"s3-versioned": True, "gcs": None}
    assert found.keeps_old_versions is keeps.get(any_store.name, False)
    assert [info.key for info in place.store.list()] == ["there before"]


@pytest.mark.parametrize(
    ("lie", "broken"),
    [
        (Lie.NO_CONDITIONS, {"create", "replace", "race", "deleted keys"}),
        (Lie.NO_PINS, {"pinned reads"}),
        (Lie.OTHER_TAGS, {"versions", "deletion"}),
        (Lie.STALE_LISTING, {"versions", "deletion", "listing", "deleted keys"}),
        (Lie.NO_DELETION, {"deletion", "listing", "deleted keys"}),
        (Lie.OLD_CLOCK, {"times"}),
    ],
)
def test_a_broken_promise_is_found(lie: Lie, broken: set[str], gcs: GcsServer) -> None:
    with gcs_server(lie) as server:
        found = examine(server.url("doctor"), server.options)
    assert problems(found).keys() == broken, problems(found)
    assert not found.holds


def test_a_probe_lets_a_store_with_conditional_writes_pass(any_store: AnyStore) -> None:
    store = any_store.place.store
    require_conditional_writes(store, "probes")
    assert not list(store.list())


def test_a_store_that_ignores_conditions_is_refused_by_name(gcs: GcsServer) -> None:
    with gcs_server(Lie.NO_CONDITIONS) as server:
        place = Place(server.url("out"), server.options)
        with pytest.raises(OutputError, match=r"gs://bkt/out: .* does not refuse .*If-None-Match"):
            require_conditional_writes(place.store, "probes")
        assert not list(place.store.list())


def test_a_place_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(PlaceMissing, match="no such folder"):
        examine(str(tmp_path / "missing"), {})
    assert not (tmp_path / "missing").exists()


def test_versions_are_one_thing_whoever_shows_them(any_store: AnyStore) -> None:
    """In sets and as keys too, where no method is asked."""
    store = any_store.place.store
    created = store.create("k", b"1")
    (listed,) = store.list()
    head, (_, read) = store.head("k"), store.read_with_info("k")
    assert {created, listed.version, head.version, read.version} == {created}
    assert len({info.version.etag for info in (listed, head, read)} | {created.etag}) == 1
    assert created.etag.startswith('"') and created.etag.endswith('"')


def test_a_listed_version_can_be_replaced_and_an_old_one_cannot(any_store: AnyStore) -> None:
    store = any_store.place.store
    store.create("k", b"1")
    (first,) = store.list()
    second = store.replace("k", b"22", first.version)
    with pytest.raises(ObjectChanged):
        store.replace("k", b"333", first.version)
    store.delete_version("k", first.version)
    assert store.read("k", second) == b"22"
    store.delete_version("k", next(store.list()).version)
    with pytest.raises(ObjectChanged):
        store.replace("k", b"333", second)
    with pytest.raises(ObjectChanged):
        store.replace("k", b"333", first.version)


def test_a_listing_of_many_pages_is_whole(gcs: GcsServer, tmp_path: Path) -> None:
    place = Place(gcs.url(f"pages/{tmp_path.name}"), gcs.options)
    keys = {f"{number:04d}" for number in range(1_005)}
    store = place.store
    for key in keys:
        store.create(key, b"")
    assert {info.key for info in store.list()} == keys


def test_a_probe_fails_where_the_place_is_gone(tmp_path: Path) -> None:
    store = Place(str(tmp_path / "root")).store
    require_conditional_writes(store, "probes")
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root").write_text("a file now")
    with pytest.raises(Exception, match="root"):
        require_conditional_writes(store, "probes")
