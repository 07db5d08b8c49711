"""What plans have found out about input files, kept beside the output for the next plan.

A plan looks into every file, for its schema, its first rows and the sizes of its parts. What that
gave is used again only for a file with the same URL, entity tag and size, and for the same
question: all settings that could matter, and the code that looked. Without an entity tag nothing is
kept or used. All of it may be lost or removed at any time; then files are looked at again.

The stored objects are foreign bytes (decision 0011). They are parsed apart, within bounds, and
checked; one that holds anything else than what is written here is as good as none. They are
believed as far as the ledger is: whoever can write there can as well store scores.
"""

import base64
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b, sha256
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.config import Config
from batch_scorer.errors import StorageError
from batch_scorer.inputs.tables import Alike, Facts, FileTable, Numbers
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records import (
    Codec,
    Layout,
    LineRun,
    Lines,
    ReadBounds,
    Source,
    layout_to_json,
)
from batch_scorer.records.reading import parsed
from batch_scorer.storage import (
    ObjectInfo,
    ObjectMissing,
    Store,
    first_line,
    open_store,
)

log = logging.getLogger("batch_scorer")

Names: TypeAlias = npt.NDArray[np.uint64]

_SUFFIX = ".files"
_NAMED = 16
"""Letters of the question in an object's name."""
_MOST_BYTES = 1 << 30
"""Of a stored object."""
_BOUNDS = Bounds(seconds=600.0, memory_bytes=1 << 31)
_LARGEST = 1 << 40
"""Rows or tokens of one part: what a million of them have together is still a number."""
_RUN = pa.struct(
    {
        "start": pa.int64(),
        "stop": pa.int64(),
        "first_line": pa.int64(),
        "num_rows": pa.int64(),
        "is_plain": pa.bool_(),
        "is_too_large": pa.bool_(),
    }
)
_NAME = pa.binary(16)
_COLUMNS = pa.schema(
    {
        "name": _NAME,
        "alike": pa.int32(),
        "rows": pa.large_list(pa.int64()),
        "tokens": pa.large_list(pa.int64()),
        "lines": pa.int32(),
        "runs": pa.large_list(_RUN),
        "matching": pa.large_binary(),
    }
)
"""A row for each file (`_names_of`), with the rows and estimated tokens of its parts. `alike` and
`lines` are places in the lists of the head; `lines` is null for a file that is none of lines,
`matching` where all rows are asked for. A digest of all of it stands before it in the object."""


@dataclass(frozen=True, slots=True)
class _Alike:
    """A `tables.Alike`; a schema is as Arrow's IPC writes it, in base64."""

    schema: str
    layout: Layout
    lost_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Lines:
    """What `Lines` have alike."""

    schema: str
    codec: Codec | None
    delimiter: str | None


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands in the metadata of the columns."""

    question: str
    alike: list[_Alike]
    lines: list[_Lines]


@dataclass(frozen=True, slots=True)
class _Kept:
    """F files that were looked at: which they were, and what was found out."""

    names: Names  # [F, 2]
    facts: Facts

    def take(self, places: Numbers) -> "_Kept":
        return _Kept(self.names[places], self.facts.take(places))

    def places(self, sources: Sequence[Source]) -> Numbers:
        """int64[len(sources)]: where these very files are, -1 for those that are not."""
        if not len(self.names):
            return np.full(len(sources), -1)
        asked = _names_of(sources)
        order = np.argsort(self.names[:, 0], kind="stable")
        found = np.searchsorted(self.names[order, 0], asked[:, 0])
        places = order[np.minimum(found, len(order) - 1)]
        return np.where((self.names[places] == asked).all(axis=1), places, -1)


def _names_of(sources: Sequence[Source]) -> Names:
    """What tells files apart: a digest of URL, entity tag and size. 128 bits: no two of all files
    that anybody has are taken for one another."""
    texts = (f"{each.url}\n{each.version.etag}\n{each.size_bytes}" for each in sources)
    digests = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def _joined(parts: Sequence[_Kept]) -> _Kept:
    """All of them; of a file that is there twice the first counts."""
    names = [np.zeros((0, 2), np.uint64), *(part.names for part in parts)]
    return _Kept(np.concatenate(names), Facts.joined([part.facts for part in parts]))


class KnownFiles:
    """What is kept in this folder of the output of these settings, for one plan."""

    def __init__(self, config: Config, folder: str) -> None:
        self._config = config
        self._folder = folder
        self._question = ""
        self._there: list[str] = []
        self._is_sound = True
        self._kept: _Kept | None = None
        self._recalled = 0

    def recall(self, question: str, sources: Sequence[Source]) -> tuple[Facts, Numbers]:
        """What is known, and int64[len(sources)]: where in it these files are, -1 for those that
        have to be looked at.

        `question` is a digest of what else looking at a file depends on.
        """
        found = []
        for store, info in self._objects():
            self._there.append(info.key)
            if not info.key.removeprefix(f"{self._folder}/").startswith(question[:_NAMED]):
                continue  # of other settings, or of another version of this program
            try:
                found.append(apart(_BOUNDS, _read, store, info, question, self._config.read_bounds))
            except (StorageError, pa.ArrowException, ValueError, OSError, MemoryError, Died) as why:
                log.info("%s: not used: %s", store.url(info.key), first_line(why))
                self._is_sound = False
        self._question, self._kept = question, _joined(found)
        places = self._kept.places(sources)
        self._recalled = int((places >= 0).sum())
        return self._kept.facts, places

    def _objects(self) -> list[tuple[Store, ObjectInfo]]:
        try:
            store = open_store(self._config.output, self._config.store_options)
            return [(store, info) for info in store.list(self._folder)]
        except ObjectMissing:  # no output yet
            return []
        except StorageError as error:
            log.info("what earlier plans found out is not used: %s", error)
            return []

    def keep(self, files: FileTable, aside: Collection[Source]) -> None:
        """Store what a plan has found out about its files, and what is known of those that were set
        `aside`, in place of what was there. Called again, it does nothing.

        A store that refuses is named in the log.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            return
        others = kept.places([*aside])
        others = others[others >= 0]
        is_known = len(files) == self._recalled and len(files) + len(others) == len(kept.names)
        if is_known and self._is_sound and len(self._there) == 1:
            return
        tagged = np.flatnonzero([bool(source.version.etag) for source in files.sources])
        sources = [files.sources[at] for at in tagged.tolist()]
        if not sources and not len(others):
            return
        now = _Kept(_names_of(sources), files.facts.take(tagged))
        data = _written(_joined([now, kept.take(others)]), self._question)
        # A name of its own: another run may store its own at this moment.
        key = f"{self._folder}/{self._question[:_NAMED]}-{uuid4().hex}{_SUFFIX}"
        try:
            store = open_store(self._config.output, self._config.store_options)
            store.put(key, data, instead_of=None)
            for before in self._there:
                store.delete(before)
        except StorageError as error:
            log.warning("the next plan looks at all files again: %s", error)


# As it is stored


def _written(kept: _Kept, question: str) -> bytes:
    facts, files = kept.facts, range(len(kept.facts))
    heads: dict[_Lines, int] = {}
    which: dict[int, int] = {}
    for at, lines in facts.lines.items():
        head = _Lines(_text_of(lines.schema), lines.codec, lines.delimiter)
        which[at] = heads.setdefault(head, len(heads))
    head_text = json.dumps(
        {
            "question": question,
            "alike": [
                {
                    "schema": _text_of(alike.schema),
                    "layout": layout_to_json(alike.layout),
                    "lost_types": alike.lost_types,
                }
                for alike in facts.alike
            ],
            "lines": [asdict(head) for head in heads],
        }
    )
    runs = (facts.lines[at].runs if at in facts.lines else () for at in files)
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(_NAME, len(files), [None, pa.py_buffer(kept.names)]),
        pa.array(facts.which, pa.int32()),
        pa.LargeListArray.from_arrays(pa.array(facts.offsets), pa.array(facts.rows)),
        pa.LargeListArray.from_arrays(pa.array(facts.offsets), pa.array(facts.tokens)),
        pa.array(map(which.get, files), pa.int32()),
        pa.array(([asdict(run) for run in some] for some in runs), pa.large_list(_RUN)),
        pa.array(map(facts.matching.get, files), pa.large_binary()),
    ]
    schema = _COLUMNS.with_metadata({"head": head_text})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, schema, options=options) as file:
        file.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return sha256(data).digest() + data


def _read(store: Store, info: ObjectInfo, question: str, bounds: ReadBounds) -> _Kept:
    """What is stored. Raises StorageError, and ValueError, ArrowException or OSError for anything
    that was not written here for this question."""
    if info.size_bytes > _MOST_BYTES:
        raise ValueError(f"{info.size_bytes} bytes are too many")
    stored = store.read_whole(info.key, info.version, info.size_bytes)
    data = pa.py_buffer(stored).slice(sha256().digest_size)
    _require(stored.startswith(sha256(data).digest()), "digest")
    with pa.ipc.open_file(data) as file:
        _require(file.schema.equals(_COLUMNS), "columns")
        head_text = (file.schema.metadata or {}).get(b"head", b"")
        table = file.read_all()
    table.validate(full=True)
    _require(len(table) > 0, "files")
    (batch,) = table.combine_chunks().to_batches()
    head = parsed(head_text, _Head)
    _require(head.question == question, "question")
    column = dict(zip(batch.schema.names, batch.columns, strict=True))
    for name in column.keys() - {"lines", "matching"}:
        _require(column[name].null_count == 0, name)
    rows, offsets = _parts(column["rows"])
    tokens, offsets_again = _parts(column["tokens"])
    _require(np.array_equal(offsets, offsets_again), "tokens")
    which = column["alike"].to_numpy()
    _require(_are_between(which, len(head.alike) - 1), "alike")
    alike = [
        Alike(_schema_of(each.schema), replace(each.layout, bounds=bounds), each.lost_types)
        for each in head.alike
    ]
    bits = column["matching"]
    has_bits = bits.null_count < len(bits)
    facts = Facts(
        alike=alike,
        which=which,
        offsets=offsets,
        rows=rows,
        tokens=tokens,
        lines=_lines_of(column["lines"], column["runs"], head.lines, bounds),
        matching={at: each for at, each in enumerate(bits.to_pylist()) if each is not None}
        if has_bits
        else {},
    )
    num_rows = facts.sums(rows)
    for at, each in facts.matching.items():
        _require(len(each) == -(-int(num_rows[at]) // 8), "matching")
    for at, lines in facts.lines.items():
        start, stop = offsets[at : at + 2]
        _require(rows[start:stop].tolist() == [run.num_rows for run in lines.runs], "runs")
    names = np.frombuffer(column["name"].buffers()[1], np.uint64).reshape(-1, 2)
    _require(len(names) == len(facts), "name")
    return _Kept(names, facts)


def _parts(column: pa.Array) -> tuple[Numbers, Numbers]:
    """A number of each part, and where those of each file begin and end."""
    values, offsets = column.values, column.offsets.to_numpy()
    _require(values.null_count == 0 and offsets[0] == 0 and offsets[-1] == len(values), "parts")
    numbers: Numbers = values.to_numpy()
    _require(_are_between(numbers, _LARGEST), "parts")
    return numbers, offsets


def _lines_of(
    which: pa.Array, runs: pa.Array, heads: Sequence[_Lines], bounds: ReadBounds
) -> dict[int, Lines]:
    if which.null_count == len(which):
        return {}
    schemas = [_schema_of(head.schema) for head in heads]
    found = {}
    for at, number in enumerate(which.to_pylist()):
        if number is not None:
            _require(0 <= number < len(heads), "lines")
            head = heads[number]
            made = [LineRun(**run) for run in runs[at].as_py()]
            _require(all(0 <= run.start <= run.stop for run in made), "runs")
            found[at] = Lines(tuple(made), schemas[number], head.codec, head.delimiter, bounds)
    return found


def _are_between(numbers: npt.NDArray[Any], most: int) -> bool:
    return not len(numbers) or bool(numbers.min() >= 0 and numbers.max() <= most)


def _text_of(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize()).decode()


def _schema_of(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"{name}: not as this program writes it")
