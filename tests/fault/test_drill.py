"""The drill's report; its faults are those of the other files."""

import argparse
import json
from pathlib import Path

import pytest

from tests.fault import drill
from tests.fault.oracles import Findings

pytestmark = pytest.mark.fault


def test_a_report_has_every_fault_and_names_every_problem(tmp_path: Path) -> None:
    part = drill.Part(runs=2)
    part.add("worker", output="a", shards=3)
    part.add("node", output="a", shards=4)
    part.judge(Findings(lost_rows=1, problems=["O1: one row lost"]))
    options = argparse.Namespace(
        store="azure", seed=7, kills=2, store_faults=0, races=0, report=tmp_path / "new" / "seed-7"
    )
    drill.write(options, {"kills": part, "races": drill.Part()}, 1.5)

    report = json.loads((tmp_path / "new" / "seed-7.json").read_text())
    assert report["seed"] == 7 and "STORE=azure SEED=7 KILLS=2" in report["command"]
    kills = report["parts"]["kills"]
    assert kills["faults"] == 2 and kills["by_kind"] == {"worker": 1, "node": 1}
    assert kills["events"][0] == {"kind": "worker", "output": "a", "shards": 3}
    assert kills["lost_rows"] == 1 and kills["problems"] == ["O1: one row lost"]
    text = (tmp_path / "new" / "seed-7.md").read_text()
    assert "| kills | 2 | 1 node, 1 worker | 2 | 0 | 1 | 0 | 0 | 1 |" in text
    assert "- O1: one row lost" in text
