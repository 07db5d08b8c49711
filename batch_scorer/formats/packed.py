"""Packed files: gzip and zstd, told apart by their first bytes; members and frames follow on."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.records import Codec, ReadBounds

_READ_BYTES = 1 << 22
_MAGIC_BYTES = 4
_SKIPPABLE = b"\x2a\x4d\x18"
"""Of a zstd frame without data, after a first byte of 0x50 to 0x5f; such a frame may come first."""


def codec_of(file: BinaryIO) -> Codec | None:
    """How the file is packed; leaves it at its beginning."""
    magic = file.read(_MAGIC_BYTES)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return "gzip"
    is_skippable = magic[1:] == _SKIPPABLE and magic[0] >> 4 == 5
    return "zstd" if magic == b"\x28\xb5\x2f\xfd" or is_skippable else None


def unpacked(file: BinaryIO, name: str, codec: Codec | None, bounds: ReadBounds) -> Iterator[bytes]:
    """The file from its beginning, a block at a time.

    Raises ShardError: UNREADABLE_FILE where it is damaged, TOO_LARGE where it unpacks to more than
    it may.
    """
    stream: Any = file
    if codec == "gzip":
        stream = gzip.GzipFile(fileobj=file)
    elif codec == "zstd":
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    stored = file.seek(0, io.SEEK_END)
    file.seek(0)
    most = bounds.most_unpacked(stored)
    size = 0
    try:
        while block := stream.read(_READ_BYTES):
            size += len(block)
            if codec is not None and size > most:
                raise ShardError(
                    ShardReason.TOO_LARGE,
                    f"{name}: {stored:,} bytes that unpack to more than {most:,} "
                    f"(max_unpacked_gib {bounds.max_unpacked_gib:g}, max_expansion "
                    f"{bounds.max_expansion:g})",
                )
            yield block
    except (OSError, EOFError, zlib.error) as error:
        raise ShardError(
            ShardReason.UNREADABLE_FILE, f"{name}: broken {codec or 'file'}: {error}"
        ) from error
