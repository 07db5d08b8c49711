"""Broken files and broken rows: each is named, and nothing else suffers."""

import io
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import Row, jsonl, pair_rows, pairs, parquet, table_of
from tests.helpers.places import Place, Stored, of_input, rows_scored_and_marked
from tests.helpers.program import Ended, Program

pytestmark = pytest.mark.e2e

MAX_TOKENS = 400
SHARD_ROWS = 40
GROUPS, CUT, GOOD = pairs(2 * SHARD_ROWS), pairs(12, start=200), pairs(5, start=300)
SCORES = ("score_chosen", "score_rejected", "margin")
# A byte that is in no real text, and so a token of its own.


def spoiled_rows() -> dict[str, Row]:
    """A pair for each way of being no good, by what it is; two good ones between them."""
    rows = pair_rows(9, start=400)
    question, answer = rows[0]["chosen"]
    long = {**answer, "content": "tea " * MAX_TOKENS}
    spoiled: list[tuple[str, dict[str, object]]] = [
        ("good", {}),
        ("a side is null", {"chosen": None}),
        ("a side is an empty list", {"rejected": []}),
        ("a content is null", {"chosen": [question, {**answer, "content": None}]}),
        ("an answer is empty", {"rejected": [question, {**answer, "content": " "}]}),
        ("a role is unknown", {"chosen": [{**question, "role": "wizard"}, answer]}),
        ("the last message is not the assistant's", {"rejected": [question, answer, question]}),
        ("a side is too long", {"chosen": [question, long]}),
        ("also good", {}),
    ]
    return {what: {**row, **change} for row, (what, change) in zip(rows, spoiled, strict=True)}


REASONS = {
    "good": None,
    "a side is null": "null_value",
    "a side is an empty list": "empty",
    "a content is null": "null_value",
    "an answer is empty": "empty",
    "a role is unknown": "template_error",
    "the last message is not the assistant's": "bad_structure",
    "a side is too long": "too_long",
    "also good": None,
}


def with_malformed_line() -> bytes:
    lines = jsonl(pair_rows(4, start=500)).splitlines(keepends=True)
    lines[2] = lines[2][:50] + b"\n"
    return b"".join(lines)


def with_damaged_page(data: bytes) -> bytes:
    """The bytes of a Parquet file whose second row group cannot be unpacked; its footer can."""
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    half = int(chunk.total_compressed_size) // 2
    start = int(chunk.data_page_offset) + half // 2
    return data[:start] + b"\xff" * half + data[start + half :]


def good_files() -> dict[str, bytes]:
    """What can be read, though not every row of it can be scored."""
    return {
        "good.parquet": parquet(GOOD),
        "rows.parquet": parquet(table_of(list(spoiled_rows().values()))),
        "lines.jsonl": with_malformed_line(),
        "empty.jsonl": b"",
    }


def mended_files() -> dict[str, bytes]:
    """What the broken files would be."""
    return {
        "cut.parquet": parquet(CUT),
        "damaged.parquet": parquet(GROUPS, SHARD_ROWS),
        "text.parquet": parquet(pairs(2, start=600)),
        "other/schema.parquet": parquet(pairs(3, start=700)),
    }


def broken_files() -> dict[str, bytes]:
    whole = mended_files()
    return {
        "cut.parquet": whole["cut.parquet"][: len(whole["cut.parquet"]) // 2],
        "damaged.parquet": with_damaged_page(whole["damaged.parquet"]),
        "text.parquet": b"chosen,rejected\nthis is,no Parquet\n",
        "other/schema.parquet": parquet(pa.table({"question": ["what?"], "label": [1]})),
    }


WHY = {
    "cut.parquet": "unreadable_file",
    "damaged.parquet": "unreadable_file",
    "text.parquet": "unreadable_file",
    "other/schema.parquet": "wrong_schema",
}


@dataclass(frozen=True)
class Scored:
    """One run over all of these files, and what it left."""

    place: Place
    flags: list[object]
    ended: Ended
    shards: dict[str, Stored]


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, module_program: Program, tiny_model: Path
) -> Scored:
    place = Place(str(tmp_path_factory.mktemp("bad-input")))
    (place / "in").write(good_files() | broken_files())
    flags: list[object] = [
        "score", "--model", tiny_model, (place / "in").url, "--output", (place / "out").url,
        "--json", "--dtype", "float32", "--max-tokens", MAX_TOKENS, "--shard-rows", SHARD_ROWS,
    ]  # fmt: skip
    ended = module_program.run(*flags)
    return Scored(place, flags, ended, (place / "out").shards())


def test_every_file_that_failed_is_named_with_its_reason(scored: Scored) -> None:
    assert scored.ended.exit_code == 3, scored.ended.err
    lines = scored.ended.err.splitlines()
    for key, reason in WHY.items():
        named = [line for line in lines if line.startswith(f"failed {key}: {reason}: ")]
        assert len(named) == 1, scored.ended.err
    assert {entry["input"]: entry["reason"] for entry in scored.ended.json["failed"]} == WHY
    assert any("empty.jsonl holds no rows" in line for line in lines)
    assert scored.ended.error.startswith("4 of 8 shards are not scored")
    assert run_cli("verify", (scored.place / "out").url).exit_code == 3


def test_the_other_files_and_the_rows_before_the_damage_are_committed(scored: Scored) -> None:
    assert sorted(scored.shards) == [
        "damaged.rows0-40.parquet",
        "good.parquet",
        "lines.jsonl.parquet",
        "rows.parquet",
    ]
    counts = {key: rows_scored_and_marked([shard.table]) for key, shard in scored.shards.items()}
    assert counts == {
        "damaged.rows0-40.parquet": (40, 0),
        "good.parquet": (5, 0),
        "lines.jsonl.parquet": (3, 1),
        "rows.parquet": (2, 7),
    }
    totals = scored.ended.json
    assert (totals["rows_scored"], totals["rows_marked"]) == (50, 8)
    assert totals["rows_failed"] == 40  # of the damaged half; a file without a footer tells none


def test_a_row_that_cannot_be_scored_keeps_its_place_and_says_why(scored: Scored) -> None:
    table = of_input(scored.shards, "rows.parquet")
    assert dict(zip(spoiled_rows(), table["score_error"].to_pylist(), strict=True)) == REASONS
    given = table_of(list(spoiled_rows().values()))
    assert table.select(given.column_names).equals(given)
    for row in table.to_pylist():
        assert (row["margin"] is None) == (row["score_error"] is not None), row
    lines = of_input(scored.shards, "lines.jsonl")
    assert lines["score_error"].to_pylist() == [None, None, "malformed_json", None]
    assert lines["margin"].is_valid().to_pylist() == [True, True, False, True]
    marks = [line for line in scored.ended.err.splitlines() if line.startswith("marked ")]
    assert any("lines.jsonl row 2: malformed_json: line 3" in line for line in marks)


def test_mended_files_are_scored_by_the_same_command_and_no_others(scored: Scored) -> None:
    (scored.place / "in").write(mended_files())
    again = run_cli(*scored.flags, "--no-ray")
    assert again.exit_code == 0, again.err  # though rows are marked
    assert again.json["marked"] == scored.ended.json["marked"]
    after = (scored.place / "out").shards()
    untouched = {key for key in scored.shards if not key.startswith("damaged")}
    assert {key: after[key] for key in untouched} == {key: scored.shards[key] for key in untouched}
    scored_now = sum(shard.commit.tokens for key, shard in after.items() if key not in untouched)
    figures = again.json["metrics"]
    assert figures["reused_rows"] == 40  # the readable half of the damaged file, as it was
    assert figures["scored_tokens"] + figures["reused_tokens"] == scored_now
    for key, data in mended_files().items():
        given = pq.read_table(io.BytesIO(data))
        found = of_input(after, key)
        assert found.select(given.column_names).equals(given)
        assert found["score_error"].null_count == given.num_rows
    assert run_cli("verify", (scored.place / "out").url).exit_code == 0


def change_weights(model: Path, name: str, rows: slice, value: float) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights[name][rows] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def score_in_place(place: Place, name: str, model: Path) -> pa.Table:
    ended = run_cli(
        "score", "--model", model, (place / "in").url, "--output", (place / name).url,
        "--no-ray", "--dtype", "float32",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert run_cli("verify", (place / name).url).exit_code == 0
    return of_input((place / name).shards(), "a.parquet")


def test_a_head_that_gives_no_numbers_marks_all_rows(tmp_path: Path, tiny_model: Path) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(GOOD)})
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change_weights(model, "score.weight", slice(None), 3e38)  # products that float32 cannot hold
    table = score_in_place(place, "out", model)
    assert table["score_error"].to_pylist() == ["non_finite_score"] * GOOD.num_rows
    for name in SCORES:
        assert table[name].null_count == GOOD.num_rows


def test_a_model_with_a_token_that_is_no_number_is_refused(
    tmp_path: Path, tiny_model: Path
) -> None:
    """What an engine makes of it is in tests/parity."""
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(GOOD)})
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change_weights(model, "model.embed_tokens.weight", slice(300, 301), math.nan)
    ended = run_cli("score", "--model", model, (place / "in").url, "--output", (place / "out").url)
    assert ended.exit_code == 2
    (line,) = ended.error.splitlines()
    assert "model.embed_tokens.weight holds NaN" in line
    assert not (tmp_path / "out").exists()
