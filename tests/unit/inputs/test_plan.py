import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, InputError, ShardReason
from batch_scorer.inputs import files
from batch_scorer.inputs.files import read_lines, read_rows
from batch_scorer.inputs.plan import make_plan
from batch_scorer.inputs.sources import list_inputs
from batch_scorer.inputs.tables import FileTable, InputFile, cut
from batch_scorer.records import Format, Layout, Source
from batch_scorer.storage import Version, open_store

MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))


def pairs(num_rows: int) -> pa.Table:
    def side(answer: str) -> list[dict[str, str]]:
        return [{"content": "Hi", "role": "user"}, {"content": answer, "role": "assistant"}]

    return pa.table(
        {
            "chosen": pa.array([side(f"yes {i}") for i in range(num_rows)], MESSAGES),
            "rejected": pa.array([side(f"no {i}") for i in range(num_rows)], MESSAGES),
        }
    )


def _config(*inputs: Path | str, **settings: Any) -> Config:
    settings.setdefault("output", "/nowhere/out")
    return load_config(model="m", inputs=tuple(map(str, inputs)), **settings)


def _file(groups: list[tuple[int, int]]) -> FileTable:
    source = Source("/data", "a/b.parquet", 1, Version("e"))
    layout = Layout(Format.TEXT, {"text": "text"})
    return FileTable.of([InputFile(source, pa.schema([]), layout, tuple(groups))])


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 500)), max_size=12),
    st.integers(1, 50),
    st.integers(1, 600),
)
def test_every_row_is_in_exactly_one_shard(
    groups: list[tuple[int, int]], shard_rows: int, shard_tokens: int
) -> None:
    file = _file(groups)
    shards = list(cut(file, shard_rows, shard_tokens))
    next_row = 0
    for shard in shards:
        assert shard.first_row == next_row
        next_row += shard.num_rows
        assert shard.num_rows <= shard_rows
        assert shard.row_groups is not None
        start, stop = shard.row_groups
        before = sum(rows for rows, _ in groups[:start])
        held = sum(rows for rows, _ in groups[start:stop])
        assert before + shard.skip_rows == shard.first_row or shard.num_rows == 0
        assert shard.skip_rows + shard.num_rows <= held
    assert next_row == file.num_rows.sum()
    assert len({shard.output_key for shard in shards}) == len(shards)


def test_a_file_that_fits_keeps_its_name_and_pieces_say_their_rows() -> None:
    assert [s.output_key for s in cut(_file([(5, 5)]), 10, 100)] == ["a/b.parquet"]
    assert [s.output_key for s in cut(_file([(5, 5), (6, 6)]), 10, 100)] == [
        "a/b.rows0-5.parquet",
        "a/b.rows5-11.parquet",
    ]


def test_an_empty_file_is_one_empty_shard() -> None:
    (shard,) = cut(_file([]), 10, 100)
    assert (shard.num_rows, shard.output_key) == (0, "a/b.parquet")


def test_a_huge_row_group_is_cut_inside() -> None:
    shards = list(cut(_file([(100, 1000)]), 30, 10_000))
    assert [(s.skip_rows, s.num_rows) for s in shards] == [(0, 25), (25, 25), (50, 25), (75, 25)]


def test_folders_globs_and_files_are_found_and_hidden_ones_left(tmp_path: Path) -> None:
    hidden = ("a/_tmp/z.parquet", "a/.h.parquet", "a/n.txt")
    for name in ("a/x.parquet", "a/b/y.parquet", "day/_day=1/x.parquet", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            pq.write_table(pairs(2), tmp_path / name)
        else:
            (tmp_path / name).write_text("no")

    def keys(*inputs: str) -> list[str]:
        return [
            source.key for source, _ in list_inputs(_config(*(tmp_path / i for i in inputs))).found
        ]

    assert keys("a") == ["b/y.parquet", "x.parquet"]
    assert keys("day") == ["_day=1/x.parquet"]  # a partition, as Spark names it
    assert keys("a/x.parquet") == ["x.parquet"]
    assert keys("a/*.parquet") == ["x.parquet"]
    assert keys("a/b/*.parquet", "a/x.parquet") == ["b/y.parquet", "x.parquet"]
    assert keys("a", "a/x.parquet") == ["b/y.parquet", "x.parquet"]


def test_an_output_inside_the_input_is_not_scored_again(tmp_path: Path) -> None:
    pq.write_table(pairs(2), tmp_path / "x.parquet")
    (tmp_path / "out").mkdir()
    pq.write_table(pairs(2), tmp_path / "out" / "x.parquet")
    sources = list_inputs(_config(tmp_path, output=str(tmp_path / "out"))).found
    assert [source.key for source, _ in sources] == ["x.parquet"]
    with pytest.raises(ConfigError, match="is the input folder"):
        list_inputs(_config(tmp_path, output=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no such file or folder"),
        ("empty", "holds no .parquet"),
        ("empty/*.parquet", "no file matches"),
        ("note.txt", "unknown file type"),
        ("gone.parquet", "no such file"),
    ],
)
def test_an_input_that_cannot_be_used_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no")
    with pytest.raises(InputError, match=message):
        make_plan(_config(tmp_path / name))


def test_a_bad_file_fails_alone(tmp_path: Path) -> None:
    pq.write_table(pairs(3), tmp_path / "good.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 but no more")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "wrong.parquet")
    pq.write_table(pairs(1).append_column("margin", [[1.0]]), tmp_path / "taken.parquet")
    plan = make_plan(_config(tmp_path))
    assert [shard.output_key for shard in plan.shards] == ["good.parquet"]
    assert {receipt.input: receipt.reason for receipt in plan.failed} == {
        "torn.parquet": ShardReason.UNREADABLE_FILE,
        "wrong.parquet": ShardReason.WRONG_SCHEMA,
        "taken.parquet": ShardReason.COLUMN_COLLISION,
    }


def test_a_column_prefix_avoids_a_collision(tmp_path: Path) -> None:
    pq.write_table(pairs(1).append_column("margin", [[1.0]]), tmp_path / "taken.parquet")
    assert make_plan(_config(tmp_path, column_prefix="rm_")).failed == []


def test_two_inputs_for_one_output_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "x.jsonl.parquet")
    with pytest.raises(InputError, match="would both be written to"):
        make_plan(_config(tmp_path, text_style="rendered"))


def test_the_plan_is_the_same_whatever_the_cluster(tmp_path: Path) -> None:
    pq.write_table(pairs(50), tmp_path / "x.parquet", row_group_size=7)
    a = make_plan(_config(tmp_path, shard_rows=10))
    b = make_plan(_config(tmp_path, shard_rows=10, workers=9, token_budget=1))
    assert a.digest("f", "") == b.digest("f", "")
    assert a.num_rows == 50


MANY_TYPES = pa.table(
    {
        "text": ["a", None, "ccc"] * 1000,
        "label": pa.array(["x", "y", None] * 1000).dictionary_encode(),
        "messages": pa.array(
            [[{"content": str(i), "role": "user"}] for i in range(3000)], MESSAGES
        ),
        "ids": pa.array([None, [], [1, 2]] * 1000, pa.list_(pa.int32())),
    },
    metadata={"made_by": "hand"},
)


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("columns", [None, ["messages", "text"]])
@pytest.mark.parametrize(
    ("groups", "skip", "count"),
    [((0, 2), 0, 2600), ((0, 1), 0, 128), ((0, 1), 1000, 300), ((1, 3), 2, 1698), ((2, 3), 399, 1)],
)
def test_a_part_of_a_row_group_is_what_the_whole_group_holds_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: tuple[int, int],
    skip: int,
    count: int,
    columns: list[str] | None,
    is_small: bool,
) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(MANY_TYPES, file, row_group_size=1300)
    monkeypatch.setattr(files, "_WHOLE_BYTES", 1 << 22 if is_small else 0)
    ((source, _),) = list_inputs(_config(tmp_path)).found
    store = open_store(source.root, {})
    whole = pq.ParquetFile(file).read_row_groups(list(range(*groups)), columns=columns)
    part = read_rows(store, source, groups, skip, count, columns)
    assert part.equals(whole.slice(skip, count), check_metadata=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_json_lines_are_cut_at_lines_and_read_alone(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "x" * (i % 7), "n": i} for i in range(50)]
    data = b"\n".join(json.dumps(row).encode() for row in rows)
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(data) if suffix == ".jsonl.gz" else data)
    plan = make_plan(
        _config(tmp_path, shard_rows=20, shard_tokens=100, format="text", text_style="rendered")
    )
    assert len(plan.shards) > 3
    found = []
    for shard in plan.shards:
        assert shard.lines is not None and shard.skip_rows == 0
        assert shard.first_row == len(found)
        assert shard.num_rows <= 20 and shard.estimated_tokens <= 100
        table, errors = read_lines(open_store(shard.source.root, {}), shard.source, shard.lines)
        assert errors == {} and table.num_rows == shard.num_rows
        found += table.to_pylist()
    assert found == rows
    assert plan.shards[0].output_key == f"a{suffix}.rows0-{plan.shards[0].num_rows}.parquet"
