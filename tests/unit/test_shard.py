"""What the stages hand on, and what a process needs to take it."""

from dataclasses import replace
from typing import Any

import numpy as np

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.errors import RowNote, RowReason
from batch_scorer.records import RowError, Scores, TokenizedRows
from batch_scorer.shard import score_shard


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
