"""A real language model judges real pairs through the whole program: SmolLM2-135M-Instruct, all of
its layers, on Ray and S3, killed and resumed. It is far too small to judge; its accuracy is only
counted right."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.local.seaweed import S3Server
from tests.helpers.inputs import Row, parquet
from tests.helpers.language_models import embedded_language_model
from tests.helpers.places import Place, of_input
from tests.helpers.program import REPOSITORY, Ended, Program, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PAIRS = 16
BEGUN = REPOSITORY / "examples" / "begun_judge.yaml"
WRITTEN = """\
verdict:
  by: pattern
  pattern: '^The better answer is Answer (A|B)'
  choices: {A: 1, B: 0}
generation: {max_tokens: 24, stop: [",", ".", ":", "\\n", " because"]}
"""
"""The same page, but the model writes its verdict."""
NEAR = 0.1
"""bfloat16 of a real model moves the difference of the two probabilities by half of this at most
(seen: 0.05); where they are nearer, either may be the larger one."""


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded_language_model(tmp_path_factory.mktemp("smollm"))


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> Place:
    """The first real pairs of the repository."""
    place = Place(s3.url("real-judge"), s3.options)
    table = pq.read_table(REPOSITORY / "tests/data/pairs-500/hh-helpful.parquet")
    (place / "in").write({"pairs.parquet": parquet(table.slice(0, PAIRS))})
    return place


def judged(
    program: Program, bucket: Place, page: Path, model: Path, backend: str, *gate: str
) -> tuple[Ended, list[Row]]:
    """Score, killed once two shards are there, and resumed: what it said, and the rows."""
    output = bucket / f"out-{backend}"
    command: list[Any] = [
        "score", "--task", "judge", "--judge", page, "--model", model, (bucket / "in").url,
        "--output", output.url, *bucket.flags, "--json", "--device", "cpu", "--dtype", "bfloat16",
        "--backend", backend, "--workers", 1, "--shard-rows", 2, "--max-tokens", 1024,
    ]  # fmt: skip
    running = program.start(*command, "--parity-check", "off")

    def has_begun() -> bool:
        assert not running.is_over, running.said()
        return len(output.shard_keys()) >= 2

    wait_until(has_begun, "two shards are committed")
    running.send(signal.SIGKILL)
    running.wait()
    program.wait_until_gone()
    before = output.shards()
    assert 2 <= len(before) < PAIRS // 2
    ended = program.run(*command, *gate)
    assert ended.exit_code == 0, ended.err
    after = output.shards()
    assert len(after) == PAIRS // 2 and {key: after[key] for key in before} == before
    rows: list[Row] = of_input(after, "pairs.parquet").to_pylist()
    return ended, rows


def first_is_better(rows: list[Row]) -> dict[tuple[int, int], float | None]:
    """By row and the answer that is shown first: what the verdict is worth for that one."""
    return {
        (number, each["shown"][0]): each["worths"] and each["worths"][0]
        for number, row in enumerate(rows)
        for each in row["judgements"]
    }


def test_a_real_model_judges_real_pairs_with_both_engines(
    program: Program, bucket: Place, smollm: Path, tmp_path: Path
) -> None:
    page = tmp_path / "written.yaml"
    page.write_text(BEGUN.read_text().partition("verdict:")[0] + WRITTEN)
    by_probability, compared = judged(program, bucket, BEGUN, smollm, "hf")
    by_writing, written = judged(program, bucket, page, smollm, "vllm", "--parity-check", "off")

    for ended, rows in ((by_probability, compared), (by_writing, written)):
        asked = [each for row in rows for each in row["judgements"]]
        assert [each["shown"] for each in asked] == [[0, 1], [1, 0]] * PAIRS
        verdicts = sum(each["worths"] is not None for each in asked)
        found = ended.json["judged"]
        assert (found["questions"], found["verdicts"]) == (2 * PAIRS, verdicts)
        assert verdicts >= PAIRS, found["lost"]
        margins = [
            row["score_chosen"] - row["score_rejected"]
            for row in rows
            if row["score_chosen"] is not None
        ]
        counts = [pair for _, pair in sorted(ended.json["pairs"].items())]
        assert sum(each["chosen_higher"] for each in counts) == sum(m > 0 for m in margins)
        assert sum(each["ties"] for each in counts) == sum(m == 0 for m in margins)

    probable, wrote = first_is_better(compared), first_is_better(written)
    decided = [key for key, worth in wrote.items() if worth is not None]
    assert len(decided) >= PAIRS
    for key in decided:
        worth = probable[key]
        assert worth is not None
        if abs(2 * worth - 1) > NEAR:
            assert wrote[key] == np.round(worth), key
