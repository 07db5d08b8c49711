"""JSON Lines, packed or not, and JSON arrays: as Arrow tables, and as values; bad lines keep
their place.

Lines are read in runs no larger than a shard (`scan_lines`, then `read_lines`), so that memory is
bounded by the shard and not by the file. An array has no lines: it is read whole, by
`read_json_table`.

Arrow's own reader reads the lines about which it is known to be right (`_look` says how that is
known), several times as fast; `json` reads the others, one by one.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats.bounded import are_within, elements_of, fault_of, too_large
from batch_scorer.formats.json_types import (
    JSON_TEXT,
    Kind,
    column_type,
    has_json_text,
    is_mixed,
    joined_fields,
    kind_of_array,
    kind_of_value,
    most_fields,
    table_of,
)
from batch_scorer.formats.lines import lines_of
from batch_scorer.formats.packed import codec_of, unpacked
from batch_scorer.formats.storable import stored_type
from batch_scorer.records import DEFAULT_BOUNDS, LineRun, Lines, ReadBounds, RowError

IntArray: TypeAlias = npt.NDArray[np.int64]
Kinds: TypeAlias = Mapping[str, Kind]
Row: TypeAlias = dict[str, Any]

_BOM = b"\xef\xbb\xbf"
_NEWLINE, _OPENING, _CLOSING = b"\n{}"
_BLANKS = np.frombuffer(b" \t\n\r\v\f", dtype=np.uint8)
_SAMPLED, _FEW_FIELDS = 100, 64
_MAX_BLOCK_BYTES = 2**31 - 1  # Arrow's limit


def scan_lines(
    file: BinaryIO,
    name: str,
    *,
    max_rows: int,
    max_bytes: int,
    bounds: ReadBounds = DEFAULT_BOUNDS,
) -> tuple[Lines, pa.Table] | None:
    """Cut a file into runs of at most `max_rows` and `max_bytes`; a longer line is a run by itself.

    Also returns the rows of the first run in which there are any objects. Every line is parsed, so
    that types fit all rows, but for those beyond the bounds. A file without rows has no runs. None
    for what seems to be an array. Raises ShardError as `read_json_table` does.
    """
    codec = codec_of(file)
    blocks = unpacked(file, name, codec, bounds)
    begin = _beginning(blocks, bounds)
    if b"".join(begin).removeprefix(_BOM).lstrip().startswith(b"["):
        return None
    runs: list[LineRun] = []
    kinds: Kinds = {}
    fault, shown = "", (0, b"")
    for run, data in _runs(chain(begin, blocks), max_rows, max_bytes, bounds):
        run, found, why = _look(data, run, kinds, bounds)
        if found and not kinds:
            shown = len(runs), data
        runs.append(run)
        fault = fault or why
        kinds = joined_fields(kinds, found)
    lines = Lines(tuple(runs), _schema(kinds), codec, bounds=bounds)
    if not runs:
        return lines, pa.table({})
    if not kinds:
        raise _no_table(name, fault)
    at, data = shown
    return lines, read_lines(data, lines.part(at, at + 1))[0]


def _beginning(blocks: Iterator[bytes], bounds: ReadBounds) -> list[bytes]:
    """Blocks up to the first one with something in it."""
    begin: list[bytes] = []
    size = 0
    for block in blocks:
        begin.append(block)
        size += len(block)
        if (size > len(_BOM) and not block.isspace()) or size > bounds.max_row_bytes:
            break
    return begin


def read_lines(data: bytes, lines: Lines) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of these runs, whose `spans` are `data`, with the columns of the whole file.

    Bad lines are rows of nulls and errors, as in `read_json_table`.
    """
    if not has_json_text(lines.schema) and all(run.is_plain for run in lines.runs):
        table = _by_arrow(data, sum(run.num_rows for run in lines.runs), lines.schema)
        if table is not None:
            return table, {}
    rows, errors = _rows_of(data, lines)
    return table_of(rows, lines.schema), errors


def read_line_values(
    data: bytes, lines: Lines, names: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[int, RowError]]:
    """The values of these columns as `json.loads` gives them, one a row, and errors as
    `read_lines` gives them. An absent key is None; a null inside a value stays one."""
    if all(run.is_plain for run in lines.runs):
        loads, errors = json.JSONDecoder().decode, dict[int, RowError]()
        rows = [loads(line) for line in data.decode().split("\n") if line and not line.isspace()]
    else:
        rows, errors = _rows_of(data, lines)
    return _values(rows, names), errors


def unpack_lines(file: BinaryIO, name: str, lines: Lines) -> bytes:
    """The `spans` of these runs in a packed file: everything before them is unpacked, too."""
    spans = lines.spans
    if not spans:
        return b""
    parts: list[list[bytes]] = [[] for _ in spans]
    position = 0
    for block in unpacked(file, name, lines.codec, lines.bounds):
        for part, (start, stop) in zip(parts, spans, strict=True):
            part.append(block[max(0, start - position) : max(0, stop - position)])
        position += len(block)
        if position >= spans[-1][1]:
            break
    return b"".join(chain.from_iterable(parts))


# A file at once


def read_json_table(
    data: bytes, name: str, bounds: ReadBounds = DEFAULT_BOUNDS
) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of a JSONL file (packed or not) or of one JSON array; blank lines are not rows.

    A line, or an element, that is not a JSON object or goes beyond the bounds becomes a row of
    nulls, and an error under its row number. A file without rows gives a table without columns.
    Strings stay strings, dates too; a column whose values have no type in common is JSON text
    (`json_types`). Raises ShardError, naming the file: UNREADABLE_FILE where the bytes cannot be
    unpacked, the elements of an array cannot be told apart, or nothing is a JSON object; TOO_LARGE
    where it unpacks to too much.
    """
    rows, errors = _whole(data, name, bounds)
    if not rows:
        return pa.table({}), {}
    kinds = _kinds(rows)
    if not kinds:
        raise _no_table(name, _first_fault(errors))
    return table_of(rows, _schema(kinds)), errors


def read_json_values(
    data: bytes, name: str, names: Sequence[str], bounds: ReadBounds = DEFAULT_BOUNDS
) -> tuple[dict[str, list[Any]], dict[int, RowError]]:
    """As `read_line_values`, of such a file. Raises as `read_json_table`."""
    rows, errors = _whole(data, name, bounds)
    return _values(rows, names), errors


def _whole(data: bytes, name: str, bounds: ReadBounds) -> tuple[list[Row], dict[int, RowError]]:
    file = io.BytesIO(data)
    data = b"".join(unpacked(file, name, codec_of(file), bounds)).removeprefix(_BOM)
    if not (data.lstrip()[:1] == b"[" and data.rstrip()[-1:] == b"]"):
        return _rows(data, 1, bounds)
    spans = elements_of(data)
    if spans is None:
        raise _unreadable(name, "not a JSON array: its brackets or its commas do not fit")
    elements = (data[start:stop].strip() for start, stop in spans)
    return _parsed(((f"element {n}", text) for n, text in enumerate(elements, 1)), bounds)


# Cutting


def _runs(
    blocks: Iterable[bytes], max_rows: int, max_bytes: int, bounds: ReadBounds
) -> Iterator[tuple[LineRun, bytes]]:
    """The runs of a file, with their bytes; without those of a row that is too large."""
    start = stop = rows = 0  # of the run that is being filled
    line = next_line = 1
    parts: list[bytes] = []
    is_long = False

    def filled() -> list[tuple[LineRun, bytes]]:
        nonlocal start, line, rows
        run = LineRun(start, stop, line, rows, is_too_large=is_long)
        found = [(run, b"".join(parts))] if rows else []
        start, line, rows = stop, next_line, 0
        parts.clear()
        return found

    for data, is_part in lines_of(blocks, bounds.max_row_bytes):
        if not stop and data.startswith(_BOM):
            data, start, stop = data[len(_BOM) :], len(_BOM), len(_BOM)
        if is_part:
            if not is_long:
                yield from filled()
            is_long = True
            stop += len(data)
            rows = int(rows or not data.isspace())
            if data.endswith(b"\n"):
                next_line += 1
                yield from filled()
                is_long = False
            continue
        ends, counts = _line_ends(data)
        cut = end = done = 0  # lines, bytes and rows of these that are in a run
        while cut < len(ends):
            fitting = min(
                np.searchsorted(ends, end + max_bytes - (stop - start), side="right"),
                np.searchsorted(counts, done + max_rows - rows, side="right"),
            )
            if fitting <= cut and parts:
                yield from filled()
                continue
            until = max(cut + 1, int(fitting))
            parts.append(data[end : ends[until - 1]])
            stop += int(ends[until - 1]) - end
            rows += int(counts[until - 1]) - done
            next_line += until - cut
            cut, end, done = until, int(ends[until - 1]), int(counts[until - 1])
    yield from filled()


def _line_ends(data: bytes) -> tuple[IntArray, IntArray]:
    """For each line, the place after its end and the rows up to there."""
    letters = np.frombuffer(data, dtype=np.uint8)
    ends = _ends(letters)
    starts = np.concatenate([[0], ends[:-1]])[: len(ends)].astype(np.int64)
    is_row = ~np.isin(letters[starts], _BLANKS)
    for place in np.flatnonzero(~is_row).tolist():
        is_row[place] = not data[starts[place] : ends[place]].isspace()
    return ends, np.cumsum(is_row)


def _ends(letters: npt.NDArray[np.uint8]) -> IntArray:
    ends = np.flatnonzero(letters == _NEWLINE) + 1
    is_open = len(letters) > (ends[-1] if len(ends) else 0)
    return np.append(ends, len(letters)) if is_open else ends


# Arrow's way


def _look(
    data: bytes, run: LineRun, known: Kinds, bounds: ReadBounds
) -> tuple[LineRun, Kinds, str]:
    """The run with what is known of it, the kinds of its columns, and what is wrong with its first
    bad line. `known` are the kinds of the runs before it.

    It is plain where Arrow's reader is right about it. It refuses what is no JSON. What it may be
    silently wrong about are objects that are not lines, bytes that are no UTF-8 (`_seems_plain`),
    nulls that it loses (`_by_arrow`), and numbers that it rounds (`kind_of_array`).
    """
    if run.is_too_large:
        return run, {}, _of_large(run, bounds).detail
    may_be_plain = not any(map(is_mixed, known.values()))
    may_be_plain = may_be_plain and _seems_plain(data, run.num_rows, bounds)
    if may_be_plain and not known:
        may_be_plain = not _has_mappings(data, bounds)
    table = _by_arrow(data, run.num_rows) if may_be_plain else None
    if table is not None and table.num_columns:
        kinds = {name: kind_of_array(table[name].combine_chunks()) for name in table.schema.names}
        if not any(map(is_mixed, kinds.values())):
            return replace(run, is_plain=True), kinds, ""
    rows, errors = _rows(data, run.first_line, bounds)
    return run, _kinds(rows), _first_fault(errors)


def _has_mappings(data: bytes, bounds: ReadBounds) -> bool:
    """Whether the first rows hold objects whose keys are new in every row. Arrow makes a column of
    nulls for each: 8,000 rows with a key each took 1.2 GB and 12 s."""
    rows, _ = _rows(b"".join(islice(io.BytesIO(data), _SAMPLED)), 1, bounds)
    return any(most_fields(kind) > _FEW_FIELDS for kind in _kinds(rows).values())


def _seems_plain(data: bytes, num_rows: int, bounds: ReadBounds) -> bool:
    """Whether every row is a line that begins and ends as an object does, of UTF-8, and within the
    bounds."""
    if not _is_utf8(data):
        return False
    letters = np.frombuffer(data, np.uint8)
    ends = _ends(letters)
    starts = ends - np.diff(ends, prepend=0)
    # Inside an object no `}` is followed by a `{`: so objects begin and end with the lines.
    is_object = (letters[starts] == _OPENING) & (letters[ends - 2] == _CLOSING)
    for place in np.flatnonzero(~is_object).tolist():
        if line := data[starts[place] : ends[place]].strip():
            if not (line.startswith(b"{") and line.endswith(b"}")):
                return False
            is_object[place] = True
    return int(is_object.sum()) == num_rows and are_within(data, ends, bounds)


def _is_utf8(data: bytes) -> bool:
    """Arrow takes bytes that are no UTF-8, and fails when they are used."""
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _by_arrow(data: bytes, num_rows: int, schema: pa.Schema | None = None) -> pa.Table | None:
    """The rows with these types or those that Arrow finds; None where they are not these rows.

    Of nulls that begin a column's lists, Arrow 26 loses count, and what follows moves up
    (apache/arrow#51305). Then there are fewer values than the lists' lengths add up to, which
    `validate` sees: it did in all of 20,700 such tables among 120,000 random ones.
    """
    try:
        table = pa.json.read_json(
            pa.BufferReader(data),
            read_options=_one_block(data),
            parse_options=pa.json.ParseOptions(explicit_schema=schema),
        )
        table.validate()
    except pa.ArrowException:
        return None  # the other way finds the lines that are to blame
    # Arrow reads objects, not lines: two in a line, or one over two lines, are not rows.
    return table if table.num_rows == num_rows else None


def _one_block(data: bytes) -> pa.json.ReadOptions:
    # A row may be as long as it likes, and types are found from all rows alike.
    return pa.json.ReadOptions(block_size=min(len(data), _MAX_BLOCK_BYTES))


# Line by line


def _rows_of(data: bytes, lines: Lines) -> tuple[list[Row], dict[int, RowError]]:
    """The rows of these runs, whose `spans` are `data`; one that is too large is an empty row."""
    rows: list[Row] = []
    errors: dict[int, RowError] = {}
    at = 0
    for run in lines.runs:
        if run.is_too_large:
            found: list[Row] = [{}]
            bad = {0: _of_large(run, lines.bounds)}
        else:
            size = run.stop - run.start
            found, bad = _rows(data[at : at + size], run.first_line, lines.bounds)
            at += size
        errors |= {len(rows) + row: error for row, error in bad.items()}
        rows += found
    return rows, errors


def _of_large(run: LineRun, bounds: ReadBounds) -> RowError:
    error = too_large(run.stop - run.start, bounds)
    return replace(error, detail=f"line {run.first_line}: {error.detail}")


def _rows(
    data: bytes, first_line: int, bounds: ReadBounds
) -> tuple[list[Row], dict[int, RowError]]:
    """All lines but blank ones."""
    lines = enumerate(io.BytesIO(data), start=first_line)
    return _parsed(((f"line {n}", line) for n, line in lines if not line.isspace()), bounds)


def _parsed(
    named: Iterable[tuple[str, bytes]], bounds: ReadBounds
) -> tuple[list[Row], dict[int, RowError]]:
    """The objects in texts with names; a bad one is an empty row and an error."""
    rows: list[Row] = []
    errors: dict[int, RowError] = {}
    for name, text in named:
        row = _row(text.removesuffix(b"\n"), bounds)
        if isinstance(row, RowError):
            errors[len(rows)] = replace(row, detail=f"{name}: {row.detail}")
            row = {}
        rows.append(row)
    return rows, errors


def _row(line: bytes, bounds: ReadBounds) -> Row | RowError:
    """The object in a line, or why there is none that a table can hold."""
    if (fault := fault_of(line, bounds)) is not None:
        return fault
    try:
        value = json.loads(line.decode(), object_pairs_hook=_object)
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half of a pair cannot be encoded
    except json.JSONDecodeError as error:
        return _malformed(f"not JSON: {error.msg}, column {error.colno}")
    except UnicodeError:
        return RowError(RowReason.NOT_UTF8, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return _malformed(f"not JSON: {error}")
    if value is None:
        return {}  # a row of nulls
    return value if isinstance(value, dict) else _malformed("not a JSON object")


def _malformed(why: str) -> RowError:
    return RowError(RowReason.MALFORMED_JSON, why)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _kinds(rows: Iterable[Row]) -> Kinds:
    kinds: Kinds = {}
    for row in rows:
        kinds = joined_fields(kinds, {name: kind_of_value(value) for name, value in row.items()})
    return kinds


def _schema(kinds: Kinds) -> pa.Schema:
    types = {name: column_type(kind) for name, kind in kinds.items()}
    return pa.schema(
        [
            (name, JSON_TEXT if stored_type(dtype) == JSON_TEXT else dtype)
            for name, dtype in types.items()
        ]
    )


def _values(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in names}


def _first_fault(errors: Mapping[int, RowError]) -> str:
    return next(iter(errors.values())).detail if errors else ""


def _no_table(name: str, fault: str) -> ShardError:
    why = fault or "the objects have no fields"
    return _unreadable(name, f"no table of JSON objects, one a line ({why})")


def _unreadable(name: str, why: str) -> ShardError:
    return ShardError(ShardReason.UNREADABLE_FILE, f"{name}: {why}")
