"""JSON Lines, gzipped or not, and JSON arrays as Arrow tables; bad lines keep their place."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.records import RowError

_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_MAX_BLOCK_BYTES = 2**31 - 1  # Arrow's limit


def read_json_table(data: bytes, name: str) -> tuple[pa.Table, dict[int, RowError]]:
    """The rows of a JSONL file (gzipped or not) or of one JSON array; blank lines are no rows.

    A line that is no JSON object becomes a row of nulls, and an error under its row number.
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
    try:
        data.decode()  # Arrow takes bytes that are no UTF-8, and fails when they are used
        table = _read(data)
        # Arrow reads objects, not lines: two in a line, or one over two lines, are not rows.
        if table.num_rows == num_rows and table.num_columns:
            return table, {}
    except (pa.ArrowInvalid, UnicodeDecodeError):
        pass  # the careful way finds the lines that are to blame
    return _read_carefully(data, name, num_rows)


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


def _read(data: bytes) -> pa.Table:
    # One block: a row may be as long as it likes, and types are inferred from all rows alike.
    options = pa.json.ReadOptions(block_size=min(len(data), _MAX_BLOCK_BYTES))
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
    """`dtype` with strings where Arrow took strings that look like dates for timestamps."""
    if pa.types.is_timestamp(dtype):
        return pa.string()
    if pa.types.is_list(dtype):
        return pa.list_(dtype.value_field.with_type(_without_times(dtype.value_type)))
    if pa.types.is_struct(dtype):
        return pa.struct([field.with_type(_without_times(field.type)) for field in dtype])
    return dtype


def _read_carefully(data: bytes, name: str, num_rows: int) -> tuple[pa.Table, dict[int, RowError]]:
    """As `_read`, with null rows in place of the lines that are to blame."""
    lines: list[bytes] = []
    line_numbers: list[int] = []
    errors: dict[int, RowError] = {}
    for number, line in _numbered_lines(data):
        why = _fault(line)
        if why:
            errors[len(lines)] = RowError(RowReason.MALFORMED_JSON, f"line {number}: {why}")
        lines.append(b"{}" if why else line)
        line_numbers.append(number)
    try:
        table = _read(b"\n".join(lines))
    except pa.ArrowInvalid as error:
        at = re.search(r"in row (\d+)$", str(error))
        where = f"line {line_numbers[int(at[1])]}: " if at else ""
        raise _unreadable(name, f"{where}{error}") from error
    if table.num_columns == 0 or table.num_rows != num_rows:
        why = next(iter(errors.values())).detail if errors else "the objects have no fields"
        raise _unreadable(name, f"no table of JSON objects, one a line ({why})")
    return table, errors


def _numbered_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.isspace():
            yield number, line.rstrip(b"\r\n")


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


def _unreadable(name: str, why: str) -> ShardError:
    return ShardError(ShardReason.UNREADABLE_FILE, f"{name}: {why}")
