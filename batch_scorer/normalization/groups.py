"""Mean and standard deviation of the scores of each group, by family.

Scores wait in a database with a bound on memory, sorted by group when all are there, and are
added up as they are read from it: sums are rounded once, from their exact value (`math.fsum`), so
that they are the same in whatever order scores come, and so in whatever shards.

Legend: R rows of a part, F families.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.derived.database import open_database
from batch_scorer.normalization.result import FamilyCounts

FloatArray: TypeAlias = npt.NDArray[np.float64]

SCORES = pa.schema(
    {"family": pa.int16(), "hi": pa.uint64(), "lo": pa.uint64(), "value": pa.float64()}
)
"""A score: the place of its family, its group's digest in two halves, its value."""
ROWS = pa.schema({"row": pa.int32(), "hi": pa.uint64(), "lo": pa.uint64()})
"""A row of a part, and its group."""
_GROUP = "family, hi, lo"
_SUMS = pa.schema(
    {
        **{name: SCORES.field(name).type for name in ("family", "hi", "lo")},
        "n": pa.int64(),
        "total": pa.float64(),
    }
)


class Groups:
    """The scores of all parts by group. What is too much for memory goes into `folder`, which is
    the caller's to remove."""

    def __init__(self, folder: Path) -> None:
        self._database = open_database(folder)
        self._writer = self._database.cursor()  # writes while the other is being read
        self._database.execute(
            "create table scores (family smallint, hi ubigint, lo ubigint, value double)"
        )
        self._database.execute("create table rows (part int, row int, hi ubigint, lo ubigint)")

    def add(self, part: int, rows: pa.Table, scores: pa.Table) -> None:
        """The rows of a part with their groups (`ROWS`), and their finite scores (`SCORES`)."""
        self._insert("rows", "select ?::int as part, * from added", rows, [part])
        self._insert("scores", "select * from added", scores)

    def settle(self) -> None:
        """Compute mean and standard deviation of each group, now that all parts are there."""
        self._database.execute(
            f"create table spread as select {_GROUP} from scores group by all "
            "having min(value) < max(value)"
        )
        self._sum("means", f"select {_GROUP}, value from scores join spread using ({_GROUP})")
        # The square of what is left without the mean, which is a float64 before it is squared.
        self._sum(
            "squares",
            f"select {_GROUP}, (value - total / n) * (value - total / n) as value "
            f"from scores join means using ({_GROUP})",
        )
        self._database.execute(
            f"create table stats as select {_GROUP}, m.total / m.n as mean, "
            f"sqrt(s.total / s.n) as std from means m join squares s using ({_GROUP}) "
            "where s.total > 0"
        )
        self._database.execute("set preserve_insertion_order = true")
        self._database.execute(
            "create table placed as select part, row, family, mean, std from rows "
            "join stats using (hi, lo) order by part, row, family"
        )

    def of_rows(self, part: int, num_rows: int, families: int) -> tuple[FloatArray, FloatArray]:
        """float64[R, F] twice: mean and standard deviation of each row's group, NaN where that has
        no spread."""
        found = self._database.execute(
            "select row, family, mean, std from placed where part = ?", [part]
        ).fetchnumpy()
        means, stds = (np.full((num_rows, families), np.nan) for _ in range(2))
        places = (np.asarray(found["row"]), np.asarray(found["family"]))
        means[places], stds[places] = found["mean"], found["std"]
        return means, stds

    def counts(self, prefixes: Sequence[str]) -> dict[str, FamilyCounts]:
        """By the prefix of each family, in the order of their places."""
        found = self._database.execute(
            f"select family, sum(n)::bigint, sum(n) filter (std is not null)::bigint, count(*), "
            f"count(*) filter (std is null) from (select {_GROUP}, count(*) as n from scores "
            f"group by all) left join stats using ({_GROUP}) group by family"
        ).fetchall()
        by_family = {
            family: (n, kept or 0, groups, without) for family, n, kept, groups, without in found
        }
        return {
            prefix: FamilyCounts(*by_family.get(place, (0, 0, 0, 0)))
            for place, prefix in enumerate(prefixes)
        }

    def close(self) -> None:
        self._writer.close()
        self._database.close()

    def _sum(self, table: str, query: str) -> None:
        """Make a table of the number and the sum of the query's values, by group."""
        self._database.execute(
            f"create table {table} "
            "(family smallint, hi ubigint, lo ubigint, n bigint, total double)"
        )
        reader = self._database.sql(f"{query} order by {_GROUP}").to_arrow_reader()
        for sums in group_sums(reader):
            self._insert(table, "select * from added", sums)

    def _insert(
        self, table: str, query: str, added: pa.Table, parameters: Sequence[object] = ()
    ) -> None:
        self._writer.register("added", added)
        self._writer.execute(f"insert into {table} by name {query}", list(parameters))
        self._writer.unregister("added")


def group_sums(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Of values in the order of their groups, in batches: number and sum of each group, rounded
    once from the exact sum. Columns as `SCORES`, and `n` and `total` in place of `value`."""
    key: tuple[int, ...] | None = None
    count, parts = 0, list[float]()
    for batch in batches:
        if not batch.num_rows:
            continue
        keys = [batch[name].to_numpy() for name in ("family", "hi", "lo")]
        changes = np.zeros(batch.num_rows - 1, dtype=bool)
        for each in keys:
            changes |= each[1:] != each[:-1]
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), batch.num_rows]
        owners = list(zip(*(each[bounds[:-1]].tolist() for each in keys), strict=True))
        values = batch["value"].to_numpy().tolist()
        done: list[tuple[object, ...]] = []
        for owner, (first, stop) in zip(owners, pairwise(bounds), strict=True):
            if owner != key:
                if key is not None:
                    done.append((*key, count, math.fsum(parts)))
                key, count, parts = owner, 0, []
            count += stop - first
            parts += values[first:stop]
        parts = exact_parts(parts)  # of the last group, which may go on in the next batch
        yield _sums_table(done)
    if key is not None:
        yield _sums_table([(*key, count, math.fsum(parts))])


def _sums_table(lines: Sequence[tuple[object, ...]]) -> pa.Table:
    columns = list(zip(*lines, strict=True)) if lines else [()] * len(_SUMS)
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, _SUMS, strict=True)], schema=_SUMS
    )


def exact_parts(values: Sequence[float]) -> list[float]:
    """A few floats whose sum is exactly that of these."""
    parts: list[float] = []
    while rest := math.fsum([*values, *(-part for part in parts)]):
        parts.append(rest)
    return parts
