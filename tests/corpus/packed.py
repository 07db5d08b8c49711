"""Packed files of lines."""

import gzip
import zlib

import pyarrow as pa

from tests.corpus.case import Case, asks, file_case, lines

ROWS = lines(asks(4))
GZIP = gzip.compress(ROWS, mtime=0)
ZSTD = pa.compress(ROWS, "zstd", asbytes=True)
BLANKS = ROWS + b" " * (80 << 20)
"""Rows and blanks of more than 64 MiB, which may always be unpacked."""


def two(data: bytes, pack: str) -> bytes:
    """Its two halves, packed one after the other; the cut goes through a line."""
    half = len(data) // 2 + 5
    parts = data[:half], data[half:]
    if pack == "gzip":
        return b"".join(gzip.compress(part, mtime=0) for part in parts)
    return b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts)


def zstd_stream(data: bytes) -> bytes:
    """One frame that does not say how long it is."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def with_name(data: bytes) -> bytes:
    """gzip with the name of the file that was packed, and a comment."""
    head = b"\x1f\x8b\x08\x18" + bytes(6) + b"a name\0a comment\0"
    return head + gzip.compress(data, mtime=0)[10:]


def blanks(pack: str) -> bytes:
    if pack == "gzip":
        return gzip.compress(BLANKS, 1, mtime=0)
    return zstd_stream(BLANKS)


CASES: list[Case] = [
    file_case("gzip", "m.jsonl.gz", GZIP, 4),
    file_case("zstd", "m.jsonl.zst", ZSTD, 4),
    file_case("gzip, not said", "m.jsonl", GZIP, 4),
    file_case("zstd, not said", "m.jsonl", ZSTD, 4),
    file_case("not packed, though it is said", "m.jsonl.gz", ROWS, 4),
    file_case("zstd called gzip", "m.jsonl.gz", ZSTD, 4),
    file_case("gzip called zstd", "m.jsonl.zst", GZIP, 4),
    file_case("two members", "m.jsonl.gz", two(ROWS, "gzip"), 4),
    file_case("two frames", "m.jsonl.zst", two(ROWS, "zstd"), 4),
    file_case("an empty member before", "m.jsonl.gz", gzip.compress(b"", mtime=0) + GZIP, 4),
    file_case("a frame of unknown length", "m.jsonl.zst", zstd_stream(ROWS), 4),
    file_case("a frame without data before", "m.jsonl.zst",
              b"\x50\x2a\x4d\x18\x03\0\0\0abc" + ZSTD, 4),
    file_case("with a name and a comment", "m.jsonl.gz", with_name(ROWS), 4),
    file_case("not pressed", "m.jsonl.gz", gzip.compress(ROWS, 0, mtime=0), 4),
    file_case("an array", "m.json.gz", gzip.compress(b"[" + ROWS.split(b"\n")[0] + b"]"), 1),
    file_case("CSV", "m.csv.gz", gzip.compress(b"prompt,response\na,b\n", mtime=0), 1),
    file_case("TSV in zstd", "m.tsv.zst", pa.compress(b"prompt\tresponse\na\tb\n", "zstd",
                                                      asbytes=True), 1),
    file_case("no rows", "m.jsonl.gz", gzip.compress(b"", mtime=0)),
    file_case("packed twice", "m.jsonl.gz", gzip.compress(GZIP, mtime=0),
              failed="unreadable_file"),
    file_case("cut", "m.jsonl.gz", GZIP[:-12], failed="unreadable_file"),
    file_case("cut before its checksum", "m.jsonl.gz", GZIP[:-8], failed="unreadable_file"),
    file_case("cut in the head", "m.jsonl.gz", GZIP[:5], failed="unreadable_file"),
    file_case("a cut frame", "m.jsonl.zst", ZSTD[:-5], failed="unreadable_file"),
    file_case("a frame cut in the head", "m.jsonl.zst", ZSTD[:5], failed="unreadable_file"),
    file_case("a wrong checksum", "m.jsonl.gz", GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:],
              failed="unreadable_file"),
    file_case("a wrong length", "m.jsonl.gz", GZIP[:-4] + b"\xff\0\0\0", failed="unreadable_file"),
    file_case("bytes of no member behind", "m.jsonl.gz", GZIP + b"more",
              failed="unreadable_file"),
    file_case("zeros behind", "m.jsonl.gz", GZIP + bytes(100), 4),
    file_case("bytes of no frame behind", "m.jsonl.zst", ZSTD + b"more",
              failed="unreadable_file"),
    file_case("changed bytes", "m.jsonl.gz", GZIP[:20] + b"\xff" * 20 + GZIP[40:],
              failed="unreadable_file"),
    file_case("another method", "m.jsonl.gz", GZIP[:2] + b"\x07" + GZIP[3:],
              failed="unreadable_file"),
    file_case("the mark alone", "m.jsonl.gz", b"\x1f\x8b", failed="unreadable_file"),
    file_case("zlib", "m.jsonl.gz", zlib.compress(ROWS), failed="unreadable_file"),
    file_case("a zip file", "m.jsonl.gz", b"PK\x03\x04" + bytes(60), failed="unreadable_file"),
    file_case("bz2, which is not read", "m.jsonl.bz2", b"BZh9" + bytes(60)),
    *(
        file_case(f"blanks in {pack}, unpacked beyond the bound", f"m.jsonl.{suffix}",
                  lambda pack=pack: blanks(pack), failed="too_large",
                  flags=("--max-expansion", 2))
        for pack, suffix in (("gzip", "gz"), ("zstd", "zst"))
    ),
    file_case("blanks beyond what may be unpacked", "m.jsonl.gz", lambda: blanks("gzip"),
              failed="too_large", flags=("--max-unpacked-gib", 0.01)),
]  # fmt: skip
