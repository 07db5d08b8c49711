"""Two runs of the whole program that cut and pack the rows differently store the same bits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import parquet
from tests.helpers.places import Place, of_input
from tests.helpers.program import Ended, Program

pytestmark = pytest.mark.e2e

PAIRS = Path(__file__).parents[1] / "data" / "pairs-500" / "hh-helpful.parquet"
ROWS = 30
Run = Callable[..., Ended]


def bits(output: Place) -> np.ndarray:
    """int32[rows, 2], of chosen and rejected."""
    table = of_input(output.shards(), "pairs.parquet")
    scores = [table[name].to_numpy() for name in ("score_chosen", "score_rejected")]
    return np.stack(scores, axis=1).view(np.int32)


def score(run: Run, model: Path, place: Place, name: str, *flags: object) -> int:
    """The output `name` in `place`; how many rows took the scores of earlier ones."""
    ended = run(
        "score", "--model", model, (place / "in").url, "--output", (place / name).url,
        "--json", *flags,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert ended.json["parity"]["agrees"]
    return int(ended.json["metrics"]["reused_rows"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cut_order_budget_and_workers_leave_all_bits_alone(
    dtype: str, tmp_path: Path, program: Program, tiny_model: Path
) -> None:
    place = Place(str(tmp_path))
    table = pq.read_table(PAIRS).slice(0, ROWS)
    (place / "in").write({"pairs.parquet": parquet(table)})
    flags = ["--dtype", dtype, "--invariant"]
    score(run_cli, tiny_model, place, "loop", *flags, "--no-ray", "--shard-rows", 7)
    score(program.run, tiny_model, place, "ray", *flags, "--shard-rows", 100, "--token-budget", 300)
    assert len((place / "loop").shards()) == 5 and len((place / "ray").shards()) == 1
    np.testing.assert_array_equal(bits(place / "loop"), bits(place / "ray"))

    # A file that is replaced: some rows take the scores that equal ones had, others are new.
    (place / "in").write({"pairs.parquet": parquet(table.slice(0, 11))})
    score(run_cli, tiny_model, place, "again", *flags, "--no-ray", "--shard-rows", 4)
    (place / "in").write({"pairs.parquet": parquet(table)})
    assert score(run_cli, tiny_model, place, "again", *flags, "--no-ray", "--shard-rows", 4) > 0
    np.testing.assert_array_equal(bits(place / "again"), bits(place / "ray"))
