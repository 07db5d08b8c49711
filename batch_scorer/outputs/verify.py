"""A second reader: recounts and re-hashes a scored output from its data, not from its counters.

For every shard of the manifest it reads the object and, where the input is still the one that was
scored, the input, and checks that the bytes are those that were committed, that every row is
scored or marked, and that the input's columns came back as they were. Where only some rows were
asked for, it counts those of each input anew: its rows are those of its shards and those that are
not asked for.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.config import expanded
from batch_scorer.errors import ExitCode, StorageError
from batch_scorer.formats.shape import shape_of
from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.columns import count_rewards, digest_columns
from batch_scorer.outputs.manifest import SUCCESS_KEY, committed, read_commit, read_parquet
from batch_scorer.outputs.scored_inputs import Cut, Inputs, cut_of, has_groups
from batch_scorer.outputs.state import OutputState
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records import (
    Commit,
    Format,
    Receipt,
    Rewarded,
    Status,
    added_up,
    family_prefix,
)
from batch_scorer.storage import (
    AccessDenied,
    ObjectDamaged,
    ObjectMissing,
    Store,
    first_line,
    in_threads,
    open_store,
)

T = TypeVar("T")

_READERS = 8
_MEMORY_BYTES = 1 << 31
_MEMORY_PER_BYTE = 8
"""The memory of a process that checks shards: so much, and more with their size."""
_NO_NUMBERS = ("score_error", "score_notes")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. `rows_*` are recounted from the data; `problems` name object and cause.

    `rows` are those of the inputs: `rows_scored + rows_marked + rows_not_asked`. `unfinished` lists
    shards that failed or are not there yet; `inputs_compared` counts shards whose input was still
    there to be compared with. `rewards` are recounted, too, by reward function.
    """

    shards: int
    rows: int
    rows_scored: int
    rows_marked: int
    rows_not_asked: int
    inputs_compared: int
    problems: list[str]
    unfinished: list[str]
    rewards: dict[str, Rewarded] = field(default_factory=dict)

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
    rewards: Mapping[str, Rewarded] = field(default_factory=dict)


def verify(output: str | Path, store_options: Mapping[str, str] | None = None) -> Verdict:
    """Check a scored output. Raises OutputError if there is none at `output`, and StorageError.

    What is stored there and is damaged, or was not written by this program, is a problem of the
    verdict. It is parsed in processes of its own.
    """
    output = expanded(output)
    options = dict(store_options or {})
    problems: list[str] = []

    def undamaged(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except ObjectDamaged as error:
            problems.append(str(error))
            return None

    opened = undamaged(lambda: open_scored(output, options))
    store = open_store(output, options) if opened is None else opened[0]
    cut = None if opened is None else undamaged(lambda: cut_of(*opened))
    state = OutputState(store)
    known_before = len(problems)
    success = undamaged(lambda: state.success)
    is_finished = success is not None or len(problems) > known_before
    recorded = undamaged(lambda: state.manifest if is_finished else [*state.receipts.values()])
    receipts = recorded
    if receipts is None:
        stored = committed(store, state.objects(), {})
        receipts = [receipt for _, receipt in stored if receipt is not None]
    groups = _read_together([receipt for receipt in receipts if receipt.commit])
    checked = [receipt for group in groups for receipt in group]
    check_group = partial(_check_apart, output, options, cut)
    checks = [check for group in in_threads(check_group, groups, _READERS) for check in group]
    problems += [problem for check in checks for problem in check.problems]
    known = {receipt.output_key for receipt in checked}
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
        for check, receipt in zip(checks, checked, strict=True)
        if receipt.status is Status.COMMITTED
    ]
    written, scored = sum(check.rows for check in counted), sum(check.scored for check in counted)
    not_asked, lost = _recount_inputs(receipts, options, cut, is_finished)
    problems += lost
    rows = written + not_asked
    if not is_finished:
        unfinished.append(f"no {SUCCESS_KEY}: the run is not finished")
        # The run may have ended between a commit and the record of it.
        strangers = [info for info in strangers if read_commit(store, info)[0] is None]
    elif success and recorded is not None and (success.rows, success.rows_scored) != (rows, scored):
        problems.append(
            f"{SUCCESS_KEY} counts {success.rows} rows, {success.rows_scored} scored; the data "
            f"{rows} rows, {scored} scored"
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
        rewards=reduce(added_up, (check.rewards for check in counted), {}),
    )


def _bounds(group: Sequence[Receipt]) -> Bounds:
    size_bytes = sum(receipt.stored.size_bytes for receipt in group if receipt.stored)
    return Bounds.of_file(size_bytes, _MEMORY_BYTES + _MEMORY_PER_BYTE * size_bytes)


def _check_apart(
    output: str, options: Mapping[str, str], cut: Cut | None, group: Sequence[Receipt]
) -> list[_Checked]:
    """The shards one by one in another process, and where that dies, each in one of its own."""
    try:
        return apart(_bounds(group), _check_group, output, options, cut, group)
    except (Died, MemoryError) as error:
        if len(group) > 1:
            return [
                check
                for receipt in group
                for check in _check_apart(output, options, cut, [receipt])
            ]
        (receipt,) = group
        if cut is None:
            return [_Checked(problems=(f"{receipt.output_key}: cannot be checked: {error}",))]
        # Either the shard is damaged, or its input is: then the shard alone can be checked.
        (check,) = _check_apart(output, options, None, group)
        if check.problems:
            return [check]
        problem = f"{receipt.output_key}: cannot be compared with its input: {error}"
        return [replace(check, problems=(problem,))]


def _check_group(
    output: str, options: Mapping[str, str], cut: Cut | None, group: Sequence[Receipt]
) -> list[_Checked]:
    store = open_store(output, options)
    inputs = None if cut is None else Inputs(options, cut)
    return [_check(store, receipt, inputs) for receipt in group]


def _recount_inputs(
    receipts: list[Receipt],
    options: Mapping[str, str],
    cut: Cut | None,
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
    if not is_complete or cut is None or (cut.limit is None and cut.where is None):
        return sum(r.rows_not_asked for group in by_input.values() for r in group), []

    def recount(group: list[Receipt]) -> tuple[int, str | None]:
        asked = sum(receipt.num_rows for receipt in group)
        not_asked = sum(receipt.rows_not_asked for receipt in group)
        try:
            found = apart(_bounds(group), _count, options, cut, group[0])
        except (Died, MemoryError) as error:
            return not_asked, f"{group[0].input}: cannot be counted anew: {error}"
        if found is None:
            return not_asked, None
        rows, matching = found
        if rows != asked + not_asked:
            problem = f"{rows} rows; {asked} in its shards and {not_asked} not asked for"
        elif asked > matching or (cut.limit is None and asked < matching):
            problem = f"{matching} rows match `where`; {asked} in its shards"
        else:
            return not_asked, None
        return rows - asked, f"{group[0].input}: {problem}"

    found = list(in_threads(recount, by_input.values(), _READERS))
    return sum(rows for rows, _ in found), [problem for _, problem in found if problem]


def _count(options: Mapping[str, str], cut: Cut, receipt: Receipt) -> tuple[int, int] | None:
    return Inputs(options, cut).count(receipt)


def _read_together(receipts: list[Receipt]) -> list[list[Receipt]]:
    """What one thread checks: all shards of a file of lines, or one shard of another file."""
    together: dict[tuple[str, str], list[Receipt]] = {}
    for receipt in receipts:
        name = receipt.output_key if has_groups(receipt) else receipt.input
        together.setdefault((receipt.input_root, name), []).append(receipt)
    return list(together.values())


def _check(store: Store, receipt: Receipt, inputs: Inputs | None) -> _Checked:
    key = receipt.output_key
    try:
        return _checked(store, receipt, inputs)
    except ObjectMissing:
        return _Checked(problems=(f"{key}: missing",))
    except AccessDenied as error:
        return _Checked(problems=(f"{key}: {error}",))
    except (StorageError, MemoryError):
        raise
    except Exception as error:  # a foreign object may hold anything; its line says what
        problem = f"{key}: cannot be checked: {type(error).__name__}: {first_line(error)}"
        return _Checked(problems=(problem,))


def _checked(store: Store, receipt: Receipt, inputs: Inputs | None) -> _Checked:
    key = receipt.output_key
    data = store.read(key)
    try:
        table = read_parquet(data)
    except (pa.ArrowException, OSError) as error:
        return _Checked(problems=(f"{key}: not readable: {first_line(error)}",))
    commit = Commit.from_footer(table.schema.metadata)
    if commit is None or commit != receipt.commit:
        return _Checked(problems=(f"{key}: its footer is not the one that was committed",))
    problems = []
    stored = receipt.stored
    if stored is not None and hashlib.sha256(data).hexdigest() != stored.sha256:
        problems.append(f"{key}: its bytes are not those that were committed")
    kept, added = _parts(table, commit)
    if added.column_names != commit.added_columns:
        missing = [name for name in commit.added_columns if name not in added.column_names]
        return _Checked(problems=(*problems, f"{key}: columns {missing} are missing"))
    found, wrong = _recount_rewards(added, commit)
    problems += [f"{key}: {problem}" for problem in (*_row_problems(added, commit), *wrong)]
    expected = None if inputs is None else inputs.rows(receipt, commit)
    if expected is not None and (difference := _compare_input(kept, expected)):
        problems.append(f"{key}: {difference}")
    scored = table.num_rows - _num_marked(added, commit)
    is_compared = expected is not None
    return _Checked(table.num_rows, scored, is_compared, tuple(problems), found)


def _parts(table: pa.Table, commit: Commit) -> tuple[pa.Table, pa.Table]:
    """The columns of the input, and those that were added after them; by place, because the input
    may have two of one name."""
    first = max(0, table.num_columns - len(commit.added_columns))
    return table.select(range(first)), table.select(range(first, table.num_columns))


def _num_marked(added: pa.Table, commit: Commit) -> int:
    return int(pc.count(added[commit.error_column], mode="only_valid").as_py())


def _row_problems(added: pa.Table, commit: Commit) -> Iterator[str]:
    marked = _num_marked(added, commit)
    if added.num_rows != commit.num_rows or marked != commit.rows_marked:
        yield (
            f"{added.num_rows} rows, {marked} marked; the commit says {commit.num_rows}, "
            f"{commit.rows_marked} marked"
        )
    columns = {name: added[name].combine_chunks() for name in commit.added_columns}
    if digest_columns(columns) != commit.scores_digest:
        yield "its scores are not those that were committed"
    marks = pc.is_valid(added[commit.error_column])
    if commit.models:
        own = [family_prefix(commit.column_prefix, name) for name in commit.models]
        by_model = [pc.is_valid(added[f"{prefix}score_error"]) for prefix in own]
        if not reduce(pc.or_, by_model).equals(marks):
            yield f"{commit.error_column} does not name the rows that some model has marked"
    rewards = {name for reward in commit.rewards for name in _names_of(commit, reward)}
    scores = [n for n in columns if n not in rewards and _holds_scores(n, commit)]
    yield from _gaps(added, scores, commit.error_column)


def _gaps(added: pa.Table, names: Sequence[str], error_column: str) -> Iterator[str]:
    """The first row without a number and without a reason, for each of these columns."""
    is_marked = pc.is_valid(added[error_column]).to_pylist()
    for name in names:
        complete = [_is_complete(value) for value in added[name].to_pylist()]
        wrong = [row for row, ok in enumerate(complete) if not ok and not is_marked[row]]
        if wrong:
            yield f"row {wrong[0]}: {name} has no number and no reason"


def _holds_scores(name: str, commit: Commit) -> bool:
    """Whether a column has numbers wherever a row has a score. A normalised score need not: it is
    of answers that every model tells apart."""
    fitting = [prefix for prefix in commit.score_prefixes if name.startswith(prefix)]
    prefix = max(fitting, key=len, default=commit.column_prefix)
    plain = name.removeprefix(prefix)
    if commit.models and prefix == family_prefix(commit.column_prefix, "z"):
        return False
    return ("score" in plain or "rewards" in plain) and not plain.endswith(_NO_NUMBERS)


def _names_of(commit: Commit, reward: str) -> list[str]:
    shape = shape_of(Format(commit.layout["format"]))
    return shape.reward_columns(commit.reward_prefix(reward))


def _recount_rewards(added: pa.Table, commit: Commit) -> tuple[dict[str, Rewarded], list[str]]:
    """What the columns of each reward function hold, and what is wrong with them."""
    found: dict[str, Rewarded] = {}
    problems: list[str] = []
    for reward, counts in commit.rewards.items():
        names = _names_of(commit, reward)
        if missing := sorted(set(names) - set(added.column_names)):
            problems.append(f"reward {reward}: no column {', '.join(missing)}")
            continue
        found[reward] = count_rewards([added[name].combine_chunks() for name in names])
        if found[reward] != counts:
            problems.append(f"reward {reward}: {found[reward]}; the commit says {counts}")
        problems += _gaps(added, names[:-1], names[-1])
    return found, problems


def _is_complete(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_complete(inner) for inner in value)
    return value is not None and abs(value) < float("inf")


def _compare_input(kept: pa.Table, expected: pa.Table) -> str:
    """The first difference between the shard's columns and those of the input, or ""."""
    if kept.column_names != expected.column_names:
        return f"columns {kept.column_names}, the input has {expected.column_names}"
    for name, ours, theirs in zip(kept.column_names, kept.columns, expected.columns, strict=True):
        if ours.type != theirs.type:
            return f"column {name} changed its type"
        if not is_same(ours.combine_chunks(), theirs.combine_chunks()):
            return f"column {name} is not as it was in the input"
    return ""


def is_same(a: pa.Array, b: pa.Array) -> bool:
    """Whether two arrays of one type have equal values; NaN is equal to NaN, which Arrow has
    otherwise, at any depth. Text is compared as bytes."""
    if a.equals(b):
        return True
    if isinstance(a, pa.ExtensionArray):
        return is_same(a.storage, b.storage)
    if isinstance(a, pa.DictionaryArray):
        return is_same(a.dictionary_decode(), b.dictionary_decode())
    if len(a) != len(b) or not a.is_valid().equals(b.is_valid()):
        return False
    if pa.types.is_struct(a.type):
        return all(map(is_same, a.flatten(), b.flatten()))
    if pa.types.is_map(a.type):
        return is_same(_as_list(a), _as_list(b))
    if pa.types.is_fixed_size_list(a.type):
        return is_same(a.flatten(), b.flatten())
    if pa.types.is_list(a.type) or pa.types.is_large_list(a.type):
        lengths = pc.list_value_length(a).equals(pc.list_value_length(b))
        return lengths and is_same(a.flatten(), b.flatten())
    if pa.types.is_floating(a.type):
        ours, theirs = (np.asarray(each.drop_null()) for each in (a, b))
        return np.array_equal(ours, theirs, equal_nan=True)
    return False


def _as_list(array: pa.MapArray) -> pa.ListArray:
    """A map as the list of entries that it is."""
    entries = pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
    mask = array.is_null() if array.null_count else None
    return pa.ListArray.from_arrays(array.offsets, entries, mask=mask)
