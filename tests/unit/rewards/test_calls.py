"""What a reward function does wrong costs the responses at fault, each with its reason."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer.config import load_partial_config
from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.pipeline.reward_pace import RewardPace
from batch_scorer.rewards import calls
from batch_scorer.rewards.calls import BATCH, Batch, ask
from batch_scorer.rewards.functions import Reward, find_rewards
from tests.helpers.reward_file import reward_file

TEXTS = ["one", "a FAULT", "three", "four"]


def found(folder: Path, function: str, **more: Any) -> Reward:
    entry = {"function": f"{reward_file(folder)}:{function}", **more}
    (reward,) = find_rewards(load_partial_config(rewards={"own": entry}))
    return reward


def batches(texts: Sequence[str], **columns: Sequence[Any]) -> list[Batch]:
    prompts = [[{"role": "user", "content": "Well?"}] for _ in texts]
    starts = range(0, len(texts), BATCH)
    return [
        Batch.of(
            prompts[start : start + BATCH],
            texts[start : start + BATCH],
            {name: values[start : start + BATCH] for name, values in columns.items()},
        )
        for start in starts
    ]


def asked(
    reward: Reward, given: list[Batch], pace: calls.Pace = lambda *_: None
) -> tuple[list[float | None], dict[int, tuple[RowReason, str]]]:
    values, errors = ask(reward, given, load_partial_config(), pace)
    assert values.dtype == np.float32
    numbers = [None if np.isnan(value) else float(value) for value in values]
    assert [i for i, number in enumerate(numbers) if number is None] == sorted(errors)
    return numbers, {place: (error.reason, error.detail) for place, error in errors.items()}


def test_a_function_is_asked_about_each_response_once(tmp_path: Path) -> None:
    texts = ["a" * size for size in range(2 * BATCH + 3)]
    values, errors = asked(found(tmp_path, "length"), batches(texts))
    assert values == [float(size) for size in range(2 * BATCH + 3)]
    assert errors == {}


def test_columns_and_arguments_come_by_name(tmp_path: Path) -> None:
    named = found(tmp_path, "named", columns={"answer": "word"})
    values, errors = asked(named, batches(["a b", "a b", "c"], word=["b", "c", None]))
    assert values == [1.0, 0.0, None]
    assert errors == {2: (RowReason.REWARD_NONE, "no answer")}
    assert asked(named, batches(["a b"]))[0] == [None], "a file without the column"
    assert asked(found(tmp_path, "turns", arguments={"factor": 3}), batches(["a"]))[0] == [3.0]


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("raise", RowReason.REWARD_RAISED, "ValueError: it cannot be read"),
        ("leave", RowReason.REWARD_RAISED, "SystemExit: gone"),
        ("short", RowReason.REWARD_INVALID, "0 values for 1 responses"),
        ("nan", RowReason.REWARD_INVALID, "nan, not a finite float32"),
        ("inf", RowReason.REWARD_INVALID, "-inf, not a finite float32"),
        ("text", RowReason.REWARD_INVALID, "str, not a number"),
        ("none", RowReason.REWARD_NONE, ""),
        (
            "die",
            RowReason.REWARD_DIED,
            "its process ended with exit code 7: a response is at fault",
        ),
        ("fill", RowReason.REWARD_DIED, "takes more than 4 GiB (read_memory_gib)"),
    ],
)
def test_a_fault_costs_its_response_alone(
    tmp_path: Path, fault: str, reason: RowReason, detail: str
) -> None:
    values, errors = asked(found(tmp_path, "at_fault", arguments={"fault": fault}), batches(TEXTS))
    assert values == [3.0, None, 5.0, 4.0]
    assert errors == {1: (reason, detail)}


def test_a_hang_costs_its_response_alone(tmp_path: Path) -> None:
    hanging = found(tmp_path, "at_fault", arguments={"fault": "hang"}, timeout_s=3)
    values, errors = asked(hanging, batches(TEXTS))
    assert values == [3.0, None, 5.0, 4.0]
    assert errors == {1: (RowReason.REWARD_TIMED_OUT, "takes longer than 3 s")}


def test_a_function_that_always_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_MOST_TIMED_OUT", 2)
    hanging = found(tmp_path, "at_fault", arguments={"fault": "hang"}, timeout_s=1)
    values, errors = asked(hanging, batches(["FAULT"] * 4))
    assert values == [None] * 4
    assert {reason for reason, _ in errors.values()} == {RowReason.REWARD_TIMED_OUT}
    assert errors[3][1].startswith("not asked")


def test_a_batch_is_tried_as_often_as_asked_before_it_is_halved(tmp_path: Path) -> None:
    file = tmp_path / "flaky.py"
    counter = tmp_path / "counter"
    file.write_text(
        "def f(responses, *, counter):\n"
        "    with open(counter, 'a') as file: file.write(f'{len(responses)} ')\n"
        "    if len(open(counter).read().split()) < 3: raise OSError('away')\n"
        "    return [1.0] * len(responses)\n"
    )
    entry = {"function": f"{file}:f", "attempts": 3, "arguments": {"counter": str(counter)}}
    (reward,) = find_rewards(load_partial_config(rewards={"own": entry}))
    assert asked(reward, batches(TEXTS)) == ([1.0] * 4, {})
    assert counter.read_text().split() == ["4", "4", "4"]


def test_a_rate_limit_is_asked_before_each_call(tmp_path: Path) -> None:
    limited, told = found(tmp_path, "length", per_minute=3), []
    values, _ = asked(limited, batches(TEXTS), lambda reward, count: told.append(count))
    assert values == [3.0, 7.0, 5.0, 4.0]
    assert told == [3, 1], "no call has more than a minute's responses"


def test_one_pace_is_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    pace = RewardPace()
    assert [pace.wait_s("a", 60, 10) for _ in range(3)] == [0.0, 10.0, 20.0]
    assert pace.wait_s("b", 60, 10) == 0.0


def test_a_function_that_cannot_be_loaded_on_this_machine_fails_the_shard(tmp_path: Path) -> None:
    from dataclasses import replace

    reward = replace(found(tmp_path, "length"), digest="0" * 64)
    with pytest.raises(ShardError, match=r"own: own_rewards\.py:length on this machine") as raised:
        ask(reward, batches(TEXTS), load_partial_config(), lambda *_: None)
    assert raised.value.reason is ShardReason.REWARD_UNUSABLE


def test_a_function_s_process_is_kept_from_call_to_call(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("import os\ndef f(responses): return [os.getpid()] * len(responses)\n")
    (reward,) = find_rewards(load_partial_config(rewards={"own": f"{file}:f"}))
    config = load_partial_config()
    first, _ = ask(reward, batches(["a"] * (BATCH + 1)), config, lambda *_: None)
    again, _ = ask(reward, batches(["a"]), config, lambda *_: None)
    assert len({*first.tolist(), *again.tolist()}) == 1
