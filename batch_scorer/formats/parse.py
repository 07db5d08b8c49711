"""Raw rows to conversations, one pass over the columns and one over the rows.

Legend: R rows, S sequences (see `records`). A *part* is a column's value as a sequence can
use it: messages, text or token ids. prompt + response makes a sequence, whichever they are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats import hh
from batch_scorer.formats.kinds import KINDS, Part, item_type, message_keys, part_of, role_of
from batch_scorer.formats.shape import RowShape, shape_of
from batch_scorer.records import (
    Conversation,
    Layout,
    Message,
    ParsedRows,
    RowError,
    TextStyle,
)

# A SequenceInput or a RowError. Any, because all values of a column are of one kind and only
# the column's type decides which.
Value: TypeAlias = Any
ReadText: TypeAlias = Callable[[str], Value]

_MAX_TOKEN_ID = np.iinfo(np.int32).max


@dataclass(slots=True)
class _Responses:
    """A response column: row r has values[offsets[r]:offsets[r + 1]], or an error.

    `label` is the name of one value in errors.
    """

    label: str
    values: list[Value]
    offsets: list[int]
    row_errors: dict[int, RowError] = field(default_factory=dict)


def parse(table: pa.Table, layout: Layout) -> ParsedRows:
    """Cut the rows of `table` into sequences by `layout`.

    A pair gives chosen, then rejected; a best-of-n row all chosen, then all rejected. One
    value that cannot be read is an error in its place. A row is an error as a whole where its
    prompt cannot be read, it has no response, or none of its responses can be read.

    Sequences of a row share the message objects of its prompt: copy before changing one.
    Raises ShardError if a column is missing or of another type than its field can have.
    """
    kind = KINDS[layout.format]
    prompt_name = layout.columns.get("prompt")
    prompts: list[Value] = [None] * table.num_rows
    if prompt_name is not None:
        read = partial(_read, read_text=_prompt_reader(layout.text_style, prompt_name))
        prompts = _each(_column(table, prompt_name), prompt_name, read)
    responses = [_responses(table, layout, layout.columns[name]) for name in kind.responses]
    return _assemble(shape_of(layout.format), prompts, responses)


def _responses(table: pa.Table, layout: Layout, name: str) -> _Responses:
    column = _column(table, name)
    if not KINDS[layout.format].is_group:
        read = partial(_read, read_text=_response_reader(layout, name))
        return _Responses(name, _each(column, name, read), list(range(table.num_rows + 1)))
    label = f"an item of {name}"
    read = partial(_read, read_text=_response_reader(layout, label))
    values: list[Value] = []
    sizes: list[int] = []
    for chunk in column.chunks:
        if item_type(chunk.type) is not None:
            values.extend(read(chunk.flatten(), label))
        elif not pa.types.is_null(chunk.type):
            raise _wrong_type(name, chunk.type)
        sizes.extend(_sizes(chunk).tolist())
    null = RowError(RowReason.NULL_VALUE, f"{name} is null")
    nulls = np.flatnonzero(column.is_null().to_numpy())
    return _Responses(
        label, values, list(accumulate(sizes, initial=0)), dict.fromkeys(nulls.tolist(), null)
    )


def _assemble(shape: RowShape, prompts: list[Value], responses: list[_Responses]) -> ParsedRows:
    rows: list[list[list[Value]]] = []
    row_errors: dict[int, RowError] = {}
    for row, prompt in enumerate(prompts):
        found = _sides(row, prompt, responses)
        if isinstance(found, RowError):
            row_errors[row], found = found, []
        rows.append(found)
    sequences, row_offsets = shape.cut(rows)
    return ParsedRows(sequences, row_offsets, row_errors)


def _sides(row: int, prompt: Value, responses: list[_Responses]) -> list[list[Value]] | RowError:
    """The row's sequences by side, in the order of the format's fields."""
    if isinstance(prompt, RowError):
        return prompt
    if _ends_with_assistant(prompt):
        return _bad("the prompt ends with the assistant's message")
    sides: list[list[Value]] = []
    for column in responses:
        if row in column.row_errors:
            return column.row_errors[row]
        values = column.values[column.offsets[row] : column.offsets[row + 1]]
        sides.append([_join(prompt, value, column.label) for value in values])
    found = [value for side in sides for value in side]
    if not found:
        return RowError(RowReason.EMPTY, "the row holds no response")
    if all(isinstance(value, RowError) for value in found):
        return found[0]  # type: ignore[no-any-return]
    return sides


def _join(prompt: Value, response: Value, label: str) -> Value:
    """The sequence of a prompt (None: it is in the response) and a response."""
    if isinstance(response, RowError):
        return response
    if not _is_conversation(response):
        return response if prompt is None else prompt + response
    if prompt is None:
        return _judged(response, label)
    if response[0]["role"] != "assistant":
        return _bad(f"{label} does not begin with the assistant, though the prompt is apart")
    return _judged(prompt + response, label)


def _judged(conversation: Conversation, label: str) -> Conversation | RowError:
    """The conversation, if it is a prompt and an assistant's answer to score."""
    last = conversation[-1]
    if last["role"] != "assistant":
        return _bad(f"{label} does not end with the assistant's message")
    if not last["content"].strip():
        return RowError(RowReason.EMPTY, f"the last message of {label} is empty")
    asked = [message for message in conversation if message["role"] != "assistant"]
    if not asked:
        return _bad(f"{label} holds no prompt before the assistant's message")
    if not any(message["content"].strip() for message in asked):
        return RowError(RowReason.EMPTY, f"the prompt of {label} is empty")
    return conversation


def _is_conversation(value: Value) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict)


def _ends_with_assistant(prompt: Value) -> bool:
    return bool(prompt) and _is_conversation(prompt) and prompt[-1]["role"] == "assistant"


# Columns to values. Each reader takes one chunk, so that no column outgrows Arrow's offsets.


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise ShardError(ShardReason.WRONG_SCHEMA, f"no column {name!r}")
    return table.column(name)


def _each(
    column: pa.ChunkedArray, label: str, read: Callable[[pa.Array, str], list[Value]]
) -> list[Value]:
    return list(chain.from_iterable(read(chunk, label) for chunk in column.chunks))


def _read(array: pa.Array, label: str, read_text: ReadText) -> list[Value]:
    """One value per slot of `array`, by its type."""
    if pa.types.is_null(array.type):
        return [RowError(RowReason.NULL_VALUE, f"{label} is null")] * len(array)
    match part_of(array.type):
        case Part.TEXT:
            return _read_text(array, label, read_text)
        case Part.MESSAGE:
            messages, bad = _messages(array, label)
            return [bad.get(i) or [message] for i, message in enumerate(messages)]
        case Part.MESSAGES:
            return _slices(array, label, *_messages(array.flatten(), f"a message of {label}"))
        case Part.TOKEN_IDS:
            return _slices(array, label, *_token_ids(array.flatten(), label))
    raise _wrong_type(label, array.type)


def _read_text(array: pa.Array, label: str, read_text: ReadText) -> list[Value]:
    null = RowError(RowReason.NULL_VALUE, f"{label} is null")
    empty = RowError(RowReason.EMPTY, f"{label} is empty")
    return [
        null if text is None else empty if not text.strip() else read_text(text)
        for text in array.to_pylist()
    ]


def _slices(
    array: pa.Array, label: str, items: list[Any], bad: Mapping[int, RowError]
) -> list[Value]:
    """The flattened `items` as one list per slot; the first bad item makes its slot an error."""
    ends = np.cumsum(_sizes(array))
    found: list[Value] = [items[a:b] for a, b in pairwise(chain([0], ends.tolist()))]
    for item in sorted(bad, reverse=True):
        found[int(np.searchsorted(ends, item, side="right"))] = bad[item]
    nulls = array.is_null().to_pylist()
    for slot, value in enumerate(found):
        if nulls[slot]:
            found[slot] = RowError(RowReason.NULL_VALUE, f"{label} is null")
        elif value == []:
            found[slot] = RowError(RowReason.EMPTY, f"{label} is an empty list")
    return found


def _messages(array: pa.Array, label: str) -> tuple[list[Message], dict[int, RowError]]:
    """A struct array's messages; those in the second result must not be used."""
    keys = message_keys(array.type)
    assert keys is not None  # the caller chose by type
    roles, contents = (pc.struct_field(array, key).to_pylist() for key in keys)
    known = {role: role_of(role) for role in set(roles)}
    messages = [
        {"role": known[role], "content": content}
        for role, content in zip(roles, contents, strict=True)
    ]
    bad = {i: _bad(f"{label} has tool calls beside its text") for i in _with_tool_calls(array)}
    if "" in known.values() or None in contents:
        for i, (role, content) in enumerate(zip(roles, contents, strict=True)):
            if role is None or content is None:
                missing = keys[0] if role is None else keys[1]
                bad[i] = RowError(RowReason.NULL_VALUE, f"{label} has no {missing}")
            elif not known[role]:
                bad[i] = RowError(RowReason.UNKNOWN_ROLE, f"{label} has an unknown role")
    return messages, bad


def _with_tool_calls(array: pa.Array) -> Iterable[int]:
    """Messages with tool calls: their text alone would get a score for something else."""
    if array.type.get_field_index("tool_calls") < 0:
        return []
    calls = pc.struct_field(array, "tool_calls").to_pylist()
    return [i for i, call in enumerate(calls) if call]


def _token_ids(array: pa.Array, label: str) -> tuple[list[int], dict[int, RowError]]:
    wrong = pc.or_(pc.less(array, 0), pc.greater(array, _MAX_TOKEN_ID)).fill_null(True)
    error = RowError(RowReason.BAD_TOKEN_ID, f"{label} holds a null or impossible token id")
    at = np.flatnonzero(wrong.to_numpy(zero_copy_only=False))
    return array.to_pylist(), dict.fromkeys(at.tolist(), error)


def _sizes(array: pa.Array) -> npt.NDArray[np.int64]:
    """int64[len(array)], the items of each list; 0 for a null."""
    if pa.types.is_null(array.type):
        return np.zeros(len(array), dtype=np.int64)
    sizes = pc.fill_null(pc.list_value_length(array), 0)
    return sizes.to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]


# What a string becomes, by the text style and by what its column holds.


def _prompt_reader(style: TextStyle | None, label: str) -> ReadText:
    if style is TextStyle.RENDERED:
        return _as_is
    if style is TextStyle.HH:
        return partial(hh.cut_prompt, name=label)
    return partial(_plain_prompt, label=label)


def _response_reader(layout: Layout, label: str) -> ReadText:
    if layout.text_style is TextStyle.RENDERED:
        return _as_is
    if layout.text_style is not TextStyle.HH:
        return partial(_one_message, role="assistant")
    if "prompt" not in layout.columns:
        return partial(hh.cut, name=label)
    return partial(_hh_reply, label=label)


def _as_is(text: str) -> str:
    return text


def _one_message(text: str, role: str) -> Conversation:
    return [{"role": role, "content": text}]


def _plain_prompt(text: str, label: str) -> Conversation | RowError:
    """The user's message; HH text that the sampled rows did not show is not scored as one."""
    if hh.is_dialogue(text):
        return _bad(f"{label} is HH dialogue text in a file of plain text")
    return _one_message(text, "user")


def _hh_reply(text: str, label: str) -> Conversation | RowError:
    """The reply to an HH prompt: all of it, even where the model wrote turn marks itself."""
    if hh.is_dialogue(text):
        return _bad(f"{label} is a whole dialogue, though the prompt is apart")
    return _one_message(text.strip(), "assistant")


def _bad(detail: str) -> RowError:
    return RowError(RowReason.BAD_STRUCTURE, detail)


def _wrong_type(name: str, dtype: pa.DataType) -> ShardError:
    return ShardError(
        ShardReason.WRONG_SCHEMA, f"{name} is {dtype}: neither text, messages nor ids"
    )
