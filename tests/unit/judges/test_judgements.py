"""A judge's columns, from an engine's answers and back."""

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
    assert reasons == [RowReason.NOT_A_PAIR, RowReason.NULL_VALUE]
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
