"""Files and shards in columns are what they were as records."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.inputs import tables
from batch_scorer.inputs.tables import Facts, FileTable, InputFile, cut
from batch_scorer.records import (
    Format,
    Layout,
    LineRun,
    Lines,
    ReadBounds,
    Source,
    TextStyle,
    layout_to_json,
)
from batch_scorer.records.digest import digest_of, digest_of_list
from batch_scorer.storage import Version

SCHEMAS = [pa.schema({"text": pa.string()}), pa.schema({"text": pa.large_string()})]
LAYOUTS = [
    Layout(Format.TEXT, {"text": "text"}, TextStyle.RENDERED),
    Layout(Format.TEXT, {"text": "text"}, TextStyle.RENDERED, bounds=ReadBounds(max_keys=3)),
    Layout(Format.TEXT, {"text": "é\n"}, TextStyle.RENDERED, watched=("system",)),
]
NAMES = ("{}.parquet", "{}.PARQUET", "{}.jsonl", "a/{}.arrow", "{}.json")


@st.composite
def files(draw: st.DrawFn) -> list[InputFile]:
    limited = draw(st.booleans())
    found = []
    for number in range(draw(st.integers(0, 6))):
        groups = tuple(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 90)), max_size=4)))
        rows = sum(each for each, _ in groups)
        key = draw(st.sampled_from(NAMES)).format(number)
        runs = tuple(LineRun(n, n + 1, n, rows) for n, (rows, _) in enumerate(groups))
        bits = np.packbits(np.arange(rows) % 3 == 0).tobytes()
        found.append(
            InputFile(
                source=Source("/data", key, number, Version(f'"{number}"')),
                schema=draw(st.sampled_from(SCHEMAS)),
                layout=draw(st.sampled_from(LAYOUTS)),
                row_groups=groups,
                lines=Lines(runs, SCHEMAS[0]) if key.endswith(".jsonl") else None,
                lost_types=draw(st.sampled_from([(), ("a (Enum)",)])),
                where="w" if limited else None,
                matching=bits if limited else None,
                limit=2 if limited else None,
            )
        )
    return found


@given(files())
def test_a_table_of_files_is_the_files(given: list[InputFile]) -> None:
    table = FileTable.of(given)
    assert list(table) == given == table[:]
    assert [file.layout.bounds for file in table] == [file.layout.bounds for file in given]
    assert table.num_rows.tolist() == [file.num_rows for file in given]
    assert table.asked() == [len(file.asked()) for file in given]
    alike = [(one, place) for one, places in table.by_alike() for place in places.tolist()]
    assert sorted(place for _, place in alike) == list(range(len(given)))
    for one, place in alike:
        assert one.layout == given[place].layout and one.lost_types == given[place].lost_types


@given(st.lists(files(), max_size=4), st.randoms())
def test_facts_are_joined_and_taken_in_any_order(parts: list[list[InputFile]], rng: object) -> None:
    flat = [replace(file, where=None, limit=None) for part in parts for file in part]
    order = list(range(len(flat)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    facts = Facts.joined([Facts.of(part) for part in parts])
    chosen = order[: len(order) // 2 + 1]
    taken = facts.take(np.array(chosen, np.int64))
    table = FileTable([flat[at].source for at in chosen], taken)
    assert list(table) == [flat[at] for at in chosen]
    assert len(taken.alike) <= len(set(taken.which.tolist()))


@given(files(), st.integers(1, 12), st.integers(1, 100))
def test_small_files_are_cut_as_all_others(
    given: list[InputFile], shard_rows: int, shard_tokens: int
) -> None:
    table = FileTable.of(given)
    shards = cut(table, shard_rows, shard_tokens)
    assert shards.numbers.tolist() == [
        (at, *numbers)
        for at, file in enumerate(given)
        for numbers in tables._pieces(file, shard_rows, shard_tokens)
    ]
    records = list(shards)
    assert [shards[at] for at in range(len(shards))] == records
    assert list(shards[1::2]) == records[1::2]
    assert list(shards.output_keys) == [shard.output_key for shard in records]
    assert list(shards.identities("f", "p_")) == [shard.identity("f", "p_") for shard in records]
    assert shards.total("num_rows") == sum(shard.num_rows for shard in records)
    assert shards.input_keys == {shard.source.key for shard in records}
    longest = sorted(records, key=lambda shard: (-shard.estimated_tokens, shard.output_key))
    assert list(shards.in_scoring_order()) == [*longest[-1:], *longest[:-1]]
    for shard in records:
        assert (shard.lines is None) == (not shard.source.key.endswith(".jsonl"))
        if shard.lines is not None and shard.num_rows:
            held = sum(run.num_rows for run in shard.lines.runs)
            assert held >= shard.skip_rows + (shard.num_rows if shard.where is None else 1)


def test_changed_shards_stay_in_their_places() -> None:
    source = Source("/data", "a.parquet", 1, Version("e"))
    file = InputFile(source, SCHEMAS[0], LAYOUTS[0], ((5, 5), (5, 5), (5, 5)))
    shards = cut(FileTable.of([file]), 5, 100)
    changed = shards.with_changed({1: replace(shards[1], retries=2)})
    assert [shard.retries for shard in changed] == [0, 2, 0]
    assert [shard.retries for shard in changed.take(np.array([1, 0]))] == [2, 0]
    assert [shard.retries for shard in changed[2:]] == [0]
    assert [shard.retries for shard in shards] == [0, 0, 0]
    with pytest.raises(IndexError):
        changed[3]


def test_an_identity_is_the_digest_of_what_it_always_was() -> None:
    layout = replace(LAYOUTS[2], fields=("x",))
    source = Source("/data", 'a "b"\u00e9.parquet', 7, Version("e"))
    file = InputFile(source, SCHEMAS[0], layout, ((5, 5),), where="w", matching=b"\xa8")
    (shard,) = cut(FileTable.of([file]), 10, 100)
    assert shard.identity("f", "p_") == digest_of(
        {
            "input": source.key,
            "etag": '"e"',
            "size_bytes": 7,
            "rows": [0, 3, 2],
            "where": "w",
            "layout": layout_to_json(layout),
            "column_prefix": "p_",
            "fingerprint": "f",
        }
    )


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_a_list_is_digested_piece_by_piece(values: list[str]) -> None:
    assert digest_of_list(iter(values)) == digest_of(values)
