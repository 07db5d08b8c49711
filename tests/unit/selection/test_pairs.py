"""Which pairs are made of responses, against the rules computed in plain Python."""

import random
from itertools import combinations, pairwise
from typing import Any

import duckdb
import pytest

from batch_scorer.selection.pairs import PromptCounts, count_prompts, pair_up
from batch_scorer.selection.recipe import NoPair, Pairs, Selection

Line = tuple[int, int, int, int, str, float | None, int, int, int | None]
"""part, row, slot, grp, category, value, tie, text, tokens"""

INF, NAN = float("inf"), float("nan")


def line(
    row: int,
    value: float | None,
    text: int,
    *,
    grp: int = 1,
    tokens: int | None = 10,
    part: int = 0,
) -> Line:
    return (part, row, -1, grp, "chat", value, text, text, tokens)


def paired(
    lines: list[Line], max_tokens: int | None = None, **recipe: Any
) -> tuple[list[tuple[float, float]], PromptCounts, list[Any]]:
    """Scores of both sides in order, the counts, and the groups and texts' rows in order."""
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE candidates(part INTEGER, row INTEGER, slot INTEGER, grp UHUGEINT,"
            " category VARCHAR, value DOUBLE, tie UBIGINT, text UBIGINT, tokens INTEGER)"
        )
        connection.executemany("INSERT INTO candidates VALUES (?,?,?,?,?,?,?,?,?)", lines)
        selection = Selection(max_tokens=max_tokens, **recipe)
        pair_up(connection, selection)
        counts = count_prompts(connection)
        found = connection.execute(
            "SELECT score_chosen, score_rejected, place, grp FROM pairs ORDER BY place"
        ).fetchall()
    assert [row[2] for row in found] == list(range(len(found)))
    return [(row[0], row[1]) for row in found], counts, [row[3] for row in found]


FOUR = [line(0, 3.0, 1), line(1, 1.0, 2), line(2, 2.0, 3), line(3, 0.5, 4)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Pairs.BEST_WORST, [(3.0, 0.5)]),
        (Pairs.ADJACENT, list(pairwise([3.0, 2.0, 1.0, 0.5]))),
        (Pairs.ALL, list(combinations([3.0, 2.0, 1.0, 0.5], 2))),
    ],
)
def test_each_rule_makes_its_pairs(rule: Pairs, expected: list[tuple[float, float]]) -> None:
    assert sorted(paired(FOUR, pairs=rule)[0]) == sorted(expected)


def test_random_below_the_best_is_decided_by_the_seed() -> None:
    by_seed = {seed: paired(FOUR, pairs="best_random", seed=seed)[0] for seed in range(8)}
    assert {pairs[0][0] for pairs in by_seed.values()} == {3.0}
    assert {pairs[0][1] for pairs in by_seed.values()} == {2.0, 1.0, 0.5}
    assert by_seed == {s: paired(FOUR, pairs="best_random", seed=s)[0] for s in range(8)}


@pytest.mark.parametrize("rule", Pairs)
def test_no_pair_of_one_text_of_equal_values_or_of_what_is_no_number(rule: Pairs) -> None:
    lines = [line(0, 1.0, 1), line(1, 0.5, 1), line(2, 1.0, 2)]
    lines += [line(3, None, 3), line(4, NAN, 4), line(5, INF, 5), line(6, -INF, 6)]
    pairs, counts, _ = paired(lines, pairs=rule)
    assert pairs == []
    assert counts == PromptCounts(1, {NoPair.EQUAL: 1})


@pytest.mark.parametrize("rule", Pairs)
def test_margins_are_larger_than_the_least(rule: Pairs) -> None:
    pairs, _, _ = paired(FOUR, pairs=rule, min_margin=1.0)
    assert all(chosen - rejected > 1.0 for chosen, rejected in pairs)


def test_at_most_so_many_pairs_of_a_prompt_those_with_the_largest_margin() -> None:
    pairs, _, _ = paired(FOUR, pairs="all", pairs_per_prompt=2)
    assert pairs == [(3.0, 0.5), (3.0, 1.0)]


def test_every_prompt_without_a_pair_has_a_reason() -> None:
    lines = [line(0, 1.0, 1, grp=1), line(1, None, 2, grp=2), line(2, 1.0, 3, grp=3)]
    lines += [line(3, 1.0, 4, grp=3), line(4, 1.0, 5, grp=4), line(5, 0.9, 6, grp=4)]
    lines += [line(6, 2.0, 7, grp=5, tokens=99), line(7, 1.0, 8, grp=5)]
    lines += [line(8, 2.0, 9, grp=6), line(9, 1.0, 10, grp=6, tokens=None)]
    lines += [line(10, 2.0, 11, grp=7), line(11, 1.0, 12, grp=7)]
    _, counts, groups = paired(lines, pairs="best_worst", min_margin=0.5, max_tokens=50)
    assert counts.without_pair == {
        NoPair.ONE_RESPONSE: 2,
        NoPair.EQUAL: 1,
        NoPair.MARGIN: 1,
        NoPair.TOO_LONG: 2,
    }
    assert counts.prompts == 7
    assert groups == [7]


@pytest.mark.parametrize("rule", Pairs)
def test_other_shards_and_another_order_give_the_same_pairs(rule: Pairs) -> None:
    dice = random.Random(5)
    lines = [line(i, dice.choice([0.0, 1.0, 2.0]), i, grp=i % 7) for i in range(80)]
    recipe: dict[str, Any] = {"pairs": rule, "shuffle": True, "pairs_per_prompt": 3, "seed": 4}
    expected = paired(lines, **recipe)
    dice.shuffle(lines)
    moved = [(i % 5, i // 5, *rest[2:]) for i, rest in enumerate(lines)]
    assert paired(moved, **recipe) == expected
