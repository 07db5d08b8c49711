"""Raw rows to conversations, one pass over the columns and one over the rows.

Legend: R rows, S sequences (see `records`). A *part* is a column's value as a sequence can
use it: messages, text, token ids or steps. prompt + response makes a sequence, whichever they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats import hh
from batch_scorer.formats.context import Context, contexts, texts_beside
from batch_scorer.formats.detect import columns_needed
from batch_scorer.formats.encoded import decoded
from batch_scorer.formats.kinds import KINDS, Part, is_assistant, mask_field
from batch_scorer.formats.messages import asked, bad, judged, message_of, messages_of
from batch_scorer.formats.repeated import Needed, lacking, needed_of
from batch_scorer.formats.shape import shape_of
from batch_scorer.formats.steps import problem_of, steps_of
from batch_scorer.formats.tokens import ids_of, without_padding
from batch_scorer.formats.values import Columns
from batch_scorer.records import Conversation, Format, Layout, ParsedRows, RowError, TextStyle

# A SequenceInput, a tuple of steps or a RowError. Any, because the columns of a file hold one kind
# of them, and a row that differs is found where it is joined.
Value: TypeAlias = Any
ReadText: TypeAlias = Callable[[str], Value]


@dataclass(slots=True)
class _Responses:
    """A response column: row r has values[offsets[r]:offsets[r + 1]], or an error.

    `label` is the name of one value in errors.
    """

    label: str
    values: list[Value]
    offsets: list[int]
    row_errors: dict[int, RowError] = field(default_factory=dict)


def parse(columns: Columns, layout: Layout) -> ParsedRows:
    """Cut the rows of these columns into sequences by `layout`.

    A pair gives chosen, then rejected; a best-of-n row all chosen, then all rejected. One
    value that cannot be read is an error in its place. A row is an error as a whole where its
    prompt or its context cannot be read, it has no response, or none of its responses can be read.

    Sequences of a row share the message objects of its prompt: copy before changing one.
    Raises ShardError if a column is missing.
    """
    kind = KINDS[layout.format]
    for name in columns_needed(layout):
        if name not in columns:
            raise ShardError(ShardReason.WRONG_SCHEMA, f"no column {name!r}")
    num_rows = len(columns[layout.columns[kind.responses[0]]])
    prompts: list[Value] = [None] * num_rows
    given = prompts
    if "prompt" in layout.columns:
        name = layout.columns["prompt"]
        given = _prompts(columns, layout)
        read = partial(_read, label=name, read_text=_prompt_reader(layout.text_style, name))
        prompts = [read(value) for value in given]
    before = given if layout.prompt_inside else None
    responses = [_responses(columns, layout, field, before) for field in kind.responses]
    needed: dict[int, Needed] = {}
    if layout.repeated is not None:
        needed = needed_of(_values(columns, layout, layout.repeated))
    around, row_errors = contexts(columns, layout)
    beside, lacking_beside = texts_beside(columns, layout)
    row_errors = lacking_beside | row_errors
    rows: list[list[list[Value]]] = []
    for row, prompt in enumerate(prompts):
        found = row_errors.get(row) or _sides(
            row, prompt, responses, around.get(row), needed.get(row)
        )
        if isinstance(found, RowError):
            row_errors[row], found = found, []
        rows.append(found)
    sequences, row_offsets = shape_of(layout.format).cut(rows)
    parsed = ParsedRows(sequences, row_offsets, dict(sorted(row_errors.items())), beside=beside)
    parsed.fields = {name: list(columns[name]) for name in layout.fields}
    for row, prompt in enumerate(prompts):
        if prompt and not isinstance(prompt, RowError) and not _is_conversation(prompt):
            parsed.prompt_lengths[row] = len(prompt)
    for row, context in around.items():
        if context.arguments and row not in parsed.row_errors:
            parsed.arguments[row] = context.arguments
    if layout.format is Format.STEPS:
        for row, steps in enumerate(responses[0].values):
            if row not in parsed.row_errors:
                parsed.steps[int(parsed.row_offsets[row])] = steps
    return parsed


# Columns to values


def _column(columns: Columns, layout: Layout, field: str) -> list[Any]:
    """The values of a field: decoded, and token ids without their padding."""
    name = layout.columns[field]
    values = _values(columns, layout, name)
    if mask := layout.columns.get(mask_field(field)):
        pairs = zip(values, columns[mask], strict=True)
        values = [without_padding(ids, flags, name) for ids, flags in pairs]
    return values


def _values(columns: Columns, layout: Layout, name: str) -> list[Any]:
    if name in layout.encoded:
        return [decoded(value, name, layout.bounds) for value in columns[name]]
    return list(columns[name])


def _prompts(columns: Columns, layout: Layout) -> list[Any]:
    values = _column(columns, layout, "prompt")
    values = [value if (text := problem_of(value)) is None else text for value in values]
    if "input" not in layout.columns:
        return values
    more = columns[layout.columns["input"]]
    return [_continued(*pair) for pair in zip(values, more, strict=True)]


def _continued(prompt: Any, text: Any) -> Any:
    """An instruction and its input, as LLaMA-Factory and others join them."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return prompt
    if not isinstance(text, str):
        return bad("the input is no text")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return text
    return f"{prompt}\n{text}" if isinstance(prompt, str) else bad("the instruction is no text")


def _responses(
    columns: Columns, layout: Layout, field: str, before: list[Any] | None
) -> _Responses:
    """The values of a response field; each text begins with its row's in `before`, if there are
    any."""
    name = layout.columns[field]
    cells = _column(columns, layout, field)
    if layout.format is Format.STEPS:
        steps = [steps_of(value, name) for value in cells]
        return _Responses(name, steps, list(range(len(cells) + 1)))
    if not KINDS[layout.format].is_group:
        if before is not None:
            pairs = zip(before, cells, strict=True)
            cells = [_after(prompt, value, name) for prompt, value in pairs]
        read = partial(_read, label=name, read_text=_response_reader(layout, name))
        return _Responses(name, [read(value) for value in cells], list(range(len(cells) + 1)))
    label = f"an item of {name}"
    read = partial(_read, label=label, read_text=_response_reader(layout, label))
    values: list[Value] = []
    sizes: list[int] = []
    row_errors: dict[int, RowError] = {}
    for row, cell in enumerate(cells):
        if not isinstance(cell, list):
            row_errors[row] = _no_list(cell, name)
            cell = []
        if before is not None:
            cell = [_after(before[row], value, label) for value in cell]
        values.extend(map(read, cell))
        sizes.append(len(cell))
    return _Responses(label, values, list(accumulate(sizes, initial=0)), row_errors)


def _no_list(cell: Any, name: str) -> RowError:
    if isinstance(cell, RowError):
        return cell
    if cell is None:
        return RowError(RowReason.NULL_VALUE, f"{name} is null")
    return bad(f"{name} is no list")


def _after(prompt: Any, response: Any, label: str) -> Any:
    """What follows the prompt in a text that begins with it."""
    if not isinstance(prompt, str) or not isinstance(response, str) or not response.strip():
        return response
    start = prompt.strip()
    text = response.lstrip()
    if not text.startswith(start):
        return bad(f"{label} does not begin with its prompt, as others of its file do")
    return text[len(start) :].lstrip()


def _read(value: Any, label: str, read_text: ReadText) -> Value:
    """What a value is to a sequence."""
    if isinstance(value, str):
        if value.strip():
            return read_text(value)
        return RowError(RowReason.EMPTY, f"{label} is empty")
    if isinstance(value, list):
        if not value:
            return RowError(RowReason.EMPTY, f"{label} is an empty list")
        first = value[0]
        if first is None:
            first = next((item for item in value if item is not None), None)
        if isinstance(first, int):
            return ids_of(value, label)
        if isinstance(first, dict) or first is None:
            return messages_of(value, label)
    if isinstance(value, dict):
        message = message_of(value, label)
        return message if isinstance(message, RowError) else [message]
    if value is None:
        return RowError(RowReason.NULL_VALUE, f"{label} is null")
    if isinstance(value, RowError):
        return value
    return bad(f"{label} is neither text, messages nor token ids")


# Values to sequences


def _sides(
    row: int,
    prompt: Value,
    responses: list[_Responses],
    context: Context | None,
    needed: Needed | None,
) -> list[list[Value]] | RowError:
    """The row's sequences by side, in the order of the format's fields."""
    if context is not None and prompt is not None and _is_conversation(prompt):
        prompt = context.around(prompt)
        context = None
    if isinstance(prompt, RowError):
        return prompt
    if prompt and _is_conversation(prompt) and is_assistant(prompt[-1]["role"]):
        return bad("the prompt ends with the assistant's message")
    sides: list[list[Value]] = []
    for column in responses:
        if row in column.row_errors:
            return column.row_errors[row]
        values = column.values[column.offsets[row] : column.offsets[row + 1]]
        sides.append([_join(prompt, value, column.label, context, needed) for value in values])
    found = [value for side in sides for value in side]
    if not found:
        return RowError(RowReason.EMPTY, "the row holds no response")
    if all(isinstance(value, RowError) for value in found):
        return found[0]  # type: ignore[no-any-return]
    return sides


def _join(
    prompt: Value, response: Value, label: str, context: Context | None, needed: Needed | None
) -> Value:
    """The sequence of a prompt (None: it is in the response) and a response."""
    if isinstance(response, RowError):
        return response
    if isinstance(response, tuple):  # steps, which stand beside their message
        if not _is_conversation(prompt):
            return bad(f"the prompt of {label} is neither text nor messages")
        return asked(prompt, label) or [*prompt, {"role": "assistant", "content": ""}]
    if prompt is None:
        if context is not None and _is_conversation(response):
            response = context.around(response)
        if isinstance(response, RowError):
            return response
        if needed is not None and (error := lacking(needed, response, label)) is not None:
            return error
        return judged(response, label) if _is_conversation(response) else response
    if _kind(prompt) is not _kind(response):
        return bad(f"the prompt is {_kind(prompt)}, {label} is {_kind(response)}")
    if not _is_conversation(response):
        return prompt + response
    if not is_assistant(response[0]["role"]):
        return bad(f"{label} does not begin with the assistant, though the prompt is apart")
    return judged(prompt + response, label)


def _kind(value: Value) -> Part:
    if isinstance(value, str):
        return Part.TEXT
    return Part.MESSAGES if _is_conversation(value) else Part.TOKEN_IDS


def _is_conversation(value: Value) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict)


# What a string becomes, by the text style and by what its column holds.


def _prompt_reader(style: TextStyle | None, label: str) -> ReadText:
    match style:
        case TextStyle.RENDERED:
            return _as_is
        case TextStyle.HH:
            return partial(hh.cut_prompt, name=label)
        case TextStyle.PLAIN:
            return partial(_plain_prompt, label=label)
    return partial(_unexpected_text, label=label)


def _response_reader(layout: Layout, label: str) -> ReadText:
    match layout.text_style:
        case TextStyle.RENDERED:
            return _as_is
        case TextStyle.PLAIN:
            return partial(_one_message, role="assistant")
        case TextStyle.HH:
            if "prompt" not in layout.columns:
                return partial(hh.cut, name=label)
            return partial(_hh_reply, label=label)
    return partial(_unexpected_text, label=label)


def _as_is(text: str) -> str:
    return text


def _unexpected_text(text: str, label: str) -> RowError:
    return bad(f"{label} is text, unlike the rows that its file was judged by")


def _one_message(text: str, role: str) -> Conversation:
    return [{"role": role, "content": text}]


def _plain_prompt(text: str, label: str) -> Conversation | RowError:
    """The user's message; HH text that the sampled rows did not show is not scored as one."""
    if hh.is_dialogue(text):
        return bad(f"{label} is HH dialogue text in a file of plain text")
    return _one_message(text, "user")


def _hh_reply(text: str, label: str) -> Conversation | RowError:
    """The reply to an HH prompt: all of it, even where the model wrote turn marks itself."""
    if hh.is_dialogue(text):
        return bad(f"{label} is a whole dialogue, though the prompt is apart")
    return _one_message(text.strip(), "assistant")
