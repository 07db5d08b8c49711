"""What `verify` tells a scheduler: 0 all is well, 3 not finished, 4 not what was committed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batch_scorer import formats
from batch_scorer.outputs import verify as reading
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pair_rows, pairs, parquet
from tests.helpers.places import Place

pytestmark = pytest.mark.e2e


@pytest.fixture
def scored(tmp_path: Path, tiny_model: Path) -> Place:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(pairs(12)), "b.parquet": parquet(pairs(3, 50))})
    score(place, tiny_model)
    return place


def score(place: Place, model: Path, *flags: object) -> None:
    done = run_cli(
        "score", "--model", model, (place / "in").url, "--output", (place / "out").url,
        "--no-ray", "--backend", "fake", *flags,
    )  # fmt: skip
    assert done.exit_code == 0, done.err


def verify(place: Place) -> tuple[int, str]:
    verdict = run_cli("verify", (place / "out").url)
    return verdict.exit_code, verdict.out


def test_an_untouched_output_is_verified(scored: Place) -> None:
    code, said = verify(scored)
    assert code == 0
    assert "2 shards, 15 rows = 15 scored + 0 marked" in said
    assert "verified" in said.splitlines()


def test_a_missing_shard_is_named(scored: Place) -> None:
    Path(scored.url, "out", "b.parquet").unlink()
    code, said = verify(scored)
    assert code == 4
    assert "b.parquet: missing" in said


def test_an_unfinished_output_is_not_verified(scored: Place) -> None:
    Path(scored.url, "out", "_SUCCESS").unlink()
    code, said = verify(scored)
    assert code == 3
    assert "no _SUCCESS" in said


def test_changed_scores_and_changed_input_columns_are_found(scored: Place) -> None:
    file = Path(scored.url, "out", "a.parquet")
    table = pq.read_table(file)
    swapped = table.set_column(
        table.column_names.index("score_chosen"), "score_chosen", table["score_rejected"]
    )
    pq.write_table(swapped, file)
    code, said = verify(scored)
    assert code == 4
    assert "a.parquet: its bytes are not those that were committed" in said
    assert "a.parquet: its scores are not those that were committed" in said

    pq.write_table(table.set_column(0, "chosen", table["chosen"].take([11, *range(11)])), file)
    code, said = verify(scored)
    assert code == 4
    assert "a.parquet: column chosen is not as it was in the input" in said


def test_a_shard_is_compared_with_its_own_rows(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups of three rows, cut in two; and files that have to be parsed from their start."""
    place = Place(str(tmp_path))
    (place / "in").write(
        {
            "p.parquet": parquet(pairs(10), row_group_rows=3),
            "j.jsonl": jsonl(pair_rows(10, 50)),
            "z.jsonl.gz": gzip.compress(jsonl(pair_rows(10, 60)), mtime=0),
            "a.json": json.dumps(pair_rows(4, 70)).encode(),
        }
    )
    score(place, tiny_model, "--shard-rows", 2)

    parsed: list[str] = []

    def counted(function: Any) -> Any:
        def call(data: Any, name: str, *given: Any, **others: Any) -> Any:
            found = function(data, name, *given, **others)
            if found is not None:
                parsed.append(name)
            return found

        return call

    monkeypatch.setattr(reading, "apart", lambda bounds, check, *given: check(*given))
    for function in ("read_json_table", "scan_lines"):
        monkeypatch.setattr(formats, function, counted(getattr(formats, function)))
    code, said = verify(place)
    assert code == 0
    assert "19 shards compared with their input" in said
    assert sorted(parsed) == ["a.json", "j.jsonl", "z.jsonl.gz"]

    # The first rows of the file, in the place of rows 3 and 4.
    other = pairs(2)["chosen"]
    file = Path(place.url, "out", "p.rows3-5.parquet")
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.column_names.index("chosen"), "chosen", other), file)
    code, said = verify(place)
    assert code == 4
    assert said.count("is not as it was in the input") == 1
    assert "p.rows3-5.parquet: column chosen is not as it was in the input" in said


def test_a_shard_of_no_run_is_found(scored: Place) -> None:
    Path(scored.url, "out", "stray.parquet").write_bytes(parquet(pairs(2)))
    code, said = verify(scored)
    assert code == 4
    assert "stray.parquet: not in the manifest" in said


def test_no_output_at_all_is_a_mistake(tmp_path: Path) -> None:
    nothing = run_cli("verify", tmp_path)
    assert nothing.exit_code == 2
    assert "no scored output here" in nothing.error
    missing = run_cli("verify", tmp_path / "missing")
    assert missing.exit_code == 2
    assert "missing" in missing.error
