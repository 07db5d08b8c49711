"""Rows in another order than that of the inputs, and pairs of rows that lie anywhere.

Every part is read once: its rows go into a file on the local disk for each shard that needs some
of them. Then each shard is put together from its own files, so that memory holds one part or one
shard. Both are done in processes that may die of what they read.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.derived.output import encode_shard
from batch_scorer.derived.parts import Part, read_apart
from batch_scorer.errors import InputError
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.selection.choose import Candidates
from batch_scorer.selection.flat import FlatPart
from batch_scorer.selection.layouts import paired_table, sides_of
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.stored_pairs import StoredPairs

_BOUNDS = Bounds(seconds=3600.0, memory_bytes=4 << 30)
"""For putting a shard together from files of our own."""
_OURS = ("place", "side")
"""Columns that stand beside the rows on the way, with a line before their names."""


def gathered(
    parts: Sequence[Part],
    candidates: Candidates,
    selection: Selection,
    derivation: str,
    committed: Collection[str],
    options: Mapping[str, str],
    folder: Path,
) -> Iterator[tuple[str, bytes, int]]:
    """Key, bytes and rows of every shard that rows are placed into, but those `committed`.

    Files go into `folder`, which is the caller's to remove.
    """
    shards = {
        (split, number): (f"{split}/" if split else "") + f"part-{number:05}.parquet"
        for split, number, _ in candidates.shards()
    }
    wanted = {place for place, key in shards.items() if key not in committed}
    for number, part in enumerate(parts):
        placed = candidates.placed(number)
        if placed.num_rows and wanted:
            target = folder / f"{number}"
            target.mkdir()
            read_apart(part.source, _scatter, part, placed, wanted, selection, options, target)
    for place in sorted(wanted):
        files = sorted(folder.glob(f"*/{_name(*place)}"), key=lambda file: int(file.parent.name))
        try:
            encoded, rows = apart(
                _BOUNDS, _put_together, files, selection, derivation, shards[place]
            )
        except (Died, MemoryError) as error:
            raise InputError(f"{shards[place]} cannot be put together: {error}") from None
        yield shards[place], encoded, rows


def _name(split: str, number: int) -> str:
    return f"{split}-{number}.arrow"


def _scatter(
    part: Part,
    placed: pa.Table,
    wanted: set[tuple[str, int]],
    selection: Selection,
    options: Mapping[str, str],
    folder: Path,
) -> None:
    """Write the part's rows into a file for each shard."""
    flat = FlatPart(part, options)
    table = flat.taken(np.stack([placed["row"].to_numpy(), placed["slot"].to_numpy()], axis=1))
    if selection.pairs:
        table = sides_of(flat, table)
    elif selection.lays_out:
        table = StoredPairs(flat, selection.columns).table(table)
    for name in _OURS:
        table = table.append_column(f"_{name}", placed[name])
    for split, number in wanted:
        here = pc.and_(pc.equal(placed["split"], split), pc.equal(placed["shard"], number))
        rows = table.filter(here)
        if not rows.num_rows:
            continue
        with (
            pa.OSFile(str(folder / _name(split, number)), "wb") as file,
            pa.ipc.new_file(file, rows.schema) as writer,
        ):
            writer.write_table(rows)


def _put_together(
    files: Sequence[Path], selection: Selection, derivation: str, key: str
) -> tuple[bytes, int]:
    """The shard's bytes, and how many rows it has."""
    tables = []
    for file in files:
        with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
            tables.append(reader.read_all())
    rows = pa.concat_tables(tables, promote_options="default").sort_by(
        [(f"_{name}", "ascending") for name in _OURS]
    )
    table = rows.drop_columns([f"_{name}" for name in _OURS])
    if selection.pairs:
        is_chosen = pc.equal(rows["_side"], 0)
        table = paired_table(
            table.filter(is_chosen), table.filter(pc.invert(is_chosen)), selection.columns
        )
    return encode_shard(table, derivation, key), table.num_rows
