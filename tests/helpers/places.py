"""Folders on this disk or in an S3 bucket, and what a run left in one."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.outputs.manifest import is_record
from batch_scorer.records import Commit
from batch_scorer.storage import ObjectMissing, Store


@dataclass(frozen=True)
class Stored:
    """One scored shard as it is stored."""

    data: bytes = field(repr=False)
    etag: str
    last_modified: datetime

    @property
    def table(self) -> pa.Table:
        return pq.read_table(io.BytesIO(self.data))

    @property
    def commit(self) -> Commit:
        found = Commit.from_footer(pq.read_schema(io.BytesIO(self.data)).metadata)
        assert found is not None
        return found

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Place:
    """A folder: its URL or path, and the store options to reach it."""

    url: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.url}/{name}", self.options)

    @property
    def flags(self) -> list[str]:
        """The options as the command line takes them."""
        return [part for k, v in self.options.items() for part in ("--store-option", f"{k}={v}")]

    @property
    def store(self) -> Store:
        return Store(self.url, self.options, create=True)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Store the files, over what is there."""
        for key, data in files.items():
            self.store.delete(key)
            self.store.create(key, data)

    def read_json(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.read(key))
        return found

    def shard_keys(self) -> list[str]:
        try:
            return sorted(info.key for info in self.store.list() if not is_record(info.key))
        except ObjectMissing:
            return []

    def shards(self) -> dict[str, Stored]:
        """All scored shards by key."""
        found = {}
        for key in self.shard_keys():
            data, info = self.store.read_with_info(key)
            found[key] = Stored(data, info.version.etag, info.last_modified)
        return found


def digests(shards: Mapping[str, Stored]) -> dict[str, str]:
    return {key: shard.sha256 for key, shard in shards.items()}


def of_input(shards: Mapping[str, Stored], key: str) -> pa.Table:
    """The scored rows of one input file, its shards in row order."""
    pieces = sorted(
        (shard for shard in shards.values() if shard.commit.input == key),
        key=lambda shard: shard.commit.first_row,
    )
    return pa.concat_tables(piece.table for piece in pieces)


def rows_scored_and_marked(tables: Iterable[pa.Table], prefix: str = "") -> tuple[int, int]:
    """Recounted from the rows themselves."""
    marks = [table[f"{prefix}score_error"].is_valid().to_pylist() for table in tables]
    marked = sum(map(sum, marks))
    return sum(map(len, marks)) - marked, marked
