"""The search for poison rows: what it finds, what it costs, when it gives up. Nothing dies here."""

from collections.abc import Callable
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason
from batch_scorer.pipeline.isolation import MOST_POISON, Search, Try, without
from batch_scorer.records import RowError, TokenizedRows

PATIENCE = 2


def carry_out(search: Search, fails: Callable[[Try], bool]) -> Try | None:
    """Make one try after the other; the last, of the whole, or None if the search gave up."""
    while (tried := search.next()) is not None:
        if not fails(tried):
            search.passed(tried)
            if not tried.is_probe:
                return tried
    return None


def holds(poison: set[int]) -> Callable[[Try], bool]:
    """Fails whatever holds a poison row."""
    return lambda tried: any(
        tried.start <= row < tried.stop and row not in tried.without for row in poison
    )


@st.composite
def shards(draw: st.DrawFn, most: int) -> tuple[int, set[int]]:
    """A number of rows, and which of them are poison."""
    num_rows = draw(st.integers(1, 300))
    return num_rows, draw(st.sets(st.integers(0, num_rows - 1), max_size=most))


@given(shards(MOST_POISON), st.integers(1, 3))
def test_exactly_the_poison_is_left_out_and_each_row_of_it_costs_a_logarithm(
    shard: tuple[int, set[int]], patience: int
) -> None:
    num_rows, poison = shard
    search = Search(num_rows, patience)
    last = carry_out(search, holds(poison))
    assert last == Try(0, num_rows, tuple(sorted(poison)))
    most = patience + len(poison) * ceil(log2(num_rows)) if poison else 0
    assert search.num_failed <= most


@given(shards(most=300))
def test_no_row_is_given_up_without_having_failed_alone(shard: tuple[int, set[int]]) -> None:
    num_rows, poison = shard
    last = carry_out(Search(num_rows, PATIENCE), holds(poison))
    if len(poison) > MOST_POISON:
        assert last is None
    else:
        assert last is not None and set(last.without) == poison


@given(st.integers(2, 300), st.sets(st.integers(0, 12)))
def test_tries_that_fail_by_chance_blame_nobody(num_rows: int, unlucky: set[int]) -> None:
    """A machine is lost at some tries, but never while a single row was alone at work."""
    number = -1

    def fails(tried: Try) -> bool:
        nonlocal number
        number += 1
        return number in unlucky and (tried.stop - tried.start > 1)

    last = carry_out(Search(num_rows, PATIENCE), fails)
    assert last is None or last.without == ()


def test_a_shard_that_always_fails_as_a_whole_is_given_up() -> None:
    search = Search(100, PATIENCE)
    assert carry_out(search, lambda tried: not tried.is_probe) is None
    assert search.num_failed == 2 * PATIENCE


def test_late_news_of_a_process_that_was_given_up_change_nothing() -> None:
    search = Search(4, 1)
    whole = search.next()
    first_half = search.next()  # the whole has failed, as far as anyone knows
    assert whole == Try(0, 4) and first_half == Try(0, 2, is_probe=True)
    search.passed(whole)
    assert search.next() == Try(0, 1, is_probe=True)  # so the half has failed too


def test_an_item_without_rows_that_fails_is_given_up() -> None:
    assert carry_out(Search(0, PATIENCE), lambda tried: True) is None


def rows_of(lengths: list[list[int]]) -> TokenizedRows:
    """Rows of sequences of these lengths; token i is i."""
    flat = [length for row in lengths for length in row]
    total = sum(flat)
    return TokenizedRows(
        token_ids=np.arange(total, dtype=np.int32),
        sequence_offsets=np.concatenate([[0], np.cumsum(flat)]).astype(np.int64),
        row_offsets=np.concatenate([[0], np.cumsum([len(row) for row in lengths])]).astype(
            np.int64
        ),
        truncated_tokens=np.zeros(len(flat), dtype=np.int32),
        sequence_errors={},
        row_errors={},
    )


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8),
    st.data(),
)
def test_rows_left_out_keep_their_place_and_the_others_their_tokens(
    lengths: list[list[int]], data: st.DataObject
) -> None:
    rows = rows_of(lengths)
    marked = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    error = RowError(RowReason.WORKER_CRASH, "died")
    left = without(rows, dict.fromkeys(marked, error))
    assert left.row_offsets.tolist() == rows.row_offsets.tolist()
    for row in range(len(lengths)):
        for sequence in range(*rows.row_offsets[[row, row + 1]].tolist()):
            ids = [
                some.token_ids[slice(*some.sequence_offsets[[sequence, sequence + 1]])].tolist()
                for some in (rows, left)
            ]
            assert ids[1] == ([] if row in marked else ids[0])
            assert left.sequence_errors.get(sequence) == (error if row in marked else None)


def test_a_row_that_was_marked_before_keeps_its_first_reason() -> None:
    rows = rows_of([[2, 0], [3]])
    rows.sequence_errors[1] = RowError(RowReason.TOO_LONG, "9 tokens")
    left = without(rows, {0: RowError(RowReason.WORKER_CRASH, "died")})
    reasons = [left.sequence_errors[sequence].reason for sequence in (0, 1)]
    assert reasons == [RowReason.WORKER_CRASH, RowReason.TOO_LONG]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8192])
def test_a_shard_that_nothing_is_wrong_with_takes_one_try(num_rows: int) -> None:
    search = Search(num_rows, PATIENCE)
    assert carry_out(search, lambda tried: False) == Try(0, num_rows)
    assert search.num_failed == 0
