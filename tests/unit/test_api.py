"""Rows in memory get what the same rows in a file get."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_scorer import load_config, score, score_rows
from batch_scorer.errors import (
    ConfigError,
    IncompleteError,
    InputError,
    ShardError,
    ShardReason,
)
from batch_scorer.pipeline import worker
from tests.helpers.inputs import Row, jsonl, pair_rows, pairs, parquet
from tests.helpers.places import Place, of_input

Scored = Callable[..., Any]


@pytest.fixture
def scored(tiny_model: Path) -> Scored:
    def call(rows: Any, **settings: Any) -> Any:
        return score_rows(rows, model=str(tiny_model), backend="fake", **settings)

    return call


def scored_file(model: Path, folder: Path, name: str, data: bytes, **settings: Any) -> pa.Table:
    (folder / name).write_bytes(data)
    config = load_config(
        model=str(model), backend="fake", use_ray=False,
        inputs=str(folder / name), output=str(folder / "out"), **settings,
    )  # fmt: skip
    assert score(config).is_complete
    return of_input(Place(config.output).shards(), name)


def odd_rows() -> list[Row]:
    """Rows of several types and keys, one of which has no score."""
    rows = pair_rows(5)
    rows[1]["chosen"] = None
    rows[2]["extra"] = {"a": 1}
    rows[3]["extra"] = [1]
    del rows[4]["source"]
    return rows


def test_a_table_gets_the_columns_of_its_file(
    scored: Scored, tiny_model: Path, tmp_path: Path
) -> None:
    table = pairs(7).replace_schema_metadata({"mine": "kept"})
    found = scored(table, shard_rows=3)
    file = scored_file(tiny_model, tmp_path, "a.parquet", parquet(table), shard_rows=3)
    assert found.to_pylist() == file.to_pylist()
    assert found.column_names == file.column_names
    assert found.select(table.column_names).equals(table, check_metadata=True)
    assert found.schema.metadata == {b"mine": b"kept"}


def test_dicts_get_the_columns_of_their_lines(
    scored: Scored, tiny_model: Path, tmp_path: Path
) -> None:
    rows = odd_rows()
    found = scored(rows, shard_rows=2)
    file = scored_file(tiny_model, tmp_path, "a.jsonl", jsonl(rows), shard_rows=2)
    added = file.column_names[file.column_names.index("score_chosen") :]
    assert [{name: row[name] for name in added} for row in found] == file.select(added).to_pylist()
    assert [{k: v for k, v in row.items() if k not in added} for row in found] == rows
    assert [row["score_error"] for row in found] == [None, "null_value", None, None, None]
    assert found[1]["margin"] is None


def test_types_that_parquet_does_not_have_come_back(scored: Scored) -> None:
    numbers = pa.RunEndEncodedArray.from_arrays([2, 3], ["a", "b"])
    views = pa.array(["x", None, "z"], pa.string_view())
    table = pairs(3).append_column("runs", numbers).append_column("views", views)
    found = scored(table)
    assert found.select(table.column_names).equals(table)
    assert found["score_error"].null_count == 3


def test_no_rows_give_no_rows(scored: Scored) -> None:
    assert scored([]) == []
    empty = scored(pairs(0))
    assert empty.num_rows == 0 and empty.schema.names == scored(pairs(1)).schema.names


def test_settings_are_those_of_a_run(scored: Scored) -> None:
    rows = [{"question": "What is 2+2?", "answer": "It is 4."}]
    columns = {"prompt": "question", "response": "answer"}
    (found,) = scored(rows, columns=columns, column_prefix="rm_")
    assert found["rm_score"] is not None and found["rm_score_error"] is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"output": "out"}, "output"),
        ({"inputs": "in"}, "inputs"),
        ({"limit": 1}, "limit"),
        ({"where": "x"}, "where"),
        ({"use_ray": False}, "use_ray"),
        ({"max_token": 1}, "max_tokens"),
    ],
)
def test_settings_that_are_none_of_its_own_are_refused(
    scored: Scored, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        scored([], **settings)
    with pytest.raises(ConfigError, match=named):
        scored(pairs(1), **settings)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([*pair_rows(1), "a"], r"rows\[1\]: str"),
        ([*pair_rows(2), {"chosen": {1}}], r"rows\[2\]: .*set"),
        ({"chosen": "a"}, "builtins.dict"),
        ([{"x": 1}], "Columns: x"),
        (pa.table({"x": [1]}), "Columns: x"),
        ([*pair_rows(1), {**pair_rows(1)[0], "margin": 1}], "already has margin"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(scored: Scored, rows: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        scored(rows)


def test_a_part_that_fails_is_an_error(scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ShardError(ShardReason.WRONG_SCHEMA, "refused")

    monkeypatch.setattr(worker, "commit_shard", refuse)
    with pytest.raises(IncompleteError, match="refused"):
        scored(pairs(2))


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_on_request_and_on_stderr(
    scored: Scored, capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    scored(pairs(2), progress=progress)
    printed = capsys.readouterr()
    assert not printed.out and bool(printed.err) is progress


def test_notebooks_have_plain_lines(
    scored: Scored, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ipykernel sets FORCE_COLOR, and a bar would be moved with escape codes."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    scored(pairs(2), progress=True)
    printed = capsys.readouterr()
    assert printed.out and not printed.err and "\x1b" not in printed.out


def test_nothing_is_left_behind(
    scored: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scored(pairs(2))
    with pytest.raises(InputError):
        scored(pa.table({"x": [1]}))
    assert not list(tmp_path.glob("batch-scorer-*"))


def test_a_hugging_face_dataset_stays_one(scored: Scored) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(pair_rows(6)).shuffle(seed=1).select(range(4))
    found = scored(rows, shard_rows=3)
    assert isinstance(found, datasets.Dataset)
    assert found.select_columns(rows.column_names).to_list() == rows.to_list()
    assert {name: found.features[name] for name in rows.features} == rows.features
    by_text = {json.dumps(row["chosen"]): row["margin"] for row in scored(pair_rows(6))}
    assert found["margin"][:] == [by_text[json.dumps(turns)] for turns in rows["chosen"]]
    assert scored(rows.with_format("numpy")).format["type"] == "numpy"
