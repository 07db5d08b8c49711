"""An input file, and a shard: a row range of one."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from batch_scorer.records.digest import json_text
from batch_scorer.records.rows import DEFAULT_BOUNDS, Format, Layout, ReadBounds, TextStyle
from batch_scorer.storage import Version


@dataclass(frozen=True, slots=True)
class Source:
    """One input file, as it was when the run was planned. `key` is relative to `root`."""

    root: str
    key: str
    size_bytes: int
    version: Version

    @property
    def url(self) -> str:
        return f"{self.root.rstrip('/')}/{self.key}"


@dataclass(frozen=True, slots=True)
class LineRun:
    """Lines that follow each other: bytes [start, stop) of the unpacked file, `num_rows` rows.

    `first_line` counts all lines of the file from 1, blank ones too. `is_plain`: Arrow's own JSON
    reader was seen to be right about them. `is_too_large`: one row that has more bytes than rows
    may have; it is marked, and its bytes are not read.
    """

    start: int
    stop: int
    first_line: int
    num_rows: int
    is_plain: bool = False
    is_too_large: bool = False


Codec: TypeAlias = Literal["gzip", "zstd"]
"""How a file of lines is packed."""


@dataclass(frozen=True, slots=True)
class Lines:
    """Runs of a file of lines, without a gap: all of them, or those of one shard.

    `schema` has the columns of all rows of the file. Values are JSON, or text between
    `delimiter`s. `bounds` are those that the file was cut by.
    """

    runs: tuple[LineRun, ...]
    schema: pa.Schema
    codec: Codec | None = None
    delimiter: str | None = None
    bounds: ReadBounds = DEFAULT_BOUNDS

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Bytes [start, stop) of the unpacked file that are read, for all runs but those of one row
        that is too large; as few spans as there can be."""
        spans: list[tuple[int, int]] = []
        for run in self.runs:
            if run.is_too_large:
                continue
            if spans and spans[-1][1] == run.start:
                spans[-1] = spans[-1][0], run.stop
            else:
                spans.append((run.start, run.stop))
        return spans

    def part(self, start: int, stop: int) -> "Lines":
        """The runs [start, stop)."""
        return replace(self, runs=self.runs[start:stop])


@dataclass(frozen=True, slots=True)
class Shard:
    """A row range of one input file: the unit of work and of commit.

    `num_rows` rows from row `first_row` of the file on: those that follow each other, or, with a
    `where`, the first that match it. They lie in the Parquet row groups [start, stop) of
    `row_groups` (record batches of an Arrow file), or in the `lines` of a file of lines, or (both
    are None) in a JSON array; `skip_rows` is how many rows come before them there. `rows_not_asked`
    counts the rows between this shard and the next one that no shard has, and for a file's first
    shard those before it: the shards of a file add up to its rows. `replaces` is the stale object
    to be replaced, if any. `earlier` are scored objects, as (root, key), that may hold rows of this
    shard with their scores (`reuse`). `retries` is how often marked rows will have been tried again
    once this shard is scored. The last three are not part of the identity.
    """

    source: Source
    layout: Layout
    first_row: int
    num_rows: int
    row_groups: tuple[int, int] | None
    skip_rows: int
    estimated_tokens: int
    output_key: str
    lines: Lines | None = None
    where: str | None = None
    rows_not_asked: int = 0
    replaces: Version | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    retries: int = 0

    def identity(self, fingerprint: str, column_prefix: str) -> str:
        """Digest of what this shard's scores are made of: equal identities, equal scores."""
        identity = identity_function(fingerprint, column_prefix, self.layout, self.where)
        return identity(self.source, self.first_row, self.num_rows, self.rows_not_asked)


def identity_function(
    fingerprint: str, column_prefix: str, layout: Layout, where: str | None
) -> Callable[[Source, int, int, int], str]:
    """What gives the identity of shards that have all of this alike, from the source, the first
    row, and the numbers of rows and of those not asked for.

    It is `digest_of` an object with these keys. What is alike is written once: a plan has the
    identities of all its shards.
    """
    prefix, mark = json_text(column_prefix), json_text(fingerprint)
    read, chosen = json_text(layout_to_json(layout)), json_text(where)

    def identity(source: Source, first_row: int, num_rows: int, rows_not_asked: int) -> str:
        text = (
            f'{{"column_prefix":{prefix},"etag":{json_text(source.version.etag)},'
            f'"fingerprint":{mark},"input":{json_text(source.key)},"layout":{read},'
            f'"rows":[{first_row},{num_rows},{rows_not_asked}],'
            f'"size_bytes":{source.size_bytes},"where":{chosen}}}'
        )
        return hashlib.sha256(text.encode()).hexdigest()

    return identity


def layout_from_json(stored: Mapping[str, Any]) -> Layout:
    """What `layout_to_json` has written."""
    style = stored["text_style"]
    return Layout(
        format=Format(stored["format"]),
        columns=dict(stored["columns"]),
        text_style=None if style is None else TextStyle(style),
        prompt_inside=stored["prompt_inside"],
        repeated=stored["repeated"],
        encoded=tuple(stored["encoded"]),
        watched=tuple(stored["watched"]),
        fields=tuple(stored.get("fields", ())),
    )


def layout_to_json(layout: Layout) -> dict[str, Any]:
    return {
        "format": layout.format,
        "columns": dict(layout.columns),
        "text_style": layout.text_style,
        "prompt_inside": layout.prompt_inside,
        "repeated": layout.repeated,
        "encoded": list(layout.encoded),
        "watched": list(layout.watched),
        **({"fields": list(layout.fields)} if layout.fields else {}),
    }
