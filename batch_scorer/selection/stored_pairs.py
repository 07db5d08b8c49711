"""Rows that are preference pairs as they are stored, in the columns that a trainer loads.

A row's two conversations are those that scoring reads. What both begin with is the prompt, and the
rest of each is its side.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer import formats
from batch_scorer.errors import ShardError
from batch_scorer.formats.kinds import is_assistant
from batch_scorer.records import Conversation, Format, Layout, layout_from_json
from batch_scorer.selection.flat import FlatPart
from batch_scorer.selection.layouts import Unfit, made_table, pair_in
from batch_scorer.selection.recipe import Columns, Reason
from batch_scorer.selection.texts import NoColumn
from batch_scorer.selection.values import side_names, side_scores

Made: TypeAlias = Mapping[str, Any]
"""One pair in a layout's columns."""

_SAMPLED_ROWS = 100


class StoredPairs:
    """The pairs of a part; its rows are cut as they were for scoring, or as scoring would.

    Raises NoColumn where they are no pairs.
    """

    def __init__(self, part: FlatPart, columns: Columns) -> None:
        self._part = part
        self._columns = columns

    @cached_property
    def columns(self) -> list[str]:
        """The columns that say what the pairs are."""
        return [] if self._layout is None else formats.columns_needed(self._layout)

    def reasons(self, rows: pa.Table) -> list[Reason | None]:
        """Why each row cannot be written; None: it can."""
        return [each if isinstance(each, Reason) else None for each in self._made(rows)]

    def table(self, rows: pa.Table) -> pa.Table:
        """The rows in the layout's columns, with what stands beside made pairs; null where it is
        not known. All can be written."""
        made = [each for each in self._made(rows) if not isinstance(each, Reason)]
        names, prefix = rows.column_names, self._part.prefix

        def column(name: str | None, kind: pa.DataType) -> Any:
            return rows[name].cast(kind) if name in names else pa.nulls(rows.num_rows, kind)

        scores = side_scores(names, prefix)
        chosen, rejected = (column(name, pa.float64()) for name in scores or (None, None))
        known = column(f"{prefix}margin", pa.float64())
        tokens = [
            column(next((name for name in each if name in names), None), pa.int32())
            for each in side_names("tokens", prefix)
        ]
        margin = known if scores is None else pc.subtract(chosen, rejected)
        source = column("source", pa.string())
        return made_table(made, self._columns, source, (chosen, rejected), margin, tokens)

    @cached_property
    def _layout(self) -> Layout | None:
        """None where the part has no rows, of which nothing is known."""
        if (stored := self._part.stored_layout) is not None:
            layout = layout_from_json(stored)
        else:
            names = formats.columns_judged(self._part.schema, {})
            head = next((group.table for group in self._part.groups(names)), None)
            if head is None or not head.num_rows:
                return None
            head = head.slice(0, _SAMPLED_ROWS)
            sampled, _ = formats.columns_of(head, formats.columns_judged(head.schema, {}))
            try:
                layout = formats.detect(
                    self._part.schema, sampled, format=None, columns={}, text_style=None
                )
            except ShardError as error:
                raise NoColumn(str(error)) from None
        if layout.format is not Format.PREFERENCE_PAIR:
            raise NoColumn(
                "columns: the rows are no pairs; name the rule by which to make them with pairs"
            )
        return layout

    def _made(self, rows: pa.Table) -> Sequence[Made | Reason]:
        if self._layout is None:
            return []
        values, _ = formats.columns_of(rows, self.columns)
        parsed = formats.parse(values, self._layout)
        made: list[Made | Reason] = []
        for row, start in enumerate(parsed.row_offsets[:-1].tolist()):
            sides = parsed.sequences[start : int(parsed.row_offsets[row + 1])]
            # Tools and documents are no messages: no layout has a place for them.
            is_whole = len(sides) == 2 and row not in parsed.arguments
            made.append(self._pair(*sides) if is_whole else Reason.COLUMNS)
        return made

    def _pair(self, chosen: Any, rejected: Any) -> Made | Reason:
        """Two sequences as the layout has them."""
        if not _is_conversation(chosen) or not _is_conversation(rejected):
            return Reason.COLUMNS  # cannot be read, or its turns are not known
        if chosen == rejected:
            return Reason.SAME_TEXT
        shared = _shared(chosen, rejected)
        sides = chosen[shared:], rejected[shared:]
        if not shared or any(not side or not is_assistant(side[0]["role"]) for side in sides):
            return Reason.COLUMNS  # they part elsewhere than at an answer
        try:
            return pair_in(self._columns, chosen[:shared], *sides)
        except Unfit:
            return Reason.COLUMNS


def _is_conversation(sequence: Any) -> bool:
    """Whether it is messages: not an error, rendered text or token ids."""
    return isinstance(sequence, list) and all(isinstance(each, dict) for each in sequence)


def _shared(chosen: Conversation, rejected: Conversation) -> int:
    """How many messages both begin with."""
    count = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
