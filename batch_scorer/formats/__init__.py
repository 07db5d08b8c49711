"""Rows as users store them, and which part of a row is scored.

`detect` finds a file's `Layout` once, from its schema and a few rows; with it, `parse` cuts the
rows into conversations. `docs/formats.md` shows every layout. A new one is an entry in the
tables of `kinds.py`, or a new text style beside `hh.py`.
"""

from batch_scorer.formats.delimited import read_delimited, scan_delimited
from batch_scorer.formats.detect import columns_judged, columns_needed, describe, detect
from batch_scorer.formats.jsonl import (
    read_json_table,
    read_json_values,
    read_line_values,
    read_lines,
    scan_lines,
    unpack_lines,
)
from batch_scorer.formats.parse import parse
from batch_scorer.formats.storable import as_stored, lost_types, stored_schema
from batch_scorer.formats.values import Columns, columns_of
from batch_scorer.records import LineRun, Lines

__all__ = [
    "Columns",
    "LineRun",
    "Lines",
    "as_stored",
    "columns_judged",
    "columns_needed",
    "columns_of",
    "describe",
    "detect",
    "lost_types",
    "parse",
    "read_delimited",
    "read_json_table",
    "read_json_values",
    "read_line_values",
    "read_lines",
    "scan_delimited",
    "scan_lines",
    "stored_schema",
    "unpack_lines",
]
