"""The small job on a store of any kind, and what must be so after each of its runs."""

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from batch_scorer import Config
from tests.fault.oracles import Folder, Found, judge
from tests.fault.small_job import SmallJob
from tests.stores.readers import rows_by_reader

_numbers = count()


@dataclass(frozen=True)
class StoreJob(SmallJob):
    """Outputs are copied to this disk below `mirrors`, where the readers find them."""

    mirrors: Path

    def run(self, config: Config) -> None:
        """Which has to come to its end."""
        assert self.runs.run(config) == 0, self.runs.said()

    def mirrored(self, output: str) -> Path:
        """What is stored there now, as a folder on this disk."""
        return Path(self.at(output).mirror(self.mirrors / str(next(_numbers))).url)

    def assert_right(
        self, output: str, expected: Found, inputs: str = "in", *, same_bytes: bool = True
    ) -> None:
        """The output holds what an undisturbed run gives, whoever reads it."""
        stored = self.mirrored(output)
        findings = judge(Folder(str(stored)), self.at(inputs), expected, same_bytes=same_bytes)
        assert not findings.problems, findings.problems
        rows = json.loads((stored / "_SUCCESS").read_bytes())["rows"]
        found = rows_by_reader(stored)
        assert found == dict.fromkeys(found, rows)
