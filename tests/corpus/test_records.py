"""Damaged records of an output: every command says so in one line, and nothing that is committed
is lost or changed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.corpus.case import asks, lines
from tests.helpers.in_process import run_cli

RECORDS = (
    "_batch_scorer/run.json",
    "_batch_scorer/lease.json",
    "_batch_scorer/plan.json",
    "_batch_scorer/CURRENT",
    "_batch_scorer/runs/*.json",
    "_batch_scorer/engines/*.json",
    "_batch_scorer/manifests/*.manifest",
    "_SUCCESS",
    "m.jsonl.parquet",
)


def other_types(data: bytes) -> bytes:
    """An object whose values are all of another type."""
    try:
        found = json.loads(data)
    except ValueError:
        return b"{}"
    return json.dumps({k: [1] for k in found} if isinstance(found, dict) else [found]).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"more",
    "zeros": lambda data: bytes(len(data)),
    "no text": lambda data: b"\xff\xfe" + data,
    "a list": lambda data: b"[1, 2]",
    "a number": lambda data: b"7",
    "null": lambda data: b"null",
    "an empty object": lambda data: b"{}",
    "other types": other_types,
    "NaN": lambda data: b"NaN",
    "nested": lambda data: b"[" * 200 + b"]" * 200,
}
EVERY = 9
"""One of so many is in `make test`."""
BESIDE = "n.jsonl.parquet"


def combinations() -> Iterator[object]:
    for number, (record, damage) in enumerate((r, d) for r in RECORDS for d in DAMAGES):
        marks = () if number % EVERY == 0 else (pytest.mark.slow,)
        yield pytest.param(record, damage, id=f"{record}: {damage}", marks=marks)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A place with inputs, and an output that is complete."""
    place = tmp_path_factory.mktemp("records")
    (place / "in").mkdir()
    for name, rows in (("m.jsonl", 2), ("n.jsonl", 3)):
        (place / "in" / name).write_bytes(lines(asks(rows)))
    assert run_cli(*score(place, tiny_model, place / "out")).exit_code == 0
    return place


def score(place: Path, model: Path, output: Path) -> list[object]:
    return [
        "score", "--model", model, place / "in", "--output", output, "--no-ray",
        "--backend", "fake", "--dtype", "float32",
    ]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("record", "damage"), list(combinations()))
def test_it_is_said_in_one_line_and_harms_nothing(
    record: str, damage: str, scored: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(scored / "out", output)
    (file,) = output.glob(record)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    before = (output / BESIDE).read_bytes()
    for command in (["status", output], ["verify", output], score(scored, tiny_model, output)):
        ended = run_cli(*command)
        assert "Traceback" not in ended.out + ended.err, (command[0], ended.err)
        assert ended.exit_code in (0, 2, 3, 4), (command[0], ended.err)
        if ended.exit_code == 2:
            assert len(ended.error.split("\n")) == 1
        assert (output / BESIDE).read_bytes() == before
