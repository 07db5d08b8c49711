"""What Python calls beside the settings: a run that shows its progress, and rows in memory.

Such rows are written to a file in a temporary folder, `runs.run.score` scores it as any other
input, and the columns that it added are put beside the caller's own rows. So whatever a file
promises holds for rows in memory: the formats, the gate, the reasons of rows without a score.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from batch_scorer import formats
from batch_scorer.backends.registry import BackendFactory
from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, IncompleteError, InputError, IntegrityError, ShardError
from batch_scorer.inputs.files import open_parquet, read_apart
from batch_scorer.records import Receipt, Source
from batch_scorer.reports.page.write import write_beside
from batch_scorer.reports.progress import progress_listener
from batch_scorer.runs.run import Listener, Summary
from batch_scorer.runs.run import score as run
from batch_scorer.storage import open_store

R = TypeVar("R")

_OF_FILES = (
    *("inputs", "exclude", "output", "where", "limit", "keep_columns", "drop_columns"),
    *("use_ray", "ray_address", "store_options", "retry_marked", "report"),
)
"""Settings that say which files and rows are read, what is written, and where."""


def score(
    config: Config,
    *listeners: Listener,
    make: BackendFactory | None = None,
    progress: bool = False,
) -> Summary:
    """Score all inputs into the output, as `runs.run.score`, and write the page if `config.report`
    asks for it; with `progress`, show how far it is.

    A terminal has a bar on stderr; a notebook, and stderr that is a file, have plain lines.
    """
    with ExitStack() as stack:
        if progress:
            listeners = (*listeners, stack.enter_context(progress_listener(_console())))
        summary = run(config, *listeners, make=make)
    if config.report:
        write_beside(config.output, config.store_options)
    return summary


def _console() -> Console:
    console = Console(stderr=True)
    if console.is_jupyter:
        # Plain lines among the cell's results: ipykernel asks for colours, which not every
        # notebook shows, and what goes to stderr looks like an error there.
        console = Console(force_jupyter=False, force_terminal=False, color_system=None)
    return console


def score_rows(rows: R, *, progress: bool = False, **settings: Any) -> R:
    """The rows with the score columns added, in their order.

    `rows` are a list of dicts with JSON values, a `pyarrow.Table`, a `datasets.Dataset` or a
    `ray.data.Dataset`; what comes back is of the same kind. `settings` are those of `load_config`,
    without those of files. A row that cannot be scored has nulls and a reason, as in a file. It is
    scored in this process, whose memory has to hold all rows, those of a Ray dataset too; with
    `progress`, it shows how far it is.

    Raises ConfigError, InputError and ModelError as `score` does, before any row is scored; and
    IncompleteError where some rows were neither scored nor marked.
    """
    for name in _OF_FILES:
        if settings.get(name) is not None:
            raise ConfigError(
                f"{name}: not for rows in memory; choose rows and columns before the call"
            )
    scored: Any
    if isinstance(rows, list):
        added = _added_to_dicts(rows, settings, progress).to_pylist()
        scored = [{**row, **columns} for row, columns in zip(rows, added, strict=True)]
    elif isinstance(rows, pa.Table):
        scored = _beside(rows, _added_to_table(rows, settings, progress))
    elif (datasets := _library_of(rows, "datasets")) is not None:
        scored = _beside_dataset(rows, datasets, settings, progress)
    elif (ray_data := _library_of(rows, "ray.data")) is not None:
        scored = _beside_blocks(rows, ray_data, settings, progress)
    else:
        raise InputError(
            f"rows: {type(rows).__module__}.{type(rows).__qualname__}; give a list of dicts, a "
            "pyarrow.Table, a datasets.Dataset or a ray.data.Dataset"
        )
    return cast(R, scored)  # of the same kind


# Kinds of rows


def _library_of(rows: object, name: str) -> Any:
    """The library whose Dataset the rows are, or None. It is loaded if they are."""
    library: Any = sys.modules.get(name)
    return library if library is not None and isinstance(rows, library.Dataset) else None


def _beside(table: pa.Table, added: pa.Table) -> pa.Table:
    for field, column in zip(added.schema, added.columns, strict=True):
        table = table.append_column(field, column)
    return table


def _beside_dataset(rows: Any, datasets: Any, settings: dict[str, Any], progress: bool) -> Any:
    """A `datasets.Dataset` with its features, and its rows as `select` and `shuffle` left them."""
    added = datasets.Dataset(_added_to_table(rows.with_format("arrow")[:], settings, progress))
    scored = datasets.concatenate_datasets([rows, added], axis=1)
    return scored.with_format(rows.format["type"], **rows.format["format_kwargs"])


def _beside_blocks(rows: Any, ray_data: Any, settings: dict[str, Any], progress: bool) -> Any:
    """A `ray.data.Dataset` of as many blocks. It is run once: another time its rows may come in
    another order."""
    blocks = sys.modules["ray"].get(rows.to_arrow_refs())
    table = pa.concat_tables(blocks, promote_options="permissive")
    table, first = _beside(table, _added_to_table(table, settings, progress)), 0
    scored = []
    for block in blocks:
        scored.append(table.slice(first, block.num_rows))
        first += block.num_rows
    return ray_data.from_arrow(scored)


# Through a file


def _added_to_dicts(rows: Sequence[Any], settings: dict[str, Any], progress: bool) -> pa.Table:
    """As JSON Lines, where rows need not have the same keys and types."""
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"rows[{number}]: {type(row).__name__}, not a dict")
        try:
            lines.append(json.dumps(row))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"rows[{number}]: not JSON values: {error}; a pyarrow.Table may hold others"
            ) from None
    with TemporaryDirectory(prefix="batch-scorer-") as folder:
        config = _config(folder, "rows.jsonl", settings)
        if not rows:
            return pa.table({})
        Path(config.inputs[0]).write_text("\n".join(lines) + "\n")
        return _added_to_file(config, len(rows), progress)


def _added_to_table(table: pa.Table, settings: dict[str, Any], progress: bool) -> pa.Table:
    with TemporaryDirectory(prefix="batch-scorer-") as folder:
        config = _config(folder, "rows.parquet", settings)
        try:
            # A row group is read at once, so it is not larger than a shard.
            pq.write_table(
                formats.as_stored(table), config.inputs[0], row_group_size=config.shard_rows
            )
        except (ShardError, pa.ArrowException) as error:
            raise InputError(f"rows: {error}") from None
        return _added_to_file(config, table.num_rows, progress)


def _config(folder: str, name: str, settings: dict[str, Any]) -> Config:
    own = {"inputs": (f"{folder}/{name}",), "output": f"{folder}/scored", "use_ray": False}
    return load_config(**{**settings, **own})


def _added_to_file(config: Config, num_rows: int, progress: bool) -> pa.Table:
    """The columns that scoring adds to a file of so many rows."""
    receipts = score(config, progress=progress).receipts
    for receipt in receipts:
        if receipt.commit is None:
            raise IncompleteError(f"{receipt.output_key}: {receipt.reason}: {receipt.detail}")
    tables: list[pa.Table] = []
    done = 0
    for receipt in sorted(receipts, key=_first_row):
        if _first_row(receipt) != done:
            raise IntegrityError(f"rows from {done} are scored as rows from {_first_row(receipt)}")
        tables.append(_read_added(config, receipt))
        done += tables[-1].num_rows
    if done != num_rows:
        raise IntegrityError(f"{num_rows} rows went in, {done} came out")
    return pa.concat_tables(tables)


def _first_row(receipt: Receipt) -> int:
    assert receipt.commit is not None
    return receipt.commit.first_row


def _read_added(config: Config, receipt: Receipt) -> pa.Table:
    stored = receipt.stored
    assert stored is not None
    source = Source(config.output, receipt.output_key, stored.size_bytes, stored.version)
    return read_apart(config, source.size_bytes, _columns_of, source, stored.commit.added_columns)


def _columns_of(source: Source, names: list[str]) -> pa.Table:
    file = open_parquet(open_store(source.root, {}), source)
    table = file.read(columns=names, use_threads=False)
    return table.select(names).replace_schema_metadata(None)
