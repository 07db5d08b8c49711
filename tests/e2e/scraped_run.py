"""A run in a Ray of its own, and what a scrape of that Ray's agent shows when the run is over.

    python -m tests.e2e.scraped_run CONFIG

Prints one line of JSON: the scrape, and the run's own figures.

The first process that scores a shard dies of it.
"""

import json
import logging
import os
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from batch_scorer import load_config, logs
from batch_scorer.backends.registry import BackendFactory, make_backend
from batch_scorer.job import Job
from batch_scorer.records import Scores, TokenizedRows
from batch_scorer.reports.progress import ProgressLog
from batch_scorer.runs.run import score
from tests.helpers.program import wait_until

_OURS = "ray_batch_scorer_"
_LAST = f"{_OURS}rows_left"
_POLL_S = 0.5


def engine_that_dies_once(died: Path) -> BackendFactory:
    class DiesOnce:
        """The job's own engine, whose first process ends in the middle of a shard."""

        def __init__(self, job: Job) -> None:
            self._engine = make_backend(job)
            self.num_outputs = self._engine.num_outputs
            self.provenance = self._engine.provenance

        def score(self, rows: TokenizedRows) -> Scores:
            with suppress(FileExistsError):
                died.touch(exist_ok=False)
                os._exit(1)
            return self._engine.score(rows)

        def close(self) -> None:
            self._engine.close()

    return DiesOnce


def ours(scrape: str) -> list[str]:
    return [line for line in scrape.splitlines() if line.startswith(_OURS)]


def main() -> None:
    logs.set_up()
    import ray

    config = Path(sys.argv[1])

    ray.init(
        address="local",
        num_cpus=5,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    summary = score(
        load_config(config),
        ProgressLog(),
        make=engine_that_dies_once(config.with_name("died")),
    )
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    scrapes = [""]

    def shows_the_end() -> bool:
        with urllib.request.urlopen(url, timeout=10) as answer:
            scrapes.append(answer.read().decode())
        before, now = map(ours, scrapes[-2:])
        is_last = any(line.startswith(_LAST) and line.endswith(" 0.0") for line in now)
        # The agent takes in a report metric by metric, scraped or not.
        if is_last and now == before:
            return True
        time.sleep(_POLL_S)
        return False

    wait_until(shows_the_end, "the agent shows that nothing is left")
    ray.shutdown()
    retries = sum(receipt.spent.retries for receipt in summary.receipts)
    found = {
        "scrape": scrapes[-1],
        "totals": summary.totals,
        "metrics": summary.metrics.to_json(summary.run),
        "retries": retries,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
