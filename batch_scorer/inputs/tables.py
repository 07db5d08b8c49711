"""The files and the shards of a plan, in columns: there may be a million of each.

Both tables are sequences that make a record when one is asked for. Legend: F files, G parts of all
files (row groups, record batches, or runs of lines), S shards.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, Self, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.inputs.selection import rows_of_bits
from batch_scorer.inputs.sources import kind_of
from batch_scorer.inputs.where import IntArray
from batch_scorer.records import (
    Layout,
    Lines,
    Shard,
    Source,
    identity_function,
    layout_to_json,
)

_SUFFIX = ".parquet"
_AT_ONCE = 4096
"""Shards whose numbers are turned into Python's together."""

Numbers: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class InputFile:
    """What the plan knows of one file. `row_groups` is (rows, estimated tokens) of each, or of each
    record batch, or of each run of `lines` where there are lines; a JSON array counts as one.
    `lost_types` names the columns whose Parquet type the output cannot have.

    `where` is the expression that rows have to match, and `matching` one bit a row
    (`selection.matching_rows`); None without it. With a `limit` only so many of them are asked for.
    """

    source: Source
    schema: pa.Schema
    layout: Layout
    row_groups: tuple[tuple[int, int], ...]
    lines: Lines | None = None
    lost_types: tuple[str, ...] = ()
    where: str | None = None
    matching: bytes | None = field(default=None, repr=False)
    limit: int | None = None

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)

    def asked(self) -> range | IntArray:
        """The rows that are asked for, in order."""
        if self.matching is None:
            return range(self.num_rows)[: self.limit]
        return rows_of_bits(self.matching, self.num_rows)[: self.limit]

    @property
    def has_groups(self) -> bool:
        kind = kind_of(self.source.key)
        return kind is not None and kind.has_groups


@dataclass(frozen=True, slots=True)
class Alike:
    """What many files have alike: how their rows are read."""

    schema: pa.Schema
    layout: Layout
    lost_types: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for those that are equal."""
        layout = json.dumps(layout_to_json(self.layout), sort_keys=True)
        return self.schema, layout, self.layout.bounds, self.lost_types


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What looking at F files found out, whatever their names.

    `alike[which[f]]` is how file f is read, its parts are those from `offsets[f]` to
    `offsets[f + 1]`. `lines` and `matching` are those of an `InputFile`, by file, for those that
    have them.
    """

    alike: Sequence[Alike]
    which: npt.NDArray[np.int32]  # [F]
    offsets: Numbers  # [F + 1]
    rows: Numbers  # [G]
    tokens: Numbers  # [G]
    lines: Mapping[int, Lines] = field(default_factory=dict)
    matching: Mapping[int, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.which)

    @classmethod
    def of(cls, files: Sequence[InputFile]) -> Self:
        """Those of these files."""
        alike: dict[Any, int] = {}
        # Files that were looked at together share these objects; the list keeps them alive.
        seen: dict[tuple[int, int, tuple[str, ...]], int] = {}
        found: list[Alike] = []
        which = []
        for file in files:
            same = (id(file.schema), id(file.layout), file.lost_types)
            if same not in seen:
                one = Alike(file.schema.remove_metadata(), file.layout, file.lost_types)
                seen[same] = alike.setdefault(one.key, len(found))
                if seen[same] == len(found):
                    found.append(one)
            which.append(seen[same])
        parts = np.array([*chain.from_iterable(file.row_groups for file in files)], np.int64)
        parts = parts.reshape(-1, 2)
        return cls(
            alike=found,
            which=np.array(which, np.int32),
            offsets=_offsets([len(file.row_groups) for file in files]),
            rows=parts[:, 0].copy(),
            tokens=parts[:, 1].copy(),
            lines={at: file.lines for at, file in enumerate(files) if file.lines is not None},
            matching={
                at: file.matching for at, file in enumerate(files) if file.matching is not None
            },
        )

    @classmethod
    def joined(cls, parts: Sequence["Facts"]) -> Self:
        """All of them, in this order."""
        alike: dict[Any, int] = {}
        found: list[Alike] = []
        which = [np.zeros(0, np.int32)]
        lines: dict[int, Lines] = {}
        matching: dict[int, bytes] = {}
        begin = 0
        for part in parts:
            new = []
            for one in part.alike:
                new.append(alike.setdefault(one.key, len(found)))
                if new[-1] == len(found):
                    found.append(one)
            which.append(np.array(new, np.int32)[part.which])
            lines |= {begin + at: value for at, value in part.lines.items()}
            matching |= {begin + at: value for at, value in part.matching.items()}
            begin += len(part)
        nothing = np.zeros(0, np.int64)
        return cls(
            alike=found,
            which=np.concatenate(which),
            offsets=_offsets(np.concatenate([nothing, *(np.diff(part.offsets) for part in parts)])),
            rows=np.concatenate([nothing, *(part.rows for part in parts)]),
            tokens=np.concatenate([nothing, *(part.tokens for part in parts)]),
            lines=lines,
            matching=matching,
        )

    def take(self, places: Numbers) -> "Facts":
        """Those of the files at these places, in their order."""
        if np.array_equal(places, np.arange(len(self))):
            return self
        counts = np.diff(self.offsets)[places]
        offsets = _offsets(counts)
        inner = np.repeat(self.offsets[places] - offsets[:-1], counts) + np.arange(offsets[-1])
        chosen = places.tolist() if self.lines or self.matching else []
        used, which = np.unique(self.which[places], return_inverse=True)
        return replace(
            self,
            alike=[self.alike[one] for one in used.tolist()],
            which=which.astype(np.int32),
            offsets=offsets,
            rows=self.rows[inner],
            tokens=self.tokens[inner],
            lines={at: self.lines[old] for at, old in enumerate(chosen) if old in self.lines},
            matching={
                at: self.matching[old] for at, old in enumerate(chosen) if old in self.matching
            },
        )

    def sums(self, of_parts: Numbers) -> Numbers:
        """int64[F]: the sum over each file's parts of a number that each part has."""
        before = np.concatenate([[0], np.cumsum(of_parts)])
        sums: Numbers = before[self.offsets[1:]] - before[self.offsets[:-1]]
        return sums


@dataclass(frozen=True, slots=True, eq=False)
class FileTable(Sequence[InputFile]):
    """The files of a plan: where each lies, and what is known of it.

    `where` is the plan's, and `limits` how many rows of each file are asked for, None for all.
    """

    sources: Sequence[Source]
    facts: Facts
    where: str | None = None
    limits: Sequence[int] | None = None

    @classmethod
    def of(cls, files: Sequence[InputFile]) -> Self:
        """These files, of which all have a limit or none."""
        limits = [file.limit for file in files if file.limit is not None]
        where = files[0].where if files else None
        return cls([file.source for file in files], Facts.of(files), where, limits or None)

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, place: int) -> InputFile: ...
    @overload
    def __getitem__(self, place: slice) -> list[InputFile]: ...
    def __getitem__(self, place: int | slice) -> InputFile | list[InputFile]:
        if isinstance(place, slice):
            return [self._made(each) for each in range(len(self))[place]]
        return self._made(range(len(self))[place])

    def _made(self, at: int) -> InputFile:
        facts = self.facts
        start, stop = facts.offsets[at : at + 2].tolist()
        alike = facts.alike[facts.which[at]]
        parts = zip(facts.rows[start:stop].tolist(), facts.tokens[start:stop].tolist(), strict=True)
        return InputFile(
            source=self.sources[at],
            schema=alike.schema,
            layout=alike.layout,
            row_groups=tuple(parts),
            lines=facts.lines.get(at),
            lost_types=alike.lost_types,
            where=self.where,
            matching=facts.matching.get(at),
            limit=None if self.limits is None else self.limits[at],
        )

    @property
    def num_rows(self) -> Numbers:
        """int64[F]."""
        return self.facts.sums(self.facts.rows)

    def asked(self) -> list[int]:
        """How many rows of each file are asked for."""
        asked: list[int] = self.num_rows.tolist()
        for at in self.facts.matching:
            asked[at] = len(self[at].asked())
        if self.limits is not None:
            asked = [min(each) for each in zip(asked, self.limits, strict=True)]
        return asked

    def by_alike(self) -> Iterator[tuple[Alike, Numbers]]:
        """How files are read, each once, in the order of their first files, with the places of the
        files that are read so."""
        order = np.argsort(self.facts.which, kind="stable")
        begins = np.flatnonzero(np.diff(self.facts.which[order])) + 1
        groups = np.split(order, begins) if len(order) else []
        for places in sorted(groups, key=lambda group: int(group[0])):
            yield self.facts.alike[self.facts.which[places[0]]], places


_NUMBERS = np.dtype(
    [
        ("file", np.int32),
        ("first_row", np.int64),
        ("stop_row", np.int64),
        ("num_rows", np.int64),
        ("start", np.int64),
        ("stop", np.int64),
        ("skip_rows", np.int64),
        ("estimated_tokens", np.int64),
        ("rows_not_asked", np.int64),
        ("is_piece", np.bool_),
    ]
)
"""What tells the shards of a plan apart: the place of its file, and numbers that have the names of
a `Shard`'s. The rows after the last one begin at `stop_row`; `start` and `stop` are of the parts
that hold it. `is_piece`: its file has others."""


@dataclass(frozen=True, slots=True, eq=False)
class ShardTable(Sequence[Shard]):
    """The shards of a plan, or some of them: each is made when it is asked for.

    `numbers` has a row for each (`_NUMBERS`). `changed` has, by place, shards that stand for those
    in the columns: with other values of what is no part of an identity, and not counted here.
    """

    files: FileTable
    numbers: npt.NDArray[np.void]  # [S]
    changed: Mapping[int, Shard] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Shard: ...
    @overload
    def __getitem__(self, place: slice) -> "ShardTable": ...
    def __getitem__(self, place: int | slice) -> "Shard | ShardTable":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        at = range(len(self))[place]
        return next(self._made(at, at + 1))

    def __iter__(self) -> Iterator[Shard]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self._made(start, start + _AT_ONCE)

    def _made(self, start: int, stop: int) -> Iterator[Shard]:
        facts, sources = self.files.facts, self.files.sources
        for at, numbers in enumerate(self.numbers[start:stop].tolist(), start):
            if at in self.changed:
                yield self.changed[at]
                continue
            file, first, after, rows, begin, end, skip, tokens, not_asked, is_piece = numbers
            source, lines = sources[file], facts.lines.get(file)
            kind = kind_of(source.key)
            yield Shard(
                source=source,
                layout=facts.alike[facts.which[file]].layout,
                first_row=first,
                num_rows=rows,
                row_groups=(begin, end) if kind is not None and kind.has_groups else None,
                skip_rows=skip,
                estimated_tokens=tokens,
                output_key=_output_key(source.key, first, after, is_piece),
                lines=lines and lines.part(begin, end),
                where=self.files.where,
                rows_not_asked=not_asked,
            )

    def take(self, places: npt.NDArray[np.intp]) -> "ShardTable":
        """The shards at these places, in their order."""
        old = places.tolist() if self.changed else []
        changed = {at: self.changed[place] for at, place in enumerate(old) if place in self.changed}
        return ShardTable(self.files, self.numbers[places], changed)

    def with_changed(self, changed: Mapping[int, Shard]) -> "ShardTable":
        """The same with these shards in their places."""
        return replace(self, changed={**self.changed, **changed})

    def in_scoring_order(self) -> "ShardTable":
        """The same in the order in which they are scored: the last ones to finish are short ones;
        and before all others the shortest, so that what is wrong with the commits shows soon."""
        keys, tokens = list(self.output_keys), self.numbers["estimated_tokens"].tolist()
        order = sorted(range(len(self)), key=lambda place: (-tokens[place], keys[place]))
        return self.take(np.roll(np.array(order, np.intp), 1))

    def total(self, number: str) -> int:
        """The sum of a number over all shards."""
        return int(self.numbers[number].sum())

    @property
    def output_keys(self) -> Iterator[str]:
        """The output key of each shard."""
        sources = self.files.sources
        for file, first, after, is_piece in self._rows("file", "first_row", "stop_row", "is_piece"):
            yield _output_key(sources[file].key, first, after, is_piece)

    @property
    def input_keys(self) -> set[str]:
        """The keys of the files that these are shards of."""
        return {self.files.sources[at].key for at in np.unique(self.numbers["file"]).tolist()}

    def identities(self, fingerprint: str, column_prefix: str) -> Iterator[str]:
        """`Shard.identity` of each shard."""
        facts, sources = self.files.facts, self.files.sources
        of = [
            identity_function(fingerprint, column_prefix, alike.layout, self.files.where)
            for alike in facts.alike
        ]
        for file, *rows in self._rows("file", "first_row", "num_rows", "rows_not_asked"):
            yield of[facts.which[file]](sources[file], *rows)

    def _rows(self, *names: str) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(self), _AT_ONCE):
            yield from self.numbers[[*names]][start : start + _AT_ONCE].tolist()


def _output_key(key: str, first_row: int, stop_row: int, is_piece: bool) -> str:
    stem = key[: -len(_SUFFIX)] if key.lower().endswith(_SUFFIX) else key
    piece = f".rows{first_row}-{stop_row}" if is_piece else ""
    return f"{stem}{piece}{_SUFFIX}"


def _offsets(counts: npt.ArrayLike) -> Numbers:
    """int64[n + 1], of n counts."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


# How files are cut


def cut(files: FileTable, shard_rows: int, shard_tokens: int) -> ShardTable:
    """Cut the rows that are asked for at row groups, and inside a group that alone is too large.

    A file that fits is one shard under its own name; an empty file is one empty shard. A file of
    which nothing is asked for has none.
    """
    facts = files.facts
    tokens, num_rows = facts.sums(facts.tokens), files.num_rows
    # Most files are small, all of their rows are asked for, and no part is empty.
    is_whole = (num_rows > 0) & (num_rows <= shard_rows) & (tokens <= shard_tokens)
    is_whole &= facts.sums((facts.rows == 0).astype(np.int64)) == 0
    if facts.matching or files.limits is not None:
        is_whole[:] = False
    others = [
        (at, *numbers)
        for at in np.flatnonzero(~is_whole).tolist()
        for numbers in _pieces(files[at], shard_rows, shard_tokens)
    ]
    places = np.flatnonzero(is_whole)
    whole = np.zeros(len(places), _NUMBERS)
    whole["file"] = places
    whole["stop_row"] = whole["num_rows"] = num_rows[places]
    whole["stop"] = np.diff(facts.offsets)[places]
    whole["estimated_tokens"] = tokens[places]
    numbers = np.concatenate([whole, np.array(others, _NUMBERS)])
    return ShardTable(files, numbers[np.argsort(numbers["file"], kind="stable")])


def _pieces(file: InputFile, shard_rows: int, shard_tokens: int) -> Iterator[tuple[int, ...]]:
    """The numbers of each shard of a file, after the file's."""
    rows = file.asked()
    ends = list(accumulate(num_rows for num_rows, _ in file.row_groups))
    counts = np.diff([0, *(bisect_left(rows, end) for end in ends)]).tolist()
    groups = [
        (asked, tokens * asked // num_rows if num_rows else tokens)
        for asked, (num_rows, tokens) in zip(counts, file.row_groups, strict=True)
    ]
    ranges = list(_ranges(groups, shard_rows, shard_tokens))
    if not file.num_rows:
        ranges = [(0, 0, 0)]
    for place, num_rows, tokens in ranges:
        first, last = (int(rows[i]) for i in (place, place + num_rows - 1)) if num_rows else (0, -1)
        after = int(rows[place + num_rows]) if place + num_rows < len(rows) else file.num_rows
        start, stop = parts_holding(ends, first, last + 1)
        skip_rows = first - (ends[start - 1] if start else 0)
        not_asked = after - (first if place else 0) - num_rows
        is_piece = len(ranges) > 1
        yield first, last + 1, num_rows, start, stop, skip_rows, tokens, not_asked, is_piece


def parts_holding(ends: Sequence[int], first_row: int, stop_row: int) -> tuple[int, int]:
    """Which parts [start, stop) of a file hold the rows [first_row, stop_row); `ends` has for each
    part the number of rows up to its end."""
    if stop_row <= first_row:
        return 0, 0
    return bisect_right(ends, first_row), bisect_right(ends, stop_row - 1) + 1


def _ranges(
    groups: Sequence[tuple[int, int]], shard_rows: int, shard_tokens: int
) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, tokens) of each shard, out of (rows, tokens) of each row group."""
    first_row, rows, tokens = 0, 0, 0
    for group_rows, group_tokens in groups:
        if rows and (rows + group_rows > shard_rows or tokens + group_tokens > shard_tokens):
            yield first_row, rows, tokens
            first_row, rows, tokens = first_row + rows, 0, 0
        if group_rows > shard_rows or group_tokens > shard_tokens:
            pieces = max(-(-group_rows // shard_rows), -(-group_tokens // shard_tokens))
            step = max(1, -(-group_rows // pieces))
            for skip in range(0, group_rows, step):
                part = min(step, group_rows - skip)
                yield first_row + skip, part, group_tokens * part // group_rows
            first_row += group_rows
        else:
            rows, tokens = rows + group_rows, tokens + group_tokens
    if rows:
        yield first_row, rows, tokens
