"""Of rows whose embeddings are close, the first is kept: against the rule in plain Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from batch_scorer import decontaminate
from batch_scorer.decontamination import decontaminate as module
from batch_scorer.decontamination import seen_embeddings
from batch_scorer.decontamination.embeddings import Vectors
from batch_scorer.decontamination.recipe import Decontamination, Match
from batch_scorer.decontamination.seen_embeddings import SeenEmbeddings
from batch_scorer.errors import ConfigError, InputError
from tests.helpers.embedded import TEXTS, conversations, embed, vectors
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl
from tests.helpers.places import Place

ROWS, DIMENSIONS, THRESHOLD = 300, 5, 0.8
Sides = dict[int, Any]
"""A row's embeddings by slot."""


def rows_with_embeddings(seed: int) -> list[Sides]:
    """One embedding or two, or none; many are close to each other and some the same."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(25, DIMENSIONS))
    rows: list[Sides] = []
    for number in range(ROWS):
        slots = [(), (0,), (0, 1), (0, 1), (1,)][random.integers(5)]
        if number % 10 == 9 and rows[-3]:
            rows.append(dict(rows[-3]))
            continue
        noise = random.uniform(0, 0.6)
        found = {
            slot: centres[random.integers(25)] + noise * random.normal(size=DIMENSIONS)
            for slot in slots
        }
        rows.append({slot: each / np.linalg.norm(each) for slot, each in found.items()})
    return rows


def vectors_of(rows: list[Sides]) -> Vectors:
    found = [(row, slot, v) for row, sides in enumerate(rows) for slot, v in sides.items()]
    return Vectors(
        np.array([row for row, _, _ in found], np.int64),
        np.array([slot for _, slot, _ in found], np.int64),
        np.array([v for _, _, v in found], np.float32).reshape(-1, DIMENSIONS),
    )


def by_the_rule(rows: list[Sides]) -> dict[int, tuple[int, float]]:
    kept: list[int] = []
    hits = {}
    for row, sides in enumerate(rows):
        close = [
            (-min(float(sides[slot] @ rows[other][slot]) for slot in sides), other)
            for other in kept
            if rows[other].keys() == sides.keys() and sides
        ]
        if close and -min(close)[0] >= THRESHOLD:
            hits[row] = min(close)[1], -min(close)[0]
        else:
            kept.append(row)
    return hits


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("file_rows", [ROWS, 64])
def test_the_first_of_close_rows_is_kept_whatever_the_blocks_and_files(
    block: int, file_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_embeddings, "_BLOCK", block)
    rows = rows_with_embeddings(1)
    expected = by_the_rule(rows)
    assert 50 < len(expected) < ROWS - 50
    seen = SeenEmbeddings(THRESHOLD, tmp_path)
    found = {}
    for start in range(0, ROWS, file_rows):
        texts = [f"text {row}" for row in range(start, min(start + file_rows, ROWS))]
        hits = seen.hits(str(start), vectors_of(rows[start : start + file_rows]), texts)
        for row, hit in hits.items():
            other = int(hit.entry.file) + hit.entry.row
            assert (hit.text, hit.entry_text) == (f"text {start + row}", f"text {other}")
            found[start + row] = other, hit.overlap
    assert found.keys() == expected.keys()
    assert found == {
        row: (other, pytest.approx(c, abs=2e-6)) for row, (other, c) in expected.items()
    }


def test_near_duplicates_within_an_embedded_output_are_left_out(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(str(tmp_path))
    texts = [*TEXTS, TEXTS[1], TEXTS[3]]
    data = conversations(texts) + jsonl([{"messages": []}])
    rows = embed(place, "rows", data, tiny_model)
    command = ["decontaminate", rows, "--against", "self", "--match", "embedding"]
    command += ["--threshold", "0.99999", "--output", (place / "clean").url]
    ended = run_cli(*command, "--json")
    assert ended.exit_code == 0, ended.err
    made = json.loads(ended.out)
    embedded = [None if v is None else {0: v / np.linalg.norm(v)} for v in vectors(rows)]
    assert embedded[-1] is None
    assert (made["rows"], made["removed"], made["rows_without_text"]) == (8, 2, 1)
    assert made["totals"]["dropped"] == {"duplicate": 2}
    lines = (tmp_path / "clean/_batch_scorer/removed.jsonl").read_text().splitlines()
    removed = [json.loads(line) for line in lines]
    assert [(line["row"], line["entry_row"]) for line in removed] == [(5, 1), (6, 3)]
    assert [line["text"] for line in removed] == [line["entry_text"] for line in removed]
    (shard,) = (tmp_path / "clean").glob("*.parquet")
    assert pq.read_table(shard).num_rows == 6

    recipe = Decontamination(match=Match.EMBEDDING, threshold=0.9)
    monkeypatch.setattr(module, "MOST_COMPARED_ROWS", 7)
    with pytest.raises(ConfigError, match=r"at most 7; these are 8"):
        decontaminate([rows], ["self"], (place / "other").url, recipe)
    with pytest.raises(InputError, match="no embeddings there"):
        decontaminate([(place / "clean").url], ["self"], (place / "other").url, recipe)
