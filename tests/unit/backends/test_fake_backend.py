import numpy as np

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.errors import RowReason
from batch_scorer.records import RowError, Scores, TokenizedRows


def score(*sequences: list[int], errors: dict[int, RowError] | None = None) -> Scores:
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    token_ids = np.array([token for ids in sequences for token in ids], dtype=np.int32)
    row_offsets = np.arange(len(offsets), dtype=np.int64)
    truncated = np.zeros(len(sequences), dtype=np.int32)
    return FakeBackend().score(
        TokenizedRows(token_ids, offsets, row_offsets, truncated, errors or {}, {})
    )


def test_a_score_depends_on_the_tokens_of_its_own_sequence_only() -> None:
    alone = score([5, 6, 7]).values[0]
    among_others = score([1], [5, 6, 7], [2, 3]).values[1]
    assert alone == among_others


def test_tokens_and_their_order_change_the_score() -> None:
    values = score([5, 6], [6, 5], [5, 6, 0], [5], [0]).values[:, 0]
    assert len(set(values.tolist())) == 5


def test_scores_spread_over_their_range() -> None:
    values = score(*([token] for token in range(4000))).values
    assert values.dtype == np.float32
    assert -8 <= values.min() < -7.9
    assert 7.9 < values.max() < 8
    assert abs(values.mean()) < 0.3  # 4000 uniform scores have a standard error of 0.07


def test_only_sequences_that_arrive_without_tokens_and_without_a_reason_are_named() -> None:
    broken = RowError(RowReason.MALFORMED_JSON, "not JSON")
    scores = score([1], [], [2], [], errors={1: broken})
    assert np.isnan(scores.values[:, 0]).tolist() == [False, True, False, True]
    assert {index: error.reason for index, error in scores.errors.items()} == {3: RowReason.EMPTY}
