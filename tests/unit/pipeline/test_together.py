"""Shards that are asked of an engine together: which, and what becomes of one that fails."""

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.config import ENGINES
from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.judges.page import Generation
from batch_scorer.pipeline.ray_data import _items
from batch_scorer.pipeline.worker import Item, Scorer
from batch_scorer.records import Scores, Shard, TokenizedRows
from tests.helpers.receipts import SHARD

POISON = 99


def shard(num_rows: int) -> Shard:
    return replace(SHARD, num_rows=num_rows)


class Delicate(FakeBackend):
    """Raises at a token, and remembers how many sequences it was asked for."""

    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self._error = error
        self.asked: list[int] = []

    def score(self, rows: TokenizedRows) -> Scores:
        self.asked.append(rows.num_sequences)
        if POISON in rows.token_ids:
            raise self._error("at this token")
        return super().score(rows)


def scorer(backend: FakeBackend) -> Scorer:
    config = SimpleNamespace(hang_s=60.0)
    job: Any = SimpleNamespace(engine=ENGINES["fake"], config=config, judging=None)
    return Scorer(job, lambda: None, lambda _: backend)


def item(*tokens: int) -> Item[TokenizedRows]:
    """A shard with a row of each token."""
    count = len(tokens)
    offsets = np.arange(count + 1)
    zeros = np.zeros(count, np.int32)
    rows = TokenizedRows(np.array(tokens, np.int32), offsets, offsets, zeros, {}, {})
    return Item(shard(count), rows)


def test_the_engine_is_asked_once_and_a_shard_that_was_not_read_keeps_its_error() -> None:
    backend = Delicate()
    unread: Item[TokenizedRows] = Item(shard(1), error=ShardError(ShardReason.INTERNAL, "torn"))
    found = scorer(backend).score_together([item(1, 2), unread, item(3)])
    assert backend.asked == [3]
    assert [each.rows is None for each in found] == [False, True, False]
    assert found[1].error is unread.error
    assert [each.num_rows for each in found] == [2, 0, 1]


def test_where_the_engine_fails_one_row_is_marked_and_all_others_are_scored() -> None:
    backend = Delicate()
    found = scorer(backend).score_together([item(1, 2), item(3, POISON, 4), item(5)])
    marked = [each.rows.scores.errors for each in found if each.rows is not None]
    assert [list(errors) for errors in marked] == [[], [1], []]
    assert marked[1][1].reason is RowReason.ENGINE_ERROR
    assert backend.asked[0] == 6


def test_an_engine_that_died_ends_all_of_them() -> None:
    with pytest.raises(EngineDied):
        scorer(Delicate(EngineDied)).score_together([item(1), item(POISON)])


@pytest.mark.parametrize(
    ("shards", "workers", "most_tokens", "expected"),
    [
        (64, 1, 1024, [16, 16, 16, 16]),  # four for each worker
        (64, 4, 1024, [4] * 16),
        (300, 1, 1024, [20] * 15),  # 20 shards of 100 rows: two million tokens
        (300, 1, 16384, [1] * 300),
        (300, 1, 8, [32] * 9 + [12]),
        (3, 1, 1024, [1, 1, 1]),
    ],
)
def test_a_judge_that_writes_gets_minutes_of_work_at_a_time(
    shards: int, workers: int, most_tokens: int, expected: list[int]
) -> None:
    page = SimpleNamespace(generation=Generation(max_tokens=most_tokens))
    job: Any = SimpleNamespace(asks_together=True, model=SimpleNamespace(judge=page))
    todo = [shard(100) for _ in range(shards)]
    bundles = list(_items(job, todo, workers))
    assert [len(bundle) for bundle in bundles] == expected
    assert [*chain(*bundles)] == todo


@pytest.mark.parametrize(
    ("shards", "workers", "tokens", "expected"),
    [
        (10_000, 2, 5_000, [32] * 312 + [16]),
        (300, 1, 5_000, [18] * 16 + [12]),
        (300, 64, 5_000, [1] * 300),
        (300, 1, 100_000, [10] * 30),  # as much as a shard may have
        (300, 1, 1_000_000, [1] * 300),
        (20, 1, 5_000, [1] * 20),  # a shard is committed now and then
    ],
)
def test_small_shards_share_an_item_where_there_are_many(
    shards: int, workers: int, tokens: int, expected: list[int]
) -> None:
    config = SimpleNamespace(shard_tokens=1_000_000)
    job: Any = SimpleNamespace(asks_together=False, config=config)
    todo = [replace(SHARD, estimated_tokens=tokens) for _ in range(shards)]
    bundles = list(_items(job, todo, workers))
    assert [len(bundle) for bundle in bundles] == expected
    assert [*chain(*bundles)] == todo
