"""Two real models and two reward functions in one job: with Ray and without, beside the jobs of
each model alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pairs, parquet
from tests.helpers.places import Place, of_input
from tests.helpers.program import Ended, Program
from tests.helpers.reward_file import reward_file
from tests.helpers.tiny import tiny_reward_model

pytestmark = pytest.mark.e2e

PAIRS, LISTS = "pairs.parquet", "rollouts.jsonl"
NAMES = ("helpful", "safety")
REWARDS = ("length", "turns")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(str(tmp_path_factory.mktemp("ensembles")))
    lists = [
        {"prompt": f"What is {number} and {number}?", "responses": answers}
        for number, answers in enumerate(
            [["two", "2", "it is two", "three"], ["four"], ["6", "six", "No."]] * 4
        )
    ]
    (place / "in").write({PAIRS: parquet(pairs(30)), LISTS: jsonl(lists)})
    folder = Path(place.url)
    reward_file(folder)
    rng = np.random.default_rng(1)
    for number, name in enumerate(NAMES):
        file = tiny_reward_model(folder / name) / "model.safetensors"
        weights = load_file(file)
        if number:  # the tokenizer is the same, the weights are not
            head = weights["score.weight"]
            weights["score.weight"] = rng.standard_normal(head.shape).astype(head.dtype)
            save_file(weights, file, {"format": "pt"})
    return place


def flags(place: Place, output: str, *more: object) -> list[object]:
    return [
        "score", (place / "in").url, "--output", (place / output).url, "--json",
        "--dtype", "float32", "--shard-rows", 10, *more,
    ]  # fmt: skip


def models(place: Place) -> list[object]:
    return [part for n in NAMES for part in ("--model", f"{n}={Path(place.url) / n}")]


def rewards(place: Place) -> list[object]:
    return [part for n in REWARDS for part in ("--reward", f"{n}={place.url}/own_rewards.py:{n}")]


@pytest.fixture(scope="module")
def together(place: Place) -> Ended:
    """Both models and functions, without Ray."""
    ended = run_cli(*flags(place, "together", *models(place), *rewards(place), "--no-ray"))
    assert ended.exit_code == 0, ended.err
    return ended


def columns(place: Place, output: str, key: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = of_input((place / output).shards(), key).to_pydict()
    return found


def test_each_models_scores_are_bit_for_bit_those_of_a_job_of_its_own(
    place: Place, together: Ended
) -> None:
    alone: dict[str, Ended] = {}
    for name in NAMES:
        own = ("--model", Path(place.url) / name, "--no-ray")
        alone[name] = run_cli(*flags(place, f"alone-{name}", *own))
        assert alone[name].exit_code == 0, alone[name].err
    for key in (PAIRS, LISTS):
        both = of_input((place / "together").shards(), key)
        for name in NAMES:
            own = of_input((place / f"alone-{name}").shards(), key)
            shards = (place / f"alone-{name}").shards().values()
            (added,) = {tuple(s.commit.added_columns) for s in shards if s.commit.input == key}
            for column in added:
                assert both[f"{name}_{column}"].equals(own[column]), column
    counts = {name: ended.json["metrics"] for name, ended in alone.items()}
    figures = together.json["metrics"]
    assert figures["tokenized_sequences"] == counts[NAMES[0]]["tokenized_sequences"]
    for sum_of in ("computed_tokens", "scored_tokens"):
        assert figures[sum_of] == sum(each[sum_of] for each in counts.values())
    flop = sum(each["model_flop"] for each in counts.values())
    assert figures["model_flop"] == pytest.approx(flop)
    assert set(together.json["parity"]["models"]) == set(NAMES)
    assert all(each["agrees"] for each in together.json["parity"]["models"].values())


def test_what_models_have_together_is_computed_over_the_models_and_the_row(
    place: Place, together: Ended
) -> None:
    table = columns(place, "together", PAIRS)
    for row in range(len(table["chosen"])):
        scores = np.array(
            [[table[f"{n}_score_{s}"][row] for s in ("chosen", "rejected")] for n in NAMES]
        )
        for place_, side in enumerate(("chosen", "rejected")):
            own = scores[:, place_]
            assert table[f"mean_score_{side}"][row] == pytest.approx(own.mean(), abs=1e-6)
            assert table[f"min_score_{side}"][row] == own.min()
            assert table[f"std_score_{side}"][row] == pytest.approx(own.std(), abs=1e-6)
        signs = np.sign(scores[:, 0] - scores[:, 1])
        if signs.all():  # of two answers, the better one is one deviation above the mean
            assert table["z_score_chosen"][row] == pytest.approx(signs.mean())
        assert table["rank_disagreement"][row] == abs(signs[0] - signs[1]) / 2
    assert len(set(table["rank_disagreement"])) > 1

    lists = columns(place, "together", LISTS)
    for row, means in enumerate(lists["mean_scores"]):
        scores = np.array([lists[f"{name}_scores"][row] for name in NAMES])
        assert means == pytest.approx(scores.mean(axis=0), abs=1e-6)
        if scores.shape[1] == 1:
            assert lists["z_scores"][row] == [None] and lists["rank_disagreement"][row] is None
            continue
        z = (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
        assert lists["z_scores"][row] == pytest.approx(z.mean(axis=0), abs=1e-4)
        one, other = np.triu_indices(scores.shape[1], 1)
        orders = np.sign(scores[:, one] - scores[:, other])
        apart = np.abs(orders[0] - orders[1]).mean() / 2
        assert lists["rank_disagreement"][row] == pytest.approx(apart)


def test_functions_are_asked_once_for_all_models(place: Place, together: Ended) -> None:
    table = columns(place, "together", PAIRS)
    for side in ("chosen", "rejected"):
        texts = [messages[-1]["content"] for messages in table[side]]
        assert table[f"length_score_{side}"] == [float(len(each)) for each in texts]
        assert table[f"turns_score_{side}"] == [len(each) - 1.0 for each in table[side]]
    lists = columns(place, "together", LISTS)
    assert lists["length_scores"] == [[float(len(t)) for t in row] for row in lists["responses"]]
    assert lists["turns_scores"] == [[1.0] * len(row) for row in lists["responses"]]
    rows = len(table["chosen"]) + len(lists["responses"])
    responses = 2 * len(table["chosen"]) + len(flat(lists["responses"]))
    counts = {"responses": responses, "values": responses, "rows_valued": rows, "marked": {}}
    assert together.json["rewards"] == dict.fromkeys(REWARDS, counts)
    for key in (PAIRS, LISTS):
        errors = [columns(place, "together", key)[f"{name}_score_error"] for name in REWARDS]
        assert set(flat(errors)) == {None}


def flat(values: list[Any]) -> list[Any]:
    """The values of a column, and those of its lists."""
    return [part for each in values for part in (each if isinstance(each, list) else [each])]


@pytest.mark.parametrize("model_workers", ["shared", "own"])
def test_ray_gives_the_same_with_models_on_one_worker_or_on_several(
    model_workers: str, place: Place, together: Ended, program: Program
) -> None:
    output = f"ray-{model_workers}"
    more = [*models(place), *rewards(place), "--model-workers", model_workers]
    ended = program.run(*flags(place, output, *more))
    assert ended.exit_code == 0, ended.err
    count = 1 if model_workers == "shared" else 2
    assert ended.json["metrics"]["workers"] == count
    for counted in ("rows_scored", "rewards"):
        assert ended.json[counted] == together.json[counted]
    sequences = together.json["metrics"]["tokenized_sequences"]
    assert ended.json["metrics"]["tokenized_sequences"] == sequences
    for key in (PAIRS, LISTS):
        here, there = columns(place, output, key), columns(place, "together", key)
        assert list(here) == list(there)
        for name in here:
            found, expected = flat(here[name]), flat(there[name])
            if any(isinstance(value, float) for value in found):
                # Ray's workers compute with other numbers of threads.
                numbers = [np.array(each, np.float64) for each in (found, expected)]
                np.testing.assert_allclose(*numbers, atol=1e-4, err_msg=name)
            else:
                assert found == expected, name
    verdict = program.run("verify", (place / output).url)
    assert verdict.exit_code == 0, verdict.out
