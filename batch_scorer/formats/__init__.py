"""Rows as users store them, and which part of a row is scored.

`detect` finds a file's `Layout` once, from its schema and a few rows; with it, `parse` cuts the
rows into conversations. `docs/formats.md` shows every layout. A new one is an entry in the
tables of `kinds.py`, or a new text style beside `hh.py`.
"""

from batch_scorer.formats.detect import columns_judged, columns_needed, describe, detect
from batch_scorer.formats.jsonl import read_json_table, read_lines, scan_lines, unpack_lines
from batch_scorer.formats.parse import parse
from batch_scorer.formats.values import Columns, columns_of
from batch_scorer.records import LineRun, Lines

__all__ = [
    "Columns",
    "LineRun",
    "Lines",
    "columns_judged",
    "columns_needed",
    "columns_of",
    "describe",
    "detect",
    "parse",
    "read_json_table",
    "read_lines",
    "scan_lines",
    "unpack_lines",
]
