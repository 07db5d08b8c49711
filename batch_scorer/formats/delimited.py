"""CSV and TSV: every value is text, exactly as it stands in the file.

The first record names the columns. Records are as RFC 4180 has them: a value in quotes may hold
the delimiter, line feeds, and quotes written twice. Blank lines are not rows. A row with too many
or too few values keeps its place as a row of nulls and an error; broken quotes fail the file,
because nobody knows where its rows begin.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats.packed import codec_of, unpacked
from batch_scorer.records import LineRun, Lines, RowError

_BOM = "\ufeff"
_UNDECODED = "surrogateescape"
"""Bytes that are no UTF-8 come through so, and mark their row."""
csv.field_size_limit(2**28)  # 128 kB by default, and an answer may be longer


def scan_delimited(
    file: BinaryIO, name: str, *, delimiter: str, max_rows: int, max_bytes: int
) -> tuple[Lines, pa.Table]:
    """Cut a file into runs, as `jsonl.scan_lines` does; also returns the rows of the first.

    Raises ShardError(UNREADABLE_FILE) where the bytes cannot be unpacked, quotes are broken, or
    the header names a column twice.
    """
    codec = codec_of(file)
    records = _records(_lines(unpacked(file, name, codec)), name, delimiter, 1)
    header, start, line = next(
        ((r, size, count + 1) for r, size, count in records if r), ([], 0, 1)
    )
    header = [column.removeprefix(_BOM) for column in header[:1]] + header[1:]
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise _unreadable(name, f"the header names {', '.join(twice)} twice")
    if not _is_utf8(header):
        raise _unreadable(name, "the header is not UTF-8")
    runs: list[LineRun] = []
    first: list[list[str]] = []
    run = LineRun(start, start, line, 0)
    for record, size, count in records:
        is_full = run.num_rows == max_rows or run.stop + size - run.start > max_bytes
        if run.num_rows and is_full:
            runs.append(run)
            run = LineRun(run.stop, run.stop, line, 0)
        line += count
        run = LineRun(run.start, run.stop + size, run.first_line, run.num_rows + bool(record))
        if record and not runs:
            first.append(record)
    if run.num_rows:
        runs.append(run)
    schema = pa.schema([(column, pa.string()) for column in header])
    return Lines(tuple(runs), schema, codec, delimiter), _table(first, schema)[0]


def read_delimited(data: bytes, name: str, lines: Lines) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of these runs, whose bytes are `data`, and errors for those that do not fit."""
    assert lines.delimiter is not None
    first_line = lines.runs[0].first_line
    places = []
    rows = []
    for record, _, count in _records(io.BytesIO(data), name, lines.delimiter, first_line):
        if record:
            places.append(first_line)
            rows.append(record)
        first_line += count
    table, errors = _table(rows, lines.schema)
    return table, {
        row: RowError(RowReason.BAD_STRUCTURE, f"line {places[row]}: {why}")
        for row, why in errors.items()
    }


def _table(rows: list[list[str]], schema: pa.Schema) -> tuple[pa.Table, dict[int, str]]:
    """The rows, those that do not fit as nulls, and what is wrong with them."""
    errors = {}
    for row, record in enumerate(rows):
        if len(record) != len(schema):
            errors[row] = f"{len(record)} values, and the header names {len(schema)}"
        elif not _is_utf8(record):
            errors[row] = "not UTF-8"
    nothing = [None] * len(schema)
    fitting = [nothing if row in errors else record for row, record in enumerate(rows)]
    columns = [[record[place] for record in fitting] for place in range(len(schema))]
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=schema), errors


def _is_utf8(record: list[str]) -> bool:
    try:
        "".join(record).encode()
    except UnicodeEncodeError:
        return False
    return True


def _records(
    lines: Iterable[bytes], name: str, delimiter: str, first_line: int
) -> Iterator[tuple[list[str], int, int]]:
    """Each record (a blank line has no values), its bytes and its lines."""
    sizes: list[int] = []

    def decoded() -> Iterator[str]:
        for line in lines:
            sizes.append(len(line))
            yield line.decode(errors=_UNDECODED)

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    while True:
        sizes.clear()
        try:
            record = next(reader, None)
        except csv.Error as error:
            at = first_line + reader.line_num - len(sizes)
            raise _unreadable(name, f"the row that begins in line {at}: {error}") from error
        if record is None:
            return
        yield record, sum(sizes), len(sizes)


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file, each with its end."""
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _unreadable(name: str, why: str) -> ShardError:
    return ShardError(ShardReason.UNREADABLE_FILE, f"{name}: {why}")
