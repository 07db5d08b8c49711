"""What the stages hand on, and what a process needs to take it."""

from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.errors import RowNote, RowReason
from batch_scorer.records import Effort, Reply, RowError, Scores, TokenizedRows
from batch_scorer.shard import score_shard, score_shards


class Version(str):
    """As torch gives its own: a string that only torch can read back."""


def test_what_an_engine_says_of_itself_is_plain_when_it_travels() -> None:
    backend = FakeBackend()
    backend.provenance["torch"] = Version("2.13")
    offsets = np.array([0, 2])
    rows = TokenizedRows(
        np.array([1, 2], np.int32), offsets, np.array([0, 1]), np.zeros(1, np.int32), {}, {}
    )
    engine = score_shard(rows, backend).engine
    assert engine == backend.provenance
    assert {type(value) for value in engine.values()} == {str}


def rows(**facts: Any) -> TokenizedRows:
    """Two rows of one sequence each, of two and three tokens."""
    return TokenizedRows(
        np.array([1, 2, 3, 4, 5], np.int32), np.array([0, 2, 5]), np.array([0, 1, 2]),
        np.zeros(2, np.int32), {}, {}, **facts,
    )  # fmt: skip


def test_a_sequence_that_is_too_long_keeps_its_length() -> None:
    error = RowError(RowReason.TOO_LONG, "9000 tokens")
    marked = TokenizedRows(
        np.array([1, 2], np.int32), np.array([0, 2, 2]), np.array([0, 1, 2]),
        np.zeros(2, np.int32), {1: error}, {}, too_long={1: 9000},
    )  # fmt: skip
    scored = score_shard(marked, FakeBackend())
    assert scored.lengths.tolist() == [2, 9000]
    assert scored.scores.errors == {1: error}


class TwoSteps(FakeBackend):
    """Gives every sequence the scores of two steps."""

    def score(self, rows: TokenizedRows) -> Scores:
        count = rows.num_sequences
        return replace(
            super().score(rows),
            step_values=np.ones(2 * count, np.float32),
            step_offsets=np.arange(count + 1) * 2,
        )


def test_another_number_of_steps_than_the_row_gives_is_marked() -> None:
    scored = score_shard(rows(given_steps={0: 2, 1: 3}), TwoSteps())
    (error,) = scored.scores.errors.values()
    assert list(scored.scores.errors) == [1] and error.reason is RowReason.STEPS_DIFFER
    assert error.detail == "3 steps in the row, 2 step scores"
    assert np.isnan(scored.scores.values[:, 0]).tolist() == [False, True]
    assert score_shard(rows(given_steps={1: 3}), FakeBackend()).scores.errors == {}


def test_a_sequence_with_a_step_that_is_no_number_is_marked() -> None:
    """Its score may be one: that of the last step."""

    class Broken(TwoSteps):
        def score(self, rows: TokenizedRows) -> Scores:
            scores = super().score(rows)
            assert scores.step_values is not None
            scores.step_values[2] = np.nan
            return scores

    scored = score_shard(rows(), Broken())
    (error,) = scored.scores.errors.values()
    assert list(scored.scores.errors) == [1] and error.reason is RowReason.NON_FINITE_SCORE
    assert np.isnan(scored.scores.values[:, 0]).tolist() == [False, True]


def test_notes_go_with_the_scores() -> None:
    noted = rows(notes={1: (RowNote.SAME_TOKENS,)}, special_tokens={0: 4})
    scored = score_shard(noted, FakeBackend())
    assert (scored.notes, scored.special_tokens) == (noted.notes, noted.special_tokens)


class Replying(TwoSteps):
    """Says how often each token came, and loses the sequences that begin with 9."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def score(self, rows: TokenizedRows) -> Scores:
        self.asked.append(rows.num_sequences)
        scores = super().score(rows)
        scores.prompt_tokens = rows.lengths.astype(np.int32)
        scores.replies = []
        bounds = rows.sequence_offsets
        for sequence, (start, stop) in enumerate(pairwise(bounds.tolist())):
            ids = rows.token_ids[start:stop].tolist()
            scores.replies.append(
                None if sequence in rows.sequence_errors else Reply(f"{ids}", "stop")
            )
            if ids[:1] == [9]:
                scores.errors[sequence] = RowError(RowReason.ENGINE_ERROR, f"{ids}")
        return scores


def shard_of(*sequences: list[int], **facts: Any) -> TokenizedRows:
    """A row of each sequence."""
    offsets = np.cumsum([0, *map(len, sequences)])
    count = len(sequences)
    return TokenizedRows(
        np.array([*chain(*sequences)], np.int32), offsets, np.arange(count + 1),
        np.zeros(count, np.int32), facts.pop("sequence_errors", {}), {}, **facts,
    )  # fmt: skip


def test_shards_that_are_scored_together_get_what_each_gets_alone() -> None:
    """With sequences that are known, marked before and lost by the engine among them."""
    too_long = RowError(RowReason.TOO_LONG, "9000 tokens")
    shards = [
        shard_of([1, 2], [9, 3], [4]),
        shard_of([5], [], [6, 7, 8], sequence_errors={1: too_long}, seeds=None),
        shard_of(),
        shard_of([9], [1, 2]),
    ]
    known = Replying().score(shards[0]).part(0, 1)
    known.values = np.concatenate([known.values, np.full((2, 1), np.nan, np.float32)])
    known.step_offsets = np.array([0, 2, 2, 2])
    shards.append(replace(shards[0], known=known))
    shards.append(replace(shard_of([1, 2]), known=known.part(0, 1)))  # nothing is left to ask for
    backend = Replying()
    together = score_shards(shards, backend)
    assert backend.asked == [3 + 3 + 0 + 2 + 2]
    for found, rows_ in zip(together, shards, strict=True):
        alone = score_shard(rows_, Replying())
        np.testing.assert_array_equal(found.scores.values, alone.scores.values)
        assert found.scores.errors == alone.scores.errors
        assert found.scores.replies == alone.scores.replies
        for name in ("step_values", "step_offsets", "prompt_tokens"):
            np.testing.assert_array_equal(
                getattr(found.scores, name), getattr(alone.scores, name), err_msg=name
            )
        assert found.rows_digest == alone.rows_digest
    assert all(one.score_s == 0 and one.scores.effort == Effort() for one in together[1:])


def test_seeds_and_answers_stay_with_their_sequences_when_shards_are_joined() -> None:
    parts = [
        shard_of([1], [2, 3], seeds=np.array([5, 6]), verdicts=np.array([1, 2]),
                 answer_starts=np.array([0, 1], np.int32)),
        shard_of([4, 5, 6], seeds=np.array([7]), verdicts=np.array([3]),
                 answer_starts=np.array([2], np.int32)),
    ]  # fmt: skip
    joined = TokenizedRows.joined(parts)
    assert joined.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert joined.sequence_offsets.tolist() == [0, 1, 3, 6]
    assert joined.row_offsets.tolist() == [0, 1, 2, 3]
    found = (joined.seeds, joined.verdicts, joined.answer_starts)
    assert [each is not None and each.tolist() for each in found] == [
        [5, 6, 7], [1, 2, 3], [0, 1, 2]
    ]  # fmt: skip
