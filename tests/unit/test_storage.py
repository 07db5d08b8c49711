"""The same promises on a local disk and on a real S3 server."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import get_session

from batch_scorer.errors import ConfigError, StorageError
from batch_scorer.storage import (
    AccessDenied,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    Store,
    Version,
    glob_matches,
    in_threads,
    open_store,
)
from batch_scorer.storage.hub import _translated as translated
from cluster.local.seaweed import S3Server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Iterator[Store]:
    if request.param == "local":
        yield Store(str(tmp_path / "root"), {}, create=True)
    else:
        yield Store(s3.url(f"storage/{tmp_path.name}"), s3.options, create=True)


def test_what_is_created_can_be_read_listed_and_deleted(store: Store) -> None:
    version = store.create("a/b c/é.bin", b"hello")
    assert store.read("a/b c/é.bin") == b"hello"
    assert store.read_with_info("a/b c/é.bin")[1].version == version
    (info,) = store.list("a")
    assert (info.key, info.size_bytes, info.version) == ("a/b c/é.bin", 5, version)
    store.delete("a/b c/é.bin")
    store.delete("a/b c/é.bin")
    assert list(store.list()) == []
    with pytest.raises(ObjectMissing):
        store.head("a/b c/é.bin")


def test_versions_with_one_tag_are_equal_however_they_were_shown() -> None:
    put, listed = Version('"0x1"', "7"), Version("0x1")
    assert put == listed and len({put, listed}) == 1
    assert listed.etag == '"0x1"' and listed.conditions == {"e_tag": '"0x1"'}
    assert put.conditions == {"e_tag": '"0x1"', "version": "7"}
    assert Version('W/"1"').etag == 'W/"1"'
    assert Version("") != Version('"0x2"') != put


def test_a_second_create_does_not_replace_the_first(store: Store) -> None:
    store.create("k", b"first")
    with pytest.raises(ObjectChanged):
        store.create("k", b"second")
    assert store.read("k") == b"first"


def test_replace_needs_the_version_that_is_there(store: Store) -> None:
    first = store.create("k", b"1")
    second = store.replace("k", b"22", first)
    assert store.head("k").version == second
    with pytest.raises(ObjectChanged):
        store.replace("k", b"333", first)
    assert store.read("k") == b"22"


def test_reads_are_pinned_to_a_version(store: Store) -> None:
    first = store.create("k", b"abcdef")
    info = store.head("k")
    with store.open(info.key, info.size_bytes, info.version) as file:
        file.seek(-2, 2)
        assert file.read() == b"ef"
    store.replace("k", b"ABCDEFG", first)
    with pytest.raises(ObjectChanged):
        store.read("k", first)
    with pytest.raises(ObjectChanged):
        store.read_range("k", first, 0, 3)


def test_of_many_creators_exactly_one_wins(store: Store) -> None:
    wins: list[int] = []

    def create(number: int) -> None:
        try:
            store.create("race", b"%d" % number)
        except ObjectChanged:
            return
        wins.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.read("race") == b"%d" % wins[0]


def test_compare_and_swap_loses_no_update(store: Store) -> None:
    store.create("n", b"0")

    def add() -> None:
        for _ in range(5):
            while True:
                data, info = store.read_with_info("n")
                try:
                    store.replace("n", b"%d" % (int(data) + 1), info.version)
                    break
                except ObjectChanged:
                    continue

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("n") == b"20"


def test_a_missing_local_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match="no such folder"):
        open_store(str(tmp_path / "missing"), {})


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/out"):
        Store(str(tmp_path / "file" / "out"), {}, create=True)


def test_wrong_keys_and_options_are_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        Store(s3.url("x"), {**s3.options, "nonsense": "1"})
    with pytest.raises(ConfigError, match="ftp"):
        Store("ftp://host/x", {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied, match="no permission"):
        Store(s3.url("denied"), s3.options).create("k", b"")


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("*.parquet", "a.parquet", "d/a.parquet"),
        ("**/*.parquet", "d/e/a.parquet", "a.txt"),
        ("**/*.parquet", "a.parquet", "a.parquet.gz"),
        ("p-[0-3].parquet", "p-2.parquet", "p-4.parquet"),
        ("d?/x(1).json", "d1/x(1).json", "d/x(1).json"),
        ("p-[!0-3].parquet", "p-4.parquet", "p-2.parquet"),
        ("a[!b]c", "axc", "a/c"),
        ("run [1]/*", "run [1]/a", "run 1/a"),
    ],
)
def test_globs(pattern: str, matching: str, other: str) -> None:
    assert glob_matches(pattern, [matching, other]) == {matching}


def test_brackets_are_characters_where_no_key_has_them() -> None:
    assert glob_matches("run [1]/*", ["run 1/a", "run 2/a"]) == {"run 1/a"}
    with pytest.raises(ConfigError, match="bad character range"):
        glob_matches("[z-a]", ["a"])


def test_results_of_threads_come_in_order_and_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_threads(lambda number: -number, items(), 2)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(taken) < 20
    assert list(results) == [-number for number in range(3, 1000)]


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda number: 1 // number, [1, 0, 1], 2))


def test_a_hub_that_cannot_be_reached_is_a_failed_store() -> None:
    """The HTTP library's error came through and ended the program with a traceback."""
    with pytest.raises(StorageError, match="hf://datasets/a/b: "), translated("hf://datasets/a/b"):
        get_session().get("http://127.0.0.1:1")


@pytest.mark.parametrize("changed_s", [0, 1, 1.9999995, 1e9 + 0.123456789, -3.5])
def test_a_local_listing_shows_what_a_request_would(tmp_path: Path, changed_s: float) -> None:
    """It is reckoned from what the system says of a file, without a request for each."""
    store = Store(str(tmp_path), {})
    for name in ("a.txt", "b/c d.txt", "é.txt"):
        store.create(name, b"x" * len(name))
        os.utime(tmp_path / name, (changed_s, changed_s))
    (tmp_path / "link.txt").symlink_to("a.txt")
    listed = list(store.list())
    assert len(listed) == 4
    assert listed == [store.head(info.key) for info in listed]


def test_where_it_would_show_something_else_each_file_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path), {})
    for name in "abc":
        store.create(name, b"x")
    shown = [store.head(name) for name in "abc"]
    other = ObjectInfo("a", 9, Version("9"), shown[0].last_modified)
    monkeypatch.setattr("batch_scorer.storage.store.info_of_file", lambda key, about: other)
    assert sorted(store.list(), key=lambda info: info.key) == shown
