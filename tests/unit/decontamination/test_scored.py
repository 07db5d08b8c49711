"""Scored outputs and nightly roots, and runs that are killed, or of which there are two at once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_scorer import Config, decontaminate, score
from batch_scorer.decontamination.result import Decontaminated
from batch_scorer.failpoints import TESTING
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pair_rows, parquet, table_of
from tests.helpers.places import Place
from tests.helpers.program import REPOSITORY, wait_until

ROWS = 8
TAINTED = (1, 6)
"""Rows whose prompts are in the evaluation set; row 6 is marked too."""
MARKED = (3, 6)
"""Rows without an answer."""


def rows() -> list[dict[str, Any]]:
    made = pair_rows(ROWS)
    for row in MARKED:
        made[row]["rejected"] = None
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(str(tmp_path_factory.mktemp("place")))
    (place / "in").write({"a.parquet": parquet(table_of(rows()))})
    evals = [{"prompt": rows()[row]["chosen"][0]["content"], "id": row} for row in TAINTED]
    place.write({"bench.jsonl": jsonl(evals)})
    return place


@pytest.fixture(scope="module")
def scored(place: Place, tiny_model: Path) -> str:
    output = place / "scored"
    config = Config(
        model=str(tiny_model),
        inputs=((place / "in").url,),
        output=output.url,
        backend="fake",
        shard_rows=3,
        use_ray=False,
    )
    score(config)
    return output.url


@pytest.fixture(scope="module")
def whole(place: Place, scored: str) -> dict[str, bytes]:
    """What a run leaves that nothing happened to."""
    run(place, scored, "whole")
    return contents(place / "whole")


def run(place: Place, scored: str, output: str) -> Decontaminated:
    return decontaminate([scored], [(place / "bench.jsonl").url], (place / output).url)


def read(place: Place) -> pa.Table:
    return pa.concat_tables(shard.table for shard in place.shards().values())


def contents(place: Place) -> dict[str, bytes]:
    return {info.key: place.store.read(info.key) for info in place.store.list()}


def test_a_scored_output_keeps_its_columns_its_order_and_its_marked_rows(
    place: Place, scored: str
) -> None:
    before = read(Place(scored))
    assert before["score_error"].is_valid().to_pylist() == [row in MARKED for row in range(ROWS)]
    made = run(place, scored, "clean")
    kept = [row for row in range(ROWS) if row not in TAINTED]
    assert read(place / "clean").equals(before.take(kept), check_metadata=False)
    assert made.totals is not None
    assert (made.totals.rows, made.totals.rows_kept) == (ROWS, len(kept))
    assert made.totals.dropped == {"contaminated": len(TAINTED)}
    shards = [Path(key).name for key in (place / "clean").shard_keys()]
    assert shards == [Path(key).name for key in Place(scored).shard_keys()]


def test_of_a_nightly_root_all_rows_of_the_newest_generation_are_read(
    place: Place, tiny_model: Path
) -> None:
    (place / "nightly in").write({"a.parquet": parquet(table_of(rows()))})

    def night() -> None:
        ended = run_cli(
            "nightly", (place / "nightly in").url, "--model", tiny_model,
            "--output", (place / "nights").url, "--backend", "fake", "--no-ray",
        )  # fmt: skip
        assert ended.exit_code == 0, ended.err

    night()
    (place / "nightly in").write({"b.parquet": parquet(table_of(pair_rows(2, start=ROWS)))})
    night()
    made = run(place, (place / "nights").url, "of nights")
    assert (made.rows, made.removed) == (ROWS + 2, len(TAINTED))
    assert read(place / "of nights").num_rows == ROWS + 2 - len(TAINTED)


def test_a_lost_list_of_removed_rows_is_made_again(
    place: Place, scored: str, whole: dict[str, bytes]
) -> None:
    output = place / "whole"
    lost, damaged, *_ = (key for key in whole if "/removed/" in key)
    output.store.delete(lost)
    output.write({damaged: whole[damaged][:20]})
    run(place, scored, "whole")
    assert contents(output) == whole


SCRIPT = """
import sys
from batch_scorer import decontaminate
from batch_scorer.failpoints import arm
arm(sys.argv[1])
decontaminate([sys.argv[2]], [sys.argv[3]], sys.argv[4])
"""
STORED = (5, 7, 10)
"""After so many PUTs: a shard's list without the shard, some shards, all that is but `_SUCCESS`."""


@contextmanager
def started(
    place: Place, scored: str, output: str, failpoint: str
) -> Iterator[subprocess.Popen[bytes]]:
    paths = (scored, (place / "bench.jsonl").url, (place / output).url)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, failpoint, *paths],
        env={**os.environ, TESTING: "1"},
        cwd=REPOSITORY,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def wait_until_paused(process: subprocess.Popen[bytes]) -> None:
    def is_paused() -> bool:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    wait_until(is_paused, "the run is paused")


@pytest.mark.parametrize("stored", STORED)
def test_a_killed_run_ends_in_the_same_bytes(
    place: Place, scored: str, whole: dict[str, bytes], stored: int
) -> None:
    output = f"killed {stored}"
    with started(place, scored, output, f"put.applied:pause:{stored}") as process:
        wait_until_paused(process)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert "_SUCCESS" not in contents(place / output)
    run(place, scored, output)
    assert same(place / output, whole)


@pytest.mark.parametrize("stored", STORED)
def test_two_runs_at_once_end_in_the_same_bytes(
    place: Place, scored: str, whole: dict[str, bytes], stored: int
) -> None:
    """One sleeps, the other does all, the first wakes up."""
    output = f"twice {stored}"
    with started(place, scored, output, f"put.applied:pause:{stored}") as process:
        wait_until_paused(process)
        run(place, scored, output)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait() == 0
    assert same(place / output, whole)


def same(output: Place, whole: dict[str, bytes]) -> bool:
    """Whether an output is the whole one; only the summary names its place."""
    found = contents(output)
    summary = "_batch_scorer/decontamination.json"
    named = {**json.loads(whole[summary]), "output": output.url}
    return json.loads(found.pop(summary)) == named and found == {
        key: data for key, data in whole.items() if key != summary
    }
