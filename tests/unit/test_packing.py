from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.packing import last_tokens, pack, pad, plan_batches
from batch_scorer.records import TokenizedRows

LENGTHS = st.lists(st.integers(0, 60), max_size=40).map(lambda n: np.array(n, dtype=np.int64))
BUDGETS = st.integers(1, 100)


def make_rows(lengths: list[int]) -> TokenizedRows:
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return TokenizedRows(
        token_ids=np.arange(offsets[-1], dtype=np.int32) + 100,
        sequence_offsets=offsets,
        row_offsets=np.arange(len(offsets), dtype=np.int64),
        truncated_tokens=np.zeros(len(lengths), dtype=np.int32),
        sequence_errors={},
        row_errors={},
    )


@given(LENGTHS, BUDGETS, st.booleans())
def test_every_sequence_with_tokens_is_in_exactly_one_batch(
    lengths: np.ndarray, budget: int, padded: bool
) -> None:
    batches = plan_batches(lengths, budget, padded=padded)
    planned = np.concatenate([np.zeros(0, dtype=np.int64), *batches])
    assert sorted(planned.tolist()) == np.flatnonzero(lengths).tolist()


@given(LENGTHS, BUDGETS, st.booleans())
def test_a_batch_stays_in_the_budget_or_is_a_single_sequence(
    lengths: np.ndarray, budget: int, padded: bool
) -> None:
    for batch in plan_batches(lengths, budget, padded=padded):
        held = lengths[batch]
        cost = held.max() * len(held) if padded else held.sum()
        assert cost <= budget or len(batch) == 1


@given(LENGTHS, BUDGETS, st.booleans())
def test_no_batch_could_have_taken_the_next_sequence_too(
    lengths: np.ndarray, budget: int, padded: bool
) -> None:
    batches = plan_batches(lengths, budget, padded=padded)
    for batch, following in pairwise(batches):
        held = lengths[np.append(batch, following[0])]
        assert (held.max() * len(held) if padded else held.sum()) > budget


@given(LENGTHS, BUDGETS, st.booleans())
def test_the_longest_come_first_and_equal_lengths_keep_their_order(
    lengths: np.ndarray, budget: int, padded: bool
) -> None:
    order = [index for batch in plan_batches(lengths, budget, padded=padded) for index in batch]
    assert order == sorted(order, key=lambda index: (-lengths[index], index))


@given(LENGTHS, BUDGETS)
def test_the_plan_is_a_function_of_lengths_and_budget(lengths: np.ndarray, budget: int) -> None:
    first, second = plan_batches(lengths, budget), plan_batches(lengths.copy(), budget)
    assert [batch.tolist() for batch in first] == [batch.tolist() for batch in second]


def test_packed_batch_is_the_sequences_end_to_end() -> None:
    rows = make_rows([3, 0, 1, 2])
    batch = pack(rows, np.array([3, 0, 2]), last_tokens(rows))
    assert batch.token_ids.tolist() == [104, 105, 100, 101, 102, 103]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.query_offsets.tolist() == [0, 2, 5, 6]
    assert batch.key_offsets.tolist() == [0, 2, 5, 6]
    assert batch.key_index is None
    assert batch.pooled_index.tolist() == [1, 4, 5]
    assert batch.token_ids.dtype == batch.position_ids.dtype == batch.query_offsets.dtype
    assert batch.query_offsets.dtype == np.int32


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.randoms())
def test_packing_loses_no_token(lengths: list[int], random: Random) -> None:
    rows = make_rows(lengths)
    chosen = np.array(random.sample(range(len(lengths)), k=len(lengths)))
    batch = pack(rows, chosen, last_tokens(rows))
    for place, sequence in enumerate(chosen):
        start, stop = batch.query_offsets[place], batch.query_offsets[place + 1]
        own = rows.token_ids[rows.sequence_offsets[sequence] : rows.sequence_offsets[sequence + 1]]
        assert batch.token_ids[start:stop].tolist() == own.tolist()
        assert batch.position_ids[start:stop].tolist() == list(range(lengths[sequence]))
        assert batch.token_ids[batch.pooled_index[place]] == own[-1]


def test_padded_batch_is_padded_on_the_right() -> None:
    batch = pad(make_rows([3, 0, 1, 2]), np.array([0, 3, 2]), pad_id=7)
    assert batch.token_ids.tolist() == [[100, 101, 102], [104, 105, 7], [103, 7, 7]]
    assert batch.lengths.tolist() == [3, 2, 1]


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_to_plan_is_no_batch(padded: bool) -> None:
    assert plan_batches(np.zeros(0, dtype=np.int64), 8, padded=padded) == []
    assert plan_batches(np.zeros(3, dtype=np.int64), 8, padded=padded) == []
