"""A row that ends its worker, or hangs it, or breaks its engine, costs that row alone."""

import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer import Config
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.errors import ShardReason
from batch_scorer.outputs.verify import verify
from batch_scorer.records import Scores, TokenizedRows
from batch_scorer.runs.run import Summary
from batch_scorer.runs.run import score as run_score
from tests.fault.oracles import Folder, Found, read_output, rows_by_reason
from tests.helpers.inputs import Row, pair_rows, parquet, table_of
from tests.helpers.places import Place

pytestmark = pytest.mark.fault

HANG_S = 4.0
WHOLE_ROWS = 7
"""A shard of so many rows cannot be scored at once, though each of them can."""
POISONS = {
    "exit": "Ⴀ",
    "segfault": "ꀀ",
    "killed": "ퟀ",
    "hang": "ߐ",
    "engine dies": "܀",
    "raise": "ڀ",
    "too much memory": "෴",
}
"""A letter for each. Its first byte occurs in no other row, and is a token of its own."""
DEADLY = {"exit", "segfault", "killed", "hang", "engine dies"}


def act(poison: str) -> None:
    if poison == "exit":
        os._exit(1)
    if poison == "segfault":
        ctypes.string_at(0)
    if poison == "killed":  # as the kernel does where memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    if poison == "hang":  # native code that never gives the interpreter back
        re.match(r"(a+)+$", "a" * 60 + "b")
    if poison == "engine dies":
        raise EngineDied("out of order")
    if poison == "raise":
        raise ValueError("no such answer")
    if poison == "too much memory":
        allocate_too_much()


def allocate_too_much() -> None:
    used_kb = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() >> 10
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, ((used_kb << 10) + (256 << 20), limits[1]))
    try:
        np.ones(4 << 30, dtype=np.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def rows(count: int, start: int, poisons: dict[int, str]) -> list[Row]:
    """Rows of which some hold the letter of a poison in their answer."""
    made = pair_rows(count, start)
    for row, poison in poisons.items():
        made[row]["chosen"][-1]["content"] += POISONS[poison]
    return made


FILES: dict[str, tuple[int, dict[int, str]]] = {
    "first": (2, {0: "exit"}),
    "last": (2, {1: "segfault"}),
    "two": (4, {1: "killed", 2: "engine dies"}),
    "alone": (1, {0: "hang"}),
    "mixed": (4, {0: "raise", 1: "exit", 3: "too much memory"}),
    "raising": (6, {1: "raise", 2: "raise"}),
    "whole": (WHOLE_ROWS, {}),
    "healthy": (3, {}),
}


def tokens_of_poisons(model: Path) -> dict[int, str]:
    """Which token tells of which poison: the first byte of its letter."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
    return {
        tokenizer.encode(letter, add_special_tokens=False)[0]: poison
        for poison, letter in POISONS.items()
    }


def poisoned_backend(tokens: dict[int, str]) -> type[FakeBackend]:
    class PoisonedBackend(FakeBackend):
        def score(self, rows: TokenizedRows) -> Scores:
            if rows.num_rows == WHOLE_ROWS:
                os._exit(1)
            for token in rows.token_ids.tolist():
                if token in tokens:
                    act(tokens[token])
            return super().score(rows)

    return PoisonedBackend


@pytest.fixture
def private_ray(ray_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_TMPDIR", str(ray_home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray
    from ray import cloudpickle

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)  # workers cannot import a test
    yield
    cloudpickle.unregister_pickle_by_value(here)
    ray.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    for number, (name, (count, poisons)) in enumerate(FILES.items()):
        table = table_of(rows(count, 10 * number, poisons))
        (place / "in").write({f"{name}.parquet": parquet(table)})
    return place


def config_of(place: Place, model: Path, output: str, **settings: Any) -> Config:
    return Config(
        model=str(model),
        inputs=((place / "in").url,),
        output=(place / output).url,
        backend="fake",
        device="cpu",
        dtype="float32",
        attempts=1,
        hang_s=HANG_S,
        **settings,
    )


def found(place: Place, output: str) -> Found:
    return read_output(Folder((place / output).url), Folder((place / "in").url))


def assert_only_poison_is_lost(place: Place, expected: Found, actual: Found) -> None:
    """The rows of all shards that are there, but the marked ones, have the undisturbed bits."""
    differing = {row for row, added in actual.rows.items() if added != expected.rows[row]}
    marked = {row for row, (added,) in actual.rows.items() if "'score_error': None" not in added}
    assert differing == marked


@pytest.mark.usefixtures("private_ray")
def test_poison_rows_are_found_and_marked_and_the_others_scored(
    place: Place, tiny_model: Path
) -> None:
    run_score(config_of(place, tiny_model, "undisturbed", use_ray=False))
    expected = found(place, "undisturbed")
    tokens = tokens_of_poisons(tiny_model)
    assert len(tokens) == len(POISONS)
    poisoned = poisoned_backend(tokens)
    config = config_of(place, tiny_model, "out", workers=2)
    summary = run_score(config, make=lambda job: poisoned())

    failed = {r.input: r.reason for r in summary.receipts if r.commit is None}
    assert failed == {"whole.parquet": ShardReason.WORKER_DIED}
    actual = found(place, "out")
    assert_only_poison_is_lost(place, expected, actual)
    poisons = [poison for _, by_row in FILES.values() for poison in by_row.values()]
    deadly = sum(poison in DEADLY for poison in poisons)
    assert rows_by_reason(Folder((place / "out").url)) == {
        "worker_crash": deadly,
        "engine_error": poisons.count("raise"),
        "out_of_memory": poisons.count("too much memory"),
    }
    assert actual.counts["mixed.parquet"] == [1, 3]
    assert_deaths_are_bounded(summary)
    totals = summary.totals
    assert totals["rows"] == sum(count for count, _ in FILES.values())
    assert totals["rows_failed"] == WHOLE_ROWS
    assert not verify((place / "out").url).problems


def assert_deaths_are_bounded(summary: Summary) -> None:
    """One for the shard, and for each poison row as many as it takes to halve down to it."""
    for receipt in summary.receipts:
        count, poisons = FILES[receipt.input.removesuffix(".parquet")]
        deadly = sum(poison in DEADLY for poison in poisons.values())
        if receipt.input == "whole.parquet":
            assert receipt.spent.retries == 2
        elif deadly:
            assert 1 <= receipt.spent.retries <= 1 + deadly * (count - 1).bit_length()
        else:
            assert receipt.spent.retries == 0


@pytest.mark.usefixtures("private_ray")
def test_poison_for_one_of_several_models_costs_that_model_alone(
    place: Place, tiny_model: Path
) -> None:
    for name in FILES:
        if name not in ("two", "mixed"):
            (place / "in").store.delete(f"{name}.parquet")
    poisoned = poisoned_backend(tokens_of_poisons(tiny_model))
    alone = config_of(place, tiny_model, "out", workers=1)
    both = {name: str(tiny_model) for name in ("a", "b")}
    config = Config.model_validate({**alone.model_dump(exclude_unset=True), "model": both})
    summary = run_score(
        config,
        make=lambda job: poisoned() if job.config.column_prefix == "b_" else FakeBackend(),
    )
    assert summary.is_complete
    crash, raised, memory = "worker_crash", "engine_error", "out_of_memory"
    for name, marks in (
        ("two", [None, crash, crash, None]),
        ("mixed", [raised, crash, None, memory]),
    ):
        table = (place / "out").shards()[f"{name}.parquet"].table
        assert table["a_score_error"].null_count == 4
        assert table["b_score_error"].to_pylist() == table["score_error"].to_pylist() == marks
    assert not verify((place / "out").url).problems


def test_rows_at_which_the_engine_raises_are_found_without_a_death(
    place: Place, tiny_model: Path
) -> None:
    """Without Ray too; there a death would end the program."""
    inputs = ("mixed.parquet", "raising.parquet", "healthy.parquet")
    for name in FILES:
        if f"{name}.parquet" not in inputs:
            (place / "in").store.delete(f"{name}.parquet")
    run_score(config_of(place, tiny_model, "undisturbed", use_ray=False))
    expected = found(place, "undisturbed")
    tokens = {t: p for t, p in tokens_of_poisons(tiny_model).items() if p not in DEADLY}
    backend = poisoned_backend(tokens)
    summary = run_score(
        config_of(place, tiny_model, "out", use_ray=False), make=lambda job: backend()
    )
    assert summary.is_complete
    assert_only_poison_is_lost(place, expected, found(place, "out"))
    marks = rows_by_reason(Folder((place / "out").url))
    assert marks == {"engine_error": 3, "out_of_memory": 1}
    examples = [example for receipt in summary.receipts for example in receipt.examples]
    assert (2, "engine_error", "ValueError: no such answer") in examples


def test_an_engine_that_raises_at_every_row_is_a_defect_and_blames_no_row(
    place: Place, tiny_model: Path
) -> None:
    class Broken(FakeBackend):
        def score(self, rows: TokenizedRows) -> Scores:
            raise ValueError("broken")

    table = table_of(pair_rows(20))
    place = place / "many"
    (place / "in").write({"a.parquet": parquet(table)})
    summary = run_score(
        config_of(place, tiny_model, "out", use_ray=False), make=lambda job: Broken()
    )
    (receipt,) = summary.receipts
    assert (receipt.reason, receipt.detail) == (ShardReason.INTERNAL, "ValueError: broken")
