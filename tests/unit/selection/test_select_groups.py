"""Lists of responses: each response is a row of its own, and is kept or dropped by itself."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import Config, score
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select


def test_the_best_response_of_each_list_is_written_flat(tmp_path: Path, tiny_model: Path) -> None:
    answers = [["yes", "no", "perhaps so"], [], ["one", "two"]]
    given = pa.table(
        {
            "id": [0, 1, 2],
            "prompt": ["Is it?", "What?", "How many?"],
            "responses": pa.array(answers, pa.list_(pa.string())),
        }
    )
    pq.write_table(given, tmp_path / "a.parquet")
    config = Config(
        model=str(tiny_model),
        inputs=(str(tmp_path / "a.parquet"),),
        output=str(tmp_path / "scored"),
        backend="fake",
        use_ray=False,
    )
    score(config)
    selected = select(
        [str(tmp_path / "scored")],
        str(tmp_path / "out"),
        Selection(best=1, group_by=("prompt",)),
    )
    (scored,) = (tmp_path / "scored").glob("*.parquet")
    (kept,) = (tmp_path / "out").glob("*.parquet")
    expected = [
        (row["id"], *max(zip(row["scores"], row["responses"], strict=True)))
        for row in pq.read_table(scored).to_pylist()
        if row["responses"]
    ]
    found = pq.read_table(kept).to_pylist()
    assert [(row["id"], row["score"], row["response"]) for row in found] == expected
    assert all(isinstance(row["num_tokens"], int) for row in found)
    totals = selected.totals
    assert (totals.rows, totals.rows_kept, totals.dropped) == (6, 2, {"marked": 1, "rank": 3})
