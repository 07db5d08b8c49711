import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.config import OverLength
from batch_scorer.errors import RowNote, RowReason
from batch_scorer.formats.shape import shape_of
from batch_scorer.outputs.by_source import pair_counts, row_sources
from batch_scorer.outputs.columns import column_metadata, digest_columns, score_columns
from batch_scorer.records import (
    SCALAR,
    Format,
    Layout,
    Outputs,
    PairCounts,
    RowError,
    ScoredRows,
    Scores,
)

NAN = float("nan")
TOO_LONG = RowError(RowReason.TOO_LONG, "")
NULL = RowError(RowReason.NULL_VALUE, "")


def scored(
    values: list[float] | list[list[float]],
    row_offsets: list[int],
    sequence_errors: dict[int, RowError] | None = None,
    row_errors: dict[int, RowError] | None = None,
    truncated: list[int] | None = None,
    steps: list[list[float]] | None = None,
) -> ScoredRows:
    scores = Scores(
        np.array(values, dtype=np.float32).reshape(len(values), -1 if values else 1),
        sequence_errors or {},
    )
    if steps is not None:
        scores.step_values = np.concatenate([np.float32([]), *map(np.float32, steps)])
        scores.step_offsets = np.cumsum([0, *map(len, steps)])
    return ScoredRows(
        scores=scores,
        lengths=np.arange(1, len(values) + 1, dtype=np.int32),
        truncated_tokens=np.array(truncated or [0] * len(values), dtype=np.int32),
        row_offsets=np.array(row_offsets, dtype=np.int64),
        row_errors=row_errors or {},
        rows_digest="",
        engine={},
        score_s=0.0,
    )


def columns(
    format: Format,
    rows: ScoredRows,
    table: pa.Table | None = None,
    outputs: Outputs = SCALAR,
    **names: str,
) -> dict[str, list[object]]:
    layout = Layout(format, names)
    table = table if table is not None else pa.table({"x": [0] * rows.num_rows})
    made = score_columns(rows, outputs, table, layout, "", OverLength.MARK)
    return {name: column.to_pylist() for name, column in made.items()}


def test_pairs() -> None:
    rows = scored(
        [3.0, 1.5, NAN, 2.0], [0, 2, 4, 4], sequence_errors={2: TOO_LONG}, row_errors={2: NULL}
    )
    assert columns(Format.PREFERENCE_PAIR, rows) == {
        "score_chosen": [3.0, None, None],
        "score_rejected": [1.5, 2.0, None],
        "margin": [1.5, None, None],
        "score_error": [None, "too_long", "null_value"],
        "num_tokens_chosen": [1, 3, None],
        "num_tokens_rejected": [2, 4, None],
        "score_notes": [None] * 3,
        "num_special_tokens": [None] * 3,
    }


def test_rollout_groups_keep_the_place_of_a_response_without_a_score() -> None:
    rows = scored(
        [1.0, NAN, 3.0, 4.0],
        [0, 3, 3, 4],
        sequence_errors={1: TOO_LONG},
        row_errors={1: NULL},
    )
    assert columns(Format.ROLLOUT_GROUP, rows) == {
        "scores": [[1.0, None, 3.0], None, [4.0]],
        "score_error": ["too_long", "null_value", None],
        "num_tokens": [[1, 2, 3], None, [4]],
        "score_notes": [None] * 3,
        "num_special_tokens": [None] * 3,
    }


def test_best_of_n_is_split_by_the_number_of_right_answers() -> None:
    table = pa.table({"right": [["a"], None, ["b", "c"]]})
    rows = scored([1.0, 2.0, 3.0, 4.0, 5.0], [0, 2, 2, 5], row_errors={1: NULL})
    made = columns(Format.BEST_OF_N, rows, table, chosen="right")
    assert made["scores_chosen"] == [[1.0], None, [3.0, 4.0]]
    assert made["scores_rejected"] == [[2.0], None, [5.0]]
    assert made["num_tokens_rejected"] == [[2], None, [5]]


def test_single_sequences() -> None:
    rows = scored([1.0, 2.0], [0, 1, 1, 2], row_errors={1: NULL})
    assert columns(Format.TEXT, rows) == {
        "score": [1.0, None, 2.0],
        "score_error": [None, "null_value", None],
        "num_tokens": [1, None, 2],
        "score_notes": [None] * 3,
        "num_special_tokens": [None] * 3,
    }


def test_notes_and_special_tokens_stand_in_their_rows() -> None:
    rows = scored([1.0, 2.0], [0, 1, 1, 2], row_errors={1: NULL})
    rows.notes = {2: (RowNote.ANSWER_REWRITTEN, RowNote.ROLE_RENAMED)}
    rows.special_tokens = {0: 3}
    made = columns(Format.TEXT, rows)
    assert list(made)[-2:] == ["score_notes", "num_special_tokens"]
    assert made["score_notes"] == [None, None, ["answer_rewritten", "role_renamed"]]
    assert made["num_special_tokens"] == [3, None, None]


def test_truncation_is_counted_for_each_sequence() -> None:
    rows = scored([1.0, 2.0, 3.0, 4.0], [0, 2, 4], truncated=[5, 7, 0, 0])
    layout = Layout(Format.PREFERENCE_PAIR, {})
    table = pa.table({"x": [0, 0]})
    for policy in (policy for policy in OverLength if policy.cuts):
        made = score_columns(rows, SCALAR, table, layout, "rm_", policy)
        assert made["rm_num_truncated_tokens_chosen"].to_pylist() == [5, 0]
        assert made["rm_num_truncated_tokens_rejected"].to_pylist() == [7, 0]


@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("over_length", list(OverLength))
def test_the_names_are_those_that_are_made(format: Format, over_length: OverLength) -> None:
    table = pa.table({"chosen": pa.array([], pa.list_(pa.string()))})
    layout = Layout(format, {"chosen": "chosen"})
    for outputs, width in (
        (SCALAR, 1),
        (Outputs(("a", "b"), steps=True), 3),
        (Outputs(("a",), tokens=True), 2),
        (Outputs((), False, 4), 4),
    ):
        rows = scored([], [0], steps=[])
        rows.scores.values = np.zeros((0, width), dtype=np.float32)
        made = score_columns(rows, outputs, table, layout, "p_", over_length)
        assert list(made) == shape_of(format).added_columns("p_", over_length, outputs)


def test_attributes_are_named_vectors_beside_the_score() -> None:
    outputs = Outputs(attributes=("helpfulness", "verbosity"))
    rows = scored(
        [[1.0, 0.5, 0.25], [2.0, 1.5, 1.25], [NAN] * 3, [3.0, 2.5, 2.25]],
        [0, 2, 4],
        {2: TOO_LONG},
    )
    made = columns(Format.PREFERENCE_PAIR, rows, outputs=outputs)
    assert made["score_chosen"] == [1.0, None]
    assert made["rewards_chosen"] == [[0.5, 0.25], None]
    assert made["rewards_rejected"] == [[1.5, 1.25], [2.5, 2.25]]
    named = column_metadata(outputs, "rm_")["rm_rewards_chosen"]
    assert named == {"batch_scorer.attributes": '["helpfulness", "verbosity"]'}


def test_every_step_has_its_score() -> None:
    """T-PRM-1: as many step scores as steps, none for a sequence that has no score."""
    rows = scored(
        [0.5, NAN, 0.25],
        [0, 2, 3],
        {1: TOO_LONG},
        steps=[[0.5, 0.75], [], [0.25]],
    )
    made = columns(Format.ROLLOUT_GROUP, rows, outputs=Outputs(steps=True))
    assert made["scores"] == [[0.5, None], [0.25]]
    assert made["step_scores"] == [[[0.5, 0.75], None], [[0.25]]]


def test_every_token_has_its_score() -> None:
    """By side, as scores are; none for a sequence that has no score."""
    rows = scored(
        [[0.5, 9.0], [NAN] * 2, [0.25, 8.0], [0.75, 7.0]],
        [0, 2, 4],
        {1: TOO_LONG},
        steps=[[1.0, 0.5], [], [0.25], [2.0, 1.0, 0.75]],
    )
    made = columns(Format.PREFERENCE_PAIR, rows, outputs=Outputs(("raw_score",), tokens=True))
    assert made["token_scores_chosen"] == [[1.0, 0.5], [0.25]]
    assert made["token_scores_rejected"] == [None, [2.0, 1.0, 0.75]]
    assert made["rewards_chosen"] == [[9.0], [8.0]]


def test_a_shard_without_any_score_has_no_lists() -> None:
    rows = scored([NAN, NAN], [0, 1, 2], {0: TOO_LONG, 1: TOO_LONG})
    for outputs in (Outputs(steps=True), Outputs(tokens=True)):
        made = columns(Format.ROLLOUT, rows, outputs=outputs)
        assert made[outputs.list_column or ""] == [None, None]


def test_embeddings_are_vectors_without_a_score() -> None:
    rows = scored([[1.0, 0.0], [NAN, NAN]], [0, 1, 2], {1: TOO_LONG})
    made = columns(Format.TEXT, rows, outputs=Outputs((), False, 2))
    assert made == {
        "embedding": [[1.0, 0.0], None],
        "score_error": [None, "too_long"],
        "num_tokens": [1, 2],
        "score_notes": [None] * 2,
        "num_special_tokens": [None] * 2,
    }


def test_pairs_are_counted_by_source_and_a_tie_is_no_win() -> None:
    table = pa.table({"source": ["a", "b", "a", "a"]})
    chosen = pa.array([2.0, 1.0, 0.0, None], pa.float32())
    rejected = pa.array([1.0, 1.0, 5.0, 1.0], pa.float32())
    counts = pair_counts(chosen, rejected, row_sources(table))
    assert counts == {"a": PairCounts(2, 1, 0), "b": PairCounts(1, 0, 1)}
    unnamed = row_sources(pa.table({"other": [1] * 4}))
    assert pair_counts(chosen, rejected, unnamed) == {"all": PairCounts(3, 1, 1)}
    without_row_1 = pair_counts(chosen, rejected, unnamed, same_tokens=[1])
    assert without_row_1 == {"all": PairCounts(2, 1, 0)}


def test_the_digest_survives_parquet_and_sees_every_change() -> None:
    made = {
        "score": pa.array([1.0, None, 3.0], pa.float32()),
        "scores": pa.array([[1.0, None], None, []], pa.list_(pa.float32())),
        "score_error": pa.array([None, "too_long", None]),
        "rewards": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        "step_scores": pa.array([[[1.0], None], None, []], pa.list_(pa.list_(pa.float32()))),
        "score_notes": pa.array([["a", "b"], None, ["c"]]),
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(made), sink)
    read = pq.read_table(io.BytesIO(sink.getvalue()))
    back = {name: read[name].combine_chunks() for name in made}
    digest = digest_columns(made)
    assert digest_columns(back) == digest
    changes = {
        "score": pa.array([1.0, None, math.nextafter(3.0, 4.0) + 1e-6], pa.float32()),
        "scores": pa.array([[1.0, None], [], []], pa.list_(pa.float32())),
        "score_error": pa.array([None, "too_long", "empty"]),
        "rewards": pa.array([[1.0, 2.0], None, [3.0, 5.0]], pa.list_(pa.float32(), 2)),
        "step_scores": pa.array([[[1.0], []], None, []], pa.list_(pa.list_(pa.float32()))),
        "score_notes": pa.array([["a"], None, ["b", "c"]]),
    }
    for name, column in changes.items():
        assert digest_columns({**made, name: column}) != digest
