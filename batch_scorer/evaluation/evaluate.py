"""A scored output as a benchmark result: find the benchmark, read its columns, compute.

Only committed shards of a complete output are read, and of them only the columns needed, pinned
to the version that the manifest names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import pyarrow as pa

from batch_scorer.config import Config, PartialConfig, expanded
from batch_scorer.errors import (
    ConfigError,
    IncompleteError,
    IntegrityError,
    OutputError,
    ShardError,
)
from batch_scorer.evaluation import (
    Benchmark,
    judgebench,
    pairs,
    rewardbench,
    rewardbench2,
    rm_bench,
)
from batch_scorer.evaluation.result import Evaluation, FloatArray, floats, texts
from batch_scorer.formats.values import is_text
from batch_scorer.inputs.files import open_parquet, read_apart
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.inputs.selection import kept_columns
from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Format, Receipt, Source, Status
from batch_scorer.runs.run import Listener, score
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store

T = TypeVar("T")

_READERS = 8
_LINES_SHOWN = 20

JUDGEBENCH_COLUMNS = {"chosen": "response_A", "rejected": "response_B"}
"""How JudgeBench's pairs are scored: A as chosen. The label decides which one is right."""


@dataclass(frozen=True, slots=True)
class File:
    """What is known of an input file or of its scored shard, without its rows.

    `fields` maps the fields of the format to columns, as `Layout.columns` does.
    """

    name: str
    format: Format
    fields: Mapping[str, str]
    columns: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Rules:
    """A benchmark: how its files are recognised, what is read from them, what computes it.

    `texts` are columns of the input (null where a file has none), `scores` added ones under the
    names that `evaluate` takes. `known` decides whether a value of the first of `texts` is one of
    the benchmark's. `by_label` gives the scores of the right answers and of the wrong ones,
    float64[P] each; None where rows are no pairs. `optional` are more columns of the input under
    the names that they are read as, each with its spellings; null where a file has none, or no text
    in it.
    """

    needs: str
    fits: Callable[[File], bool]
    texts: tuple[str, ...]
    scores: Callable[[File], dict[str, str]]
    score_type: pa.DataType
    evaluate: Callable[[pa.Table], Evaluation]
    known: Callable[[str], bool]
    by_label: Callable[[pa.Table], tuple[FloatArray, FloatArray]] | None = None
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def evaluate(
    scored: str | Path | Config,
    store_options: Mapping[str, str] | None = None,
    *,
    benchmark: str | None = None,
    legacy_xstest_weights: bool = False,
    listeners: Sequence[Listener] = (),
) -> Evaluation:
    """A benchmark's result, from a complete scored output, local or in an object store.

    `scored` is that output, in a store with `store_options`; or the Config of a run, which then is
    scored first, as by `score`, with `listeners` to its progress. `benchmark` is one of
    `Benchmark`; None: found from the columns and the names of the subsets. With
    `legacy_xstest_weights`, RewardBench weighs its two xstest subsets as before 2024-09-10.

    Raises ConfigError for an unknown benchmark or settings that do not go together, OutputError if
    there is no scored output or its rows are no benchmark's, InputError if a row cannot be of the
    benchmark, IncompleteError if shards are missing, IntegrityError if one is not the object that
    was committed; and for a Config what `score` raises. Rows that are no benchmark's are refused
    before they are scored.
    """
    if benchmark is not None and benchmark not in list(Benchmark):
        raise ConfigError(f"unknown benchmark {benchmark!r}; known are {', '.join(Benchmark)}")
    wanted = Benchmark(benchmark) if benchmark else None
    if not isinstance(scored, Config):
        return evaluate_output(expanded(scored), store_options or {}, wanted, legacy_xstest_weights)
    if store_options is not None:
        raise ConfigError("store_options: a Config has its own")
    _score(scored, wanted, listeners)
    return evaluate_output(scored.output, scored.store_options, wanted, legacy_xstest_weights)


def _score(config: Config, wanted: Benchmark | None, listeners: Sequence[Listener]) -> None:
    """Score a benchmark's rows; JudgeBench's need not have their columns named."""
    if wanted is Benchmark.JUDGEBENCH:
        columns = {**JUDGEBENCH_COLUMNS, **config.columns}
        config = config.model_copy(update={"columns": columns})
    if config.report:
        raise ConfigError("report: `score` and `nightly` write the page; here, leave it out")
    files = files_of_plan(make_plan(config), config)
    find_benchmark(files, wanted)  # before hours of scoring, not after
    score(config, *listeners)


def evaluate_output(
    output: str,
    store_options: Mapping[str, str],
    wanted: Benchmark | None,
    legacy_xstest_weights: bool,
    column_prefix: str | None = None,
) -> Evaluation:
    """`evaluate` of a scored output whose name is `expanded` already.

    `column_prefix` is what the names of the score columns begin with; None: as they were scored, of
    several models the mean of their scores.
    """
    store, run = open_scored(output, store_options)
    receipts, gone = _complete(store, output)
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        files = list(pool.map(partial(_file, store), receipts))
        found = find_benchmark(files, wanted)
        prefix = _score_prefix(receipts) if column_prefix is None else column_prefix
        read = partial(_read, store, found, prefix)
        table = pa.concat_tables(pool.map(read, receipts, files))
    rules, judge = _RULES[found], run.provenance.get("judge")
    if wanted is None and not any(map(rules.known, texts(table, rules.texts[0]).tolist())):
        raise OutputError(
            f"{output}: its rows look like {found}, but that benchmark knows no {rules.texts[0]} "
            f"of them; pass --benchmark {found} to evaluate them all the same"
        )
    if found is Benchmark.REWARDBENCH:
        result = rewardbench.evaluate(
            table, legacy_xstest_weights=legacy_xstest_weights, is_judged=judge is not None
        )
    elif legacy_xstest_weights:
        raise ConfigError(f"only RewardBench has legacy xstest weights, and this is {found}")
    else:
        result = rules.evaluate(table)
    if rules.by_label is not None:
        right, wrong = rules.by_label(table)
        result = replace(result, calibration=pairs.calibration_of(right, wrong, judge))
        if rules.optional:
            result = replace(result, writers=pairs.writers_of(table, right, wrong))
    if gone:
        note = f"{gone} shards are not counted: the last run did not name their inputs"
        result = replace(result, notes=[*result.notes, note])
    return replace(
        result, model=str(run.provenance.get("model")), output=output, scored_with=run.fingerprint
    )


def _score_prefix(receipts: Sequence[Receipt]) -> str:
    """Of a complete output, whose shards have the same columns."""
    commits = (receipt.commit for receipt in receipts if receipt.commit)
    return next((commit.score_prefix for commit in commits), "")


def find_benchmark(files: Sequence[File], wanted: Benchmark | None = None) -> Benchmark:
    """The benchmark that all files belong to, `wanted` or one that is found; raises OutputError for
    none."""
    candidates = [wanted] if wanted else [one for one in _RULES if one is not Benchmark.PAIRS]
    if not files:
        raise OutputError("there are no rows to evaluate")
    for benchmark in candidates:
        if all(map(_RULES[benchmark].fits, files)):
            return benchmark
    # Of files of several kinds, name one that fits nothing, if there is one.
    file = min(files, key=lambda file: any(_RULES[one].fits(file) for one in candidates))
    needs = "".join(f"\n  {one}: {_RULES[one].needs}" for one in ([wanted] if wanted else _RULES))
    raise OutputError(
        f"not the rows of one benchmark: {file.name} holds {file.format} rows with columns "
        f"{', '.join(sorted(file.columns))}. These would do:{needs}"
    )


def files_of_plan(plan: Plan, config: Config) -> list[File]:
    """The inputs of a run that is still to be made, in the columns that it keeps; those of which no
    row is asked for show nothing."""
    return [
        File(
            name=file.source.key,
            format=file.layout.format,
            fields=file.layout.columns,
            columns=frozenset(
                kept_columns(file.schema.names, config.keep_columns, config.drop_columns)
            ),
        )
        for file in plan.files
        if len(file.asked())
    ]


# What a benchmark looks like, and what is read of it.


def _prior_set(file: File) -> str | None:
    """The prior set that a file is: their data set has one split each, so its name shows it."""
    split = PurePosixPath(file.name).name.split(".")[0].split("-")[0]
    return split if split in rewardbench.PRIOR_SETS else None


def _is_rewardbench(file: File) -> bool:
    is_named = "subset" in file.columns or _prior_set(file) is not None
    return file.format is Format.PREFERENCE_PAIR and is_named


def _is_judgebench(file: File) -> bool:
    sides = {file.fields.get("chosen"), file.fields.get("rejected")}
    return (
        file.format is Format.PREFERENCE_PAIR
        and sides == set(JUDGEBENCH_COLUMNS.values())
        and {"source", "label"} <= file.columns
    )


def _chosen_and_rejected(table: pa.Table) -> tuple[FloatArray, FloatArray]:
    return floats(table, "score_chosen"), floats(table, "score_rejected")


def _has(format: Format, *columns: str) -> Callable[[File], bool]:
    return lambda file: file.format is format and file.columns.issuperset(columns)


def _sides(file: File) -> dict[str, str]:
    side_of = {column: side for side, column in file.fields.items()}
    return {f"score_{x}": f"score_{side_of[f'response_{x.upper()}']}" for x in ("a", "b")}


def _same(*names: str) -> Callable[[File], dict[str, str]]:
    return lambda file: {name: name for name in names}


_LIST = pa.list_(pa.float32())
_RULES: Mapping[Benchmark, _Rules] = {
    Benchmark.JUDGEBENCH: _Rules(
        needs="pairs with columns source and label, scored with --column chosen=response_A "
        "--column rejected=response_B",
        fits=_is_judgebench,
        texts=("source", "label", "response_model"),
        scores=_sides,
        score_type=pa.float32(),
        evaluate=judgebench.evaluate,
        known=lambda source: bool(judgebench.category_of(source)),
        by_label=judgebench.right_and_wrong,
    ),
    Benchmark.REWARDBENCH: _Rules(
        needs="pairs with a column subset, or in files named as the prior sets "
        f"({', '.join(rewardbench.PRIOR_SETS)})",
        fits=_is_rewardbench,
        texts=("subset",),
        scores=_same("score_chosen", "score_rejected"),
        score_type=pa.float32(),
        evaluate=rewardbench.evaluate,
        known=lambda subset: subset in rewardbench.SUBSETS,
        by_label=_chosen_and_rejected,
        optional=pairs.WRITERS,
    ),
    Benchmark.REWARDBENCH_2: _Rules(
        needs="best-of-n rows with columns id and subset",
        fits=_has(Format.BEST_OF_N, "id", "subset"),
        texts=("subset", "id"),
        scores=_same("scores_chosen", "scores_rejected"),
        score_type=_LIST,
        evaluate=rewardbench2.evaluate,
        known=lambda subset: subset.lower() in map(str.lower, rewardbench2.SUBSETS),
    ),
    Benchmark.RM_BENCH: _Rules(
        needs="best-of-n rows, three to three, with a column domain",
        fits=_has(Format.BEST_OF_N, "domain"),
        texts=("domain",),
        scores=_same("scores_chosen", "scores_rejected"),
        score_type=_LIST,
        evaluate=rm_bench.evaluate,
        known=lambda domain: bool(rm_bench.domain_of(domain)),
    ),
    Benchmark.PAIRS: _Rules(
        needs="any pairs, with --benchmark pairs; their chosen answer is the right one",
        fits=_has(Format.PREFERENCE_PAIR),
        texts=(),
        scores=_same("score_chosen", "score_rejected"),
        score_type=pa.float32(),
        evaluate=pairs.evaluate,
        known=lambda _: True,
        by_label=_chosen_and_rejected,
        optional={**pairs.WRITERS, "source": ("source",)},
    ),
}


# Reading.


def _of_shard(store: Store, receipt: Receipt, read: Callable[..., T], *args: object) -> T:
    """What `read` gives of a committed shard; raises IntegrityError if it is not as it was
    committed."""
    stored = receipt.stored
    assert stored is not None  # it is committed
    try:
        source = Source(store.root, receipt.output_key, stored.size_bytes, stored.version)
        return read_apart(PartialConfig(), stored.size_bytes, read, store, source, *args)
    except (ObjectMissing, ObjectChanged, ShardError, pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{store.url(receipt.output_key)} is not the shard that was committed "
            f"({error}); for details run `batch-scorer verify`"
        ) from error


def _names(store: Store, source: Source) -> list[str]:
    names: list[str] = open_parquet(store, source).schema_arrow.names
    return names


def _columns(store: Store, source: Source, names: list[str]) -> pa.Table:
    return open_parquet(store, source).read(columns=names, use_threads=False)


def _file(store: Store, receipt: Receipt) -> File:
    commit = receipt.commit
    assert commit is not None  # it is committed
    return File(
        name=receipt.input,
        format=Format(commit.layout["format"]),
        fields=commit.layout["columns"],
        columns=frozenset(_of_shard(store, receipt, _names)),
    )


def _read(
    store: Store, benchmark: Benchmark, prefix: str, receipt: Receipt, file: File
) -> pa.Table:
    """The columns of one shard, under the benchmark's names and types."""
    rules = _RULES[benchmark]
    prior = _prior_set(file) if benchmark is Benchmark.REWARDBENCH else None
    texts = [name for name in rules.texts if name in file.columns]
    optional = {
        name: column
        for name, spellings in rules.optional.items()
        for column in spellings
        if column in file.columns
    }
    scores = {name: f"{prefix}{column}" for name, column in rules.scores(file).items()}
    url = store.url(receipt.output_key)
    if missing := set(scores.values()) - file.columns:
        raise OutputError(f"{url} has no column {', '.join(sorted(missing))}")
    table = _of_shard(store, receipt, _columns, [*texts, *scores.values(), *optional.values()])
    constants = dict.fromkeys((*rules.texts, *rules.optional)) | (
        {"subset": prior} if prior else {}
    )
    columns = {
        name: pa.array([value] * table.num_rows, pa.string()) for name, value in constants.items()
    }
    try:
        columns |= {name: table[name].cast(pa.string()) for name in texts if not constants[name]}
        columns |= {
            name: table[column].cast(pa.string())
            for name, column in optional.items()
            if is_text(table[column].type)
        }
        columns |= {name: table[column].cast(rules.score_type) for name, column in scores.items()}
    except pa.ArrowException as error:
        raise OutputError(f"{url}: a column has the wrong type: {error}") from error
    return pa.table(columns)


def _complete(store: Store, output: str) -> tuple[list[Receipt], int]:
    """The committed shards that hold rows, and how many belong to inputs no longer named.

    Raises IncompleteError, which lists what is missing.
    """
    state = OutputState(store)
    if state.success is None:
        raise IncompleteError("\n  ".join(_what_is_missing(state, output)))
    receipts = state.manifest
    there = [r for r in receipts if r.status is Status.COMMITTED and r.num_rows]
    return there, sum(r.status is Status.INPUT_GONE for r in receipts)


def _what_is_missing(state: OutputState, output: str) -> list[str]:
    """Lines for people: how much is scored, which shards failed, which rows were not reached."""
    there = [r for _, r in state.shards() if r and r.status is Status.COMMITTED]
    keys = {receipt.output_key for receipt in there}
    lacking = (Status.FAILED, Status.LEFT)
    failed = [
        receipt
        for receipt in state.receipts.values()
        if receipt.status in lacking and receipt.output_key not in keys
    ]
    if (plan := state.plan) is None:
        return [f"{output} is not scored: its run has not planned anything yet"]
    advice = (
        f"{state.holder.holder} is working on it"
        if state.holder
        else "run the same `score` command again"
    )
    lines = [f"{r.output_key} failed ({r.num_rows:,} rows): {r.reason}: {r.detail}" for r in failed]
    named = {receipt.input for receipt in failed}
    lines += [
        f"{name}: rows {start:,} to {stop:,} are missing"
        for name, start, stop in _gaps(there)
        if name not in named
    ]
    if len(lines) > _LINES_SHOWN:
        lines = [*lines[:_LINES_SHOWN], f"and {len(lines) - _LINES_SHOWN} more"]
    return [
        f"{output} is not complete: {len(there):,} of {plan.shards:,} planned shards are "
        f"scored, {sum(r.num_rows for r in there):,} of {plan.rows:,} rows; {advice}",
        *lines,
    ]


def _gaps(receipts: Iterable[Receipt]) -> Iterable[tuple[str, int, int]]:
    """(input, first row, row after) of what lies before and between the committed shards.

    What lies after them nobody knows here: the plan is not kept.
    """
    # Of rows picked by `where` nobody knows here which lie between two shards.
    commits = [r.commit for r in receipts if r.commit and r.commit.where is None]
    reached: dict[str, int] = {}
    for commit in sorted(commits, key=lambda commit: (commit.input, commit.first_row)):
        start = reached.get(commit.input, 0)
        if commit.first_row > start:
            yield commit.input, start, commit.first_row
        reached[commit.input] = commit.first_row + commit.num_rows
