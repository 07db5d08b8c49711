"""Scored outputs written without a model: any columns in the place of scores, in any number."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.fingerprint import Fingerprint
from batch_scorer.formats.shape import shape_of
from batch_scorer.outputs.by_source import LEVELS, pair_counts, row_sources
from batch_scorer.outputs.claim import claim_output
from batch_scorer.outputs.families import headline_prefix
from batch_scorer.outputs.manifest import conclude, publish, published
from batch_scorer.records import (
    SCALAR,
    Commit,
    Format,
    Layout,
    Receipt,
    Spread,
    Status,
    Stored,
    layout_to_json,
)
from batch_scorer.storage import Store


def write_scored(
    store: Store,
    tables: Iterable[tuple[str, pa.Table]],
    layout: Layout,
    added: Sequence[str],
    provenance: dict[str, Any] | None = None,
) -> None:
    """A complete output of these shards, by name. `added` are their columns that scoring would have
    added."""
    fingerprint = Fingerprint({"model": "none"})
    made = {"model": "/models/written", "batch_scorer": "0", **(provenance or {})}
    claim_output(store, fingerprint, {"column_prefix": ""}, made)
    receipts = []
    for key, table in tables:
        commit = _commit(key, table, layout, added, fingerprint)
        sink = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(commit.footer()), sink, compression="zstd")
        version = store.create(key, sink.getvalue())
        receipts.append(
            Receipt(
                output_key=key,
                input=key,
                input_root="",
                num_rows=table.num_rows,
                status=Status.COMMITTED,
                stored=Stored(commit, version, len(sink.getvalue()), "0" * 64),
                engine="none",
            )
        )
    found = published(store)
    conclude(store, publish(store, 1, fingerprint.digest, receipts, found), found)


def _commit(
    key: str, table: pa.Table, layout: Layout, added: Sequence[str], fingerprint: Fingerprint
) -> Commit:
    error = next(name for name in added if name.endswith("score_error"))
    (names,) = shape_of(layout.format).value_columns(SCALAR)
    prefix = headline_prefix(added, names)
    reasons = table[error].drop_null().to_pylist()
    sources = row_sources(table)
    columns = [table[prefix + name].combine_chunks() for name in names]
    pairs = {}
    if layout.format is Format.PREFERENCE_PAIR:
        pairs = pair_counts(columns[0], columns[1], sources, _same_tokens(table))
    spread = {}
    for source in sorted(set(sources)):
        here = pa.array(sources == source)
        values = np.concatenate([_numbers(column.filter(here)) for column in columns])
        quantiles = tuple(np.quantile(values, LEVELS).tolist())
        mean, std = float(values.mean()), float(values.std())
        spread[source] = Spread(int((sources == source).sum()), len(values), mean, std, quantiles)
    return Commit(
        identity=key,
        fingerprint=fingerprint.digest,
        epoch=1,
        input=key,
        input_etag=key,
        first_row=0,
        num_rows=table.num_rows,
        rows_scored=table.num_rows - len(reasons),
        rows_marked=len(reasons),
        marked=dict(Counter(reasons)),
        notes={},
        sequences=sum(len(_numbers(column)) for column in columns),
        tokens=0,
        rows_digest="",
        scores_digest="",
        pairs=pairs,
        layout=layout_to_json(layout),
        added_columns=list(added),
        spread=spread,
    )


def _same_tokens(table: pa.Table) -> list[int]:
    if "score_notes" not in table.column_names:
        return []
    notes = table["score_notes"].to_pylist()
    return [row for row, found in enumerate(notes) if "same_tokens" in (found or ())]


def _numbers(column: pa.Array) -> Any:
    """float64[n], those that are there, also in lists."""
    if pa.types.is_list(column.type):
        column = column.flatten()
    return column.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
