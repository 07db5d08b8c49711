"""A judge's columns, from an engine's answers and back."""

from typing import Any

import numpy as np
import pytest

from batch_scorer.errors import RowReason
from batch_scorer.judges.judgements import judged, judged_rows, judgement_type, stored_verdicts
from batch_scorer.judges.page import JUDGEMENTS, load_page
from batch_scorer.records import Judged, ParsedRows, RowError, Scores, TokenizedRows
from batch_scorer.render.questions import ask


@pytest.mark.parametrize("name", ["pairwise", "sfr_pairwise"])
def test_rows_without_any_question_have_no_judgement(name: str) -> None:
    """A regression: a shard of such rows alone failed as a whole."""
    page = load_page(name)
    null = RowError(RowReason.NULL_VALUE, "rejected is null")
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    _, questions = ask(ParsedRows([talk, null], np.array([0, 2])), page, "template")
    rows = TokenizedRows(
        token_ids=np.zeros(0, np.int32),
        sequence_offsets=np.zeros(1, np.int64),
        row_offsets=np.zeros(2, np.int64),
        truncated_tokens=np.zeros(0, np.int32),
        sequence_errors={},
        row_errors={},
        questions=questions,
    )
    width = 0 if page.generates else len(page.verdict.choices)
    answers = Scores(np.zeros((0, width), np.float32), replies=[] if page.generates else None)
    made = judged_rows(rows, judged(answers, page, []), page, keeps_replies=False)
    reasons = [made.scores.errors[place].reason for place in (0, 1)]
    assert reasons == [RowReason.NULL_VALUE, RowReason.NULL_VALUE]
    assert np.isnan(made.scores.values).all() and made.lengths.tolist() == [0, 0]
    column = made.columns[JUDGEMENTS]
    assert column.to_pylist() == [None]
    assert column.type.value_type == judgement_type(page, keeps_replies=False)
    assert made.counts == Judged()
    assert len(stored_verdicts(column, rows, page).values) == 0


def test_choices_without_any_probability_are_no_verdict_even_where_any_mass_will_do() -> None:
    """Probabilities too small for float32 are 0: their share of nothing is no number."""
    page = load_page("pairwise")
    rule = page.verdict.model_copy(update={"least_mass": 0.0})
    answers = Scores(np.array([[0.0, 0.0], [0.0, 1e-30]], np.float32))
    found = judged(answers, page.model_copy(update={"verdict": rule}), None)
    assert {place: error.reason for place, error in found.errors.items()} == {
        0: RowReason.NO_VERDICT
    }
    assert np.isnan(found.values[0, 0]) and found.values[1, 0] == 0.0


def test_verdicts_for_the_longer_answer_are_counted() -> None:
    """Of each row: its answers' texts, and what the one shown first got in either order."""
    cases = [
        ("long", "no", 0.9, 0.2),  # for the longer one, in both orders
        ("long", "no", 0.9, 0.8),  # for the one that stands first
        ("no", "long", 0.5, 0.6),  # a tie, then for the longer one
        ("yes", "nay", 0.9, 0.1),  # of equal length
    ]
    question = {"role": "user", "content": "Why?"}
    talks: list[Any] = [
        [question, {"role": "assistant", "content": text}] for case in cases for text in case[:2]
    ]
    page = load_page("pairwise")
    asked, questions = ask(ParsedRows(talks, np.arange(0, 9, 2)), page, "template")
    count = len(asked.sequences)
    rows = TokenizedRows(
        token_ids=np.arange(count, dtype=np.int32),
        sequence_offsets=np.arange(count + 1),
        row_offsets=asked.row_offsets,
        truncated_tokens=np.zeros(count, np.int32),
        sequence_errors={},
        row_errors={},
        questions=questions,
    )
    worths = np.array([worth for case in cases for worth in case[2:]])
    answers = Scores(np.stack([worths, 1 - worths], axis=1).astype(np.float32))
    counts = judged_rows(rows, judged(answers, page, None), page, keeps_replies=False).counts
    assert (counts.comparisons, counts.disagree) == (4, 2)
    assert (counts.decisive, counts.first_preferred) == (7, 5)
    assert (counts.unequal, counts.longer_preferred) == (5, 4)
    assert counts.longer_share == 0.8 and Judged().longer_share is None
    assert (counts + counts).longer_share == 0.8
