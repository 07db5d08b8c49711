"""Which rows and columns of the inputs are asked for: `limit`, `where`, `keep_columns` and
`drop_columns`."""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pyarrow as pa

from batch_scorer import formats
from batch_scorer.errors import ConfigError
from batch_scorer.inputs.arrow_files import open_arrow
from batch_scorer.inputs.files import matching_batches, open_parquet, read_lines
from batch_scorer.inputs.sources import FileKind, kind_of
from batch_scorer.inputs.where import IntArray, Where
from batch_scorer.records import Lines, ReadBounds, Source
from batch_scorer.storage import Store

_PACKED_RUNS = 64
"""Runs of a packed file that are read together: for each part it is unpacked from its beginning."""


def matching_rows(
    store: Store,
    source: Source,
    num_rows: int,
    where: Where,
    lines: Lines | None,
    bounds: ReadBounds,
) -> bytes:
    """One bit for each of a file's `num_rows` rows, as `numpy.packbits` has them: whether `where`
    is true for it."""
    matches = np.zeros(num_rows, np.bool_)
    first = 0
    if kind_of(source.key) is FileKind.PARQUET:
        file = open_parquet(store, source)
        groups = range(file.metadata.num_row_groups)
        for first, batch in matching_batches(file, where, groups, ()):
            matches[first + where.matches(batch)] = True
    elif kind_of(source.key) is FileKind.ARROW:
        with open_arrow(store, source) as arrow:
            for batch in arrow.batches(columns=where.columns):
                table = formats.as_stored(pa.Table.from_batches([batch]))
                matches[first + where.matches(table)] = True
                first += batch.num_rows
    elif lines is None:
        data = store.read_whole(source.key, source.version, source.size_bytes)
        matches[where.matches(formats.read_json_table(data, source.key, bounds)[0])] = True
    else:
        step = 1 if lines.codec is None else _PACKED_RUNS
        for start in range(0, len(lines.runs), step):
            table, _ = read_lines(store, source, lines.part(start, start + step))
            matches[first + where.matches(table)] = True
            first += table.num_rows
    return np.packbits(matches).tobytes()


def rows_of_bits(bits: bytes, num_rows: int) -> IntArray:
    """int64[n]: the rows that `matching_rows` found, in order."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), count=num_rows))


def spread(limit: int, sizes: Sequence[int]) -> list[int]:
    """`limit` rows over files of these sizes, in proportion; where that leaves parts of rows, the
    largest parts are made whole ones, the first file first. All rows where there are fewer."""
    total = sum(sizes)
    if limit >= total:
        return list(sizes)
    parts = [divmod(limit * size, total) for size in sizes]
    shares = [whole for whole, _ in parts]
    by_rest = sorted(range(len(parts)), key=lambda place: -parts[place][1])
    for place in by_rest[: limit - sum(shares)]:
        shares[place] += 1
    return shares


def kept_columns(names: Iterable[str], keep: Collection[str], drop: Collection[str]) -> list[str]:
    """The columns of a file that are written, in their order."""
    return [name for name in names if (not keep or name in keep) and name not in drop]


def kept_of(rows: pa.Table, keep: Collection[str], drop: Collection[str]) -> pa.Table:
    """The rows in the columns that are written. A name may be there twice."""
    kept = kept_columns(rows.column_names, keep, drop)
    return rows.select([i for i, name in enumerate(rows.column_names) if name in kept])


def refuse_unknown(
    keep: Collection[str], drop: Collection[str], files: Iterable[Iterable[str]]
) -> None:
    """Raise ConfigError for names that no file has: a column that is spelled wrongly."""
    known = {name for names in files for name in names}
    for setting, names in (("keep_columns", keep), ("drop_columns", drop)):
        for name in names:
            if name not in known:
                there = ", ".join(sorted(known))
                raise ConfigError(f"{setting}: no input has a column {name!r}; there are {there}")
