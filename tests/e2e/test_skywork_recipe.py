"""The seed's curation, end to end on real pairs: every count is that of plain Python."""

from collections import Counter
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples import skywork_recipe
from tests.helpers.places import Place
from tests.helpers.program import REPOSITORY

pytestmark = pytest.mark.e2e

SOURCES = ("wildguard", "magpie-ultra", "magpie-pro-llama-3.1", "magpie-pro", "magpie-air")
CATEGORIES = ("math", "code", "advice")
DATA = REPOSITORY / "batch_scorer" / "data" / "pairs"
LOOKED_FOR = 3
"""Prompts that the evaluation file repeats; long ones, so that there is something to look for."""


def real_rows() -> list[dict[str, Any]]:
    """Real pairs under the names of the seed's sources, with averages of which some are equal."""
    pairs = [
        row for file in sorted(DATA.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    marks = zip(pairs, cycle(SOURCES), cycle(CATEGORIES), strict=False)
    return [
        {
            "chosen": pair["chosen"],
            "rejected": pair["rejected"],
            "source": source,
            "task_category": category,
            "armorm": round(len(str(pair["chosen"])) % 40 / 200, 3),
        }
        for pair, source, category in marks
    ]


def prompt_of(row: dict[str, Any]) -> str:
    return str(row["chosen"][0]["content"])


def kept_of_magpie(rows: list[dict[str, Any]]) -> int:
    counts = Counter(row["task_category"] for row in rows if row["source"].startswith("magpie"))
    shares = {"math": 30, "code": 30}
    return sum(ceil(count * shares.get(name, 10) / 100) for name, count in counts.items())


def test_the_seed_s_recipe_keeps_what_its_words_say(tiny_model: Path, tmp_path: Path) -> None:
    rows = real_rows()
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "pairs.parquet")
    arguments = [
        str(tmp_path / "in"),
        "--model",
        str(tiny_model),
        "--output",
        str(tmp_path / "out"),
    ]
    settings = {"backend": "fake", "use_ray": False, "shard_rows": 50}
    bench = tmp_path / "bench.parquet"
    # Which rows are looked for is known once they are chosen: of the first run, some that it kept.
    pq.write_table(
        pa.table({"prompt": ["What nobody has ever asked anybody in any of these words?"]}), bench
    )
    first = skywork_recipe.main([*arguments, "--against", str(bench)], **settings)
    scored = Place(str(tmp_path / "out" / "scored")).shards()
    margins = {
        str(row["chosen"]) + str(row["rejected"]): row["margin"]
        for shard in scored.values()
        for row in shard.table.to_pylist()
    }
    higher = [
        row
        for row in rows
        if row["source"] == "wildguard" and margins[str(row["chosen"]) + str(row["rejected"])] > 0
    ]
    assert (first["wildguard"].rows, first["wildguard"].rows_kept) == (len(rows), len(higher))
    assert first["magpie"].rows_kept == kept_of_magpie(rows)
    clean = first["clean"]
    assert clean.rows == clean.rows_kept == first["wildguard"].rows_kept + first["magpie"].rows_kept

    kept = [
        row
        for file in sorted((tmp_path / "out" / "clean").rglob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    long = sorted({prompt_of(row) for row in kept if len(prompt_of(row).split()) >= 20})
    looked_for = long[:LOOKED_FOR]
    assert looked_for
    pq.write_table(pa.table({"prompt": looked_for}), bench)
    arguments[-1] = str(tmp_path / "again")
    again = skywork_recipe.main([*arguments, "--against", str(bench)], **settings)
    expected = sum(prompt_of(row) in looked_for for row in kept)
    assert again["clean"].rows == clean.rows
    assert again["clean"].rows - again["clean"].rows_kept >= expected > 0
    left = [
        row
        for file in sorted((tmp_path / "again" / "clean").rglob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]
    assert len(left) == again["clean"].rows_kept
    assert not any(prompt_of(row) in looked_for for row in left)
    for totals in again.values():
        assert totals.rows == totals.rows_kept + sum(totals.dropped.values())
