"""What plans have found out about files is used again, for these very files and nothing else."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_scorer import version
from batch_scorer.config import Config, load_config
from batch_scorer.errors import ShardReason
from batch_scorer.inputs import known as module
from batch_scorer.inputs import plan as planning
from batch_scorer.inputs.known import KnownFiles
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.records import Source
from batch_scorer.storage import Store, Version, open_store
from cluster.local.seaweed import S3Server
from tests.helpers.inputs import jsonl, pair_rows, pairs, parquet
from tests.helpers.places import Place

FOLDER = "_batch_scorer/inputs"
FILES = {
    "a.parquet": parquet(pairs(7), row_group_rows=3),
    "b/c.parquet": parquet(pairs(2, 50)),
    "lines.jsonl": jsonl(pair_rows(9, 100)),
    "table.csv": b"prompt,chosen,rejected\nhi,yes,no\nso?,right,wrong\n",
    "whole.json": json.dumps(pair_rows(3, 200)).encode(),
}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Place:
    made = Place(str(tmp_path))
    if request.param == "s3":
        made = Place(s3.url(f"known/{tmp_path.name}"), s3.options)
    (made / "in").write(FILES)
    (made / "out").write({"_batch_scorer/run.json": b"{}"})
    return made


class Looks(list[str]):
    """The keys of the files that plans have looked into."""


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    seen = Looks()
    look = planning._look_together

    def counted(sources: list[Source], **named: Any) -> Any:
        seen.extend(source.key for source in sources)
        return look(sources, **named)

    monkeypatch.setattr(planning, "_look_together", counted)
    return seen


def config_of(place: Place, **settings: Any) -> Config:
    return load_config(
        model="m",
        inputs=((place / "in").url,),
        output=(place / "out").url,
        store_options=dict(place.options),
        **{"shard_rows": 4, **settings},
    )


def planned(config: Config, *, keeps: bool = True) -> Plan:
    plan = make_plan(config, known=KnownFiles(config, FOLDER))
    if keeps:
        assert plan.known is not None
        plan.known.keep(plan.files, plan.aside.values())
    return plan


def kept(place: Place) -> list[str]:
    return [info.key for info in (place / "out").store.list(FOLDER)]


def assert_equal(one: Plan, other: Plan) -> None:
    assert list(one.files) == list(other.files)
    assert list(one.shards) == list(other.shards)
    assert [file.layout.bounds for file in one.files] == [f.layout.bounds for f in other.files]
    assert one.digest("f", "") == other.digest("f", "")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"limit": 5},
        {"where": 'field("source") != "x"', "exclude": ("table.csv",)},
        {"max_row_bytes": 1000, "column_prefix": "rm_"},
    ],
)
def test_a_second_plan_looks_into_no_file_and_is_the_same(
    place: Place, looks: Looks, settings: dict[str, Any]
) -> None:
    config = config_of(place, **settings)
    first = planned(config)
    assert set(looks) == {source.key for source in first.files.sources}
    looks.clear()
    assert_equal(planned(config), first)
    assert looks == []
    assert len(kept(place)) == 1


def test_a_second_plan_asks_the_store_for_no_input(place: Place, s3: S3Server) -> None:
    if not place.options:
        pytest.skip("a disk counts no requests")
    config = config_of(place)
    planned(config)
    before = s3.requests()
    planned(config)
    asked = s3.requests() - before
    assert asked["GET"] <= len(kept(place)) == 1  # what is kept: the server may count it late
    assert asked["PUT"] == 0


def test_only_what_is_new_or_has_changed_is_looked_into(place: Place, looks: Looks) -> None:
    config = config_of(place)
    planned(config)
    looks.clear()
    (place / "in").write({"a.parquet": parquet(pairs(5)), "new.parquet": parquet(pairs(3, 9))})
    (place / "in").store.delete("table.csv")
    plan = planned(config)
    assert sorted(looks) == ["a.parquet", "new.parquet"]
    assert_equal(plan, make_plan(config))
    looks.clear()
    assert_equal(planned(config), plan)
    assert looks == [] and len(kept(place)) == 1


def test_a_plan_alone_stores_nothing(place: Place) -> None:
    planned(config_of(place), keeps=False)
    assert kept(place) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "preference_pair"},
        {"column_prefix": "rm_"},
        {"max_nesting": 100},
        {"max_expansion": 7.0},
        {"where": 'field("source") != "x"', "exclude": ("table.csv",)},
        {"shard_rows": 5},
    ],
)
def test_another_question_is_another_answer(
    place: Place, looks: Looks, settings: dict[str, Any]
) -> None:
    planned(config_of(place))
    looks.clear()
    config = config_of(place, **settings)
    plan = planned(config, keeps=False)
    assert set(looks) == {source.key for source in plan.files.sources}


def test_what_other_code_found_out_is_not_used(
    place: Place, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(config_of(place))
    looks.clear()
    monkeypatch.setattr(planning, "package_digest", lambda: "another")
    planned(config_of(place))
    assert set(looks) == FILES.keys()
    assert len(kept(place)) == 1  # the old one is gone


def test_the_code_that_counts_is_all_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    version.package_digest.cache_clear()
    before = version.package_digest()
    read = Path.read_bytes

    def changed(path: Path) -> bytes:
        return read(path) + b"#" * (path.name == "held.py")

    monkeypatch.setattr(Path, "read_bytes", changed)
    version.package_digest.cache_clear()
    assert version.package_digest() != before
    version.package_digest.cache_clear()


def test_files_that_are_set_aside_stay_known(place: Place, looks: Looks) -> None:
    config = config_of(place)
    planned(config)
    looks.clear()

    def choose(source: Source, changed: object) -> bool:
        return source.key == "a.parquet"

    plan = make_plan(config, choose=choose, known=KnownFiles(config, FOLDER))
    assert plan.known is not None
    plan.known.keep(plan.files, plan.aside.values())
    planned(config)
    assert looks == []


def test_a_file_that_fails_is_looked_into_each_time(place: Place, looks: Looks) -> None:
    (place / "in").write({"torn.parquet": b"PAR1 and no more"})
    config = config_of(place)
    for _ in range(3):
        looks.clear()
        plan = planned(config)
        assert [receipt.reason for receipt in plan.failed] == [ShardReason.UNREADABLE_FILE]
    assert looks == ["torn.parquet"]


def test_a_file_without_an_entity_tag_is_neither_kept_nor_known(place: Place) -> None:
    config = config_of(place)
    plan = make_plan(config)
    sources = [replace(source, version=Version("")) for source in plan.files.sources]
    sources[0] = plan.files.sources[0]
    for known in ([-1] * len(FILES), [0] + [-1] * (len(FILES) - 1)):
        memory = KnownFiles(config, FOLDER)
        assert memory.recall("question", sources)[1].tolist() == known
        memory.keep(replace(plan.files, sources=sources), ())


# Foreign bytes


def _changed(data: bytes, change: Callable[[pa.Table], pa.Table]) -> bytes:
    table = change(pa.ipc.open_file(pa.BufferReader(data[32:])).read_all())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    made: bytes = sink.getvalue().to_pybytes()
    return hashlib.sha256(made).digest() + made


def _with(name: str, values: Callable[[list[Any]], list[Any]]) -> Callable[[bytes], bytes]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        return table.set_column(place, field, pa.array(values(table[name].to_pylist()), field.type))

    return lambda data: _changed(data, change)


def _with_head(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def changed(table: pa.Table) -> pa.Table:
        head = change(json.loads(table.schema.metadata[b"head"]))
        return table.replace_schema_metadata({"head": json.dumps(head)})

    return lambda data: _changed(data, changed)


def _alike(**other: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda head: {**head, "alike": [{**each, **other} for each in head["alike"]]}


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one byte": lambda data: data[:200] + bytes([data[200] ^ 255]) + data[201:],
    "zeros": lambda data: bytes(len(data)),
    "parquet": lambda data: FILES["a.parquet"],
    "json": lambda data: b'{"question": 1}',
    "no head": lambda data: _changed(data, lambda table: table.replace_schema_metadata(None)),
    "a list for a head": _with_head(lambda head: [head]),
    "another question": _with_head(lambda head: {**head, "question": "x" * 64}),
    "no schema": _with_head(_alike(schema="bm90IGE=")),
    "no base64": _with_head(_alike(schema="§")),
    "a layout of numbers": _with_head(_alike(layout={"format": 1})),
    "an unknown format": _with_head(_alike(layout={"format": "x", "columns": {}})),
    "nothing alike": _with_head(lambda head: {**head, "alike": []}),
    "another column": lambda data: _changed(data, lambda table: table.drop_columns(["alike"])),
    "no rows": lambda data: _changed(data, lambda table: table.slice(0, 0)),
    "fewer rows than none": _with("rows", lambda rows: [[-1 for _ in each] for each in rows]),
    "more rows than there can be": _with("rows", lambda rows: [[2**62] * len(x) for x in rows]),
    "a part less": _with("tokens", lambda tokens: [each[1:] for each in tokens]),
    "a null": _with("rows", lambda rows: [None, *rows[1:]]),
    "no name": _with("name", lambda names: [None, *names[1:]]),
    "far away": _with("alike", lambda which: [99 for _ in which]),
    "below zero": _with("alike", lambda which: [-1 for _ in which]),
    "other lines": _with("lines", lambda lines: [0 for _ in lines]),
    "lines far away": _with("lines", lambda lines: [x and 7 for x in lines]),
    "no runs": _with("runs", lambda runs: [[] for _ in runs]),
    "bits of rows that are not there": _with("matching", lambda bits: [b"abc" for _ in bits]),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str, bytes]:
    """A place whose files are known, and the object that holds what is."""
    made = Place(str(tmp_path_factory.mktemp("sound")))
    (made / "in").write(FILES)
    (made / "out").write({"_batch_scorer/run.json": b"{}"})
    planned(config_of(made))
    (key,) = kept(made)
    return made, key, (made / "out").store.read(key)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_costs_itself_and_is_replaced(
    damage: str,
    sound: tuple[Place, str, bytes],
    looks: Looks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place, key, data = sound
    config = config_of(place)
    wanted = make_plan(config)
    for other in kept(place):
        (place / "out").store.delete(other)
    (place / "out").store.create(key, DAMAGES[damage](data))
    looks.clear()
    with caplog.at_level(logging.INFO, "batch_scorer"):
        plan = planned(config)
    assert key in caplog.text
    assert set(looks) == FILES.keys()
    assert_equal(plan, wanted)
    looks.clear()
    assert_equal(planned(config), wanted)
    assert looks == []


def test_what_ends_the_process_that_reads_it_costs_itself(
    sound: tuple[Place, str, bytes], looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _, _ = sound
    config = config_of(place)
    monkeypatch.setattr(module, "_read", _dies)
    assert len(planned(config, keeps=False).files) == len(FILES)
    assert set(looks) == FILES.keys()


def _dies(*_: object) -> None:
    os.abort()


def test_two_runs_at_once_do_not_harm_each_other(place: Place, looks: Looks) -> None:
    """Both have read what was there; each stores its own and removes what it has read."""
    config = config_of(place)
    planned(config)
    (place / "in").write({"new.parquet": parquet(pairs(3, 9))})
    plans = [make_plan(config, known=KnownFiles(config, FOLDER)) for _ in range(2)]
    for plan in plans:
        assert plan.known is not None
        plan.known.keep(plan.files, ())
    assert len(kept(place)) == 2
    looks.clear()
    assert_equal(planned(config), plans[0])
    assert looks == [] and len(kept(place)) == 1


def test_what_is_gone_when_it_is_read_costs_itself(
    place: Place, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(place)
    planned(config)
    looks.clear()
    listed = Store.list

    def and_removed(self: Store, prefix: str = "") -> Iterator[Any]:
        infos = list(listed(self, prefix))
        if prefix == FOLDER:
            for info in infos:
                self.delete(info.key)
        return iter(infos)

    monkeypatch.setattr(Store, "list", and_removed)
    planned(config, keeps=False)
    assert set(looks) == FILES.keys()


def test_many_files_are_looked_into_together_and_one_that_kills_its_reader_fails_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({f"{n:03}.parquet": parquet(pairs(2, n)) for n in range(40)})
    (place / "in").write({"bomb.csv": b"prompt,chosen,rejected\n" + b"hi,yes,no\n" * 400_000})
    config = config_of(place, read_memory_gib=0.03)
    plan = make_plan(config)
    assert len(plan.files) == 40
    assert [(r.input, r.reason) for r in plan.failed] == [("bomb.csv", ShardReason.READER_DIED)]


def test_the_output_may_be_missing(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    (place / "in").write(FILES)
    config = config_of(place)
    plan = planned(config, keeps=False)
    assert plan.known is not None and len(plan.files) == len(FILES)
    open_store(config.output, {}, create=True)
    plan.known.keep(plan.files, ())
    plan.known.keep(plan.files, ())  # does nothing
    assert len(kept(place)) == 1
