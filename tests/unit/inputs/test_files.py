"""Files as people hold them: which are read, under which names, and that their rows come back."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from batch_scorer.config import Config
from batch_scorer.errors import InputError, RowReason, ShardReason
from batch_scorer.formats.storable import stored_type
from batch_scorer.inputs.files import columns_of_shard, rows_of_shard
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.inputs.sources import list_inputs
from cluster.local.seaweed import S3Server
from tests.helpers.places import Place

ROWS = [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(25)]
TABLE = pa.Table.from_pylist(ROWS)
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def _config(*inputs: Path | str, **settings: Any) -> Config:
    settings = {"output": "/nowhere", **settings}
    return Config(model="m", inputs=tuple(map(str, inputs)), **settings)


def parquet(table: pa.Table = TABLE) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def arrow(table: pa.Table = TABLE, *, is_stream: bool, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=7)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def feather(table: pa.Table = TABLE) -> bytes:
    sink = pa.BufferOutputStream()
    pa.feather.write_feather(table, sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def delimited(delimiter: str) -> bytes:
    lines = [delimiter.join(f'"{value}"' for value in row.values()) for row in ROWS]
    return "\r\n".join([delimiter.join(ROWS[0]), *lines]).encode()


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, "zstd", asbytes=True)
    return packed


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    assert plan.failed == []
    found: list[dict[str, Any]] = []
    for shard in plan.shards:
        table, errors = rows_of_shard(shard, {}, None)
        assert errors == {} and table.num_rows == shard.num_rows and shard.first_row == len(found)
        names = ["chosen", "prompt"]
        columns, errors = columns_of_shard(shard, {}, names)
        assert errors == {}
        assert columns == {name: table[name].to_pylist() for name in names}
        assert rows_of_shard(shard, {}, names)[0].equals(table.select(names))
        found += table.to_pylist()
    return found


FILES = {
    "a.parquet": parquet(),
    "A.PARQUET": parquet(),
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.zst": zstd(LINES[:1000]) + zstd(LINES[1000:]),
    "a.json.zst": zstd(json.dumps(ROWS).encode()),
    "a.ndjson.gz": gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:]),
    "a.Ndjson.Zst": zstd(LINES),
    "a.csv": delimited(","),
    "a.TSV": delimited("\t"),
    "a.csv.gz": gzip.compress(delimited(",")),
    "a.arrow": arrow(is_stream=False),
    "a.stream.arrow": arrow(is_stream=True, compression="zstd"),
    "a.feather": feather(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_cut_and_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    plan = make_plan(_config(tmp_path / name, shard_rows=10))
    assert len(plan.shards) >= 3
    assert rows_of(plan) == ROWS
    stem = name[:-8] if name.lower().endswith(".parquet") else name
    first = plan.shards[0].num_rows
    assert plan.shards[0].output_key == f"{stem}.rows0-{first}.parquet"
    assert make_plan(_config(tmp_path)).shards[0].output_key == f"{stem}.parquet"


def test_one_name_with_two_suffixes_is_two_outputs(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(FILES[name])
    keys = [shard.output_key for shard in make_plan(_config(tmp_path)).shards]
    assert keys == ["a.csv.parquet", "a.jsonl.parquet", "a.parquet"]
    (tmp_path / "a.PARQUET").write_bytes(FILES["a.parquet"])
    with pytest.raises(InputError, match="would both be written to"):
        make_plan(_config(tmp_path))


def test_columns_of_any_type_beside_the_scored_ones_come_through(tmp_path: Path) -> None:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([25], pa.int32()), pa.array(["x"]))
    table = TABLE
    for name, column in {
        "runs": runs,
        "views": pa.array([[n] for n in range(25)], pa.list_view(pa.int64())),
        "nothing": pa.array([{}] * 25, pa.struct([])),
        "choice": pa.array([n % 3 for n in range(25)]).dictionary_encode(),
    }.items():
        table = table.append_column(name, column)
    (tmp_path / "a.arrow").write_bytes(arrow(table, is_stream=True))
    (shard,) = make_plan(_config(tmp_path)).shards
    read, _ = rows_of_shard(shard, {}, None)
    assert pq.read_table(io.BytesIO(parquet(read))).equals(read)
    assert read["views"].to_pylist() == table["views"].to_pylist()
    assert read["nothing"].to_pylist() == ["{}"] * 25
    assert set(read["runs"].to_pylist()) == {"x"}
    assert read["choice"].to_pylist() == table["choice"].to_pylist()


@pytest.mark.parametrize(
    "data",
    [
        arrow(is_stream=False)[:-300],
        arrow(is_stream=True)[:900],
        b"FEA1 of old",
        b"ARROW1\0\0 and no more",
        b"",
    ],
)
def test_a_torn_arrow_file_fails_alone(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.arrow").write_bytes(data)
    (tmp_path / "b.csv").write_bytes(FILES["a.csv"])
    plan = make_plan(_config(tmp_path))
    assert [shard.output_key for shard in plan.shards] == ["b.csv.parquet"]
    assert [receipt.reason for receipt in plan.failed] == [ShardReason.UNREADABLE_FILE]


def test_errors_of_rows_are_those_of_their_shard(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(delimited(",") + b"\nshort\n")
    bad = [*LINES.splitlines(), b"{bad"]
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(bad))
    (tmp_path / "c.json").write_bytes(json.dumps([*ROWS, 5]).encode())
    last = {}
    for shard in make_plan(_config(tmp_path, shard_rows=20)).shards:
        _, errors = rows_of_shard(shard, {}, None)
        assert columns_of_shard(shard, {}, ["chosen"])[1] == errors
        last[shard.source.key] = {row: error.reason for row, error in errors.items()}
        assert not errors or shard.num_rows - 1 in errors
    assert [list(found.values()) for found in last.values()] == [
        [RowReason.BAD_STRUCTURE],
        [RowReason.MALFORMED_JSON],
        [RowReason.MALFORMED_JSON],
    ]


# Which files


def _write(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(FILES.get(f"a{file.suffix}", b"text"))


def test_what_lies_beside_the_data_is_named_and_not_read(tmp_path: Path) -> None:
    _write(
        tmp_path, "data/train.parquet", "data/more.arrow", "README.md", "notes.txt",
        "dataset_infos.json", "data/state.json", "data/dataset_info.json", "dataset_dict.json",
        ".gitattributes", "_SUCCESS", ".cache/huggingface/x.json", "_tmp/y.parquet",
        "old.parquet.gz", "data/_late.parquet",
    )  # fmt: skip
    plan = make_plan(_config(tmp_path))
    assert [file.source.key for file in plan.files] == ["data/more.arrow", "data/train.parquet"]
    assert [url.removeprefix(f"{tmp_path}/") for url in plan.skipped] == [
        "README.md", "data/_late.parquet", "data/dataset_info.json", "data/state.json",
        "dataset_dict.json", "dataset_infos.json", "notes.txt", "old.parquet.gz",
    ]  # fmt: skip
    (tmp_path / "state.json").write_bytes(FILES["a.json"])
    assert make_plan(_config(tmp_path / "state.json")).num_rows == len(ROWS)
    both = make_plan(_config(tmp_path, tmp_path / "data" / "_late.parquet"))
    assert len(both.files) == 3 and f"{tmp_path}/data/_late.parquet" not in both.skipped


def test_excluded_files_are_left_out(tmp_path: Path) -> None:
    _write(tmp_path, "train/a.parquet", "test/a.parquet", "test/deep/b.parquet", "c.csv")

    def keys(*exclude: str) -> list[str]:
        listing = list_inputs(_config(tmp_path, exclude=exclude))
        assert listing.skipped == []
        return [source.key for source, _ in listing.found]

    assert keys("test/**") == ["c.csv", "train/a.parquet"]
    assert keys("test/*", "*.csv") == ["test/deep/b.parquet", "train/a.parquet"]
    assert keys("**/a.parquet") == ["c.csv", "test/deep/b.parquet"]
    with pytest.raises(InputError, match="every file is excluded"):
        keys("**")
    files = [tmp_path / name for name in ("train/a.parquet", "test/a.parquet", "c.csv")]
    named = list_inputs(_config(*files, exclude=("c.*",))).found  # as a shell expands a pattern
    assert [source.key for source, _ in named] == ["test/a.parquet", "train/a.parquet"]
    with pytest.raises(InputError, match="nothing to score there"):
        list_inputs(_config(*files, exclude=("**",)))


NAMES = [
    "run [v2]/a.parquet",
    "a[1].parquet",
    "what?.parquet",
    "every*/b.jsonl",
    "a b#1%20.parquet",
    "date=2026-01-01/größe=µ/part 0.csv",
]


@pytest.mark.parametrize("name", NAMES)
def test_marks_of_patterns_in_names_mean_themselves(tmp_path: Path, name: str) -> None:
    _write(tmp_path, f"in/{name}", "in/other/a.parquet", "in/run v/a.parquet")
    file = tmp_path / "in" / name
    for spec in {file, file.parent} - {tmp_path / "in"}:
        (shard,) = make_plan(_config(spec)).shards
        assert shard.source.url == str(file)
        assert rows_of_shard(shard, {}, None)[0].to_pylist() == ROWS


def test_a_pattern_below_a_folder_with_marks_in_its_name(tmp_path: Path) -> None:
    _write(tmp_path, "run [v2]/a.parquet", "run [v2]/b.csv", "run v/c.parquet")
    found = list_inputs(_config(tmp_path / "run [v2]" / "*.parquet")).found
    assert [source.key for source, _ in found] == ["a.parquet"]
    found = list_inputs(_config(tmp_path / "run [v]" / "*.parquet")).found
    assert [source.url for source, _ in found] == [str(tmp_path / "run v" / "c.parquet")]
    with pytest.raises(InputError, match="no file matches"):
        list_inputs(_config(tmp_path / "run [v2]" / "gone.parquet"))


def test_marks_of_patterns_in_a_bucket_mean_themselves_too(s3: S3Server) -> None:
    place = Place(s3.url("marks"), s3.options)
    names = [name for name in NAMES if "%" not in name]
    place.write({name: FILES[f"a{Path(name).suffix}"] for name in names})
    for name in names:
        for spec in {place.url, f"{place.url}/{name}", f"{place.url}/{name}".rpartition("/")[0]}:
            config = _config(spec, store_options=s3.options)
            urls = [source.url for source, _ in list_inputs(config).found]
            assert f"{place.url}/{name}" in urls
            assert len(urls) == 1 or spec == place.url
    pattern = _config(f"{place.url}/a?1?.parquet", store_options=s3.options)
    assert [source.key for source, _ in list_inputs(pattern).found] == ["a[1].parquet"]


ODD_COLUMNS = {
    "a dictionary in a struct": pa.StructArray.from_arrays(
        [pa.array([f"word {n % 3}" for n in range(25)]).dictionary_encode()], ["word"]
    ),
    "an extension in a struct": pa.StructArray.from_arrays(
        [
            pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([bytes([n] * 16) for n in range(25)], pa.binary(16))
            )
        ],
        ["id"],
    ),
    "text views": pa.array([f"more than twelve bytes {n}" for n in range(25)], pa.string_view()),
    "lists of views": pa.array([[str(n)] for n in range(25)], pa.list_(pa.string_view())),
}


@pytest.mark.parametrize("where", [None, 'field("prompt") >= "question 3"'])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("odd", ODD_COLUMNS)
def test_rows_of_every_type_are_read_from_several_groups(
    tmp_path: Path, odd: str, name: str, where: str | None
) -> None:
    table = TABLE.append_column("odd", ODD_COLUMNS[odd])
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=4)
    else:
        (tmp_path / name).write_bytes(arrow(table, is_stream=True))
    plan = make_plan(_config(tmp_path, where=where, shard_rows=10))
    assert not plan.failed and plan.num_rows + plan.rows_not_asked == 25
    found = pa.concat_tables([rows_of_shard(shard, {}, None)[0] for shard in plan.shards])
    picked = [n for n in range(25) if where is None or ROWS[n]["prompt"] >= "question 3"]
    assert found["prompt"].to_pylist() == [ROWS[n]["prompt"] for n in picked]
    assert found["odd"].type == stored_type(table["odd"].type)
    assert found["odd"].to_pylist() == [table["odd"][n].as_py() for n in picked]


def test_results_that_datasets_keeps_beside_the_rows_are_no_data(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "cache-1a2b3c4d.arrow"):
        (tmp_path / name).write_bytes(arrow(is_stream=True))
    listing = list_inputs(_config(tmp_path))
    assert [source.key for source, _ in listing.found] == ["data-00000-of-00001.arrow"]
    assert [Path(url).name for url in listing.skipped] == ["cache-1a2b3c4d.arrow"]
    assert len(list_inputs(_config(tmp_path / "cache-1a2b3c4d.arrow")).found) == 1
