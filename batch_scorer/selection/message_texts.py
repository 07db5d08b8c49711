"""Texts that stand for messages, so that equal messages have equal texts: in Arrow where messages
have a role and a text alone, as nearly all do, and in Python for the others.

Both make the same text of the same messages, so that rows of different files are put together.
Python takes 5 to 30 us a row for what Arrow does in 1 to 4.

Legend: R rows, M messages of all rows end to end.
"""

import json
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MessageColumn:
    """A column of R lists of messages. int64[R] `lengths` (0 for null) and `starts`, among the M
    messages; string[M] `pieces`, each a message with the lengths of its parts, and `contents`;
    bool[M] `is_user` and `is_plain`, whether it has a role and a text alone: others have no piece.
    """

    lists: pa.ChunkedArray
    lengths: IntArray
    starts: IntArray
    pieces: pa.Array
    contents: pa.Array
    is_user: npt.NDArray[np.bool_]
    is_plain: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Self | None:
        """None where the column's type is none of messages with a role and a text."""
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            return None
        kind = column.type.value_type
        names = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if any(names.count(name) != 1 for name in ("role", "content")):
            return None
        if not all(pa.types.is_string(kind.field(name).type) for name in ("role", "content")):
            return None
        lengths = pc.if_else(pc.is_valid(column), pc.list_value_length(column), 0)
        lengths = lengths.to_numpy().astype(np.int64)
        messages = pc.list_flatten(column)
        if isinstance(messages, pa.ChunkedArray):
            messages = messages.combine_chunks()
        # Of the message itself too: under a null message, its fields are null.
        parts = dict(zip(names, messages.flatten(), strict=True))
        role, content = parts.pop("role"), parts.pop("content")
        is_plain = pc.and_(pc.is_valid(role), pc.is_valid(content))
        for other in parts.values():
            is_plain = pc.and_(is_plain, pc.is_null(other))
        return cls(
            column,
            lengths,
            np.cumsum(lengths) - lengths,
            pc.binary_join_element_wise(_measured(role), _measured(content), ""),
            content,
            pc.fill_null(pc.equal(role, "user"), False).to_numpy(zero_copy_only=False),
            is_plain.to_numpy(zero_copy_only=False),
        )

    def are_plain(self) -> npt.NDArray[np.bool_]:
        """bool[R]: whether all of a row's messages are."""
        plain: npt.NDArray[np.bool_] = self._strange_before(self.lengths) == 0
        return plain

    def texts(self, counts: IntArray) -> pa.Array:
        """string[R]: the text of the first so many messages of each row, int64[R]; null where the
        list is null."""
        in_arrow = (counts > 0) & (self._strange_before(counts) == 0)
        taken = np.where(in_arrow, counts, 0)
        rows = np.repeat(np.arange(len(taken)), taken)
        places = self.starts[rows] + np.arange(len(rows)) - (np.cumsum(taken) - taken)[rows]
        offsets = np.concatenate([[0], np.cumsum(taken)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(offsets, self.pieces.take(pa.array(places)))
        texts = pc.binary_join(lists, "")
        alone = in_arrow & (counts == 1)
        alone[alone] = self.is_user[self.starts[alone]]
        if alone.any():
            only = self.contents.take(pa.array(self.starts, mask=~alone))
            texts = pc.if_else(pa.array(alone), only, texts)
        others = np.flatnonzero(~in_arrow)
        if not len(others):
            return texts
        values = self.lists.take(pa.array(others)).to_pylist()
        made = [
            text_of(None if value is None else value[:count])
            for value, count in zip(values, counts[others].tolist(), strict=True)
        ]
        return pc.replace_with_mask(texts, pa.array(~in_arrow), pa.array(made, pa.string()))

    def _strange_before(self, counts: IntArray) -> IntArray:
        """int64[R]: how many of a row's first so many messages have more than a role and a text."""
        before = np.concatenate([[0], np.cumsum(~self.is_plain)])
        found: IntArray = before[self.starts + counts] - before[self.starts]
        return found


def shared_counts(chosen: MessageColumn, rejected: MessageColumn) -> IntArray:
    """int64[R]: how many messages the lists of both columns begin with."""
    counts = np.zeros(len(chosen.lengths), np.int64)
    are_plain = chosen.are_plain() & rejected.are_plain()
    shorter = np.minimum(chosen.lengths, rejected.lengths)
    alike = np.flatnonzero(are_plain & (shorter > 0))
    while len(alike):
        place = counts[alike]
        ours = chosen.pieces.take(pa.array(chosen.starts[alike] + place))
        theirs = rejected.pieces.take(pa.array(rejected.starts[alike] + place))
        alike = alike[pc.equal(ours, theirs).to_numpy(zero_copy_only=False)]
        counts[alike] += 1
        alike = alike[counts[alike] < shorter[alike]]
    others = np.flatnonzero(~are_plain)
    if len(others):
        taken = pa.array(others)
        sides = (column.lists.take(taken).to_pylist() for column in (chosen, rejected))
        counts[others] = [len(shared(*both)) for both in zip(*sides, strict=True)]
    return counts


def shared(chosen: Any, rejected: Any) -> list[Any]:
    """The messages that both begin with; a null key is an absent one."""
    found = []
    for ours, theirs in zip(chosen or [], rejected or [], strict=False):
        if _without_nulls(ours) != _without_nulls(theirs):
            break
        found.append(ours)
    return found


def text_of(value: Any) -> str | None:
    """The text of any value. One message of a user is the same as its text; others are JSON."""
    if value is None or isinstance(value, str):
        return value
    match value := _without_nulls(value):
        case [{"role": "user", "content": str(text)} as message] if len(message) == 2:
            return text
        case [_, *_] if all(_is_plain(message) for message in value):
            return "".join(
                f"{len(part.encode())}:{part}"
                for message in value
                for part in (message["role"], message["content"])
            )
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _is_plain(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return len(message) == 2
    return False


def _measured(part: pa.Array) -> pa.Array:
    """string[M]: each text after its bytes and a colon, so that no two lists of texts are alike
    once they are joined."""
    return pc.binary_join_element_wise(pc.binary_length(part).cast(pa.string()), part, ":")


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {k: _without_nulls(v) for k, v in value.items() if v is not None}
        case list():
            return [_without_nulls(each) for each in value]
    return value
