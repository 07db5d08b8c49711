"""The drill's report; its faults are those of the other files."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.fault.drill_report import Part, Piece, joined, report_of, write, write_json
from tests.fault.oracles import Findings
from tests.fault.proxy import Answered, Kind
from tests.fault.sleepers import Slept
from tests.fault.sometimes import FAULTS_PER_STATE, never_seen, of_faults, of_sleeper

pytestmark = pytest.mark.fault


def options(report: Path, pieces: int) -> argparse.Namespace:
    return argparse.Namespace(
        store="s3", seed=7, kills=2, store_faults=0, races=0, sleepers=0, report=report,
        piece=Piece(1, pieces),
    )  # fmt: skip


def part_with(kinds: list[str], **found: object) -> Part:
    part = Part(runs=len(kinds), **found)  # type: ignore[arg-type]
    for kind in kinds:
        part.add(kind, output="a")
    return part


def test_pieces_are_joined_to_one_report_that_names_every_fault_and_problem(tmp_path: Path) -> None:
    asked = options(tmp_path / "new" / "seed-7", 2)
    bad = part_with(["worker", "node"])
    bad.judge(Findings(lost_rows=1, problems=["O1: one row lost"]))
    files = []
    for k, part in enumerate([bad, part_with(["worker"])], 1):
        files.append(Piece(k, 2).file(asked.report))
        others = {name: Part() for name in FAULTS_PER_STATE}
        write_json(files[-1], report_of(asked, others | {"kills": part}, 1.5))
    write(asked.report, joined(asked, files))

    report = json.loads((tmp_path / "new" / "seed-7.json").read_text())
    assert report["seed"] == 7 and "STORE=s3 SEED=7 KILLS=2" in report["command"]
    assert report["wall_s"] == 3.0
    kills = report["parts"]["kills"]
    assert kills["faults"] == 3 and kills["by_kind"] == {"worker": 2, "node": 1}
    assert kills["events"][0] == {"kind": "worker", "output": "a"}
    assert kills["lost_rows"] == 1 and kills["problems"] == ["O1: one row lost"]
    text = (tmp_path / "new" / "seed-7.md").read_text()
    assert "| kills | 3 | 1 node, 2 worker | 3 | 0 | 1 | 0 | 0 | 1 |" in text
    assert "- O1: one row lost" in text


def test_pieces_of_different_drills_are_not_joined(tmp_path: Path) -> None:
    asked = options(tmp_path / "drill", 1)
    file = asked.piece.file(asked.report)
    write_json(file, report_of(asked, {name: Part() for name in FAULTS_PER_STATE}, 1.0))
    asked.seed = 8
    with pytest.raises(SystemExit, match="a piece of another drill"):
        joined(asked, [file])


def test_pieces_share_all_that_is_asked_for_and_have_seeds_of_their_own() -> None:
    pieces = [Piece(k, 3) for k in (1, 2, 3)]
    assert sum(piece.share(200) for piece in pieces) == 200
    assert len({piece.seed(5) for piece in pieces}) == 3
    assert Piece(1, 1).seed(5) == "5"
    with pytest.raises(ValueError):
        Piece.parsed("4/3")


@pytest.mark.parametrize("part", FAULTS_PER_STATE)
def test_a_drill_that_misses_a_state_fails(part: str, tmp_path: Path) -> None:
    most = max(FAULTS_PER_STATE[part].values())
    enough = Counter({state: most // per for state, per in FAULTS_PER_STATE[part].items()})
    assert not never_seen(part, most, enough)
    for state in enough:
        without = {name: number for name, number in enough.items() if name != state}
        (problem,) = never_seen(part, most, without)
        assert state in problem
    asked = options(tmp_path / "drill", 1)
    file = asked.piece.file(asked.report)
    parts = {name: Part() for name in FAULTS_PER_STATE} | {part: part_with(["x"] * most)}
    write_json(file, report_of(asked, parts, 1.0))
    assert len(joined(asked, [file])["parts"][part]["problems"]) == len(enough)


def put(key: str, status: int, kind: Kind | None = None) -> Answered:
    return Answered("PUT", f"/bkt/drill/out/{key}", status, kind)


def test_a_lost_answer_counts_where_the_store_refused_what_it_had_itself_stored() -> None:
    state = "an answer was lost, and the store refused the same PUT again"
    lost = put("a.parquet", 200, Kind.LOST)
    assert of_faults([lost, put("a.parquet", 412)], 0)[state] == 1
    assert of_faults([lost, put("b.parquet", 412)], 0)[state] == 0
    assert of_faults([put("a.parquet", 200), put("a.parquet", 412)], 0)[state] == 0


def test_a_late_shard_counts_as_withdrawn_where_it_was_created_and_is_gone() -> None:
    slept = Slept("commit.before_put:pause:3", None, code=3, left=["a.parquet"])
    state = "a late shard was withdrawn"
    assert of_sleeper(slept, "out", [put("b.parquet", 200)])[state] == 1
    assert of_sleeper(slept, "out", [put("a.parquet", 200)])[state] == 0
    assert of_sleeper(slept, "out", [put("b.parquet", 412)])[state] == 0
    assert of_sleeper(slept, "out", [put("_batch_scorer/x.parquet", 200)])[state] == 0
