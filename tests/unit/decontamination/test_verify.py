"""`verify` decides again what `decontaminate` left out."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer import decontaminate
from batch_scorer.decontamination.decontaminate import REMOVED_KEY
from batch_scorer.decontamination.recipe import Decontamination
from batch_scorer.derived.output import DERIVED_KEY, SHARDS_KEY, encode_shard, mark_of
from tests.helpers.embedded import TEXTS, conversations, embed
from tests.helpers.in_process import run_cli
from tests.helpers.places import Place

ROWS = ["One thing", "another", "one THING.", "", "a third", "a fourth"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(2):
        rows = [{"prompt": text, "source": "s"} for text in ROWS[3 * number :][:3]]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / f"{number}.parquet")
    questions = [{"question": "One thing"}, {"question": "a fourth"}]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return tmp_path


def made(place: Path, against: Sequence[str], **recipe: Any) -> Path:
    output = place / "out"
    decontaminate([str(place / "in")], against, str(output), Decontamination(**recipe))
    return output


def verified(output: Path) -> tuple[int, dict[str, Any]]:
    ended = run_cli("verify", output, "--json")
    return ended.exit_code, json.loads(ended.out)


@pytest.mark.parametrize("match", ["ngram", "exact", "near"])
def test_what_is_right_is_found_again_against_evaluation_files(place: Path, match: str) -> None:
    output = made(place, [str(place / "evals.jsonl")], match=match)
    code, found = verified(output)
    assert (code, found["ok"], found["remade"], found["shards"]) == (0, True, 2, 2)
    assert found["counts"]["dropped"] == {"contaminated": 3}


@pytest.mark.parametrize("match", ["exact", "near"])
def test_what_is_right_is_found_again_within_the_rows(place: Path, match: str) -> None:
    code, found = verified(made(place, ["self"], match=match))
    assert (code, found["remade"], found["counts"]["dropped"]) == (0, 2, {"duplicate": 1})


@pytest.mark.parametrize("against", ["evals", "self"])
def test_embedded_rows_are_compared_again(against: str, tmp_path: Path, tiny_model: Path) -> None:
    place = Place(str(tmp_path))
    rows = embed(place, "rows", conversations([*TEXTS, TEXTS[0]]), tiny_model)
    evals = embed(place, "evals", conversations(TEXTS[:2]), tiny_model)
    recipe = Decontamination(match="embedding", threshold=0.99999)
    named = ["self"] if against == "self" else [evals]
    decontaminate([rows], named, (place / "out").url, recipe)
    code, found = verified(tmp_path / "out")
    reasons = {"self": {"duplicate": 1}, "evals": {"contaminated": 3}}
    assert (code, found["remade"], found["counts"]["dropped"]) == (0, 1, reasons[against])


def test_another_row_in_a_shard_is_found_even_where_all_records_agree(place: Path) -> None:
    output = made(place, [str(place / "evals.jsonl")])
    shard = output / "0.parquet"
    mark = mark_of(shard.read_bytes())
    assert mark is not None
    data = encode_shard(
        pa.Table.from_pylist([{"prompt": "One thing", "source": "s"}]), mark.derivation, mark.key
    )
    shard.write_bytes(data)
    lines = [json.loads(line) for line in (output / SHARDS_KEY).read_text().splitlines()]
    sha256 = hashlib.sha256(data).hexdigest()
    lines[0] |= {"size_bytes": len(data), "sha256": sha256}
    (output / SHARDS_KEY).write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found = verified(output)
    (problem,) = found["problems"]
    assert code == 4 and problem.endswith("0.parquet has other rows than the recipe keeps")


@pytest.mark.parametrize(
    ("key", "before", "after", "problem"),
    [
        (REMOVED_KEY, '"row": 0', '"row": 1', "lists other rows than are left out"),
        (REMOVED_KEY, '"entry_row": 1', '"entry_row": 0', "lists other rows than are left out"),
        (REMOVED_KEY, "{", "", "lists other rows than are left out"),
        ("_SUCCESS", "contaminated", "duplicate", "_SUCCESS has other counts"),
    ],
)
def test_records_that_say_something_else_are_found(
    place: Path, key: str, before: str, after: str, problem: str
) -> None:
    output = made(place, [str(place / "evals.jsonl")])
    text = (output / key).read_text()
    assert before in text
    (output / key).write_text(text.replace(before, after))
    code, found = verified(output)
    assert code == 4 and problem in found["problems"][0] and len(found["problems"]) == 1


def test_what_has_changed_since_is_only_recounted(place: Path) -> None:
    output = made(place, [str(place / "evals.jsonl")])
    derivation = (output / DERIVED_KEY).read_text()
    assert "NFC" in derivation
    (output / DERIVED_KEY).write_text(derivation.replace("NFC", "NFKC"))
    assert verified(output)[1]["remade"] is None  # compared by another version

    (output / DERIVED_KEY).write_text(derivation)
    assert verified(output)[1]["remade"] == 2
    (place / "evals.jsonl").write_text(json.dumps({"question": "another"}) + "\n")
    code, found = verified(output)
    assert (code, found["remade"], found["counts"]) == (0, None, None)
