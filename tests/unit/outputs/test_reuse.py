"""Rows of a rewritten file take the scores that equal sequences got before."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.config import OverLength, PartialConfig
from batch_scorer.errors import RowReason
from batch_scorer.outputs.by_source import row_sources, spread_by_source
from batch_scorer.outputs.columns import score_columns, score_items, sequence_scores
from batch_scorer.outputs.reuse import (
    EARLIER,
    MOST_EARLIER,
    Earlier,
    find_known,
    keep,
    kept,
    nearest,
)
from batch_scorer.records import (
    SCALAR,
    Effort,
    Format,
    Layout,
    Outputs,
    Questions,
    Receipt,
    RowError,
    ScoredRows,
    Scores,
    Spread,
    Status,
    Stored,
    TokenizedRows,
    layout_to_json,
)
from batch_scorer.shard import score_shard
from batch_scorer.storage import Store
from tests.helpers.receipts import COMMIT, SHARD

TOO_LONG = RowError(RowReason.TOO_LONG, "")
NULL = RowError(RowReason.NULL_VALUE, "")


# score_columns and back

COUNTS = {
    Format.PREFERENCE_PAIR: st.sampled_from([0, 2]),
    Format.BEST_OF_N: st.integers(0, 4),
    Format.ROLLOUT_GROUP: st.integers(0, 4),
}
OUTPUTS = [
    SCALAR,
    Outputs(("a", "b")),
    Outputs(steps=True),
    Outputs(("a",), tokens=True),
    Outputs(embedding_size=3),
]


@st.composite
def scored_rows(draw: st.DrawFn) -> tuple[ScoredRows, Outputs, pa.Table, Layout]:
    """Rows of any format with any outputs, some without a score, some not cut into sequences."""
    format = draw(st.sampled_from(list(Format)))
    outputs = draw(st.sampled_from(OUTPUTS))
    counts = draw(st.lists(COUNTS.get(format, st.integers(0, 1)), max_size=6))
    offsets = np.cumsum([0, *counts])
    total = int(offsets[-1])
    width = outputs.embedding_size or 1 + len(outputs.attributes)
    random = np.random.default_rng(draw(st.integers(0, 99)))
    values = random.normal(size=(total, width)).astype(np.float32)
    broken = draw(st.sets(st.integers(0, total - 1))) if total else set()
    values[list(broken)] = np.nan
    steps = np.array([0 if s in broken else 1 + s % 3 for s in range(total)], dtype=np.int64)
    scored = ScoredRows(
        scores=Scores(
            values,
            dict.fromkeys(broken, TOO_LONG),
            step_values=random.normal(size=int(steps.sum())).astype(np.float32),
            step_offsets=np.concatenate([[0], np.cumsum(steps)]),
        ),
        lengths=np.arange(1, total + 1, dtype=np.int32),
        truncated_tokens=np.zeros(total, np.int32),
        row_offsets=offsets,
        row_errors={row: NULL for row, count in enumerate(counts) if not count},
        rows_digest="",
        engine={},
        score_s=0.0,
    )
    right = [None if not count else ["x"] * draw(st.integers(0, count)) for count in counts]
    table = pa.table({"right": pa.array(right, pa.list_(pa.string()))})
    return scored, outputs, table, Layout(format, {"chosen": "right"})


@given(scored_rows(), st.booleans())
def test_scores_come_back_from_their_columns(
    rows: tuple[ScoredRows, Outputs, pa.Table, Layout], through_parquet: bool
) -> None:
    scored, outputs, table, layout = rows
    made = score_columns(scored, outputs, table, layout, "p_", OverLength.MARK)
    stored = pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **made})
    if through_parquet:
        sink = pa.BufferOutputStream()
        pq.write_table(stored, sink)
        stored = pq.ParquetFile(pa.BufferReader(sink.getvalue()), pre_buffer=False).read(
            use_threads=False
        )
    back = sequence_scores(stored, layout, "p_", outputs, scored.row_offsets)
    np.testing.assert_array_equal(back.values, scored.scores.values)
    if outputs.list_column:
        np.testing.assert_array_equal(back.step_values, scored.scores.step_values)
        np.testing.assert_array_equal(back.step_offsets, scored.scores.step_offsets)
    if outputs.embedding_size is None:
        item_rows, items = score_items(stored, layout.format, "p_")
        there = ~np.isnan(items)
        known = ~np.isnan(scored.scores.values[:, 0])
        owners = np.repeat(np.arange(scored.num_rows), np.diff(scored.row_offsets))
        np.testing.assert_array_equal(items[there], scored.scores.values[known, 0])
        np.testing.assert_array_equal(item_rows[there], owners[known])


def test_a_row_that_is_cut_otherwise_now_has_no_score() -> None:
    table = pa.table({"scores": pa.array([[1.0, 2.0], [3.0]], pa.list_(pa.float32()))})
    layout = Layout(Format.ROLLOUT_GROUP, {})
    back = sequence_scores(table, layout, "", SCALAR, np.array([0, 3, 4]))
    np.testing.assert_array_equal(back.values[:, 0], [np.nan, np.nan, np.nan, 3.0])


# Which sequences are known


def tokenized(*sequences: list[int], per_row: int = 1, **errors: Any) -> TokenizedRows:
    offsets = np.cumsum([0, *map(len, sequences)])
    ids = np.array([token for ids in sequences for token in ids], dtype=np.int32)
    rows = np.arange(0, len(sequences) + 1, per_row)
    truncated = np.zeros(len(sequences), np.int32)
    return TokenizedRows(
        ids,
        offsets,
        rows,
        truncated,
        errors.get("sequence_errors", {}),
        errors.get("row_errors", {}),
    )


def scores(*values: float) -> Scores:
    return Scores(np.array(values, np.float32)[:, None])


def test_equal_token_ids_have_equal_scores() -> None:
    rows = tokenized([1, 2], [3], [1, 2], [4, 5], [], sequence_errors={4: TOO_LONG})
    there = [
        (tokenized([9], [1, 2], [3, 0]), scores(9.0, 1.5, 7.0)),
        (tokenized([3], [3]), scores(np.nan, 2.5)),
    ]
    known = find_known(rows, there)
    assert known is not None
    np.testing.assert_array_equal(known.values[:, 0], [1.5, 2.5, 1.5, np.nan, np.nan])


def test_a_vote_is_taken_for_no_other() -> None:
    def votes(*sequences: list[int]) -> TokenizedRows:
        count = len(sequences)
        asked = Questions(
            response_offsets=np.arange(count + 1),
            response_errors={},
            characters=np.ones(count, np.int64),
            shown=np.arange(count),
            shown_offsets=np.arange(count + 1),
            criteria=np.full(count, -1),
            votes=np.arange(count) % 2,
            verdicts=np.ones(count, np.int64),
            weights={},
        )
        return replace(tokenized(*sequences), questions=asked)

    before = votes([1], [1], [2], [2])
    known = find_known(votes([2], [2], [1], [1]), [(before, scores(1.0, 2.0, np.nan, 4.0))])
    assert known is not None
    np.testing.assert_array_equal(known.values[:, 0], [np.nan, 4.0, 1.0, 2.0])


def test_nothing_known_is_nothing() -> None:
    rows = tokenized([1], [2])
    assert find_known(rows, []) is None
    assert (
        find_known(rows, [(tokenized([1]), scores(np.nan)), (tokenized([3]), scores(1.0))]) is None
    )


def test_earlier_objects_are_read_until_all_is_known() -> None:
    def endless() -> Any:
        yield tokenized([1]), scores(1.0)
        yield tokenized([2]), scores(2.0)
        pytest.fail("everything was known")

    assert find_known(tokenized([2], [1]), endless()) is not None


class Counting(FakeBackend):
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def score(self, rows: TokenizedRows) -> Scores:
        bounds = rows.sequence_offsets
        self.asked += [rows.token_ids[a:b].tolist() for a, b in pairwise(bounds)]
        return super().score(rows)


def test_only_unknown_sequences_meet_the_model_and_the_scores_are_those_of_all() -> None:
    rows = tokenized([1, 2], [3], [], [4], [5], [6], per_row=2, sequence_errors={2: TOO_LONG})
    every = score_shard(rows, FakeBackend())
    before = tokenized([5], [1, 2], [3])
    known = find_known(rows, [(before, FakeBackend().score(before))])
    backend = Counting()
    some = score_shard(replace(rows, known=known), backend)
    assert backend.asked == [[4], [6]]
    np.testing.assert_array_equal(some.scores.values, every.scores.values)
    assert some.rows_digest == every.rows_digest
    assert some.scores.errors == every.scores.errors
    assert some.was_known is not None
    assert some.was_known.tolist() == [True, True, False, False, True, False]
    assert some.scores.effort.computed_tokens == 2


def test_where_all_is_known_no_model_is_asked() -> None:
    rows = tokenized([1], [2])
    known = find_known(rows, [(rows, FakeBackend().score(rows))])
    backend = Counting()
    some = score_shard(replace(rows, known=known), backend)
    assert backend.asked == []
    assert some.scores.effort == Effort()
    np.testing.assert_array_equal(some.scores.values, FakeBackend().score(rows).values)


class Stepping(FakeBackend):
    """One score for each token, beside that of the sequence."""

    def score(self, rows: TokenizedRows) -> Scores:
        found = super().score(rows)
        found.step_values = rows.token_ids.astype(np.float32)
        found.step_offsets = rows.sequence_offsets
        return found


def test_steps_come_from_both() -> None:
    rows = tokenized([1, 2], [3], [4, 5, 6], [7])
    every = score_shard(rows, Stepping())
    before = tokenized([7], [1, 2])
    known = find_known(rows, [(before, Stepping().score(before))])
    some = score_shard(replace(rows, known=known), Stepping())
    np.testing.assert_array_equal(some.scores.step_values, every.scores.step_values)
    np.testing.assert_array_equal(some.scores.step_offsets, every.scores.step_offsets)


def test_a_part_of_the_rows_knows_the_scores_of_its_own() -> None:
    rows = tokenized([1, 2], [3], [4, 5, 6], [7], [8, 9], [1], per_row=2)
    before = tokenized([7], [1, 2], [8, 9])
    known = find_known(rows, [(before, Stepping().score(before))])
    every = score_shard(rows, Stepping()).scores
    for first, stop in ((0, 1), (1, 3), (0, 3), (2, 2)):
        part = replace(rows, known=known).part(first, stop)
        scores = score_shard(part, Stepping()).scores
        expected = every.part(2 * first, 2 * stop)
        np.testing.assert_array_equal(scores.values, expected.values)
        if first < stop:
            np.testing.assert_array_equal(scores.step_values, expected.step_values)
            np.testing.assert_array_equal(scores.step_offsets, expected.step_offsets)


class Failing(Stepping):
    """Without a score for any sequence."""

    def score(self, rows: TokenizedRows) -> Scores:
        found = super().score(rows)
        found.values[:] = np.nan
        found.errors = dict.fromkeys(range(rows.num_sequences), NULL)
        return found


def test_what_became_of_a_sequence_that_gets_no_score_is_kept() -> None:
    """A judge's reply without a verdict, say; also where nothing of a part is known."""
    rows = tokenized([1, 2], [3], [4, 5, 6])
    before = tokenized([3])
    known = find_known(rows, [(before, Stepping().score(before))])
    for asked in (replace(rows, known=known), replace(rows, known=known).part(2, 3)):
        found = score_shard(asked, Failing()).scores
        assert found.step_values is not None and found.step_offsets is not None
        assert found.step_values.tolist() == asked.token_ids.tolist()
        assert found.step_offsets.tolist() == asked.sequence_offsets.tolist()
        assert found.errors.keys() == set(np.flatnonzero(np.isnan(found.values)).tolist())
        assert found.errors


# Which objects are looked into


def earlier(first_row: int, num_rows: int, **changes: Any) -> Earlier:
    commit = replace(
        COMMIT,
        first_row=first_row,
        num_rows=num_rows,
        layout=layout_to_json(SHARD.layout),
        **changes,
    )
    return Earlier("/out", f"{first_row}.parquet", commit)


def test_the_nearest_rows_are_looked_into_and_only_so_many() -> None:
    shard = replace(SHARD, first_row=100, num_rows=10)
    candidates = [earlier(first, 10) for first in range(0, 400, 10)]
    found = nearest(shard, candidates, {COMMIT.fingerprint})
    assert len(found) == MOST_EARLIER
    assert found[:3] == (
        ("/out", "100.parquet"), ("/out", "110.parquet"), ("/out", "90.parquet"),
    )  # fmt: skip


def test_other_scores_and_other_layouts_are_not_looked_into() -> None:
    other = earlier(0, 10, fingerprint="another")
    text = replace(SHARD, layout=Layout(Format.TEXT, {"text": "chosen"}))
    assert nearest(SHARD, [other], {COMMIT.fingerprint}) == ()
    assert nearest(text, [earlier(0, 10)], {COMMIT.fingerprint}) == ()
    assert nearest(SHARD, [earlier(0, 10)], {COMMIT.fingerprint}) == (("/out", "0.parquet"),)


def test_copies_are_made_again_after_a_crash_and_found_by_their_footers(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), {}, create=True)
    sink = pa.BufferOutputStream()
    table = pa.table({"x": [1]}).replace_schema_metadata(COMMIT.footer())
    pq.write_table(table, sink)
    version = store.create("a/b.parquet", sink.getvalue().to_pybytes())
    stored = Stored(COMMIT, version, size_bytes=0, sha256="")
    receipt = Receipt("a/b.parquet", "a/b.parquet", "", 10, Status.COMMITTED, stored)
    expected = [Earlier(store.root, f"{EARLIER}/a/b.parquet.earlier", COMMIT)]
    for _ in range(2):
        assert keep(store, [receipt]) == expected
        assert kept(PartialConfig(), store) == expected
    assert [info.key for info in store.list(EARLIER)] == [expected[0].key]
    assert len(list((tmp_path / "out").rglob("*.parquet"))) == 1, "a plain glob finds rows twice"
    store.delete("a/b.parquet")
    assert kept(PartialConfig(), store) == expected


# What a commit says of its scores


def test_the_spread_of_scores_is_told_by_source() -> None:
    rows = ScoredRows(
        Scores(np.array([[1], [3], [np.nan], [2], [10], [10]], np.float32), {2: TOO_LONG}),
        np.ones(6, np.int32), np.zeros(6, np.int32), np.array([0, 2, 4, 6, 6]),
        {3: NULL}, "", {}, 0.0,
    )  # fmt: skip
    spread = spread_by_source(rows, row_sources(pa.table({"source": ["a", "a", "b", "c"]})))
    assert spread["a"] == Spread(2, 3, 2, 0.816497, (1, 1.1, 1.5, 2, 2.5, 2.9, 3))
    assert spread["b"] == Spread(1, 2, 10, 0, (10,) * 7)
    assert spread["c"] == Spread(1)
    assert list(spread_by_source(rows, row_sources(pa.table({"x": [0] * 4})))) == ["all"]
    assert spread_by_source(rows, row_sources(pa.table({"x": [0] * 4})), has_scores=False) == {
        "all": Spread(4)
    }
