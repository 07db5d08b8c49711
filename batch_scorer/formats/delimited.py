"""CSV and TSV: every value is text, exactly as it stands in the file.

The first record names the columns. Records are as RFC 4180 has them: a value in quotes may hold
the delimiter, line feeds, and quotes written twice. Blank lines are not rows. A row with too many
or too few values keeps its place as a row of nulls and an error; broken quotes fail the file,
because nobody knows where its rows begin.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats.bounded import too_large
from batch_scorer.formats.lines import lines_of
from batch_scorer.formats.packed import codec_of, unpacked
from batch_scorer.records import DEFAULT_BOUNDS, LineRun, Lines, ReadBounds, RowError

Record: TypeAlias = tuple[list[str] | RowError, int, int]
"""The values between delimiters, or why there are none; the bytes and the lines of both."""

_BOM = "\ufeff"
_UNDECODED = "surrogateescape"
"""Bytes that are no UTF-8 come through so, and mark their row."""
csv.field_size_limit(2**31 - 1)  # 128 kB by default; a row is held to `max_row_bytes` before
_QUOTE = ord('"')


def scan_delimited(
    file: BinaryIO,
    name: str,
    *,
    delimiter: str,
    max_rows: int,
    max_bytes: int,
    bounds: ReadBounds = DEFAULT_BOUNDS,
) -> tuple[Lines, pa.Table]:
    """Cut a file into runs, as `jsonl.scan_lines` does; also returns the rows of the first one that
    has any to show.

    Raises ShardError: UNREADABLE_FILE where the bytes cannot be unpacked, quotes are broken, or the
    header names a column twice or goes beyond the bounds; TOO_LARGE where it unpacks to too much.
    """
    codec = codec_of(file)
    blocks = unpacked(file, name, codec, bounds)
    records = _records(lines_of(blocks, bounds.max_row_bytes), name, delimiter, 1, bounds)
    header, start, line = _header(records, name, bounds)
    runs: list[LineRun] = []
    first: list[list[str]] = []
    shown = 0  # the run that these are of
    run = LineRun(start, start, line, 0)
    for record, size, count in records:
        is_large = isinstance(record, RowError)
        is_full = run.num_rows == max_rows or run.stop + size - run.start > max_bytes
        if is_large or run.is_too_large or (run.num_rows and is_full):
            runs += [run] if run.num_rows else []
            run = LineRun(run.stop, run.stop, line, 0)
        line += count
        rows = run.num_rows + bool(record)
        run = LineRun(run.start, run.stop + size, run.first_line, rows, is_too_large=is_large)
        if isinstance(record, list) and record and (not first or shown == len(runs)):
            first.append(record)
            shown = len(runs)
    if run.num_rows:
        runs.append(run)
    schema = pa.schema([(column, pa.string()) for column in header])
    lines = Lines(tuple(runs), schema, codec, delimiter, bounds)
    return lines, _table(first, schema)[0]


def _header(records: Iterator[Record], name: str, bounds: ReadBounds) -> tuple[list[str], int, int]:
    """The names of the columns; the byte and the line after them."""
    start, line = 0, 1
    for record, size, count in records:
        start, line = start + size, line + count
        if isinstance(record, RowError):
            raise _unreadable(name, f"the header has {record.detail}")
        if record:
            break
    else:
        return [], 0, 1
    header = record
    if len(header) > bounds.max_keys:
        raise _unreadable(
            name, f"the header has {len(header):,} names, and max_keys is {bounds.max_keys:,}"
        )
    if twice := sorted(column for column, times in Counter(header).items() if times > 1):
        raise _unreadable(name, f"the header names {', '.join(twice)} twice")
    if not _is_utf8(header):
        raise _unreadable(name, "the header is not UTF-8")
    return header, start, line


def read_delimited(data: bytes, name: str, lines: Lines) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of these runs, whose `spans` are `data`, and errors for those that do not fit."""
    assert lines.delimiter is not None
    places: list[int] = []
    rows: list[list[str] | RowError] = []
    at = 0
    for run in lines.runs:
        line, size = run.first_line, run.stop - run.start
        if run.is_too_large:
            places.append(line)
            rows.append(too_large(size, lines.bounds))
            continue
        pieces = lines_of([data[at : at + size]], lines.bounds.max_row_bytes)
        at += size
        for record, _, count in _records(pieces, name, lines.delimiter, line, lines.bounds):
            if record:
                places.append(line)
                rows.append(record)
            line += count
    table, errors = _table(rows, lines.schema)
    return table, {
        row: replace(error, detail=f"line {places[row]}: {error.detail}")
        for row, error in errors.items()
    }


def _table(
    rows: Sequence[list[str] | RowError], schema: pa.Schema
) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows, those that do not fit as nulls, and what is wrong with them."""
    errors = {}
    for row, record in enumerate(rows):
        if isinstance(record, RowError):
            errors[row] = record
        elif len(record) != len(schema):
            why = f"{len(record)} values, and the header names {len(schema)}"
            errors[row] = RowError(RowReason.BAD_STRUCTURE, why)
        elif not _is_utf8(record):
            errors[row] = RowError(RowReason.NOT_UTF8, "not UTF-8")
    nothing = [None] * len(schema)
    fitting: list[Any] = [nothing if row in errors else record for row, record in enumerate(rows)]
    columns = [[record[place] for record in fitting] for place in range(len(schema))]
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=schema), errors


def _is_utf8(record: list[str]) -> bool:
    try:
        "".join(record).encode()
    except UnicodeEncodeError:
        return False
    return True


# Records


class _Full(Exception):
    """With this line, or part of one, the record has more bytes than a row may have."""


def _records(
    parts: Iterable[tuple[bytes, bool]],
    name: str,
    delimiter: str,
    first_line: int,
    bounds: ReadBounds,
) -> Iterator[Record]:
    """Each record (a blank line has no values), its bytes and its lines; an error for a record that
    is too large, which is passed over without being held. `parts` are those of `lines_of`."""
    lines = _one_by_one(parts)
    size = count = 0
    line_num = first_line
    line = b""

    def decoded() -> Iterator[str]:
        nonlocal size, count, line
        for line, is_part in lines:
            size += len(line)
            count += 1
            if is_part or size - line.endswith(b"\n") > bounds.max_row_bytes:
                raise _Full
            text = line.decode(errors=_UNDECODED)
            is_first = first_line == line_num == count == 1
            yield text.removeprefix(_BOM) if is_first else text

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    while True:
        size = count = 0
        try:
            record: list[str] | RowError | None = next(reader, None)
        except _Full:
            # A record goes on in the next line where a quote is open.
            place = _after(line, delimiter, _Place.QUOTED if count > 1 else _Place.BEGIN)
            while place is _Place.QUOTED or not line.endswith(b"\n"):
                count += line.endswith(b"\n")
                line, _ = next(lines, (b"", False))
                if not line:
                    break
                size += len(line)
                place = _after(line, delimiter, place)
            if place is _Place.QUOTED:
                why = f"the row that begins in line {line_num}: unexpected end of data"
                raise _unreadable(name, why) from None
            record = too_large(size, bounds)
            reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
        except csv.Error as error:
            why = f"the row that begins in line {line_num}: {error}"
            raise _unreadable(name, why) from error
        if record is None:
            return
        line_num += count
        yield record, size, count


def _one_by_one(parts: Iterable[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
    for data, is_part in parts:
        if is_part:
            yield data, True
        else:
            yield from ((line, False) for line in io.BytesIO(data))


class _Place(Enum):
    """Where in a field the next byte is."""

    BEGIN = "its first one"
    PLAIN = "outside of quotes"
    QUOTED = "in quotes"
    CLOSED = "after a quote in quotes, which may be the first of two"


def _after(part: bytes, delimiter: str, place: _Place) -> _Place:
    """The place after a part of a record that began at `place`."""
    at = 0
    while at < len(part):
        if place in (_Place.BEGIN, _Place.CLOSED):
            place = _Place.QUOTED if part[at] == _QUOTE else _Place.PLAIN
            at += place is _Place.QUOTED
        else:
            is_plain = place is _Place.PLAIN
            found = part.find(delimiter.encode() if is_plain else b'"', at)
            if found < 0:
                return place
            place, at = _Place.BEGIN if is_plain else _Place.CLOSED, found + 1
    return place


def _unreadable(name: str, why: str) -> ShardError:
    return ShardError(ShardReason.UNREADABLE_FILE, f"{name}: {why}")
