"""Digests of texts: XXH3, whose values no version changes.

They decide what a selection keeps of equal values, so they may never change. MD5 would do too, and
takes several times as long: more than reading the rows does.
"""

from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

Digests: TypeAlias = npt.NDArray[np.uint64]

_MIX = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that it takes no two numbers to one."""


def digests(texts: pa.Array) -> Digests:
    """uint64[n, 2] of string[n]: the halves of each text's digest, high and low; zeros for null."""
    binary = texts.cast(pa.large_binary())
    _, offsets, data = binary.buffers()
    if data is None:  # no text has a byte
        data = pa.py_buffer(b"")
    ends = np.frombuffer(offsets, np.int64, len(binary) + 1, binary.offset * 8).tolist()
    view = memoryview(data)
    joined = b"".join(xxhash.xxh3_128_digest(view[start:end]) for start, end in pairwise(ends))
    found = np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)
    found[pc.is_null(binary).to_numpy(zero_copy_only=False)] = 0
    return found


def tie_of(prompts: Digests, responses: Digests) -> Digests:
    """uint64[n]: by what rows of equal value are ordered; of the low halves of both digests."""
    return np.asarray(prompts[:, 1] * _MIX + responses[:, 1])
