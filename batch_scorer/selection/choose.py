"""Which candidates are kept: SQL over a database in bounded memory, in the order of the recipe.

Each step is a table made of the one before, so that what it drops is the difference in rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.derived.database import open_database
from batch_scorer.selection.pairs import PromptCounts, count_prompts, pair_up, sample_pairs
from batch_scorer.selection.recipe import EVERY_OTHER, NoPair, Reason, Selection

IntArray: TypeAlias = npt.NDArray[np.int32]

_PLACE = "part, row, slot"
_GROUP = "(grp >> 64)::ubigint, (grp & 18446744073709551615)::ubigint"
"""A group in two halves: in one of 128 bits, DuckDB takes twice as long to part the rows by it."""
_LOWEST = f"value, tie, {_PLACE}"
_HIGHEST = f"value desc, tie, {_PLACE}"
_SPLIT_STEPS = 1 << 64
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Choice:
    """How many candidates are not kept, by reason; of pairs, what became of the prompts."""

    dropped: dict[Reason, int]
    prompts: PromptCounts | None


class Candidates:
    """The candidates of all parts. What is too much for memory goes into `folder`, which is the
    caller's to remove."""

    def __init__(self, folder: Path) -> None:
        self._database = open_database(folder)
        self._database.execute(
            "create table candidates (part int, row int, slot int, grp uhugeint, prompt ubigint, "
            "category varchar, value double, tie ubigint, text ubigint, tokens int)"
        )

    def add(self, part: int, candidates: pa.Table) -> None:
        """`candidates` as `find_candidates` gives them."""
        self._database.register("added", candidates)
        self._database.execute(
            "insert into candidates by name select ?::int as part, * exclude (grp_hi, grp_lo), "
            "(grp_hi::uhugeint << 64) | grp_lo::uhugeint as grp from added",
            [part],
        )
        self._database.unregister("added")

    def choose(self, selection: Selection) -> Choice:
        """Leave only the candidates that are kept."""
        dropped: dict[Reason, int] = {}
        prompts: PromptCounts | None = None
        if selection.quantiles:
            low, high = (self._at_quantile(share) for share in selection.quantiles)
            dropped[Reason.QUANTILE] = self._keep(f"value between {low!r} and {high!r}")
        if selection.best or selection.worst:
            dropped[Reason.RANK] = self._keep_ranks(selection.best or 0, selection.worst or 0)
        if selection.top_percent:
            ranked = self._keep_top(selection)
            dropped[Reason.RANK] = dropped.get(Reason.RANK, 0) + ranked
        if selection.sample and not selection.pairs:
            order = f"md5_number_lower(tie || ':{selection.seed}'), tie, {_PLACE}"
            dropped[Reason.SAMPLE] = self._step(
                f"select * from candidates order by {order} limit {selection.sample}"
            )
        if selection.pairs:
            pair_up(self._database, selection)
            prompts = count_prompts(self._database)
            dropped[Reason.NO_PAIR] = self._keep_paired()
            if selection.sample:
                undrawn = sample_pairs(self._database, selection)
                without = {**prompts.without_pair, NoPair.SAMPLE: undrawn}
                prompts = PromptCounts(prompts.prompts, without)
                dropped[Reason.SAMPLE] = self._keep_paired()
        self._split(selection)
        if selection.reorders:
            self._place(selection)
        return Choice(dropped, prompts)

    def kept(self, part: int) -> Iterator[tuple[str, IntArray]]:
        """Each split with rows of this part, and int32[k, 2]: row and slot of each, in order."""
        found = self._database.execute(
            "select split, row, slot from kept where part = ? order by split, row, slot", [part]
        ).fetchnumpy()
        places = np.stack([found["row"], found["slot"]], axis=1)
        splits = np.asarray(found["split"]).astype(str)
        for split in np.unique(splits):
            yield str(split), places[splits == split]

    def placed(self, part: int) -> pa.Table:
        """`split`, `shard`, `place`, `side`, `row` and `slot` of this part's rows that are written,
        in the order of the part."""
        return self._database.sql(
            "select split, shard, place, side, row, slot from placed where part = ? "
            "order by row, slot, side, shard, place",
            params=[part],
        ).to_arrow_table()

    def shards(self) -> list[tuple[str, int, int]]:
        """Split, number and rows of each shard that rows are placed into."""
        found: list[tuple[str, int, int]] = self._database.execute(
            "select split, shard, count(*) from placed where side = 0 group by all order by all"
        ).fetchall()
        return found

    def __len__(self) -> int:
        return self._number("select count(*) from candidates")

    def close(self) -> None:
        self._database.close()

    def _at_quantile(self, share: float) -> float:
        """The value at rank ceil(share * rows), counted from 1."""
        place = max(1, _part_of(share, len(self))) - 1
        found = self._database.execute(
            f"select value from candidates order by value limit 1 offset {place}"
        ).fetchone()
        return float(found[0]) if found else 0.0

    def _keep_ranks(self, best: int, worst: int) -> int:
        return self._keep_ranked(
            " or ".join(
                f"row_number() over (partition by {_GROUP} order by {order}) <= {count}"
                for order, count in ((_HIGHEST, best), (_LOWEST, worst))
                if count
            )
        )

    def _keep_top(self, selection: Selection) -> int:
        counts = self._database.execute(
            "select category, count(*) from candidates group by category"
        ).fetchall()
        percents, other = selection.top_percent, selection.top_percent.get(EVERY_OTHER, 100.0)
        limits = pa.table(
            {
                "category": pa.array([category for category, _ in counts], pa.string()),
                "most": [_part_of(percents.get(c, other), n, of=100) for c, n in counts],
            }
        )
        self._database.register("limits", limits)
        before = len(self)
        self._step(
            "select c.* exclude (nth) from (select *, row_number() over "
            f"(partition by category order by {_HIGHEST}) as nth from candidates) c "
            "join limits on c.category is not distinct from limits.category where nth <= most"
        )
        return before - len(self)

    def _keep_paired(self) -> int:
        """Leave only the responses that are in a pair; how many are in none."""
        sides = " union all ".join(
            f"select ({side}_part, {side}_row, {side}_slot) from pairs" for side in _SIDES
        )
        return self._keep(f"(part, row, slot) in ({sides})")

    def _place(self, selection: Selection) -> None:
        """Make the table `placed`: into which shard, and where in it, each row is written. `side`
        is 0 for a row and the chosen response of a pair, 1 for the rejected one."""
        if selection.pairs:
            ranked = (
                "select p.*, k.split, row_number() over (partition by k.split order by p.place) "
                "- 1 as nth from pairs p join kept k on (part, row, slot) = "
                "(chosen_part, chosen_row, chosen_slot)"
            )
            sides = " union all ".join(
                f"select {side}_part as part, {side}_row as row, {side}_slot as slot, "
                f"{number} as side, split, nth from ranked"
                for number, side in enumerate(_SIDES)
            )
        else:
            order = f"md5_number_lower(tie || ':{selection.seed}'), {_HIGHEST}"
            ranked = (
                "select part, row, slot, split, row_number() over (partition by split order by "
                f"{order}) - 1 as nth from candidates join kept using (part, row, slot)"
            )
            sides = "select part, row, slot, 0 as side, split, nth from ranked"
        self._database.execute(
            f"create table placed as with ranked as ({ranked}) "
            f"select part, row, slot, side, split, (nth // {selection.shard_rows})::int as shard, "
            f"(nth % {selection.shard_rows})::int as place from ({sides}) order by part, row, slot"
        )

    def _split(self, selection: Selection) -> None:
        """Make the table of what is kept, in the order of the parts: each is asked for alone."""
        self._database.execute("set preserve_insertion_order = true")
        self._database.execute(
            f"create table kept as select part, row, slot, {_split(selection)} as split "
            f"from candidates order by {_PLACE}"
        )

    def _keep(self, condition: str) -> int:
        return self._step(f"select * from candidates where {condition}")

    def _keep_ranked(self, condition: str) -> int:
        return self._step(f"select * from candidates qualify {condition}")

    def _step(self, query: str) -> int:
        """Replace the candidates by what the query gives; how many fewer they are."""
        before = len(self)
        self._database.execute(f"create table next as {query}")
        self._database.execute("drop table candidates")
        self._database.execute("alter table next rename to candidates")
        return before - len(self)

    def _number(self, query: str) -> int:
        found = self._database.execute(query).fetchone()
        assert found is not None
        return int(found[0])


def _part_of(share: float, rows: int, of: int = 1) -> int:
    """ceil(share * rows / of) of the decimal number that was written: 0.07 * 100 is 7, not 8."""
    return ceil(Fraction(str(share)) * rows / of)


def _split(selection: Selection) -> str:
    """SQL for the name of a row's split; empty without splits. Rows with one prompt have one."""
    if not selection.splits:
        return "''"
    end, cases = Fraction(0), []
    digest = f"md5_number_lower(prompt || ':{selection.seed}')"
    *first, last = selection.splits
    for name in first:
        end += Fraction(str(selection.splits[name]))
        cases.append(f"when {digest} < {int(end * _SPLIT_STEPS)}::uhugeint then {_quoted(name)}")
    otherwise = _quoted(last)
    return f"case {' '.join(cases)} else {otherwise} end" if cases else otherwise


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
