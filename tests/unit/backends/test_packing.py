from itertools import accumulate, pairwise
from random import Random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batch_scorer.backends.packing import (
    TokenTrie,
    build_trie,
    longest_first,
    pad,
    rectangle_stop,
)
from batch_scorer.records import PooledTokens, TokenizedRows

Sequences = list[list[int]]

LENGTHS = st.lists(st.integers(0, 60), max_size=40).map(lambda n: np.array(n, dtype=np.int64))
BUDGETS = st.integers(1, 100)
# Two tokens only: long prefixes are shared, sequences are equal, and some end inside of others.
SEQUENCES = st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=24)
DEEP = [
    [1] * depth + [2] * branch + [3] * leaf
    for depth in (3, 6, 9, 12)
    for branch in (0, 2, 4)
    for leaf in (1, 1, 5)
]
"""Shared prefixes inside shared prefixes, four deep, with equal sequences."""
ONE_GROUP = [[7] * 50 + [8, answer, 9] for answer in range(64)]
"""A prompt and its 64 answers: any small budget cuts the group many times."""


def make_rows(sequences: Sequences) -> TokenizedRows:
    offsets = np.array([0, *accumulate(map(len, sequences))], dtype=np.int64)
    return TokenizedRows(
        token_ids=np.array([token for ids in sequences for token in ids], dtype=np.int32),
        sequence_offsets=offsets,
        row_offsets=np.arange(len(offsets), dtype=np.int64),
        truncated_tokens=np.zeros(len(sequences), dtype=np.int32),
        sequence_errors={},
        row_errors={},
    )


def prefixes(sequences: Sequences) -> set[tuple[int, ...]]:
    return {tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))}


def spelled(trie: TokenTrie, budget: int) -> list[tuple[int, ...]]:
    """The prefix that ends at each token of the trie, read off batches of `budget` tokens."""
    found: list[tuple[int, ...]] = []
    carried = np.zeros(0, dtype=np.int32)
    for start in range(0, trie.num_tokens, budget):
        batch = trie.batch(start, min(start + budget, trie.num_tokens))
        assert 0 < batch.num_tokens <= budget
        assert batch.num_carried == len(carried)
        keys = np.concatenate([carried, batch.token_ids])
        tokens = list(range(batch.num_tokens))
        for token, ancestors in zip(tokens, batch.ancestors(tokens), strict=True):
            found.append((*keys[ancestors].tolist(), int(batch.token_ids[token])))
        carried = keys[batch.kept_keys]
    assert len(carried) == 0
    return found


@given(SEQUENCES, BUDGETS)
@example(DEEP, 1)
@example(DEEP, 7)
@example(ONE_GROUP, 20)
@settings(max_examples=200)
def test_every_distinct_prefix_is_computed_once_whatever_the_budget(
    sequences: Sequences, budget: int
) -> None:
    trie = build_trie(make_rows(sequences))
    found = spelled(trie, budget)
    assert len(found) == trie.num_tokens == len(prefixes(sequences))
    assert set(found) == prefixes(sequences)


@given(SEQUENCES, st.randoms())
@example(DEEP, Random(1))
def test_every_sequence_ends_where_its_tokens_end(sequences: Sequences, random: Random) -> None:
    rows = make_rows(sequences)
    chosen = [index for index, ids in enumerate(sequences) if ids]
    random.shuffle(chosen)
    trie = build_trie(rows, np.array(chosen, dtype=np.int64))
    found = spelled(trie, 5)
    assert [found[end] for end in trie.ends] == [tuple(sequences[index]) for index in chosen]
    assert trie.position_ids[trie.ends].tolist() == [len(sequences[index]) - 1 for index in chosen]


@given(SEQUENCES, st.data())
def test_pooled_tokens_are_found_wherever_they_lie(
    sequences: Sequences, data: st.DataObject
) -> None:
    chosen = [index for index, ids in enumerate(sequences) if ids]
    places = [
        sorted(data.draw(st.sets(st.integers(0, len(sequences[index]) - 1), min_size=1)))
        for index in chosen
    ]
    pooled = PooledTokens(
        np.array([place for some in places for place in some], dtype=np.int64),
        np.array([0, *accumulate(map(len, places))], dtype=np.int64),
    )
    trie = build_trie(make_rows(sequences), np.array(chosen, dtype=np.int64), pooled)
    found = spelled(trie, 100)
    wanted = [
        tuple(sequences[index][: place + 1])
        for index, some in zip(chosen, places, strict=True)
        for place in some
    ]
    assert [found[index] for index in trie.pooled_index] == wanted


@given(SEQUENCES, st.integers(1, 6))
@example(DEEP, 3)
@example(ONE_GROUP, 2)
def test_parts_share_the_sequences_out(sequences: Sequences, count: int) -> None:
    rows = make_rows(sequences)
    chosen = np.flatnonzero(rows.lengths)
    trie = build_trie(rows, chosen)
    parts = trie.parts(count)
    assert 1 <= len(parts) <= count
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(chosen)))
    assert all(len(part) for part in parts) or not len(chosen)
    again = [build_trie(rows, chosen[part]) for part in parts]
    repeated = sum(part.num_tokens for part in again) - trie.num_tokens
    longest = max(map(len, sequences), default=0)
    assert 0 <= repeated <= (len(parts) - 1) * longest
    if len({tuple(ids) for ids in sequences}) >= 4 * count:
        sizes = [part.num_tokens for part in again]
        assert max(sizes) - trie.num_tokens / count <= 2 * longest


@given(SEQUENCES)
@example(DEEP)
def test_a_subtree_holds_all_that_goes_through_its_first_token(sequences: Sequences) -> None:
    trie = build_trie(make_rows(sequences))
    found = spelled(trie, 100)
    for start, prefix in enumerate(found):
        inside = [index for index, other in enumerate(found) if other[: len(prefix)] == prefix]
        assert inside == list(range(start, trie.subtree_stop(start)))


@given(SEQUENCES, BUDGETS)
@example(ONE_GROUP, 16)
def test_a_batch_reads_the_pooled_tokens_inside_it(sequences: Sequences, budget: int) -> None:
    rows = make_rows(sequences)
    chosen = np.flatnonzero(rows.lengths)
    last = PooledTokens(rows.lengths[chosen] - 1, np.arange(len(chosen) + 1))
    trie = build_trie(rows, chosen, last)
    read = [
        start + place
        for start in range(0, trie.num_tokens, budget)
        for place in trie.batch(start, min(start + budget, trie.num_tokens)).pooled_index
    ]
    assert read == sorted(set(trie.ends.tolist()))


def test_what_a_trie_looks_like() -> None:
    trie = build_trie(make_rows([[5, 6, 7], [5, 6, 8, 9], [5, 6], [], [4], [5, 6, 7]]))
    assert trie.token_ids.tolist() == [4, 5, 6, 7, 8, 9]
    assert trie.position_ids.tolist() == [0, 0, 1, 2, 2, 3]
    assert trie.ends.tolist() == [3, 5, 2, 0, 3]
    batch = trie.batch(3, 6)
    assert batch.num_carried == 2
    assert batch.run_starts.tolist() == [0, 1]
    assert batch.attended_pairs == 3 + 3 + 4
    assert batch.token_ids.dtype == batch.position_ids.dtype == np.int32


@given(LENGTHS)
def test_the_longest_come_first_and_equal_lengths_keep_their_order(lengths: np.ndarray) -> None:
    order = longest_first(lengths).tolist()
    assert sorted(order) == np.flatnonzero(lengths).tolist()
    assert order == sorted(order, key=lambda index: (-lengths[index], index))


@given(LENGTHS, BUDGETS)
def test_rectangles_take_everything_and_as_much_at_a_time_as_the_budget_allows(
    lengths: np.ndarray, budget: int
) -> None:
    ordered = lengths[longest_first(lengths)]
    cuts = [0]
    while cuts[-1] < len(ordered):
        cuts.append(rectangle_stop(ordered, cuts[-1], budget))
    for start, stop in pairwise(cuts):
        cost = int(ordered[start]) * (stop - start)
        assert cost <= budget or stop == start + 1
        assert stop == len(ordered) or cost + ordered[start] > budget


def test_padded_batch_is_padded_on_the_right() -> None:
    rows = make_rows([[100, 101, 102], [], [103], [104, 105]])
    batch = pad(rows, np.array([0, 3, 2]), pad_id=7)
    assert batch.token_ids.tolist() == [[100, 101, 102], [104, 105, 7], [103, 7, 7]]
    assert batch.lengths.tolist() == [3, 2, 1]
