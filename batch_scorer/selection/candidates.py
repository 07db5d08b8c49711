"""The first pass of a selection: what decides about each row, and nothing else of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.derived.parts import Part
from batch_scorer.errors import InputError, ShardError
from batch_scorer.inputs.where import where_of
from batch_scorer.selection.digests import digests, tie_of
from batch_scorer.selection.flat import FlatPart, FlatRows
from batch_scorer.selection.layouts import SIDE_FIELDS, fits, sides_of
from batch_scorer.selection.recipe import PROMPT, Reason, Selection
from batch_scorer.selection.stored_pairs import StoredPairs
from batch_scorer.selection.texts import NoColumn, joined_texts, prompts_of, responses_of, texts_of
from batch_scorer.selection.values import Ranking, numbers_of, require

_SCHEMA = pa.schema(
    {
        "row": pa.int32(),
        "slot": pa.int32(),
        "grp_hi": pa.uint64(),
        "grp_lo": pa.uint64(),
        "prompt": pa.uint64(),
        "category": pa.string(),
        "value": pa.float64(),
        "tie": pa.uint64(),
        "text": pa.uint64(),
        "tokens": pa.int32(),
    }
)
"""Digests in place of texts. `text` is null where no pairs are made, and where there is none."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a part holds. `candidates` are of `_SCHEMA`, in the order of the rows; `rows` were read
    (flat ones), and `dropped` of them are no candidates."""

    candidates: pa.Table
    rows: int
    dropped: dict[Reason, int]


def find_candidates(part: Part, selection: Selection, options: Mapping[str, str]) -> Found:
    """Called in a process that may die of the file.

    Raises InputError where a column that the selection needs is not there, or is of another type.
    """
    try:
        finder = _Finder(FlatPart(part, options), selection)
        return finder.found()
    except ShardError as error:
        raise InputError(f"{part.url}: where: {error}") from None
    except NoColumn as error:
        raise InputError(f"{part.url}: {error}") from None


class _Finder:
    """What one part has for one selection."""

    def __init__(self, part: FlatPart, selection: Selection) -> None:
        self._part = part
        self._selection = selection
        self._where = None if selection.where is None else where_of(selection.where)
        if self._where is not None:
            self._where.check(part.schema)
        self._ranking = Ranking(selection, part.schema, part.prefix)
        self._prompts = prompts_of(part, is_needed=_needs_prompt(selection))
        self._responses = responses_of(part)
        self._stored = StoredPairs(part, selection.columns) if selection.lays_out else None
        self._dropped = dict.fromkeys(Reason, 0)

    def found(self) -> Found:
        tables, rows = [], 0
        for group in self._part.groups(self._columns()):
            tables.append(self._slim(group))
            rows += group.table.num_rows
        candidates = pa.concat_tables(tables) if tables else pa.table({})
        return Found(candidates, rows, {why: n for why, n in self._dropped.items() if n})

    def _columns(self) -> set[str]:
        """All that decides; the other columns are not read in this pass."""
        selection, prefix = self._selection, self._part.prefix
        needed = {name for name in selection.group_by if name != PROMPT}
        if selection.above_margin is not None:
            needed.add(f"{prefix}margin")
        if selection.top_percent:
            needed.add(selection.category)
        for name in sorted(needed):
            require(self._part.schema.names, name)
        needed |= {self._part.error_column, *self._ranking.columns}
        needed |= {*self._prompts.columns, *self._responses.columns}
        if self._where is not None:
            needed |= {*self._where.columns}
        if selection.pairs:
            fields = {self._part.column_of(field) for field in SIDE_FIELDS} - {None}
            needed |= {f"{prefix}num_tokens", *map(str, fields)}
        if self._stored is not None:
            needed |= {*self._stored.columns}
        return needed

    def _slim(self, group: FlatRows) -> pa.Table:
        value = self._ranking.values(group.table)
        kept = np.flatnonzero(self._kept(group, value))
        table, selection = group.table.take(pa.array(kept)), self._selection
        prompts = self._prompts.texts(table)
        prompt, responses = digests(prompts), self._responses.texts(table)
        text, grp = digests(responses), prompt
        if selection.group_by not in ((), (PROMPT,)):
            names = selection.group_by
            keys = [prompts if name == PROMPT else texts_of(table[name]) for name in names]
            grp = digests(joined_texts(keys))
        category = pa.nulls(len(kept), pa.string())
        if selection.top_percent:
            category = texts_of(table[selection.category])
        is_no_text = pc.is_null(responses).to_numpy(zero_copy_only=False) | (not selection.pairs)
        columns = [
            pa.array(group.rows[kept].astype(np.int32)),
            pa.array(group.slots[kept].astype(np.int32)),
            pa.array(grp[:, 0]),
            pa.array(grp[:, 1]),
            pa.array(prompt[:, 1]),
            category,
            pa.array(value[kept]),
            pa.array(tie_of(prompt, text)),
            pa.array(text[:, 1], mask=is_no_text),
            self._tokens(table),
        ]
        return pa.table(columns, schema=_SCHEMA)

    def _kept(self, group: FlatRows, value: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """bool[n]: the rows that are candidates; the others are counted."""
        table, error = group.table, self._part.error_column
        kept = np.isfinite(value)
        if error in table.column_names:
            # In a list, the error is of one of the responses: that one has no score.
            kept &= (group.slots >= 0) | pc.is_null(table[error]).to_numpy()
        self._dropped[Reason.MARKED] += int((~kept).sum())
        if self._where is not None:
            matches = np.zeros(len(kept), dtype=bool)
            matches[self._where.matches(table)] = True
            self._dropped[Reason.WHERE] += int((kept & ~matches).sum())
            kept &= matches
        if (least := self._selection.above_margin) is not None:
            above = numbers_of(table[f"{self._part.prefix}margin"]) > least
            self._dropped[Reason.MARGIN] += int((kept & ~above).sum())
            kept &= above
        if self._selection.pairs:
            sides = sides_of(self._part, table.filter(pa.array(kept)))
            fit = np.zeros(len(kept), dtype=bool)
            fit[kept] = fits(sides, self._selection.columns)
            self._dropped[Reason.COLUMNS] += int((kept & ~fit).sum())
            kept = fit
        if self._stored is not None:
            reasons = self._stored.reasons(table.filter(pa.array(kept)))
            for reason in filter(None, reasons):
                self._dropped[reason] += 1
            kept[kept] = [reason is None for reason in reasons]
        return kept

    def _tokens(self, table: pa.Table) -> pa.Array:
        name = f"{self._part.prefix}num_tokens"
        if self._selection.pairs and name in table.column_names:
            return table[name].cast(pa.int32()).combine_chunks()
        return pa.nulls(table.num_rows, pa.int32())


def _needs_prompt(selection: Selection) -> bool:
    return PROMPT in selection.group_by or bool(selection.splits or selection.pairs)
