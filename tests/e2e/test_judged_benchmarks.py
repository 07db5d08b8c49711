"""Benchmarks of judges through the whole program: every figure is computed here, from what the
judge's questions got (`judgements`)."""

from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_scorer.evaluation import rewardbench
from tests.helpers.chat_server import Body, chat_server, completion, reply_text
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import Row, parquet
from tests.helpers.places import Place, of_input
from tests.helpers.tiny_judge import PAGE, tiny_judge_directory

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("one_thread")]

RATINGS = """
about: Whether an answer gives the number that was asked for, from 1 to 10.
mode: pointwise
messages:
  - role: user
    content: "{{ fence }}\\n{{ prompt }}\\n{{ fence }}\\n{{ fence }}\\n{{ response }}\\n{{ fence }}"
verdict: {by: probability, choices: {A: 10, B: 1}, least_mass: 0}
"""

Judge = Callable[..., tuple[list[Row], dict[str, Any]]]


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """The rows of a benchmark as the tiny judge has judged them, and what `evaluate` says: of the
    output alone the same as of scoring and evaluating in one go."""

    def judged(
        rows: list[Row], name: str, page: str | None = None, key: str = "rows.parquet"
    ) -> tuple[list[Row], dict[str, Any]]:
        place = Place(str(tmp_path))
        (place / "in").write({key: parquet(pa.Table.from_pylist(rows))})
        if page is not None:
            (tmp_path / "page.yaml").write_text(page)
        one_go = run_cli(
            "evaluate", (place / "in").url, "--output", (place / "out").url, "--benchmark", name,
            "--task", "judge", "--judge", PAGE if page is None else tmp_path / "page.yaml",
            "--model", tiny_judge_directory(), "--no-ray", "--dtype", "float32", "--device", "cpu",
            "--parity-check", "off", "--json",
        )  # fmt: skip
        assert one_go.exit_code == 0, one_go.err
        again = run_cli("evaluate", (place / "out").url, "--benchmark", name, "--json")
        assert again.json == one_go.json
        return of_input((place / "out").shards(), key).to_pylist(), one_go.json

    return judged


def worths(row: Row) -> dict[tuple[int, ...], float]:
    """What each question of a row got, by the answers that it shows."""
    return {tuple(each["shown"]): each["worths"][0] for each in row["judgements"]}


def mean_worths(row: Row) -> list[float]:
    """Of each answer of a row of comparisons: the mean of those it is in, each of them the mean of
    both orders; as float32, which scores are."""
    found = worths(row)
    count = 1 + max(first for first, _ in found)
    means = []
    for own in range(count):
        others = [other for other in range(count) if other != own]
        both = [(found[own, other] + 1 - found[other, own]) / 2 for other in others]
        means.append(float(np.float32(np.mean(both))))
    return means


def assert_in_both_orders(rows: list[Row]) -> None:
    for row in rows:
        count = 1 + max(place for shown in worths(row) for place in shown)
        assert sorted(worths(row)) == sorted(permutations(range(count), 2))


def asks(count: int) -> list[tuple[int, int]]:
    """Numbers to ask for, and others."""
    return [(number % 10, (number * 3 + 1) % 10) for number in range(count)]


def value(found: dict[str, Any], column: str) -> float:
    result: float = found["columns"][column]["value"]
    return result


# RewardBench


SUBSETS = {"alpacaeval-easy": "Chat", "math-prm": "Reasoning", "hep-go": "Reasoning"}


def test_rewardbench_takes_the_mean_of_both_orders_and_halves_ties(judge: Judge) -> None:
    rows = []
    for number, (asked, other) in enumerate(asks(24)):
        # Every fifth label is wrong, every seventh pair is twice the same answer.
        right, wrong = (asked, other) if number % 5 else (other, asked)
        wrong = right if number % 7 == 0 else wrong
        rows.append(
            {
                "prompt": f"Say the number {asked}.",
                "chosen": f"It is {right}.",
                "chosen_model": ("tiny", "human")[number % 2],
                "rejected": f"It is {wrong}.",
                "rejected_model": ("other", "tiny")[number % 2],
                "subset": [*SUBSETS][number % 3],
                "id": number,
            }
        )
    rows, found = judge(rows, "rewardbench")
    assert_in_both_orders(rows)
    credits = []
    for row in rows:
        chosen, rejected = mean_worths(row)
        credits.append((chosen > rejected) + 0.5 * (chosen == rejected))
    assert credits.count(0.5) == 4 and 0 < credits.count(0.0) < credits.count(1.0)
    for subset in found["subsets"]:
        here = [c for c, row in zip(credits, rows, strict=True) if row["subset"] == subset["name"]]
        assert subset["accuracy"]["value"] == pytest.approx(sum(here) / len(here))
        assert (subset["ties"], subset["unscored"]) == (here.count(0.5), 0)
    by_name = {each["name"]: each["accuracy"]["value"] for each in found["subsets"]}
    assert value(found, "Chat") == by_name["alpacaeval-easy"]
    weights = [rewardbench.MATH_WEIGHT, 164]
    reasoning = np.average([by_name["math-prm"], by_name["hep-go"]], weights=weights)
    assert value(found, "Reasoning") == pytest.approx(reasoning)
    assert "4 ties of the judge count as half right" in found["notes"]

    # How sure it is, and whose answers it prefers.
    probable = np.array([mean_worths(row)[0] for row in rows])
    assert found["calibration"]["brier"] == pytest.approx(((1 - probable) ** 2).mean())
    assert sum(each["pairs"] for each in found["calibration"]["bins"]) == len(rows)
    (tiny,) = [each for each in found["writers"] if each["name"] == "tiny"]
    won = [
        credit if row["chosen_model"] == "tiny" else 1 - credit
        for credit, row in zip(credits, rows, strict=True)
    ]
    assert tiny["pairs"] == len(rows) and tiny["won_by_label"] == 0.5
    assert tiny["won_by_score"]["value"] == pytest.approx(sum(won) / len(won))


# RewardBench 2


def ties_score(ref: dict[str, tuple[float, float]], tied: dict[str, tuple[float, float]]) -> float:
    """By the published formula, from the gap and the spread of each form of a prompt."""
    both = [(min(ref[n][0], gap), gap, spread) for n, (gap, spread) in tied.items()]
    right = [np.mean([gap > 0 for gap, _ in form.values()]) for form in (ref, tied)]
    apart = np.mean([gap > spread for _, gap, spread in both])
    both_apart = np.mean([least > spread for least, _, spread in both])
    margin = np.mean([np.tanh(least / spread - 1) for least, _, spread in both])
    return float(0.3 * sum(right) + 0.2 * apart + 0.2 * both_apart + 0.01 * margin)


def test_rewardbench_2_shares_the_credit_among_the_best_rated(judge: Judge) -> None:
    """Answers with the same text have the same rating."""
    rows: list[Row] = []
    for number, (asked, other) in enumerate(asks(20)):
        same = f"It is {asked}."
        others = [same, f"It is {other}.", f"Sure, {other}!"]  # the first is as good
        if number % 2:
            others[0] = f"Here you are: {other}"
        subset = ("Math", "Focus", "Factuality", "Safety", "Precise IF")[number % 5]
        rows.append(
            {"id": str(number), "prompt": f"Say the number {asked}.", "chosen": [same],
             "rejected": others, "num_correct": 1, "subset": subset}
        )  # fmt: skip
    for number, (asked, other) in enumerate(asks(4)):
        for form, texts in (("ref", [f"{asked}"]), ("tied", [f"{asked}", f"It is {asked}."])):
            rows.append(
                {"id": f"{form}:{number}", "prompt": f"Say the number {asked}.", "chosen": texts,
                 "rejected": [f"It is {other}."], "num_correct": len(texts), "subset": "Ties"}
            )  # fmt: skip
    rows, found = judge(rows, "rewardbench-2", RATINGS)

    def ratings(row: Row) -> tuple[list[float], list[float]]:
        got = worths(row)
        assert list(got) == [(place,) for place in range(len(row["chosen"] + row["rejected"]))]
        each = [got[place,] for place in range(len(got))]
        assert all(1 <= rating <= 10 for rating in each)
        return each[: len(row["chosen"])], each[len(row["chosen"]) :]

    credits: dict[str, list[float]] = {}
    forms: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for row in rows:
        right, wrong = ratings(row)
        if row["subset"] == "Ties":
            form, _, number = row["id"].partition(":")
            forms[form][number] = min(right) - max(wrong), max(right) - min(right)
            continue
        winners = [
            place for place, rating in enumerate(right + wrong) if rating == max(right + wrong)
        ]
        credits.setdefault(row["subset"], []).append((0 in winners) / len(winners))
    earned = [credit for each in credits.values() for credit in each]
    assert {0.0, 0.5} <= set(earned)
    expected = {name: sum(each) / len(each) for name, each in credits.items()}
    expected["Ties"] = ties_score(forms["ref"], forms["tied"])
    for name, share in expected.items():
        assert value(found, name) == pytest.approx(share)
    assert value(found, "Score") == pytest.approx(sum(expected.values()) / 6)


# RM-Bench


STYLES = ("{}", "It is {}.", "Here you are: {}")


@pytest.mark.parametrize("page", [None, RATINGS])
def test_rm_bench_compares_every_style_with_every_style(judge: Judge, page: str | None) -> None:
    rows: list[Row] = [
        {
            "id": str(number),
            "prompt": f"Say the number {asked}.",
            "chosen": [style.format(asked) for style in STYLES],
            "rejected": [style.format(other) for style in STYLES],
            "domain": ("chat", "math", "code", "safety-refuse", "safety-response")[number % 5],
        }
        for number, (asked, other) in enumerate(asks(10))
    ]
    rows, found = judge(rows, "rm-bench", page)
    wins: dict[str, list[np.ndarray]] = {}
    for row in rows:
        if page is None:
            assert_in_both_orders([row])
            scores = mean_worths(row)
        else:
            scores = [worths(row)[place,] for place in range(6)]
        matrix = np.array([[right > wrong for wrong in scores[3:]] for right in scores[:3]])
        wins.setdefault(row["domain"].split("-")[0], []).append(matrix)
    cells = {"Hard": np.less, "Normal": np.equal, "Easy": np.greater}
    by_level: dict[str, list[float]] = {level: [] for level in cells}
    for domain, matrices in wins.items():
        mean = np.mean(matrices, axis=0)
        assert value(found, domain.capitalize()) == pytest.approx(mean.mean())
        np.testing.assert_allclose(found["details"]["matrix"][domain], mean)
        for level, holds in cells.items():
            share = [mean[a, b] for a, b in product(range(3), repeat=2) if holds(a, b)]
            by_level[level].append(float(np.mean(share)))
    for level, shares in by_level.items():
        assert value(found, level) == pytest.approx(np.mean(shares))
    assert value(found, "Score") == pytest.approx(
        np.mean([value(found, domain.capitalize()) for domain in wins])
    )


# JudgeBench


@pytest.mark.parametrize("inconsistent", ["mean", "tie"])
def test_judgebench_counts_a_pair_by_both_of_its_orders(judge: Judge, inconsistent: str) -> None:
    sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    rows = []
    for number, (asked, other) in enumerate(asks(24)):
        a_is_right = number % 3 != 0
        texts = [f"It is {asked}.", f"It is {other}."]
        a, b = texts if a_is_right else texts[::-1]
        if number % 4 == 0:  # it cannot tell these apart
            a, b = f"It is {other}.", f"Sure, {(other + 1) % 10}!"
        rows.append(
            {
                "pair_id": str(number),
                "original_id": str(number),
                "source": sources[number % 4],
                "question": f"Say the number {asked}.",
                "response_model": "gpt-4o",
                "response_A": a,
                "response_B": b,
                "label": "A>B" if a_is_right else "B>A",
            }
        )
    rows, found = judge(rows, "judgebench", PAGE.read_text() + f"inconsistent: {inconsistent}\n")
    assert_in_both_orders(rows)
    credits = []
    for row in rows:
        got = worths(row)
        for_a = [got[0, 1], 1 - got[1, 0]]  # in each order, what A got
        decided = [np.sign(worth - 0.5) for worth in for_a]
        lead = sum(for_a) - 1 if inconsistent == "mean" or sum(decided) else 0.0
        if inconsistent == "tie":
            # As published: more of both orders are for it than for the other one.
            assert (lead > 0) == (sum(decided) > 0)
        credits.append(float(lead > 0 if row["label"] == "A>B" else lead < 0))
    assert 0 < sum(credits) < len(credits)
    assert value(found, "Score") == sum(credits) / len(credits)
    for subset in found["subsets"]:
        here = [c for c, row in zip(credits, rows, strict=True) if row["source"] == subset["name"]]
        assert subset["accuracy"]["value"] == sum(here) / len(here)
    assert found["calibration"]["pairs"] == len(rows) and found["writers"] == []


# Written verdicts. The server's replies follow from the question: what is shown is how they are
# counted, not how well they judge.


Say = Callable[[list[dict[str, str]]], str]
"""What the server replies to messages."""


def served(
    rows: list[Row], name: str, page: str | Path, folder: Path, say: Say
) -> tuple[list[Row], dict[str, Any], list[str]]:
    """The same as `judge`, by a served judge that writes; and what it was asked."""

    def reply(body: Body) -> tuple[int, Body]:
        found = completion(body)
        found["choices"][0]["message"]["content"] = say(body["messages"])
        return 200, found

    place = Place(str(folder))
    (place / "in").write({"rows.parquet": parquet(pa.Table.from_pylist(rows))})
    with chat_server(reply) as server:
        done = run_cli(
            "evaluate", (place / "in").url, "--output", (place / "out").url, "--benchmark", name,
            "--task", "judge", "--judge", page, "--model", "judge-1", "--backend", "endpoint",
            "--endpoint", server.base_url, "--no-ray", "--json",
        )  # fmt: skip
        asked = [body["messages"][-1]["content"] for body in server.bodies]
    assert done.exit_code == 0, done.err
    return of_input((place / "out").shards(), "rows.parquet").to_pylist(), done.json, asked


def a_rating(messages: list[dict[str, str]]) -> str:
    drawn = hash_of(messages)
    return f"Well. {1 + drawn % 10}" if drawn % 7 else "I cannot say"


def a_or_b(messages: list[dict[str, str]]) -> str:
    drawn = hash_of(messages)
    return f"**Reasoning:** so.\n\n**Result:** {'AB'[drawn % 2]}" if drawn % 7 else "Neither."


def hash_of(messages: list[dict[str, str]]) -> int:
    return int(reply_text(messages, 0).removeprefix("reply "), 16)


def test_written_ratings_share_the_credit_and_a_row_without_one_is_wrong(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"id": str(number), "prompt": f"Say the number {number}.", "chosen": [f"{number}"],
         "rejected": [f"{number + more}" for more in (1, 2, 3)],
         "subset": ("Math", "Focus")[number % 2]}
        for number in range(60)
    ]  # fmt: skip
    rows, found, _ = served(rows, "rewardbench-2", "ratings", tmp_path, a_rating)
    credits: dict[str, list[float]] = {"Math": [], "Focus": []}
    unscored = 0
    for row in rows:
        given = [each["worths"] for each in row["judgements"]]
        ratings = [each[0] for each in given if each is not None]
        unscored += len(ratings) < 4
        winners = [place for place, rating in enumerate(ratings) if rating == max(ratings)]
        credit = (0 in winners) / len(winners) if len(ratings) == 4 else 0.0
        credits[row["subset"]].append(credit)
    assert {0.0, 0.5, 1.0} <= {credit for each in credits.values() for credit in each}
    assert found["unscored"] == unscored > 0
    for name, each in credits.items():
        assert value(found, name) == pytest.approx(sum(each) / len(each))


BY_SUBSET = """
about: A rating, in other words where several answers are right.
mode: pointwise
columns: [subset]
messages:
  - role: user
    content: |
      {% if subset == "Ties" %}Short answers are fine.{% else %}Detail counts.{% endif %}
      {{ prompt }}
      {{ response }}
verdict: {by: pattern, pattern: '(\\d+)\\z', low: 1, high: 10}
"""


def test_a_page_may_ask_about_ties_in_other_words(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"id": f"{form}{number}", "prompt": f"{form}{number}?", "chosen": ["1"],
         "rejected": ["2"], "subset": "Math" if form == "math" else "Ties"}
        for form in ("math", "ref:", "tied:") for number in range(3)
    ]  # fmt: skip
    page = tmp_path / "page.yaml"
    page.write_text(BY_SUBSET)
    _, found, asked = served(rows, "rewardbench-2", page, tmp_path, lambda _: "7")
    questions = [text for text in asked if "?" in text]
    assert len(questions) == 2 * len(rows)
    for text in questions:
        assert text.startswith("Detail counts." if "math" in text else "Short answers")
    # All answers are equally good: half of each row of Math, and no gap in Ties.
    assert (value(found, "Math"), value(found, "Ties")) == (0.5, 0.0)


@pytest.mark.parametrize("name", ["judgebench", "rewardbench"])
def test_written_orders_that_disagree_are_a_tie(name: str, tmp_path: Path) -> None:
    rows: list[Row] = []
    for number in range(60):
        a, b = f"It is {number}.", f"It is {number + 1}."
        if name == "judgebench":
            source = ("mmlu-pro-law", "livebench-math", "livecodebench", "livebench-reasoning")
            rows.append(
                {"source": source[number % 4], "question": "Which?", "response_A": a,
                 "response_B": b, "label": ("A>B", "B>A")[number % 3 == 0]}
            )  # fmt: skip
        else:
            rows.append({"prompt": "Which?", "chosen": a, "rejected": b, "subset": "hep-go"})
    rows, found, _ = served(rows, name, "sfr_pairwise", tmp_path, a_or_b)
    credits, ties = [], 0
    for row in rows:
        first, second = (each["worths"] for each in row["judgements"])
        if first is None or second is None:
            credits.append(0.0)
            continue
        # What each order says of the right answer: 1 for it, -1 for the other one.
        sign = -1 if row.get("label") == "B>A" else 1
        decided = [sign * (2 * first[0] - 1), sign * (1 - 2 * second[0])]
        assert set(map(abs, decided)) == {1}
        ties += sum(decided) == 0
        half = 0.5 if name == "rewardbench" and sum(decided) == 0 else 0.0
        credits.append(half if sum(decided) <= 0 else 1.0)
    assert ties and {0.0, 1.0} <= set(credits)
    column = {"judgebench": "Score", "rewardbench": "Reasoning"}[name]
    assert value(found, column) == pytest.approx(sum(credits) / len(credits))
    for subset in found["subsets"]:
        named = [row.get("source") or row["subset"] for row in rows]
        here = [c for c, each in zip(credits, named, strict=True) if each == subset["name"]]
        assert subset["accuracy"]["value"] == pytest.approx(sum(here) / len(here))
    assert sum(each["ties"] for each in found["subsets"]) == ties
    assert found["unscored"] == sum(row["score_chosen"] is None for row in rows) > 0


# Any pairs


def test_any_pairs_have_an_accuracy_and_say_how_sure_they_are(judge: Judge, tmp_path: Path) -> None:
    rows: list[Row] = [
        {
            "prompt": f"Say the number {asked}.",
            "chosen": f"It is {asked if number % 4 else other}.",
            "rejected": f"It is {other if number % 4 else asked}.",
            "source": ("web", "books")[number % 2],
            "chosen-model": "tiny",
            "rejected-model": "other",
        }
        for number, (asked, other) in enumerate(asks(20))
    ]
    rows[2]["rejected"] = None
    rows, found = judge(rows, "pairs")
    assert rows[2]["score_error"] == "null_value" and rows[2]["judgements"] is None
    scored = rows[:2] + rows[3:]
    right = np.array([mean_worths(row)[0] for row in scored])
    credits = (right > 0.5) + 0.5 * (right == 0.5)
    assert value(found, "Accuracy") == pytest.approx((right > 0.5).sum() / len(rows))
    assert value(found, "Without a score") == 1 / len(rows)
    assert {each["name"]: each["unscored"] for each in found["subsets"]} == {"books": 0, "web": 1}
    sure = np.maximum(right, 1 - right)
    error, total = 0.0, 0
    for each in found["calibration"]["bins"]:
        is_last = each["high"] == 1.0
        here = (sure >= each["low"]) & ((sure < each["high"]) | is_last)
        assert each["pairs"] == here.sum()
        assert each["right"]["value"] == pytest.approx(credits[here].mean())
        assert each["sure"] == pytest.approx(sure[here].mean())
        error += abs(credits[here].sum() - sure[here].sum())
        total += each["pairs"]
    assert total == len(scored) == found["calibration"]["pairs"]
    assert found["calibration"]["expected_error"] == pytest.approx(error / total)
    assert [(each["name"], each["won_by_label"]) for each in found["writers"]] == [
        ("other", 0.0), ("tiny", 1.0)
    ]  # fmt: skip

    shown = run_cli("evaluate", tmp_path / "out", "--benchmark", "pairs").out
    for said in ("Preference pairs", "the judge's score", "expected calibration error", "tiny"):
        assert said in shown
    refused = run_cli("evaluate", tmp_path / "out")
    assert refused.exit_code == 2
    assert "pairs: any pairs, with --benchmark pairs" in refused.error
