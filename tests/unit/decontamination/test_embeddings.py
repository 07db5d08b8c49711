"""Rows whose embeddings are close to those of an evaluation set are left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from batch_scorer import decontaminate
from batch_scorer.decontamination.recipe import Decontamination, Match
from batch_scorer.derived.recipes import load_recipe
from batch_scorer.errors import ConfigError, InputError
from tests.helpers.embedded import TEXTS, conversations, embed, vectors
from tests.helpers.inputs import jsonl
from tests.helpers.places import Place


def test_close_rows_are_left_out_and_a_row_without_an_embedding_is_kept(
    tmp_path: Path, tiny_model: Path
) -> None:
    place = Place(str(tmp_path))
    data = conversations(TEXTS) + jsonl([{"messages": []}])
    rows = embed(place, "rows", data, tiny_model)
    entries = embed(place, "entries", conversations([TEXTS[1], "Name three trees."]), tiny_model)

    def cosine(left: Any, right: Any) -> float:
        return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))

    closest = [
        None if row is None else max(cosine(row, entry) for entry in vectors(entries))
        for row in vectors(rows)
    ]
    assert closest[-1] is None
    found = sorted(each for each in closest if each is not None)
    assert found[-1] == pytest.approx(1.0)
    threshold = (found[-2] + found[-3]) / 2  # two rows are closer
    recipe = Decontamination(match=Match.EMBEDDING, threshold=threshold)
    made = decontaminate([rows], [entries], (place / "clean").url, recipe)
    left_out = [i for i, each in enumerate(closest) if each is not None and each >= threshold]
    lines = (tmp_path / "clean/_batch_scorer/removed.jsonl").read_text().splitlines()
    removed = [json.loads(line) for line in lines]
    assert [line["row"] for line in removed] == left_out
    assert (made.rows, made.removed, made.rows_without_text, made.entries) == (6, 2, 1, 2)
    (same,) = (line for line in removed if line["row"] == 1)
    assert (same["text"], same["entry_text"], same["entry_row"]) == (TEXTS[1], TEXTS[1], 0)
    assert same["overlap"] == pytest.approx(1.0)
    (shard,) = (tmp_path / "clean").glob("*.parquet")
    assert pq.read_table(shard).num_rows == 4

    pooled = embed(place, "pooled", conversations(TEXTS[:1]), tiny_model, embedding_pooling="mean")
    with pytest.raises(InputError, match="two models or in two ways"):
        decontaminate([rows], [pooled], (place / "other").url, recipe)


def test_a_threshold_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match="threshold"):
        load_recipe(Decontamination, match="embedding")
