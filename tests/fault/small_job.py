"""A job of a fifth of a second, in forked processes: for faults by the hundred."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_scorer import Config
from tests.fault.forked import ForkedRuns, forked_runs
from tests.fault.oracles import Findings, Folder, Found, judge, read_output
from tests.fault.proxy import redirected
from tests.helpers.inputs import pair_rows, pairs, parquet, table_of
from tests.helpers.places import Place

SHARD_ROWS = 3


@dataclass(frozen=True)
class SmallJob:
    """Two small files in four shards, with one row that cannot be scored. Rewritten (`newer`), the
    second is cut in another way."""

    place: Place
    model: Path
    runs: ForkedRuns

    def write_inputs(self, name: str = "in", *, newer: bool = False) -> None:
        """Two files; `newer`: the second one is another, and the first one stays if it is there,
        so that its shards do."""
        first = pair_rows(5)
        first[3]["rejected"] = None
        second = pairs(7, start=100) if newer else pairs(4, start=50)
        files = {"b.parquet": parquet(second)}
        if not (newer and "a.parquet" in self.at(name).files()):
            files["a.parquet"] = parquet(table_of(first))
        (self.place / name).write(files)

    def config(
        self, output: str, inputs: str = "in", *, endpoint: str | None = None, **settings: Any
    ) -> Config:
        """With an `endpoint`, requests go there: to a proxy before the store's own."""
        options = dict(self.place.options)
        if endpoint:
            options = redirected(options, endpoint)
        return Config(
            model=str(self.model),
            inputs=((self.place / inputs).url,),
            output=(self.place / output).url,
            store_options=options,
            backend="fake",
            device="cpu",
            dtype="float32",
            shard_rows=SHARD_ROWS,
            use_ray=False,
            **settings,
        )

    def at(self, name: str) -> Folder:
        """As the oracles see it."""
        return Folder((self.place / name).url, self.place.options)

    def undisturbed(self, inputs: str = "in") -> Found:
        output = f"undisturbed-{inputs}"
        assert self.runs.run(self.config(output, inputs)) == 0, self.runs.said()
        return read_output(self.at(output), self.at(inputs))

    def finish(self, output: str, code: int, expected: Found) -> Findings:
        """Run the same command again if the last one ended with another code than 0, and judge."""
        assert code in (0, 2, 3), (code, self.runs.said())
        if code != 0:
            assert self.runs.run(self.config(output)) == 0, self.runs.said()
        return judge(self.at(output), self.at("in"), expected)


@contextmanager
def small_job(place: Place, folder: Path, model: Path) -> Iterator[SmallJob]:
    """With its inputs written; the processes' log is in `folder`."""
    with forked_runs(folder, model) as runs:
        job = SmallJob(place, model, runs)
        job.write_inputs()
        yield job
