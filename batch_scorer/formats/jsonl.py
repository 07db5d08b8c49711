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
from batch_scorer.formats.json_types import (
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
from batch_scorer.formats.packed import codec_of, unpacked
from batch_scorer.records import LineRun, Lines, RowError

IntArray: TypeAlias = npt.NDArray[np.int64]
Kinds: TypeAlias = Mapping[str, Kind]
Row: TypeAlias = dict[str, Any]

_BOM = b"\xef\xbb\xbf"
_NEWLINE, _OPENING, _CLOSING = b"\n{}"
_BLANKS = np.frombuffer(b" \t\n\r\v\f", dtype=np.uint8)
_MAX_OPENED = 3000
"""Objects and lists that begin in one line: Arrow's reader ends the process some 20,000 levels
deep."""
_SAMPLED, _FEW_FIELDS = 100, 64
_MAX_BLOCK_BYTES = 2**31 - 1  # Arrow's limit


def scan_lines(
    file: BinaryIO, name: str, *, max_rows: int, max_bytes: int
) -> tuple[Lines, pa.Table] | None:
    """Cut a file into runs of at most `max_rows` and `max_bytes`; a longer line is a run by itself.

    Also returns the rows of the first run. Every line is parsed, so that types fit all rows. A file
    without rows has no runs. None for what seems to be an array. Raises ShardError as
    `read_json_table` does.
    """
    codec = codec_of(file)
    runs: list[LineRun] = []
    kinds: Kinds = {}
    fault, first = "", b""
    for run, data in _runs(unpacked(file, name, codec), max_rows, max_bytes):
        if not runs:
            if data.lstrip().startswith(b"["):
                return None
            first = data
        run, found, why = _look(data, run, kinds)
        runs.append(run)
        fault = fault or why
        kinds = joined_fields(kinds, found)
    lines = Lines(tuple(runs), _schema(kinds), codec)
    if not runs:
        return lines, pa.table({})
    if not kinds:
        raise _no_table(name, fault)
    return lines, read_lines(first, lines.part(0, 1))[0]


def read_lines(data: bytes, lines: Lines) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of these runs, whose bytes are `data`, with the columns of the whole file.

    Bad lines are rows of nulls and errors, as in `read_json_table`.
    """
    if not has_json_text(lines.schema) and all(run.is_plain for run in lines.runs):
        table = _by_arrow(data, sum(run.num_rows for run in lines.runs), lines.schema)
        if table is not None:
            return table, {}
    rows, errors = _rows(data, lines.runs[0].first_line)
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
        rows, errors = _rows(data, lines.runs[0].first_line)
    return _values(rows, names), errors


def unpack_lines(file: BinaryIO, name: str, lines: Lines) -> bytes:
    """The bytes of these runs in a packed file: everything before them is unpacked, too."""
    parts: list[bytes] = []
    position = 0
    for block in unpacked(file, name, lines.codec):
        parts.append(block[max(0, lines.start - position) : max(0, lines.stop - position)])
        position += len(block)
        if position >= lines.stop:
            break
    return b"".join(parts)


# A file at once


def read_json_table(data: bytes, name: str) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of a JSONL file (packed or not) or of one JSON array; blank lines are not rows.

    A line that is not a JSON object becomes a row of nulls, and an error under its row number.
    A file without rows gives a table without columns. Strings stay strings, dates too; a column
    whose values have no type in common is JSON text (`json_types`). Raises
    ShardError(UNREADABLE_FILE), naming the file, where the bytes cannot be unpacked, or no line is
    a JSON object.
    """
    rows, errors = _whole(data, name)
    if not rows:
        return pa.table({}), {}
    kinds = _kinds(rows)
    if not kinds:
        raise _no_table(name, _first_fault(errors))
    return table_of(rows, _schema(kinds)), errors


def read_json_values(
    data: bytes, name: str, names: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[int, RowError]]:
    """As `read_line_values`, of such a file. Raises as `read_json_table`."""
    rows, errors = _whole(data, name)
    return _values(rows, names), errors


def _whole(data: bytes, name: str) -> tuple[list[Row], dict[int, RowError]]:
    file = io.BytesIO(data)
    data = b"".join(unpacked(file, name, codec_of(file))).removeprefix(_BOM)
    if data.lstrip()[:1] == b"[" and data.rstrip()[-1:] == b"]":
        data = _array_to_lines(data, name)
    return _rows(data, 1)


def _array_to_lines(data: bytes, name: str) -> bytes:
    try:
        elements = json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, f"not a JSON array: {error}") from error
    return b"\n".join(json.dumps(element).encode() for element in elements)


# Cutting


def _runs(
    blocks: Iterable[bytes], max_rows: int, max_bytes: int
) -> Iterator[tuple[LineRun, bytes]]:
    """The runs of a file, with their bytes."""
    data, start, line = b"", 0, 1  # what is not cut yet, its first byte and line in the file
    for block in chain(blocks, [None]):
        data += block or b""
        if start == 0 and data.startswith(_BOM):
            data, start = data[len(_BOM) :], len(_BOM)
        ends, rows = _line_ends(data, at_end=block is None)
        cut = end = done = 0  # lines, bytes and rows that are in a run
        while cut < len(ends):
            fitting = min(
                np.searchsorted(ends, end + max_bytes, side="right"),
                np.searchsorted(rows, done + max_rows, side="right"),
            )
            stop = max(cut + 1, int(fitting))
            if stop == len(ends) and block is not None:
                break  # the next line may belong to it
            first_line, begin, before = line + cut, end, done
            cut, end, done = stop, int(ends[stop - 1]), int(rows[stop - 1])
            if done > before:
                run = LineRun(start + begin, start + end, first_line, done - before)
                yield run, data[begin:end]
        data, start, line = data[end:], start + end, line + cut


def _line_ends(data: bytes, *, at_end: bool) -> tuple[IntArray, IntArray]:
    """For each line, the place after its end and the rows up to there; without an unfinished last
    line."""
    letters = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(letters == _NEWLINE) + 1
    if at_end and len(data) > (ends[-1] if len(ends) else 0):
        ends = np.append(ends, len(data))
    starts = np.concatenate([[0], ends[:-1]])[: len(ends)].astype(np.int64)
    is_row = ~np.isin(letters[starts], _BLANKS)
    for place in np.flatnonzero(~is_row).tolist():
        is_row[place] = not data[starts[place] : ends[place]].isspace()
    return ends, np.cumsum(is_row)


# Arrow's way


def _look(data: bytes, run: LineRun, known: Kinds) -> tuple[LineRun, Kinds, str]:
    """The run with what is known of it, the kinds of its columns, and what is wrong with its first
    bad line. `known` are the kinds of the runs before it.

    It is plain where Arrow's reader is right about it. It refuses what is no JSON. What it may be
    silently wrong about are objects that are not lines, bytes that are no UTF-8 (`_seems_plain`),
    nulls that it loses (`_by_arrow`), and numbers that it rounds (`kind_of_array`).
    """
    may_be_plain = not any(map(is_mixed, known.values())) and _seems_plain(data, run.num_rows)
    if may_be_plain and not known:
        may_be_plain = not _has_mappings(data)
    table = _by_arrow(data, run.num_rows) if may_be_plain else None
    if table is not None and table.num_columns:
        kinds = {name: kind_of_array(table[name].combine_chunks()) for name in table.schema.names}
        if not any(map(is_mixed, kinds.values())):
            return replace(run, is_plain=True), kinds, ""
    rows, errors = _rows(data, run.first_line)
    return run, _kinds(rows), _first_fault(errors)


def _has_mappings(data: bytes) -> bool:
    """Whether the first rows hold objects whose keys are new in every row. Arrow makes a column of
    nulls for each: 8,000 rows with a key each took 1.2 GB and 12 s."""
    rows, _ = _rows(b"".join(islice(io.BytesIO(data), _SAMPLED)), 1)
    return any(most_fields(kind) > _FEW_FIELDS for kind in _kinds(rows).values())


def _seems_plain(data: bytes, num_rows: int) -> bool:
    """Whether every row is a line that begins and ends as an object does, of UTF-8."""
    if not _is_utf8(data):
        return False
    begin = rows = 0
    while begin < len(data):
        end = data.find(b"\n", begin) + 1 or len(data)
        # Inside an object no `}` is followed by a `{`: so objects begin and end with the lines.
        is_object = data[begin] == _OPENING and data[end - 2] == _CLOSING
        if not is_object and (line := data[begin:end].strip()):
            is_object = line.startswith(b"{") and line.endswith(b"}")
            if not is_object:
                return False
        if end - begin > 2 * _MAX_OPENED:
            opened = data.count(b"{", begin, end) + data.count(b"[", begin, end)
            if opened > _MAX_OPENED:
                return False
        begin, rows = end, rows + is_object
    return rows == num_rows


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


def _rows(data: bytes, first_line: int) -> tuple[list[Row], dict[int, RowError]]:
    """All lines but blank ones; a bad line is an empty row and an error."""
    rows: list[Row] = []
    errors: dict[int, RowError] = {}
    for number, line in enumerate(io.BytesIO(data), start=first_line):
        if line.isspace():
            continue
        row, why = _row(line.rstrip(b"\r\n"))
        if why:
            errors[len(rows)] = RowError(RowReason.MALFORMED_JSON, f"line {number}: {why}")
        rows.append(row)
    return rows, errors


def _row(line: bytes) -> tuple[Row, str]:
    """The object in a line, and "" or why there is none that a table can hold."""
    try:
        value = json.loads(line.decode(), object_pairs_hook=_object)
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half of a pair cannot be encoded
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg}, column {error.colno}"
    except UnicodeError:
        return {}, "not UTF-8"
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if value is None:
        return {}, ""  # a row of nulls
    return (value, "") if isinstance(value, dict) else ({}, "not a JSON object")


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
    return pa.schema([(name, column_type(kind)) for name, kind in kinds.items()])


def _values(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in names}


def _first_fault(errors: Mapping[int, RowError]) -> str:
    return next(iter(errors.values())).detail if errors else ""


def _no_table(name: str, fault: str) -> ShardError:
    why = fault or "the objects have no fields"
    return _unreadable(name, f"no table of JSON objects, one a line ({why})")


def _unreadable(name: str, why: str) -> ShardError:
    return ShardError(ShardReason.UNREADABLE_FILE, f"{name}: {why}")
