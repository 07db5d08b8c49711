"""A second reader: recounts and re-hashes a scored output from its data, not from its counters.

For every shard of the manifest it reads the object and, where the input is still the one that was
scored, the input, and checks that the bytes are those that were committed, that every row is
scored or marked, and that the input's columns came back as they were. Where only some rows were
asked for, it counts those of each input anew: its rows are those of its shards and those that are
not asked for.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer import formats
from batch_scorer.errors import ExitCode, ShardError, StorageError
from batch_scorer.inputs.files import (
    batches_of,
    group_rows,
    open_parquet,
    read_lines,
    read_rows,
    scan_lines,
)
from batch_scorer.inputs.plan import parts_holding
from batch_scorer.inputs.selection import kept_of, matching_rows, rows_of_bits
from batch_scorer.inputs.sources import FileKind, kind_of
from batch_scorer.inputs.where import where_of
from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.columns import digest_columns
from batch_scorer.outputs.manifest import SUCCESS_KEY, read_commit, read_parquet
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Commit, Receipt, Source, Status
from batch_scorer.storage import ObjectMissing, Store, Version, in_threads, open_store

_READERS = 8


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. `rows_*` are recounted from the data; `problems` name object and cause.

    `rows` are those of the inputs: `rows_scored + rows_marked + rows_not_asked`. `unfinished` lists
    shards that failed or are not there yet; `inputs_compared` counts shards whose input was still
    there to be compared with.
    """

    shards: int
    rows: int
    rows_scored: int
    rows_marked: int
    rows_not_asked: int
    inputs_compared: int
    problems: list[str]
    unfinished: list[str]

    @property
    def exit_code(self) -> ExitCode:
        if self.problems:
            return ExitCode.INTEGRITY
        return ExitCode.INCOMPLETE if self.unfinished else ExitCode.DONE


@dataclass(frozen=True, slots=True)
class _Checked:
    rows: int = 0
    scored: int = 0
    compared: bool = False
    problems: tuple[str, ...] = ()


def verify(output: str, store_options: Mapping[str, str] | None = None) -> Verdict:
    """Check a scored output. Raises OutputError if there is none at `output`."""
    options = dict(store_options or {})
    store, record = open_scored(output, options)
    state = OutputState(store)
    success = state.success
    receipts = list(state.receipts.values()) if success is None else state.manifest
    groups = _read_together([receipt for receipt in receipts if receipt.commit])
    committed = [receipt for group in groups for receipt in group]

    def check_group(group: list[Receipt]) -> list[_Checked]:
        inputs = _Inputs(options, record["layout"])
        return [_check(store, receipt, inputs) for receipt in group]

    checks = [check for group in in_threads(check_group, groups, _READERS) for check in group]
    problems = [problem for check in checks for problem in check.problems]
    known = {receipt.output_key for receipt in committed}
    strangers = [
        info
        for info in state.objects()
        if info.key.endswith(".parquet") and info.key not in known  # a plain glob reads it
    ]
    unfinished = [
        f"{receipt.output_key}: left for a later run"
        if receipt.status is Status.LEFT
        else f"{receipt.input}: {receipt.reason}: {receipt.detail}"
        for receipt in receipts
        if receipt.status in (Status.LEFT, Status.FAILED)
    ]
    counted = [
        check
        for check, receipt in zip(checks, committed, strict=True)
        if receipt.status is Status.COMMITTED
    ]
    written, scored = sum(check.rows for check in counted), sum(check.scored for check in counted)
    not_asked, lost = _recount_inputs(receipts, options, record["layout"], success is not None)
    problems += lost
    rows = written + not_asked
    if success is None:
        unfinished.append(f"no {SUCCESS_KEY}: the run is not finished")
        # The run may have ended between a commit and the record of it.
        strangers = [info for info in strangers if read_commit(store, info)[0] is None]
    elif (claim := (success["rows"], success["rows_scored"])) != (rows, scored):
        problems.append(
            "{} counts {} rows, {} scored; the data {} rows, {} scored".format(
                SUCCESS_KEY, *claim, rows, scored
            )
        )
    problems += [f"{info.key}: not in the manifest" for info in strangers]
    return Verdict(
        shards=len(counted),
        rows=rows,
        rows_scored=scored,
        rows_marked=written - scored,
        rows_not_asked=not_asked,
        inputs_compared=sum(check.compared for check in checks),
        problems=problems,
        unfinished=unfinished,
    )


def _recount_inputs(
    receipts: list[Receipt],
    options: Mapping[str, str],
    layout: Mapping[str, Any],
    is_complete: bool,
) -> tuple[int, list[str]]:
    """The rows that are not asked for, and which inputs have rows that nothing accounts for.

    The inputs of a complete output are counted anew where they are still those that were scored;
    of others the receipts are believed.
    """
    counted = (Status.COMMITTED, Status.NOT_ASKED)
    by_input: dict[tuple[str, str], list[Receipt]] = defaultdict(list)
    for receipt in receipts:
        if receipt.status in counted:
            by_input[receipt.input_root, receipt.input].append(receipt)
    if not is_complete or not (layout.get("limit") or layout.get("where")):
        return sum(r.rows_not_asked for group in by_input.values() for r in group), []

    def recount(group: list[Receipt]) -> tuple[int, str | None]:
        asked = sum(receipt.num_rows for receipt in group)
        not_asked = sum(receipt.rows_not_asked for receipt in group)
        found = _Inputs(options, layout).count(group[0])
        if found is None:
            return not_asked, None
        rows, matching = found
        if rows != asked + not_asked:
            problem = f"{rows} rows; {asked} in its shards and {not_asked} not asked for"
        elif asked > matching or (layout.get("limit") is None and asked < matching):
            problem = f"{matching} rows match `where`; {asked} in its shards"
        else:
            return not_asked, None
        return rows - asked, f"{group[0].input}: {problem}"

    found = list(in_threads(recount, by_input.values(), _READERS))
    return sum(rows for rows, _ in found), [problem for _, problem in found if problem]


def _read_together(receipts: list[Receipt]) -> list[list[Receipt]]:
    """What one thread checks: all shards of a file of lines, or one shard of another file."""
    together: dict[tuple[str, str], list[Receipt]] = {}
    for receipt in receipts:
        name = receipt.output_key if _has_groups(receipt) else receipt.input
        together.setdefault((receipt.input_root, name), []).append(receipt)
    return list(together.values())


class _Inputs:
    """The rows that were scored. How a JSON file is cut is found once; an array, which is parsed
    whole, is kept for its next shard, and so are the places of rows that match `where`."""

    def __init__(self, options: Mapping[str, str], layout: Mapping[str, Any]) -> None:
        self._options = options
        self._max_rows, self._max_tokens = layout["shard_rows"], layout["shard_tokens"]
        self._keep, self._drop = layout.get("keep_columns", ()), layout.get("drop_columns", ())
        where = layout.get("where")
        self._where = None if where is None else where_of(where)
        self._json: tuple[Source, formats.Lines | pa.Table] | None = None
        self._matching = np.zeros(0, np.int64)  # of the same file

    def rows(self, receipt: Receipt, commit: Commit) -> pa.Table | None:
        """In the columns that were kept. None if the file is gone, not readable, or no longer the
        one that was scored."""
        try:
            if (found := self._find(receipt)) is None:
                return None
            read = self._of_groups if _has_groups(receipt) else self._of_lines
            table = read(*found, commit.first_row, commit.num_rows)
        except (StorageError, ShardError, pa.ArrowException, OSError):
            return None
        return kept_of(table, self._keep, self._drop)

    def count(self, receipt: Receipt) -> tuple[int, int] | None:
        """All rows of a receipt's input, and those that match `where`; None as for `rows`."""
        try:
            if (found := self._find(receipt)) is None:
                return None
            if not _has_groups(receipt):
                num_rows = _num_rows(self._scanned(*found))
                return num_rows, num_rows if self._where is None else len(self._matching)
            num_rows = sum(group_rows(*found))
            if self._where is None:
                return num_rows, num_rows
            if kind_of(receipt.input) is not FileKind.PARQUET:
                bits = matching_rows(*found, num_rows, self._where, None)
                return num_rows, len(rows_of_bits(bits, num_rows))
            # All of the rows, whatever the statistics of their groups say.
            file = open_parquet(*found)
            groups = range(file.metadata.num_row_groups)
            batches = batches_of(file, groups, self._where.columns)
            return num_rows, sum(len(self._where.matches(batch)) for batch in batches)
        except (StorageError, ShardError, pa.ArrowException, OSError):
            return None

    def _find(self, receipt: Receipt) -> tuple[Store, Source] | None:
        """The input, if it is still the one that was looked at."""
        store = open_store(receipt.input_root, self._options)
        info = store.head(receipt.input)
        if info.version != Version(receipt.input_etag):
            return None
        return store, Source(receipt.input_root, info.key, info.size_bytes, info.version)

    def _of_groups(self, store: Store, source: Source, first_row: int, num_rows: int) -> pa.Table:
        ends = list(accumulate(group_rows(store, source)))
        # Nobody knows where the last one of some rows that match is.
        stop_row = ends[-1] if self._where and num_rows else first_row + num_rows
        start, stop = parts_holding(ends, first_row, stop_row)
        skip_rows = first_row - (ends[start - 1] if start else 0)
        place = (start, stop), skip_rows, num_rows
        return formats.as_stored(read_rows(store, source, *place, None, self._where))

    def _of_lines(self, store: Store, source: Source, first_row: int, num_rows: int) -> pa.Table:
        found = self._scanned(store, source)
        rows = np.arange(first_row, first_row + num_rows)
        if self._where is not None:
            rows = self._matching[self._matching >= first_row][:num_rows]
        if isinstance(found, pa.Table):
            before, table = 0, found
        else:
            ends = list(accumulate(run.num_rows for run in found.runs))
            start, stop = parts_holding(ends, int(rows[0]), int(rows[-1]) + 1)
            before = ends[start - 1] if start else 0
            table, _ = read_lines(store, source, found.part(start, stop))
        if self._where is None:
            return table.slice(first_row - before, num_rows)
        return table.take(pa.array(rows - before))

    def _scanned(self, store: Store, source: Source) -> formats.Lines | pa.Table:
        """How a file of lines is cut, or the rows of a JSON array."""
        if self._json is None or self._json[0] != source:
            scanned = scan_lines(store, source, self._max_rows, self._max_tokens)
            if scanned is None:
                data = store.read(source.key, source.version)
                self._json = source, formats.read_json_table(data, source.key)[0]
            else:
                self._json = source, scanned[0]
            self._matching = self._matches(store, source, self._json[1])
        return self._json[1]

    def _matches(
        self, store: Store, source: Source, found: formats.Lines | pa.Table
    ) -> npt.NDArray[np.int64]:
        if self._where is None:
            return np.zeros(0, np.int64)
        if isinstance(found, pa.Table):
            return self._where.matches(found)
        num_rows = _num_rows(found)
        bits = matching_rows(store, source, num_rows, self._where, found)
        return rows_of_bits(bits, num_rows)


def _num_rows(found: formats.Lines | pa.Table) -> int:
    return found.num_rows if isinstance(found, pa.Table) else sum(r.num_rows for r in found.runs)


def _has_groups(receipt: Receipt) -> bool:
    kind = kind_of(receipt.input)
    return kind is not None and kind.has_groups


def _check(store: Store, receipt: Receipt, inputs: _Inputs) -> _Checked:
    key = receipt.output_key
    try:
        data = store.read(key)
    except ObjectMissing:
        return _Checked(problems=(f"{key}: missing",))
    try:
        table = read_parquet(data)
    except (pa.ArrowException, OSError) as error:
        return _Checked(problems=(f"{key}: not readable: {error}",))
    commit = Commit.from_footer(table.schema.metadata)
    if commit is None or commit != receipt.commit:
        return _Checked(problems=(f"{key}: its footer is not the one that was committed",))
    problems = []
    stored = receipt.stored
    if stored is not None and hashlib.sha256(data).hexdigest() != stored.sha256:
        problems.append(f"{key}: its bytes are not those that were committed")
    problems += [f"{key}: {problem}" for problem in _row_problems(table, commit)]
    expected = inputs.rows(receipt, commit)
    if expected is not None and (difference := _compare_input(table, commit, expected)):
        problems.append(f"{key}: {difference}")
    scored = table.num_rows - _num_marked(table, commit)
    return _Checked(table.num_rows, scored, expected is not None, tuple(problems))


def _num_marked(table: pa.Table, commit: Commit) -> int:
    return int(pc.count(table[commit.error_column], mode="only_valid").as_py())


def _row_problems(table: pa.Table, commit: Commit) -> Iterator[str]:
    missing = [name for name in commit.added_columns if name not in table.column_names]
    if missing:
        yield f"columns {missing} are missing"
        return
    added = {name: table[name].combine_chunks() for name in commit.added_columns}
    if digest_columns(added) != commit.scores_digest:
        yield "its scores are not those that were committed"
    marked = _num_marked(table, commit)
    if table.num_rows != commit.num_rows or marked != commit.rows_marked:
        yield (
            f"{table.num_rows} rows, {marked} marked; the commit says {commit.num_rows}, "
            f"{commit.rows_marked} marked"
        )
    is_marked = pc.is_valid(table[commit.error_column]).to_pylist()
    for name in commit.added_columns:
        if "score" in name and not name.endswith(("score_error", "score_notes")):
            complete = [_is_complete(value) for value in table[name].to_pylist()]
            wrong = [row for row, ok in enumerate(complete) if not ok and not is_marked[row]]
            if wrong:
                yield f"row {wrong[0]}: {name} has no number and no reason"


def _is_complete(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_complete(inner) for inner in value)
    return value is not None and abs(value) < float("inf")


def _compare_input(table: pa.Table, commit: Commit, expected: pa.Table) -> str:
    """The first difference between the shard's columns and those of the input, or ""."""
    names = table.column_names
    kept = table.select([i for i, name in enumerate(names) if name not in commit.added_columns])
    if kept.column_names != expected.column_names:
        return f"columns {kept.column_names}, the input has {expected.column_names}"
    for name, ours, theirs in zip(kept.column_names, kept.columns, expected.columns, strict=True):
        if ours.type != theirs.type:
            return f"column {name} changed its type"
        if not _is_same(ours, theirs):
            return f"column {name} is not as it was in the input"
    return ""


def _is_same(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    """Arrow takes NaN for another value than NaN; what both print as nan is the same here."""
    return a.equals(b) or ("nan" in (text := repr(a.to_pylist())) and text == repr(b.to_pylist()))
