"""Whole files of real data: every row that went in comes out, scored or marked."""

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batch_scorer.inputs.sources import FileKind, kind_of
from tests.helpers.in_process import run_cli
from tests.helpers.places import Place, Stored, of_input, rows_scored_and_marked
from tests.helpers.program import REPOSITORY, Program
from tests.helpers.tiny import tiny_reward_model

pytestmark = pytest.mark.e2e

FOLDERS = ("formats", "hh-rlhf-pairs", "mixed-pairs", "rollouts")
SAMPLE = REPOSITORY / "batch_scorer" / "data"
# The tiny tokenizer gives a token for every letter or two, three for a Chinese character.
MAX_TOKENS = 65_536
RUN_TIMEOUT_S = 540


@pytest.fixture
def data() -> Path:
    """The root of a larger data set, which is not part of the repository."""
    named = os.environ.get("BATCH_SCORER_DATA")
    root = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not named and not root.is_dir():
        pytest.skip(f"no larger data: BATCH_SCORER_DATA is to name a folder of {FOLDERS}")
    return root


def rows_by_file(root: Path, folders: Iterable[Path]) -> dict[str, int]:
    """Rows that each file holds, by its footer, its lines or its array's length."""
    found = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        key = str(path.relative_to(root))
        if kind_of(key) is FileKind.PARQUET:
            found[key] = pq.read_metadata(path).num_rows
        elif kind_of(key) is FileKind.JSON:
            data = path.read_bytes()
            data = gzip.decompress(data) if key.endswith(".gz") else data
            is_array = data.lstrip().startswith(b"[")
            lines = [line for line in data.splitlines() if line.strip()]
            found[key] = len(json.loads(data)) if is_array else len(lines)
    return found


def assert_all_rows_are_there(
    shards: dict[str, Stored], given: dict[str, int], prefix: str = ""
) -> tuple[int, int]:
    """Compares file by file; returns how many rows are scored and how many are marked."""
    assert {key: of_input(shards, key).num_rows for key in given} == given
    counts = [rows_scored_and_marked([shard.table], prefix) for shard in shards.values()]
    scored, marked = (sum(column) for column in zip(*counts, strict=True))
    assert scored + marked == sum(given.values())
    return scored, marked


def test_every_row_of_all_real_files_is_scored_or_marked(
    data: Path, program: Program, tmp_path: Path
) -> None:
    folders = [data / name for name in FOLDERS]
    given = rows_by_file(data, folders)
    assert given
    model = tiny_reward_model(tmp_path / "model", max_tokens=MAX_TOKENS)
    output = Place(str(tmp_path / "out"))
    running = program.start(
        "score", "--model", model, *folders, "--output", output.url, "--json",
        "--backend", "fake", "--column-prefix", "rm_",
    )  # fmt: skip
    ended = running.wait(RUN_TIMEOUT_S)
    assert ended.exit_code == 0, ended.err
    counted = assert_all_rows_are_there(output.shards(), given, "rm_")
    assert (ended.json["rows_scored"], ended.json["rows_marked"]) == counted
    verdict = program.run("verify", output.url, "--json")
    assert verdict.exit_code == 0, verdict.out
    assert verdict.json["inputs_compared"] == verdict.json["shards"] == ended.json["shards"]


def test_every_row_of_the_shipped_sample_is_scored_by_a_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    output = Place(str(tmp_path / "out"))
    ended = run_cli(
        "score", "--model", tiny_model, SAMPLE / "pairs", SAMPLE / "rollouts",
        "--output", output.url, "--no-ray", "--dtype", "float32", "--json",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    given = rows_by_file(SAMPLE, [SAMPLE])
    scored, marked = assert_all_rows_are_there(output.shards(), given)
    assert (ended.json["rows_scored"], ended.json["rows_marked"]) == (scored, marked)
    assert set(ended.json["marked"]) <= {"too_long"}
    assert scored > marked
    assert run_cli("verify", output.url).exit_code == 0
