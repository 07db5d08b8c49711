"""A job long enough to be hit in the middle, and what it gives when nothing disturbs it."""

from dataclasses import dataclass
from pathlib import Path

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import long_pair_rows, parquet, table_of
from tests.helpers.places import Place
from tests.helpers.program import Ended, Running, wait_until

SHARDS = 10
ROWS_PER_SHARD = 2


@dataclass(frozen=True)
class LongJob:
    """Some ten thousand tokens in each of `SHARDS` shards; a tiny model needs a second for one."""

    place: Place
    model: Path

    def write_inputs(self) -> None:
        rows = long_pair_rows(SHARDS * ROWS_PER_SHARD)
        half = len(rows) // 2
        files = {"a.parquet": rows[:half], "b.parquet": rows[half:]}
        (self.place / "in").write({key: parquet(table_of(part)) for key, part in files.items()})

    def output(self, name: str) -> Place:
        return self.place / name

    def arguments(self, name: str, *flags: object) -> list[object]:
        return [
            "score", "--model", self.model, (self.place / "in").url,
            "--output", self.output(name).url, *self.place.flags, "--json",
            "--dtype", "float32", "--parity-check", "off", "--shard-rows", ROWS_PER_SHARD, *flags,
        ]  # fmt: skip

    def wait_for_shards(self, name: str, count: int, running: Running) -> None:
        """Until `count` shards are committed; fails the test if the run ends before."""

        def reached() -> bool:
            assert not running.is_over, running.said()
            return len(self.output(name).shard_keys()) >= count

        wait_until(reached, f"{count} shards are committed")

    def verify(self, name: str) -> Ended:
        return run_cli("verify", self.output(name).url, *self.place.flags, "--json")
