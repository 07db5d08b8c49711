"""What a plan of 100,000 shards costs: to plan, to resume half-way, to find that all is done.

The whole job without a model (`backend: fake`) on files of a few short rows, one shard each, so
that everything but the shards themselves weighs nothing: S3 in, S3 out. A first run, over Ray Data,
is stopped after half of the shards, or 2,000 of them, which tells what an item costs; a second one
goes on to the half without Ray, a third one resumes there and does the rest, a fourth one has
nothing to do. A plan of more than 20,000 shards is resumed after the first 2,000 and left: to
commit them all would take most of an hour. Times are of one command; memory is the driver's largest
resident set.

    python -m benchmarks.shards                      # 1,000, 10,000 and 100,000 shards
"""

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.config import Config, load_config
from batch_scorer.pipeline.session import ray_session
from batch_scorer.records import Receipt
from batch_scorer.runs.metrics import Metrics
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import Summary, score
from batch_scorer.storage import in_threads, open_store
from benchmarks.common import Child, Family, command_line, environment_set, print_table, report
from cluster.local.seaweed import S3Server, s3_server
from tests.helpers.inputs import pairs
from tests.helpers.tiny import tiny_reward_model

SIZES = (1_000, 10_000, 100_000)
TINY_SIZES = (8,)
ROWS = 4
SHARDS_OVER_RAY = 2_000
MOST_COMMITTED = 20_000
_WRITERS = 8
_FILES_A_FOLDER = 1_000


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="shards of each plan")
    asked = parser.parse_args()
    sizes = asked.sizes or (TINY_SIZES if asked.tiny else SIZES)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model_dir = tiny_reward_model(Path(folder) / "model")
        for size in sizes:
            runs.append(run(size, model_dir, tiny=asked.tiny))
            print(runs[-1], flush=True)
    names = (
        "plan_s", "shard_ms", "shard_ms_without_ray", "resume_s", "again_s", "driver_mb",
    )  # fmt: skip
    print_table(
        ("shards", *names),
        ((one["shards"], *(one.get(name, "") for name in names)) for one in runs),
    )
    report("shards", asked, {"runs": runs})


def run(shards: int, model_dir: Path, *, tiny: bool) -> dict[str, Any]:
    """One size, on a new server and, unless it is tiny, in a new process."""
    with s3_server() as server:
        with environment_set(server.environment):
            upload(shards, server)
            if tiny:
                return measure(server, model_dir, shards)
        child = Child(server.environment)
        try:
            return child.call(measure, server, model_dir, shards)
        finally:
            child.close()


def upload(shards: int, server: S3Server) -> None:
    """One small file under many names."""
    sink = pa.BufferOutputStream()
    pq.write_table(pairs(ROWS), sink)
    data = sink.getvalue().to_pybytes()
    store = open_store(server.url("in"), server.options)

    def put(number: int) -> None:
        store.create(f"{number // _FILES_A_FOLDER:03}/pairs-{number:06}.parquet", data)

    for _ in in_threads(put, range(shards), _WRITERS):
        pass


class Enough(Exception):
    """As many shards are committed as were asked for."""


class Clock:
    """When a run knew what it has to do, and when its shards came; stops it after so many."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop_after = stop_after
        self.planned_at = 0.0
        self._done = 0
        self.metrics = Metrics()

    def planned(self, work: Work) -> None:
        self.planned_at = time.perf_counter()

    def finished(self, receipt: Receipt) -> None:
        self.metrics.add(receipt)
        self._done += 1
        if self._done == self.stop_after:
            raise Enough


def measure(server: S3Server, model_dir: Path, shards: int) -> dict[str, Any]:
    config = load_config(
        model=str(model_dir),
        inputs=(server.url("in"),),
        output=server.url("out"),
        store_options=server.options,
        backend="fake",
    )
    is_ended = shards <= MOST_COMMITTED
    half = shards // 2 if is_ended else SHARDS_OVER_RAY
    over_ray = Clock(min(half, SHARDS_OVER_RAY))
    without, rest = Clock(half - over_ray.stop_after), Clock(0 if is_ended else 1)
    with Family() as family:
        with ray_session(config):
            plan_s, _, _ = timed(config, over_ray)
        config = config.model_copy(update={"use_ray": False})
        if without.stop_after:
            timed(config, without)
        resume_s, _, resumed = timed(config, rest)
        ended: dict[str, float | int] = {}
        if is_ended:
            _, again_s, again = timed(config, Clock())
            assert resumed is not None and 0 < resumed.run.shards <= shards - half
            assert again is not None and again.run.shards == 0 and again.totals["shards"] == shards
            ended = {
                "again_s": round(again_s, 2),
                "resumed_shards": resumed.run.shards,
                "shard_ms_without_ray": round(1e3 * resumed.metrics.span_s / resumed.run.shards, 2),
            }
    return {
        "shards": shards,
        "plan_s": round(plan_s, 2),
        "resume_s": round(resume_s, 2),
        **ended,
        "shard_ms": round(1e3 * over_ray.metrics.span_s / over_ray.stop_after, 2),
        "driver_mb": family.peak_mb["driver"],
        "peak_mb": family.peak_mb,
        "cpu_s": family.cpu_s,
    }


def timed(config: Config, clock: Clock) -> tuple[float, float, Summary | None]:
    """Seconds until it was known what is to do, and in all; no summary of a run that stopped."""
    started = time.perf_counter()
    summary = None
    with suppress(Enough):
        summary = score(config, clock)
    return clock.planned_at - started, time.perf_counter() - started, summary


if __name__ == "__main__":
    main()
