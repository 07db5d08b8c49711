"""Whatever stands beside them: healthy files come out the same, byte for byte, and what is odd ends
as its case says. A part of the cases is in `make test`, all are in `make corpus`."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.corpus.case import Case
from tests.corpus.kinds import KINDS
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pair_rows, pairs, parquet
from tests.helpers.memory import peak_bytes
from tests.helpers.program import Ended

HEALTHY = ("a.parquet", "z.jsonl")
HEALTHY_ROWS = 3
BESIDE = "{beside}"
"""In a case's flags: the folder that holds the folder of inputs."""
EVERY = 10
"""One case of so many is in `make test`."""
MOST_BYTES = 2 << 30


def cases() -> Iterator[object]:
    number = 0
    for kind, found in KINDS.items():
        for case in found:
            marks = [] if number % EVERY == 0 else [pytest.mark.slow]
            yield pytest.param(case, id=f"{kind}: {case.name}", marks=marks)
            number += 1


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    (folder / "a.parquet").write_bytes(parquet(pairs(HEALTHY_ROWS)))
    (folder / "z.jsonl").write_bytes(jsonl(pair_rows(HEALTHY_ROWS)))
    return folder


@pytest.fixture(scope="module")
def job(healthy: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> "Job":
    return Job(healthy, tiny_model, tmp_path_factory.mktemp("alone"))


class Job:
    """Jobs over the healthy files, and what these give alone."""

    def __init__(self, healthy: Path, model: Path, folder: Path) -> None:
        self._healthy, self._model, self._folder = healthy, model, folder
        self.alone = cache(self._alone)

    def inputs(self, folder: Path) -> Path:
        """A folder with the healthy files. They are linked and not copied, as a copy is another
        version, which its output names."""
        folder.mkdir()
        for name in HEALTHY:
            os.link(self._healthy / name, folder / name)
        return folder

    def run(self, inputs: Path, output: Path, flags: tuple[object, ...]) -> Ended:
        flags = tuple(str(flag).replace(BESIDE, str(inputs.parent)) for flag in flags)
        return run_cli(
            "score", "--model", self._model, inputs, "--output", output, "--json", "--no-ray",
            "--backend", "fake", "--dtype", "float32", *flags,
        )  # fmt: skip

    def _alone(self, flags: tuple[object, ...]) -> dict[str, bytes]:
        """The outputs of the healthy files, in a job with nothing beside them."""
        place = self._folder / str(len(list(self._folder.iterdir())))
        place.mkdir()
        ended = self.run(self.inputs(place / "in"), place / "out", flags)
        assert ended.exit_code == 0, ended.err
        return outputs_of_healthy(place / "out")


def outputs_of_healthy(output: Path) -> dict[str, bytes]:
    files = [*output.glob("a.*parquet"), *output.glob("z.*parquet")]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", list(cases()))
def test_it_costs_itself_alone(case: Case, job: Job, tmp_path: Path) -> None:
    inputs, output = job.inputs(tmp_path / "in"), tmp_path / "out"
    case.make(inputs)
    ended = job.run(inputs, output, case.flags)
    assert "Traceback" not in ended.out + ended.err
    assert ended.exit_code == case.exit_code, ended.out + ended.err
    if case.says is not None:
        assert case.says in ended.error
        assert not output.exists() or not any(output.iterdir())
        return
    totals = ended.json
    assert {entry["input"]: entry["reason"] for entry in totals["failed"]} == dict(case.failed)
    for key in case.failed:
        named = [line for line in ended.err.split("\n") if line.startswith("failed ")]
        assert len(named) == len(case.failed), (key, ended.err)
    assert totals["marked"] == dict(case.marked)
    asked_for = 2 * HEALTHY_ROWS + case.scored + sum(case.marked.values())
    assert totals["rows_scored"] == 2 * HEALTHY_ROWS + case.scored
    assert totals["rows_scored"] + totals["rows_marked"] == asked_for
    assert totals["rows"] == asked_for + totals["rows_failed"]
    assert recounted(output) == {None: 2 * HEALTHY_ROWS + case.scored, **case.marked}
    assert outputs_of_healthy(output) == job.alone(case.flags)
    verified = run_cli("verify", output)
    assert "Traceback" not in verified.out + verified.err
    assert verified.exit_code == case.exit_code, verified.out + verified.err


def recounted(output: Path) -> Counter[str | None]:
    """The rows of all stored files by their mark, as the files themselves have them."""
    found: Counter[str | None] = Counter()
    for file in output.rglob("*.parquet"):
        if not file.relative_to(output).parts[0].startswith((".", "_")):
            with pq.ParquetFile(file) as stored:
                name = next(n for n in stored.schema_arrow.names if n.endswith("score_error"))
                found.update(stored.read([name])[name].to_pylist())
    return found


def test_there_are_enough_of_them() -> None:
    assert sum(map(len, KINDS.values())) >= 350
    for found in KINDS.values():
        assert len({case.name for case in found}) == len(found)


@pytest.fixture(scope="module", autouse=True)
def held_before() -> int:
    """What tests of other files have left in this process; its peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()[0]


def test_no_process_took_much_memory(held_before: int) -> None:
    """The last test of the file: of this process and of those that read for it."""
    own, *others = peak_bytes()
    peaks = [own - held_before, *others]
    print("\npeak memory:", ", ".join(f"{p >> 20} MiB" for p in peaks), file=sys.__stderr__)
    assert max(peaks) <= MOST_BYTES
