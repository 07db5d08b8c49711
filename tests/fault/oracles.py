"""What a scored output must be, found out from its files alone.

Nothing of the program is used here: objects are listed and read by obstore itself, their rows by
pyarrow, and what is expected follows from the inputs and from docs/commit-protocol.md.

O1  every row of the inputs is there once, each with the bits of an undisturbed run
O2  every shard has the bytes of an undisturbed run
O3  rows in = rows scored + rows marked, for every file and in `_SUCCESS`; all rows are asked for
O4  what a glob finds is what the manifest names
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.store import from_url

_PIECE = re.compile(r"\.rows\d+-\d+\.parquet$")
_NO_SCORES = {"score_error", "score_notes"}
_RECORDS = "_batch_scorer/"


@dataclass(frozen=True)
class Folder:
    """A folder on this disk, or a URL and its store options; keys are from the environment."""

    url: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}", self.options)

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError."""
        if self._client is None:
            return Path(self.url, key).read_bytes()
        return bytes(obstore.get(self._client, key).bytes())

    def files(self) -> list[str]:
        """Of all files below."""
        if self._client is None:
            root = Path(self.url)
            return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
        return sorted(meta["path"] for page in obstore.list(self._client) for meta in page)

    def mirror(self, to: Path) -> "Folder":
        """A copy on this disk, for readers that know no such store."""
        for key in self.files():
            file = to / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.read(key))
        return Folder(str(to))

    @cached_property
    def _client(self) -> Any:
        """The client library without anything of the program's between; None for this disk."""
        if "://" not in self.url:
            return None
        config = dict(self.options)
        client: dict[str, Any] = {"allow_http": config.pop("allow_http", "false") == "true"}
        return from_url(self.url, config=config, client_options=client)  # type: ignore


@dataclass(frozen=True)
class Found:
    """What a plain reader finds in an output.

    `rows`: of each input row, by a digest of its columns, what was added to it, once for every
    time that it is there. `shards`: sha256 by key. `counts`: [scored, marked] by input file.
    """

    rows: Mapping[str, list[str]]
    shards: Mapping[str, str]
    counts: Mapping[str, list[int]]


@dataclass
class Findings:
    """How an output differs from what it must be; `problems` say it in words."""

    lost_rows: int = 0
    doubled_rows: int = 0
    changed_rows: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, others: "Findings") -> None:
        self.lost_rows += others.lost_rows
        self.doubled_rows += others.doubled_rows
        self.changed_rows += others.changed_rows
        self.problems += others.problems


def read_output(output: Folder, inputs: Folder) -> Found:
    """Read all shards, and the columns that their inputs have, which are the ones not added."""
    rows: dict[str, list[str]] = {}
    shards: dict[str, str] = {}
    counts: dict[str, list[int]] = {}
    given: dict[str, list[str]] = {}
    for key in _globbed(output):
        data = output.read(key)
        shards[key] = hashlib.sha256(data).hexdigest()
        source = _PIECE.sub(".parquet", key)
        if source not in given:
            given[source] = _table(inputs.read(source)).column_names
        table = _table(data)
        added = [name for name in table.column_names if name not in given[source]]
        so_far = counts.setdefault(source, [0, 0])
        for row in table.to_pylist():
            rows.setdefault(_row_digest(row, given[source]), []).append(_added(row, added))
            so_far[row["score_error"] is not None] += 1
            scores = [row[name] for name in set(added) - _NO_SCORES if "score" in name]
            if row["score_error"] is None and None in scores:
                raise AssertionError(f"{key}: a row has neither a score nor a reason: {row}")
    return Found(rows, shards, counts)


def judge(
    output: Folder, inputs: Folder, undisturbed: Found, *, same_bytes: bool = True
) -> Findings:
    """Hold a finished output against O1 to O4."""
    found = read_output(output, inputs)
    findings = Findings()
    _judge_rows(found, undisturbed, findings)
    if same_bytes and found.shards != undisturbed.shards:
        differing = found.shards.items() ^ undisturbed.shards.items()
        findings.problems.append(f"O2: other bytes: {sorted({key for key, _ in differing})}")
    _judge_counts(output, inputs, found, findings)
    _judge_reach(output, found, findings)
    return findings


def _judge_rows(found: Found, undisturbed: Found, findings: Findings) -> None:
    for row, expected in undisturbed.rows.items():
        added = found.rows.get(row, [])
        if not added:
            findings.lost_rows += 1
        elif len(added) > len(expected):
            findings.doubled_rows += 1
        elif sorted(added) != sorted(expected):
            findings.changed_rows += 1
    strange = found.rows.keys() - undisturbed.rows.keys()
    counts = (findings.lost_rows, findings.doubled_rows, findings.changed_rows, len(strange))
    if any(counts):
        findings.problems.append("O1: {} rows lost, {} doubled, {} changed, {} new".format(*counts))


def _judge_counts(output: Folder, inputs: Folder, found: Found, findings: Findings) -> None:
    given = {key: _table(inputs.read(key)).num_rows for key in inputs.files()}
    counted = {key: sum(counts) for key, counts in found.counts.items()}
    if given != counted:
        findings.problems.append(f"O3: rows of the inputs {given}, of the output {counted}")
    try:
        success = json.loads(output.read("_SUCCESS"))
    except FileNotFoundError:
        findings.problems.append("O3: no _SUCCESS")
        return
    scored, marked = (sum(counts[i] for counts in found.counts.values()) for i in (0, 1))
    expected = {
        "rows": scored + marked,
        "rows_scored": scored,
        "rows_marked": marked,
        "rows_not_asked": 0,
        "rows_failed": 0,
        "shards": len(found.shards),
        "shards_failed": 0,
    }
    claimed = {name: success[name] for name in expected}
    if claimed != expected:
        findings.problems.append(f"O3: _SUCCESS says {claimed}, the data {expected}")


def _judge_reach(output: Folder, found: Found, findings: Findings) -> None:
    try:
        manifest = json.loads(output.read(f"{_RECORDS}CURRENT"))["manifest"]
    except FileNotFoundError:
        findings.problems.append("O4: no manifest")
        return
    named = _table(output.read(manifest))
    digests = dict(
        zip(*(named[name].to_pylist() for name in ("output_key", "sha256")), strict=True)
    )
    if digests != found.shards:
        differing = digests.items() ^ dict(found.shards).items()
        keys = sorted({key for key, _ in differing})
        findings.problems.append(f"O4: the manifest and what is there differ in {keys}")


def _globbed(output: Folder) -> list[str]:
    """What `**/*.parquet` finds, the program's own records aside."""
    found = output.files()
    return [key for key in found if key.endswith(".parquet") and not key.startswith(_RECORDS)]


def _table(data: bytes) -> pa.Table:
    return pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)


def _row_digest(row: Mapping[str, Any], columns: list[str]) -> str:
    text = json.dumps({name: row[name] for name in columns}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _added(row: Mapping[str, Any], columns: list[str]) -> str:
    return repr({name: _bits(row[name]) for name in columns})


def _bits(value: Any) -> Any:
    """Floats to the last bit."""
    if isinstance(value, float):
        return value.hex()
    return [_bits(inner) for inner in value] if isinstance(value, list) else value


def rows_by_reason(output: Folder) -> Counter[str]:
    """How many rows carry which reason, in all shards."""
    reasons: Counter[str] = Counter()
    for key in _globbed(output):
        column = _table(output.read(key))["score_error"].to_pylist()
        reasons.update(reason for reason in column if reason is not None)
    return reasons
