"""Files with something changed in them that their format knows: a field of a footer, a token of a
line, a member of an archive, a number of a config. All of a mutant follows from its `Random`."""

import gzip
import io
import json
import re
import struct
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.parquet_footer import (
    BINARY,
    COMPRESSED_SIZE,
    DATA_PAGE,
    DICTIONARY_PAGE,
    I8,
    I64,
    LIST,
    STRUCT,
    List,
    Struct,
    chunks,
    read_footer,
    read_struct,
    with_footer,
    write_struct,
)

Change: TypeAlias = Callable[[bytes, Random], bytes]

ROWS = 12
"""Of every sound file."""
_TRUE, _I16 = 1, 4
_NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**31 - 1,
    2**31,
    -(2**31),
    2**63 - 1,
    -(2**63),
)
_DEEPEST = 300
_PIECES: tuple[bytes, ...] = (
    b"NaN", b"-Infinity", b"1e999", b"-0", b"01", b"1.", b"0x1", b"9" * 400, b"null", b"true",
    b'""', b'"\\ud800"', b'"\\u0000"', b'"\\x"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\xe2\x82',
    b"[]", b"{}", b"[1, \"a\", null]", b'{"": 1}', b'{"a": 1, "a": 2}', b"\n", b"\r\n", b"\r",
    b"\0", b"\xef\xbb\xbf", b"\x0b", b"\xc2\xa0", b"\xe2\x80\xa8", b",", b":", b"{", b"}", b"[",
    b"]", b'"',
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},:\n]|[^\s\[\]{},:"]+|\s+|.', re.DOTALL)


def sound_rows() -> list[dict[str, Any]]:
    """What every sound file of rows holds."""
    return [
        {
            "prompt": f"What is {i}?",
            "response": f"It is {i * i}, \u00e9\U0001f600.",
            "x": {"a": [i, None], "b": "c" * (i % 3)},
            "y": i / 7,
        }
        for i in range(ROWS)
    ]


def sound_lines() -> bytes:
    """The same, a line each."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in sound_rows())


# Of any bytes


def _place(data: bytes, rng: Random) -> int:
    return rng.randrange(len(data)) if data else 0


def flipped(data: bytes, rng: Random) -> bytes:
    """A few bits are others."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        found[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(data: bytes, rng: Random) -> bytes:
    """It ends too early."""
    return data[: _place(data, rng)]


def spliced(data: bytes, rng: Random) -> bytes:
    """A part stands at another place too, or is gone, or is overwritten."""
    start, size = _place(data, rng), rng.choice((1, 4, 16, 200))
    part, at = data[start : start + size], _place(data, rng)
    if rng.random() < 0.3:
        return data[:start] + data[start + size :]
    over = len(part) if rng.random() < 0.5 else 0
    return data[:at] + part + data[at + over :]


_ANY: tuple[Change, ...] = (flipped, cut, spliced)


# Parquet


@cache
def _sound_parquet() -> tuple[bytes, ...]:
    table = pa.Table.from_pylist(sound_rows())
    table = table.append_column("z", table["prompt"].dictionary_encode())
    options: tuple[dict[str, Any], ...] = (
        {"compression": "none", "use_dictionary": False, "row_group_size": 5},
        {"compression": "zstd", "row_group_size": 5, "write_page_checksum": True},
        {"compression": "snappy", "data_page_version": "2.0", "store_schema": False},
        {"compression": "gzip", "write_page_index": True, "data_page_size": 20},
    )
    found = []
    for each in options:
        sink = io.BytesIO()
        pq.write_table(table, sink, **each)
        found.append(sink.getvalue())
    return tuple(found)


def _structs(value: Any) -> list[Struct]:
    """All structs in it, itself among them."""
    if isinstance(value, Struct):
        return [value, *(s for _, each in value.fields.values() for s in _structs(each))]
    if isinstance(value, List) and value.type == STRUCT:
        return [s for each in value.values for s in _structs(each)]
    return []


def _change_struct(tree: Struct, rng: Random) -> None:
    """One field of one struct in the tree is another, or is gone; or a list has other items."""
    found = rng.choice([s for s in _structs(tree) if s.fields] or [tree])
    if not found.fields:
        return
    number = rng.choice(list(found.fields))
    kind, value = found.fields[number]
    if rng.random() < 0.1:
        del found[number]
    elif kind == _TRUE:
        found[number] = not value
    elif kind == I8:
        found[number] = rng.randrange(-128, 128)
    elif _I16 <= kind <= I64:
        near = (value + 1, value - 1, 2 * value, value // 2, -value)
        found[number] = rng.choice((*_NUMBERS, *near, *near, rng.randrange(20)))
    elif kind == BINARY:
        found[number] = rng.choice((b"", b"\xff\xfe", b"prompt", b"a.b", value[:-1], value * 2))
    elif kind == LIST and value.values:
        items = value.values
        at = rng.randrange(len(items))
        match rng.randrange(4):
            case 0:
                del items[at]
            case 1:
                items.insert(rng.randrange(len(items)), items[at])
            case 2:
                rng.shuffle(items)
            case _:
                if value.type in (_I16, 5, I64):
                    items[at] = rng.choice(_NUMBERS)


def _footer_changed(data: bytes, rng: Random) -> bytes:
    footer = read_footer(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_struct(footer, rng)
    return with_footer(data, footer)


def _page_changed(data: bytes, rng: Random) -> bytes:
    """The header of a page, with what lies behind it at its new place."""
    footer = read_footer(data)
    chunk = rng.choice(list(chunks(footer)))
    start = chunk[rng.choice([n for n in (DATA_PAGE, DICTIONARY_PAGE) if n in chunk])]
    header, end = read_struct(data, start)
    _change_struct(header, rng)
    new = write_struct(header)
    moved = len(new) - (end - start)
    for each in chunks(footer):
        for number in (DATA_PAGE, DICTIONARY_PAGE):
            if number in each and each[number] > start:
                each[number] += moved
    chunk[COMPRESSED_SIZE] += moved
    return with_footer(data[:start] + new + data[end:], footer)


def _body_changed(data: bytes, rng: Random) -> bytes:
    """Bytes of pages are others; the footer stays."""
    size = 8 + int.from_bytes(data[-8:-4], "little")
    return rng.choice((flipped, spliced))(data[:-size], rng) + data[-size:]


def parquet(rng: Random) -> bytes:
    """A Parquet file."""
    change = rng.choice((*[_footer_changed] * 4, *[_page_changed] * 3, _body_changed, *_ANY))
    return change(rng.choice(_sound_parquet()), rng)


# JSON


def _nested(rng: Random) -> bytes:
    depth = rng.randrange(1, _DEEPEST)
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opening * depth + b"1" + closing * (depth - rng.choice((0, 0, 1, depth)))


def _tokens_changed(data: bytes, rng: Random) -> bytes:
    tokens = _TOKEN.findall(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not tokens:
            break
        at, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        match rng.randrange(6):
            case 0:
                del tokens[at]
            case 1:
                tokens.insert(at, tokens[other])
            case 2:
                tokens[at], tokens[other] = tokens[other], tokens[at]
            case 3:
                tokens[at] = _nested(rng)
            case 4:
                tokens.insert(at, rng.choice(_PIECES))
            case _:
                tokens[at] = rng.choice(_PIECES)
    return b"".join(tokens)


def _lines_changed(data: bytes, rng: Random) -> bytes:
    lines = data.split(b"\n")
    match rng.randrange(5):
        case 0:
            return rng.choice((b"\r\n", b"\n\n", b"\r", b",\n", b" ")).join(lines)
        case 1:
            return b"[" + b",".join(line for line in lines if line) + rng.choice((b"]", b"", b",]"))
        case 2:
            rng.shuffle(lines)
            return b"\n".join(lines)
        case 3:
            return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" ")) + data
    return data * rng.choice((2, 20)) + rng.choice(lines)


def json_lines(rng: Random) -> bytes:
    """JSON Lines."""
    change = rng.choice((*[_tokens_changed] * 6, _lines_changed, *_ANY))
    return change(sound_lines(), rng)


# Packed lines


def _gzip_changed(data: bytes, rng: Random) -> bytes:
    """A part of a member's head or end, or the members."""
    match rng.randrange(6):
        case 0:
            return data[:3] + bytes([rng.randrange(256)]) + data[4:]
        case 1:
            return data[:3] + b"\x04" + data[4:10] + rng.randbytes(2) + data[10:]
        case 2:
            return data[:-4] + struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1)))
        case 3:
            return data[:-8] + rng.randbytes(4) + data[-4:]
        case 4:
            return data + rng.choice((data, cut(data, rng), bytes(30), b"more", data[:3]))
    return gzip.compress(b"", mtime=0) * rng.randrange(1, 20) + data


def packed_gzip(rng: Random) -> bytes:
    """A packed file of lines, sound or not itself."""
    lines = sound_lines() if rng.random() < 0.8 else json_lines(rng)
    data = gzip.compress(lines, rng.choice((0, 1, 9)), mtime=0)
    return rng.choice((*[_gzip_changed] * 3, *_ANY))(data, rng)


def packed_zstd(rng: Random) -> bytes:
    """The same in zstd: a frame's head, its blocks, or the frames."""
    lines = sound_lines() if rng.random() < 0.8 else json_lines(rng)
    data: bytes = pa.compress(lines, "zstd", asbytes=True)
    match rng.randrange(6):
        case 0:
            return data[:4] + bytes([rng.randrange(256)]) + data[5:]
        case 1:
            return data[:5] + rng.randbytes(rng.randrange(1, 5)) + data[9:]
        case 2:
            return data + rng.choice((data, cut(data, rng), bytes(30), b"more", data[:5]))
        case 3:
            size = struct.pack("<I", rng.choice((0, 3, 4, 2**31, 2**32 - 1)))
            return bytes([0x50 + rng.randrange(16)]) + b"\x2a\x4d\x18" + size + b"abc" + data
    return rng.choice(_ANY)(data, rng)


# Models


def _values() -> tuple[Any, ...]:
    far = (2**31, 2**63, 10**12, 1e300, float("nan"), float("inf"))
    empty = ("", [], {}, None, True, False)
    return (*far, *empty, 0, -1, 1, 3, 1.5, "a", "\ud800", [1], [[]], {"a": 1}, "x" * 5000)


def _tree_changed(tree: Any, rng: Random) -> None:
    """One entry somewhere in the tree is another, is gone, has another name, or is there twice."""
    places: list[Any] = []
    waiting = [tree]
    while waiting:
        found = waiting.pop()
        items = found.values() if isinstance(found, dict) else found
        if items:
            places.append(found)
        waiting += [item for item in items if isinstance(item, dict | list)]
    if not places:
        return
    # Near the root as often as in the crowd below.
    found = rng.choice(places[: rng.choice((1, 5, len(places)))])
    key = rng.choice(list(found) if isinstance(found, dict) else range(len(found)))
    match rng.randrange(6):
        case 0:
            del found[key]
        case 1 if isinstance(found, dict):
            found[rng.choice(("", "a", f"{key}x", "__metadata__"))] = found.pop(key)
        case 1:
            found.append(found[key])
        case 2:
            other = rng.choice(places)
            found[key] = json.loads(json.dumps(other))
        case 3 if isinstance(found[key], int | float):
            found[key] = rng.choice((found[key] + 1, found[key] - 1, -found[key], found[key] * 2))
        case _:
            found[key] = rng.choice(_values())


def _json_changed(data: bytes, rng: Random) -> bytes:
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _tree_changed(tree, rng)
    return json.dumps(tree).encode()


def json_file(data: bytes, rng: Random) -> bytes:
    """A JSON file of a model."""
    return rng.choice((*[_json_changed] * 6, _tokens_changed, *_ANY))(data, rng)


def safetensors(data: bytes, rng: Random) -> bytes:
    """Weights: the header's length, the header, or the numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(8):
        case 0:
            near = (0, length - 1, length + 1, length + 8, len(data), 2**31, 2**63, 2**64 - 1)
            return struct.pack("<Q", rng.choice(near)) + data[8:]
        case 1:
            return data[: 8 + length] + rng.choice(_ANY)(body, rng)
        case 2:
            return rng.choice(_ANY)(data, rng)
        case 3:
            header = _tokens_changed(header, rng)
        case _:
            header = _json_changed(header, rng)
    return struct.pack("<Q", len(header)) + header + body


FILES: dict[str, tuple[str, Callable[[Random], bytes]]] = {
    "parquet": ("m.parquet", parquet),
    "jsonl": ("m.jsonl", json_lines),
    "gzip": ("m.jsonl.gz", packed_gzip),
    "zstd": ("m.jsonl.zst", packed_zstd),
}
"""Kind → name of the file and what makes one."""
MODELS: dict[str, tuple[str, Change]] = {
    "safetensors": ("model.safetensors", safetensors),
    "tokenizer": ("tokenizer.json", json_file),
    "config": ("config.json", json_file),
}
"""Kind → which file of a model is changed, and how."""
