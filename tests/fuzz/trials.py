"""One mutant beside what is healthy, and what came of it.

A trial gives an outcome, or raises `Wrong`: the program took the mutant otherwise than it promises.
"""

import gzip
import os
import re
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from batch_scorer.config import load_config, load_partial_config
from batch_scorer.errors import (
    BatchScorerError,
    ConfigError,
    ModelError,
    RowReason,
    ShardError,
    ShardReason,
)
from batch_scorer.inputs.files import columns_of_shard, rows_of_shard
from batch_scorer.inputs.plan import make_plan
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records import Shard
from tests.fuzz.mutants import FILES, MODELS, ROWS, sound_lines

Trial: TypeAlias = Callable[[Random], str]

HEALTHY = "a.jsonl"
_BOUNDS = Bounds(seconds=20, memory_bytes=1 << 30)
_FRAME = re.compile(r'File "[^"]*/batch_scorer/[^"]*?(\w+)\.py", line \d+, in (\w+)')
_BLANKS = b" \t\n\r\v\f"


class Wrong(Exception):
    """What the program must not do."""


def trial_of(kind: str, place: Path, model: Path | None) -> Trial:
    """The trial of mutants of this kind, in a folder of its own."""
    if kind in FILES:
        return _FileTrial(kind, place)
    assert model is not None
    return _ModelTrial(kind, place, model)


class _FileTrial:
    """A mutant of an input file is planned and read beside a healthy file."""

    def __init__(self, kind: str, place: Path) -> None:
        self._kind = kind
        self._name, self._make = FILES[kind]
        self._file = place / self._name
        (place / HEALTHY).write_bytes(sound_lines())
        self._config = load_partial_config(
            inputs=(str(place),), read_timeout_s=_BOUNDS.seconds,
            read_memory_gib=_BOUNDS.memory_bytes / 2**30,
        )  # fmt: skip
        self._healthy: Shard | None = None

    def __call__(self, rng: Random) -> str:
        data = self._make(rng)
        self._file.write_bytes(data)
        plan = _known(lambda: make_plan(self._config))
        (healthy,) = (shard for shard in plan.shards if shard.source.key == HEALTHY)
        if self._healthy not in (None, healthy):
            raise Wrong("the healthy file is planned in another way")
        self._healthy = healthy
        if plan.failed:
            (receipt,) = plan.failed
            return f"failed: {_one_line(receipt.detail, str(receipt.reason))}"
        shards = [shard for shard in plan.shards if shard.source.key == self._name]
        planned = sum(shard.num_rows for shard in shards)
        marked = 0
        try:
            for shard in shards:
                marked += _known(lambda shard=shard: apart(_BOUNDS, read, shard))
        except ShardError as error:
            return f"failed as it was read: {_one_line(error.detail, str(error.reason))}"
        expected = self._rows(data)
        if expected is not None and planned != expected:
            raise Wrong(f"rows are lost or invented ({'fewer' if planned < expected else 'more'})")
        if not planned:
            return "no rows"
        return "read, rows marked" if marked else "read"

    def _rows(self, data: bytes) -> int | None:
        """The rows that the mutant holds, where that can be said without the program."""
        if self._kind == "parquet":
            return ROWS
        try:
            text = _unpacked_gzip(data) if self._kind == "gzip" else data
        except (OSError, EOFError, zlib.error):
            return None
        if self._kind == "zstd" or text.removeprefix(b"\xef\xbb\xbf").lstrip(_BLANKS)[:1] == b"[":
            return None
        lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return sum(bool(line.strip(_BLANKS)) for line in lines)


def _unpacked_gzip(data: bytes) -> bytes:
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def read(shard: Shard) -> int:
    """Read the shard in both ways; the number of rows that could not be read. Raises ShardError,
    and Wrong where the rows are not those that were planned."""
    table, errors = rows_of_shard(shard, {}, None)
    needed = list(shard.layout.columns.values())
    columns, same = columns_of_shard(shard, {}, needed)
    counts = {table.num_rows, *(len(values) for values in columns.values())}
    if counts != {shard.num_rows}:
        how = "fewer" if min(counts) < shard.num_rows else "more"
        raise Wrong(f"{how} rows are read than were planned")
    # Text that is not UTF-8 comes back from Parquet as it is; only who reads it as text sees it.
    of_text = {row for row, error in same.items() if error.reason is RowReason.NOT_UTF8}
    if not errors.keys() <= same.keys() or not same.keys() - of_text <= errors.keys():
        raise Wrong("the two ways of reading mark other rows")
    return len(same)


class _ModelTrial:
    """A model with a mutant of one of its files is looked at, and its texts are rendered."""

    def __init__(self, kind: str, place: Path, model: Path) -> None:
        name, self._make = MODELS[kind]
        self._sound = (model / name).read_bytes()
        self._file = place / name
        for file in model.iterdir():
            if file.name != name:
                os.link(file, place / file.name)
        self._config = load_config(
            model=str(place), inputs=("-",), output="-", dtype="float32", device="cpu", backend="hf"
        )

    def __call__(self, rng: Random) -> str:
        from batch_scorer.runs.derive import derive, look_at_model

        self._file.unlink(missing_ok=True)  # another file, lest something be kept of the last
        self._file.write_bytes(self._make(self._sound, rng))
        try:
            _known(lambda: derive(self._config, look_at_model(self._config)))
        except (ModelError, ConfigError) as error:
            return _one_line(str(error), "refused")
        return "accepted"


def _known(call: Callable[[], Any]) -> Any:
    """What the call returns. Raises errors of the program's own; Wrong for any other."""
    try:
        return call()
    except (BatchScorerError, Wrong):
        raise
    except Died as died:
        raise ShardError(ShardReason.READER_DIED, str(died)) from None
    except Exception as error:
        raise Wrong(f"{type(error).__name__} in {_where(error)}") from error


def _where(error: BaseException) -> str:
    """The place in the program at which it was raised, or called what raised it."""
    notes = "".join(getattr(error, "__notes__", ()))
    frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [f"{Path(f).stem}.{name}" for f, name in frames if "/batch_scorer/" in f]
    if "/batch_scorer/" in notes:  # from another process, as text
        ours = [f"{file}.{name}" for file, name in _FRAME.findall(notes)]
    return ours[-1] if ours else "?"


def _one_line(text: str, outcome: str) -> str:
    if not text or "\n" in text.strip() or "Traceback" in text:
        raise Wrong(f"{outcome}: the message is not one line")
    return outcome
