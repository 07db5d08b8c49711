"""Reward functions beside a model: in one job with it, with Ray and without, through kills and
faults; counted apart, and chosen by."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from batch_scorer import score_rows
from batch_scorer.cli.submit import Submission
from batch_scorer.config import RewardSettings
from batch_scorer.outputs.verify import verify
from batch_scorer.runs.card import write_card
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import Row, jsonl, pair_rows
from tests.helpers.places import Place, Stored, digests, of_input
from tests.helpers.program import Ended, Models, Program, model_flags, wait_until
from tests.helpers.reward_file import reward_file
from tests.helpers.tiny import tiny_reward_model

pytestmark = pytest.mark.e2e

SHARD_ROWS = 8
FAULTS = ("hang", "raise", "die", "short", "nan")
REASONS = {
    "hang": "reward_timed_out",
    "raise": "reward_raised",
    "die": "reward_died",
    "short": "reward_invalid",
    "nan": "reward_invalid",
}


def pairs_with_answers(count: int) -> list[Row]:
    """Pairs with a column `answer`; one without it, one that cannot be read."""
    rows = pair_rows(count)
    for number, row in enumerate(rows):
        row["answer"] = None if number == 3 else row["chosen"][-1]["content"].split()[-1]
    rows[5]["chosen"] = None
    return rows


def rollouts(count: int) -> list[Row]:
    return [
        {
            "prompt": f"{number}. Name some trees.",
            "responses": ["oak " * (1 + (number + k) % 4) + str(k) for k in range(1 + number % 4)],
            "answer": str(number % 3),
        }
        for number in range(count)
    ]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    (place / "in").write(
        {"pairs.jsonl": jsonl(pairs_with_answers(20)), "rollouts.jsonl": jsonl(rollouts(12))}
    )
    reward_file(tmp_path)
    return place


def own(place: Place, function: str, **more: Any) -> str:
    return json.dumps({"function": f"{place.url}/own_rewards.py:{function}", **more})


@pytest.fixture(params=["one", "two"])
def models(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Models:
    """One model, and two in one job."""
    if request.param == "one":
        return tiny_model
    return {"a": tiny_model, "b": tiny_reward_model(tmp_path / "b", bos=True)}


def command(place: Place, models: Models, output: str, *flags: object) -> list[object]:
    return [
        "score", *model_flags(models), (place / "in").url, "--output", (place / output).url,
        "--json", "--backend", "fake", "--dtype", "float32", "--shard-rows", SHARD_ROWS, *flags,
    ]  # fmt: skip


def score(place: Place, models: Models, output: str, *flags: object) -> Ended:
    """In this process, without Ray."""
    ended = run_cli(*command(place, models, output, "--no-ray", *flags))
    assert ended.exit_code == 0, ended.err
    return ended


def two_functions(place: Place) -> list[str]:
    return [
        "--reward", f"length={own(place, 'length', per_minute=600_000)}",
        "--reward", f"named={own(place, 'named')}",
    ]  # fmt: skip


def text(messages: Any) -> str:
    found: str = messages[-1]["content"]
    return found


def assert_columns_are_ours(shards: dict[str, Stored]) -> None:
    """The columns of both functions are what this test computes."""
    for row in of_input(shards, "pairs.jsonl").to_pylist():
        sides = [f"score_{side}" for side in ("chosen", "rejected")]
        lengths = [row[f"length_{side}"] for side in sides]
        found = [row[f"named_{side}"] for side in sides]
        if row["chosen"] is None:  # the other side has its values all the same
            assert lengths == [None, float(len(text(row["rejected"])))]
            errors = {row[f"{name}_score_error"] for name in ("length", "named")}
            assert errors == {"null_value"} == {row["score_error"]}
            continue
        texts = [text(row[side]) for side in ("chosen", "rejected")]
        assert lengths == [float(len(each)) for each in texts]
        assert row["length_score_error"] is None
        if row["answer"] is None:
            assert (found, row["named_score_error"]) == ([None, None], "reward_none: no answer")
        else:
            assert found == [float(row["answer"] in each) for each in texts]
            assert row["named_score_error"] is None
    for row in of_input(shards, "rollouts.jsonl").to_pylist():
        assert row["length_scores"] == [float(len(each)) for each in row["responses"]]
        assert row["named_scores"] == [float(row["answer"] in each) for each in row["responses"]]
        assert row["length_score_error"] is row["named_score_error"] is None


def without(shards: dict[str, Stored], *rewards: str) -> dict[str, list[Row]]:
    """The rows without the columns of these functions."""
    found = {}
    for key, shard in shards.items():
        names = [n for n in shard.table.column_names if not n.startswith(rewards)]
        found[key] = shard.table.select(names).to_pylist()
    return found


@pytest.mark.parametrize("with_ray", [False, True], ids=["plain", "ray"])
def test_two_functions_beside_the_model(
    place: Place, tiny_model: Path, program: Program, with_ray: bool
) -> None:
    flags = two_functions(place)
    if with_ray:
        ended = program.run(*command(place, tiny_model, "out", *flags))
    else:
        ended = score(place, tiny_model, "out", *flags)
    assert ended.exit_code == 0, ended.err
    shards = (place / "out").shards()
    assert_columns_are_ours(shards)

    alone = score(place, tiny_model, "alone")
    assert without(shards, "length_", "named_") == without((place / "alone").shards())
    assert alone.json["metrics"]["reward_s"] == 0.0
    assert "rewards" not in alone.json

    responses = 2 * 20 + sum(len(row["responses"]) for row in rollouts(12))
    totals = ended.json
    assert totals["rewards"] == {
        "length": {
            "responses": responses,
            "values": responses - 1,
            "rows_valued": 31,
            "marked": {"null_value": 1},
        },
        "named": {
            "responses": responses,
            "values": responses - 3,
            "rows_valued": 30,
            "marked": {"null_value": 1, "reward_none": 1},
        },
    }
    assert totals["marked"] == {"null_value": 1}, "a reward marks no row of the model"
    assert totals["metrics"]["reward_s"] > 0
    verdict = verify((place / "out").url)
    assert verdict.problems == [] == verdict.unfinished
    assert {n: vars_of(c) for n, c in verdict.rewards.items()} == totals["rewards"]
    status = run_cli("status", (place / "out").url, "--json").json
    assert status["rewards"] == totals["rewards"]
    assert status["provenance"]["rewards"]["named"]["columns"] == {"answer": "answer"}
    write_card((place / "out").url, {})
    card = (place / "out").store.read("README.md").decode()
    assert "| `named_score_chosen` | of the reward function named |" in card


def vars_of(counts: Any) -> dict[str, Any]:
    return {name: getattr(counts, name) for name in counts.__slots__}


@pytest.mark.slow
def test_faults_cost_their_rows_alone_and_the_counts_add_up(
    place: Place, tiny_model: Path, program: Program
) -> None:
    rows = pairs_with_answers(20)
    at_fault = {2: "chosen", 9: "rejected", 10: "chosen", 19: "rejected"}
    for number, side in at_fault.items():
        rows[number][side] = [*rows[number][side][:-1], {"role": "assistant", "content": "FAULT"}]
    (place / "in").write({"pairs.jsonl": jsonl(rows)})
    flags = []
    for fault in FAULTS:
        more = {"timeout_s": 5} if fault == "hang" else {}
        entry = own(place, "at_fault", arguments={"fault": fault}, **more)
        flags += ["--reward", f"{fault}={entry}"]
    ended = program.run(*command(place, tiny_model, "out", *flags))
    assert ended.exit_code == 0, ended.err
    shards = (place / "out").shards()
    scored = of_input(shards, "pairs.jsonl").to_pylist()
    for fault in FAULTS:
        for number, row in enumerate(scored):
            error = REASONS[fault] if number in at_fault else None
            assert row[f"{fault}_score_error"] == ("null_value" if number == 5 else error)
            for side in ("chosen", "rejected"):
                lost = (number, side) == (5, "chosen") or at_fault.get(number) == side
                value = None if lost else float(len(text(row[side])))
                assert row[f"{fault}_score_{side}"] == value
        counts = ended.json["rewards"][fault]
        errors = Counter(filter(None, (row[f"{fault}_score_error"] for row in scored)))
        assert counts["marked"] == errors
        assert counts["rows_valued"] + sum(errors.values()) == 32
        assert counts["responses"] - counts["values"] == 1 + len(at_fault)
    score(place, tiny_model, "alone")
    alone = without((place / "alone").shards())
    assert without(shards, *(f"{fault}_" for fault in FAULTS)) == alone
    verdict = verify((place / "out").url)
    assert verdict.problems == []
    assert verdict.rewards["die"].marked == {"null_value": 1, "reward_died": 4}


@pytest.mark.parametrize("how", ["--no-ray", pytest.param("--ray", marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_to_the_same_bytes(
    place: Place, tiny_model: Path, program: Program, how: str
) -> None:
    flags = [*two_functions(place), "--reward", f"slow={place.url}/own_rewards.py:slow"]
    score(place, tiny_model, "whole", *flags)
    again = command(place, tiny_model, "out", "--lease-s", 2, *flags)
    running = program.start(*again, how)
    wait_until(lambda: bool((place / "out").shard_keys()) or running.is_over, "a shard is there")
    running.send(signal.SIGKILL)
    assert running.wait().exit_code == -signal.SIGKILL
    program.wait_until_gone()
    before = digests((place / "out").shards())
    assert 0 < len(before) < len((place / "whole").shard_keys())
    ended = run_cli(*again, "--no-ray")
    assert ended.exit_code == 0, ended.err
    after = digests((place / "out").shards())
    assert after == digests((place / "whole").shards())
    assert before.items() <= after.items()


def test_another_source_or_argument_is_other_work(place: Place, models: Models) -> None:
    flags = ["--reward", f"turns={own(place, 'turns')}"]
    score(place, models, "out", *flags)
    other = ["--reward", f"turns={own(place, 'turns', arguments={'factor': 2})}"]
    ended = run_cli(*command(place, models, "out", "--no-ray", *other))
    assert (ended.exit_code, "rewards.turns.arguments" in ended.error) == (2, True)
    file = Path(f"{place.url}/own_rewards.py")
    file.write_text(f"{file.read_text()}\n")
    ended = run_cli(*command(place, models, "out", "--no-ray", *flags))
    assert (ended.exit_code, "rewards.turns.source" in ended.error) == (2, True)
    ended = run_cli(*command(place, models, "out", "--no-ray"))
    assert ended.exit_code == 2, "without the function, too"


def test_rows_of_a_service_that_was_away_are_tried_again(
    place: Place, models: Models, tmp_path: Path
) -> None:
    away = tmp_path / "away"
    away.touch()
    flags = ["--reward", f"asked={own(place, 'until_gone', arguments={'file': str(away)})}"]
    ended = score(place, models, "out", *flags)
    assert ended.json["rewards"]["asked"]["marked"] == {"null_value": 1, "reward_raised": 31}
    model = without((place / "out").shards(), "asked_")
    away.unlink()
    ended = score(place, models, "out", *flags)
    assert ended.json["rewards"]["asked"]["rows_valued"] == 0, "nothing was left to do"
    ended = score(place, models, "out", *flags, "--retry-marked", "reward_raised")
    assert ended.json["rewards"]["asked"]["marked"] == {"null_value": 1}
    assert ended.json["metrics"]["scored_tokens"] == 0, "no model was asked again"
    assert without((place / "out").shards(), "asked_") == model
    assert verify((place / "out").url).problems == []


def test_verify_finds_a_value_without_a_reason(place: Place, models: Models) -> None:
    score(place, models, "out", *two_functions(place))
    key = next(key for key in (place / "out").shard_keys() if key.startswith("rollouts"))
    file = Path(f"{(place / 'out').url}/{key}")
    table = pq.read_table(file)
    values = [None] * table.num_rows
    at = table.column_names.index("length_score_error")
    pq.write_table(
        table.set_column(at, table.schema.field(at), [["reward_raised", *values[1:]]]), file
    )
    problems = "\n".join(verify((place / "out").url).problems)
    assert "reward length: Rewarded(" in problems


def test_what_is_missing_is_said_before_anything_is_scored(place: Place, tiny_model: Path) -> None:
    entry = own(place, "named", columns={"answer": "solution"})
    for name in ("score", "plan"):
        words = command(place, tiny_model, "out", "--no-ray", "--reward", f"right={entry}")
        ended = run_cli(name, *words[1:])
        assert ended.exit_code == 2
        assert "rewards: right: no input has a column 'solution'" in ended.error
    assert not (place / "out").shard_keys()
    taken = [{**row, "length_score_chosen": 1.0} for row in pair_rows(2)]
    (place / "in").write({"taken.jsonl": jsonl(taken)})
    ended = run_cli(*command(place, tiny_model, "out", "--no-ray", *two_functions(place)))
    assert ended.exit_code == 3
    assert "the file already has length_score_chosen" in ended.out + ended.err


def test_a_plan_shows_the_functions(place: Place, tiny_model: Path) -> None:
    words = command(place, tiny_model, "out", "--no-ray", *two_functions(place))[1:]
    shown = run_cli("plan", *[word for word in words if word != "--json"]).out
    assert "reward named: own_rewards.py:named (source " in shown
    assert ", reads answer)" in shown
    found = run_cli("plan", *words).json
    assert found["rewards"]["length"]["function"] == "own_rewards.py:length"
    checked = run_cli("nightly", *words, "--dry-run")
    assert checked.exit_code == 0, checked.err


def test_rows_are_chosen_by_a_function_and_by_the_models(place: Place, models: Models) -> None:
    Path(f"{place.url}/in/pairs.jsonl").unlink()
    score(place, models, "out", *two_functions(place))
    by = "score" if isinstance(models, Path) else "mean_score"
    scored = of_input((place / "out").shards(), "rollouts.jsonl").to_pylist()
    flat = [
        {"prompt": row["prompt"], "response": response, "score": s, "length": n, "named": right}
        for row in scored
        for response, s, n, right in zip(
            row["responses"], row[f"{by}s"], row["length_scores"], row["named_scores"], strict=True
        )
    ]

    def chosen(output: str, *flags: object) -> list[tuple[str, str]]:
        words = ["select", (place / "out").url, "--output", (place / output).url, *flags]
        ended = run_cli(*words)
        assert ended.exit_code == 0, ended.err
        tables = [shard.table for shard in (place / output).shards().values()]
        rows = [row for table in tables for row in table.to_pylist()]
        return sorted((row["prompt"], row["response"]) for row in rows)

    longest: dict[str, Row] = {}
    for row in flat:
        best = longest.get(row["prompt"])
        if best is None or row["length"] > best["length"]:
            longest[row["prompt"]] = row
    found = chosen("longest", "--by", "length_score", "--best", 1, "--group-by", "prompt")
    lengths = {row["response"]: row["length"] for row in flat}
    assert [prompt for prompt, _ in found] == sorted(longest)
    assert [lengths[r] for _, r in found] == [longest[p]["length"] for p in sorted(longest)]

    right = [row for row in flat if row["named"] == 1.0]
    best_right: dict[str, Row] = {}
    for row in right:
        best = best_right.get(row["prompt"])
        if best is None or row["score"] > best["score"]:
            best_right[row["prompt"]] = row
    found = chosen(
        "right", "--where", '(field("named_score") == 1)', "--by", by, "--best", 1,
        "--group-by", "prompt",
    )  # fmt: skip
    assert found == sorted((row["prompt"], row["response"]) for row in best_right.values())
    assert 0 < len(found) < len(longest)


def test_a_file_travels_with_a_submitted_job(
    place: Place, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the job runs there, in the folder that is shipped."""
    rewards = {
        "length": RewardSettings(function=f"{place.url}/own_rewards.py:length"),
        "short": RewardSettings(function="length", arguments={"limit": 40, "soft": 10}),
    }
    words = command(place, tiny_model, "out", "--no-ray")
    submission = Submission(tuple(map(str, words)), rewards=rewards)
    with submission.runtime_env() as shipped:
        monkeypatch.chdir(shipped["working_dir"])
        ended = run_cli(*submission.shipped_words)
    assert ended.exit_code == 0, ended.err
    here = ["--reward", f"length={place.url}/own_rewards.py:length"]
    here += ["--reward", "short={function: length, arguments: {limit: 40, soft: 10}}"]
    monkeypatch.chdir(tmp_path)
    score(place, tiny_model, "here", *here)
    assert digests((place / "out").shards()) == digests((place / "here").shards())
    changed = submission.name
    Path(f"{place.url}/own_rewards.py").write_text("def length(responses): return []\n")
    assert submission.name != changed, "another source is another job"


def test_a_night_scores_with_functions_and_another_source_begins_a_generation(
    place: Place, models: Models
) -> None:
    flags = ["--reward", f"turns={own(place, 'turns')}"]

    def night() -> Ended:
        words = command(place, models, "nights", "--no-ray", *flags)
        ended = run_cli("nightly", *words[1:])
        assert ended.exit_code == 0, ended.err
        return ended

    (first,) = night().json["models"]
    responses = 2 * 20 + sum(len(row["responses"]) for row in rollouts(12))
    assert first["rewards"]["turns"]["responses"] == responses, "asked once, for all models"
    (second,) = night().json["models"]
    assert second["metrics"]["scored_tokens"] == 0
    before = (place / "nights").read_json("latest.json")
    file = Path(f"{place.url}/own_rewards.py")
    file.write_text(f"{file.read_text()}\n")
    (third,) = night().json["models"]
    assert (place / "nights").read_json("latest.json") != before
    if not isinstance(models, Path):
        assert third["metrics"]["scored_tokens"] == 0, "each of several models keeps its scores"


def test_rows_in_memory_get_the_columns_too(place: Place, tiny_model: Path) -> None:
    rows = rollouts(3)
    scored = score_rows(
        rows,
        model=str(tiny_model),
        backend="fake",
        rewards={"n": f"{place.url}/own_rewards.py:length"},
    )
    assert [row["n_scores"] for row in scored] == [
        [float(len(response)) for response in row["responses"]] for row in rows
    ]


def test_scores_are_float32_as_the_model_s(place: Place, tiny_model: Path) -> None:
    entry = own(place, "turns", arguments={"factor": 0.1})
    score(place, tiny_model, "out", "--reward", f"turns={entry}")
    rows = of_input((place / "out").shards(), "rollouts.jsonl").to_pylist()
    assert rows[0]["turns_scores"] == [float(np.float32(0.1))]
