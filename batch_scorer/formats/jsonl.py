"""JSON Lines, gzipped or not, and JSON arrays as Arrow tables; bad lines keep their place.

Lines are read in runs no larger than a shard (`scan_lines`, then `read_lines`), so that memory is
bounded by the shard and not by the file. An array has no lines: it is read whole, by
`read_json_table`.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.records import LineRun, Lines, RowError

IntArray: TypeAlias = npt.NDArray[np.int64]

_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_NEWLINE = ord("\n")
_BLANKS = np.frombuffer(b" \t\n\r\v\f", dtype=np.uint8)
_NULL_FIRST = re.compile(rb"\s*null")
"""Arrow 26 reads past its memory where the first row is null."""
_MAX_BLOCK_BYTES = 2**31 - 1  # Arrow's limit
_READ_BYTES = 1 << 22


def scan_lines(
    file: BinaryIO, name: str, *, max_rows: int, max_bytes: int
) -> tuple[Lines, pa.Table] | None:
    """Cut a file into runs of at most `max_rows` and `max_bytes`; a longer line is a run by itself.

    Also returns the rows of the first run. Every line is parsed, so that types fit all rows. A file
    without rows has no runs. None for what seems to be an array. Raises ShardError as
    `read_json_table` does.
    """
    is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    file.seek(0)
    runs: list[LineRun] = []
    schema, fault, first = pa.schema([]), "", b""
    for run, data in _runs(_blocks(file, name, is_gzip), max_rows, max_bytes):
        if not runs:
            if data.lstrip().startswith(b"["):
                return None
            first = data
        runs.append(run)
        table, errors = _parse(data, name, run.first_line, run.num_rows)
        fault = fault or _first_fault(errors)
        try:
            schema = pa.schema(_joined(pa.struct(schema), pa.struct(table.schema)))
        except pa.ArrowInvalid as error:
            raise _unreadable(name, f"lines from {run.first_line}: {error}") from error
    lines = Lines(tuple(runs), schema, is_gzip)
    if not runs:
        return lines, pa.table({})
    if not schema.names:
        raise _no_table(name, fault)
    return lines, read_lines(first, name, lines.part(0, 1))[0]


def read_lines(data: bytes, name: str, lines: Lines) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of these runs, whose bytes are `data`, with the columns of the whole file.

    Bad lines are rows of nulls and errors, as in `read_json_table`.
    """
    num_rows = sum(run.num_rows for run in lines.runs)
    return _parse(data, name, lines.runs[0].first_line, num_rows, lines.schema)


def unpack_lines(file: BinaryIO, name: str, lines: Lines) -> bytes:
    """The bytes of these runs in a gzipped file: everything before them is unpacked, too."""
    parts: list[bytes] = []
    position = 0
    for block in _blocks(file, name, is_gzip=True):
        parts.append(block[max(0, lines.start - position) : max(0, lines.stop - position)])
        position += len(block)
        if position >= lines.stop:
            break
    return b"".join(parts)


def read_json_table(data: bytes, name: str) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of a JSONL file (gzipped or not) or of one JSON array; blank lines are not rows.

    A line that is not a JSON object becomes a row of nulls, and an error under its row number.
    A file without rows gives a table without columns. Strings stay strings, dates too.
    Raises ShardError(UNREADABLE_FILE), naming the file, where the bytes cannot be unpacked,
    no line is a JSON object, or the rows disagree about a type.
    """
    data = _unzip(data, name).removeprefix(_BOM)
    if data.lstrip()[:1] == b"[" and data.rstrip()[-1:] == b"]":
        data = _array_to_lines(data, name)
    num_rows = sum(1 for line in io.BytesIO(data) if not line.isspace())
    if num_rows == 0:
        return pa.table({}), {}
    table, errors = _parse(data, name, 1, num_rows)
    if table.num_columns == 0:
        raise _no_table(name, _first_fault(errors))
    return table, errors


# Lines


def _blocks(file: BinaryIO, name: str, is_gzip: bool) -> Iterator[bytes]:
    """The file from its beginning, unpacked."""
    stream: Any = gzip.GzipFile(fileobj=file) if is_gzip else file
    try:
        while block := stream.read(_READ_BYTES):
            yield block
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, f"broken gzip: {error}") from error


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


def _unzip(data: bytes, name: str) -> bytes:
    if not data.startswith(_GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, f"broken gzip: {error}") from error


def _array_to_lines(data: bytes, name: str) -> bytes:
    try:
        elements = json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, f"not a JSON array: {error}") from error
    return b"\n".join(json.dumps(element).encode() for element in elements)


def _parse(
    data: bytes, name: str, first_line: int, num_rows: int, schema: pa.Schema | None = None
) -> tuple[pa.Table, dict[int, RowError]]:
    """The `num_rows` rows of these lines, with `schema` or their own types; no columns if none is
    good."""
    try:
        data.decode()  # Arrow takes bytes that are no UTF-8, and fails when they are used
        table = None if _NULL_FIRST.match(data) else _read(data, schema)
        # Arrow reads objects, not lines: two in a line, or one over two lines, are not rows.
        if table is not None and table.num_rows == num_rows and table.num_columns:
            return table, {}
    except (pa.ArrowInvalid, UnicodeDecodeError):
        pass  # the careful way finds the lines that are to blame
    return _parse_carefully(data, name, first_line, num_rows, schema)


def _read(data: bytes, schema: pa.Schema | None) -> pa.Table:
    # One block: a row may be as long as it likes, and types are inferred from all rows alike.
    options = pa.json.ReadOptions(block_size=min(len(data), _MAX_BLOCK_BYTES))
    if schema is None:
        table = pa.json.read_json(pa.BufferReader(data), read_options=options)
        schema = pa.schema([field.with_type(_without_times(field.type)) for field in table.schema])
        if schema == table.schema:
            return table
    return pa.json.read_json(
        pa.BufferReader(data),
        read_options=options,
        parse_options=pa.json.ParseOptions(explicit_schema=schema),
    )


def _without_times(dtype: pa.DataType) -> pa.DataType:
    """`dtype` with strings in place of timestamps, which Arrow makes of strings like dates."""
    if pa.types.is_timestamp(dtype):
        return pa.string()
    if pa.types.is_list(dtype):
        return pa.list_(dtype.value_field.with_type(_without_times(dtype.value_type)))
    if pa.types.is_struct(dtype):
        return pa.struct([field.with_type(_without_times(field.type)) for field in dtype])
    return dtype


def _joined(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Arrow's type for values that are `a` in some lines and `b` in others.

    Raises ArrowInvalid where there is none.
    """
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(a.value_field.with_type(_joined(a.value_type, b.value_type)))
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        types = {field.name: field.type for field in a}
        for field in b:
            types[field.name] = _joined(types.get(field.name, pa.null()), field.type)
        return pa.struct(list(types.items()))
    raise pa.ArrowInvalid(f"{b} in a place that held {a} before")


def _parse_carefully(
    data: bytes, name: str, first_line: int, num_rows: int, schema: pa.Schema | None
) -> tuple[pa.Table, dict[int, RowError]]:
    """As `_parse`, with null rows in place of the bad lines."""
    lines: list[bytes] = []
    line_numbers: list[int] = []
    errors: dict[int, RowError] = {}
    for number, line in enumerate(io.BytesIO(data), start=first_line):
        if line.isspace():
            continue
        line = line.rstrip(b"\r\n")
        why = _fault(line)
        if why:
            errors[len(lines)] = RowError(RowReason.MALFORMED_JSON, f"line {number}: {why}")
        lines.append(b"{}" if why or line.strip() == b"null" else line)
        line_numbers.append(number)
    try:
        table = _read(b"\n".join(lines), schema)
    except pa.ArrowInvalid as error:
        at = re.search(r"in row (\d+)$", str(error))
        where = f"line {line_numbers[int(at[1])]}: " if at else ""
        raise _unreadable(name, f"{where}{error}") from error
    if table.num_columns and table.num_rows != num_rows:
        raise _no_table(name, _first_fault(errors))
    return table, errors


def _fault(line: bytes) -> str | None:
    """Why a line is not one JSON object that Arrow can take, or None."""
    try:
        value = json.loads(line.decode(), object_pairs_hook=_object)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg}, column {error.colno}"
    except UnicodeError:
        return "not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    # Arrow takes a null for a row of nulls; so does the fast way.
    return None if value is None or isinstance(value, dict) else "not a JSON object"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _first_fault(errors: dict[int, RowError]) -> str:
    return next(iter(errors.values())).detail if errors else ""


def _no_table(name: str, fault: str) -> ShardError:
    why = fault or "the objects have no fields"
    return _unreadable(name, f"no table of JSON objects, one a line ({why})")


def _unreadable(name: str, why: str) -> ShardError:
    return ShardError(ShardReason.UNREADABLE_FILE, f"{name}: {why}")
