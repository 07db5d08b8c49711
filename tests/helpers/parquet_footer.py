"""A Parquet file's footer and page headers as trees, to change a field and write them again.

They are Thrift structs in the compact protocol. A field that is not known here stays as it was, so
`with_footer(data, read_footer(data)) == data` for a file as pyarrow writes it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAGIC = b"PAR1"
_TRUE, _FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

# Ids of fields, by the names that they have in parquet.thrift: of FileMetaData,
SCHEMA, NUM_ROWS, ROW_GROUPS = 2, 3, 4
# of RowGroup (the last three may be absent),
COLUMNS, TOTAL_BYTE_SIZE, GROUP_NUM_ROWS = 1, 2, 3
GROUP_FILE_OFFSET, GROUP_COMPRESSED_SIZE, ORDINAL = 5, 6, 7
# of ColumnChunk,
FILE_PATH, CHUNK_FILE_OFFSET, META_DATA = 1, 2, 3
OFFSET_INDEX_OFFSET, OFFSET_INDEX_LENGTH, COLUMN_INDEX_OFFSET, COLUMN_INDEX_LENGTH = 4, 5, 6, 7
# of ColumnMetaData,
CODEC, NUM_VALUES, UNCOMPRESSED_SIZE, COMPRESSED_SIZE, DATA_PAGE, DICTIONARY_PAGE = (
    4,
    5,
    6,
    7,
    9,
    11,
)
# and of PageHeader; DataPageHeader and DictionaryPageHeader begin with their number of values.
PAGE_TYPE, PAGE_UNCOMPRESSED_SIZE, PAGE_COMPRESSED_SIZE, PAGE_CRC = 1, 2, 3, 4
DATA_PAGE_HEADER, DICTIONARY_PAGE_HEADER, DATA_PAGE_HEADER_V2 = 5, 7, 8
PAGE_NUM_VALUES = 1


@dataclass
class List:
    """Values of one type."""

    type: int
    values: list[Any]


@dataclass
class Struct:
    """Fields by id. `tree[NUM_ROWS] = 7` keeps the field's type; `put` sets it."""

    fields: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def __getitem__(self, number: int) -> Any:
        return self.fields[number][1]

    def __setitem__(self, number: int, value: Any) -> None:
        self.fields[number] = self.fields[number][0], value

    def __delitem__(self, number: int) -> None:
        del self.fields[number]

    def __contains__(self, number: int) -> bool:
        return number in self.fields

    def put(self, number: int, type_: int, value: Any) -> None:
        """Set a field that may be absent."""
        self.fields[number] = type_, value


def read_footer(data: bytes) -> Struct:
    """The FileMetaData of a Parquet file."""
    return read_struct(data, _footer_start(data))[0]


def with_footer(data: bytes, footer: Struct) -> bytes:
    """The file with this footer in place of its own."""
    return data[: _footer_start(data)] + end_of_file(footer)


def end_of_file(footer: Struct) -> bytes:
    """What stands behind the pages: footer, its length, magic."""
    written = write_struct(footer)
    return written + len(written).to_bytes(4, "little") + MAGIC


def row_groups(footer: Struct) -> list[Struct]:
    """The row groups; the list itself, to add or remove some."""
    found: list[Struct] = footer[ROW_GROUPS].values
    return found


def chunks(footer: Struct) -> Iterator[Struct]:
    """The ColumnMetaData of all column chunks, in the order of the footer."""
    for group in row_groups(footer):
        for chunk in group[COLUMNS].values:
            yield chunk[META_DATA]


def read_struct(data: bytes, start: int) -> tuple[Struct, int]:
    """The struct that begins at `start`, such as a page's header, and where it ends."""
    reader = _Reader(data, start)
    return reader.struct(), reader.place


def write_struct(tree: Struct) -> bytes:
    out = bytearray()
    _write(out, STRUCT, tree)
    return bytes(out)


def _footer_start(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


class _Reader:
    def __init__(self, data: bytes, place: int) -> None:
        self._data = data
        self.place = place

    def struct(self) -> Struct:
        found = Struct()
        number = 0
        while (head := self._byte()) != 0:
            kind, step = head & 15, head >> 4
            number = number + step if step else self._signed()
            value = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
            found.put(number, _TRUE if kind == _FALSE else kind, value)
        return found

    def _value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE):  # in a list; in a struct the field's head holds it
            return self._byte() == 1
        if kind == I8:
            return int.from_bytes(self._take(1), signed=True)
        if kind in (I16, I32, I64):
            return self._signed()
        if kind == DOUBLE:
            return struct.unpack("<d", self._take(8))[0]
        if kind == BINARY:
            return self._take(self._unsigned())
        if kind in (LIST, SET):
            head = self._byte()
            count = self._unsigned() if head >> 4 == 15 else head >> 4
            return List(head & 15, [self._value(head & 15) for _ in range(count)])
        if kind == STRUCT:
            return self.struct()
        raise ValueError(f"no Thrift type of Parquet's: {kind}")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, count: int) -> bytes:
        found = self._data[self.place : self.place + count]
        if len(found) < count:
            raise ValueError("the struct is cut off")
        self.place += count
        return found


def _write(out: bytearray, kind: int, value: Any) -> None:
    if kind in (_TRUE, _FALSE):
        out.append(1 if value else 2)
    elif kind == I8:
        out += value.to_bytes(1, signed=True)
    elif kind in (I16, I32, I64):
        _write_unsigned(out, (value << 1) ^ (value >> 63))
    elif kind == DOUBLE:
        out += struct.pack("<d", value)
    elif kind == BINARY:
        _write_unsigned(out, len(value))
        out += value
    elif kind in (LIST, SET):
        count = len(value.values)
        out.append((min(count, 15) << 4) | value.type)
        if count >= 15:
            _write_unsigned(out, count)
        for each in value.values:
            _write(out, value.type, each)
    else:
        last = 0
        for number, (type_, each) in value.fields.items():
            head = (_TRUE if each else _FALSE) if type_ == _TRUE else type_
            if 0 < number - last < 16:
                out.append(((number - last) << 4) | head)
            else:
                out.append(head)
                _write_unsigned(out, (number << 1) ^ (number >> 15))
            last = number
            if type_ != _TRUE:
                _write(out, type_, each)
        out.append(0)


def _write_unsigned(out: bytearray, value: int) -> None:
    value &= (1 << 64) - 1
    while value > 127:
        out.append((value & 127) | 128)
        value >>= 7
    out.append(value)
