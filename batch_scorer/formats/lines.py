"""The lines of a file, cut out of its blocks: every byte is passed once, and a line that is longer
than a row may be is never held as a whole."""

from collections.abc import Iterable, Iterator

import numpy as np


def lines_of(blocks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """The file, in order, as whole lines with their ends, many together (False), or as a part of a
    line that has more than `max_bytes` before its line feed (True).

    Only the last part of a long line ends in a line feed, and so do all others but the file's last.
    """
    held: list[bytes] = []
    size = 0  # of what is held, a line that has not ended
    is_long = False  # parts of this line have been given
    for block in blocks:
        first, last = block.find(b"\n") + 1, block.rfind(b"\n") + 1
        begin = 0
        if first and (is_long or size + first - 1 > max_bytes):
            yield b"".join([*held, block[:first]]), True
            held, size, is_long, begin = [], 0, False, first
        if last > begin:
            yield from _without_long(b"".join([*held, block[begin:last]]), max_bytes)
            held, size, begin = [], 0, last
        held.append(block[begin:])
        size += len(block) - begin
        if size > max_bytes or (is_long and size):
            yield b"".join(held), True
            held, size, is_long = [], 0, True
    if size:
        yield b"".join(held), False


def _without_long(lines: bytes, max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """These whole lines, the long ones apart."""
    begin = 0
    if len(lines) > max_bytes:
        ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1
        sizes = np.diff(ends, prepend=0)
        for line in np.flatnonzero(sizes - 1 > max_bytes):
            start, stop = ends[line] - sizes[line], ends[line]
            if start > begin:
                yield lines[begin:start], False
            yield lines[start:stop], True
            begin = stop
    if begin < len(lines):
        yield lines[begin:], False
