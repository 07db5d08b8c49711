"""A raw row as the sequences that its model has to see, by the gate's own short code.

It says again, on plain values and one row at a time, what docs/formats.md says of each layout.
Nothing of it is shared with `formats.parse`, which it checks.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_scorer.formats.kinds import KINDS, role_alias
from batch_scorer.parity.raw_rows import RawRow
from batch_scorer.records import Conversation, Format, Layout, Message, SequenceInput, TextStyle


@dataclass(frozen=True, slots=True)
class RawSequence:
    """One sequence of a row.

    `content` is a conversation to render, rendered text, or token ids; `arguments` are those of the
    row for the chat template. `steps` are a process reward model's, where the row lists them: the
    last message then has no content. `unmasked` are token ids before the mask was applied. `beside`
    is the row's reference or principle, where the model reads one; `prompt` what rendered text or
    ids begin with where it is in a column of its own.
    """

    content: SequenceInput
    arguments: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[str, ...] | None = None
    unmasked: list[int] | None = None
    beside: str | None = None
    prompt: str | list[int] | None = None


def raw_sequences(row: RawRow, layout: Layout) -> list[RawSequence | None]:
    """The row's sequences in the order of the format's fields; None for one that is not there.

    Raises LookupError, TypeError, ValueError or SyntaxError where the row is not what its layout
    says.
    """
    kind = KINDS[layout.format]
    values: dict[str, Any] = {name: row.get(column) for name, column in layout.columns.items()}
    for name, column in layout.columns.items():
        if column in layout.encoded:
            values[name] = _decoded(values[name])
    prompt = _prompt(values, layout)
    found: list[RawSequence | None] = []
    for side in kind.responses:
        answers = values[side] if kind.is_group else [values[side]]
        mask = values.get("attention_mask" if side == "token_ids" else f"attention_mask_{side}")
        masks = (mask if kind.is_group else [mask]) if mask else [None] * len(answers)
        for answer, flags in zip(answers, masks, strict=True):
            found.append(_sequence(layout, values, prompt, answer, flags))
    return found


def _sequence(
    layout: Layout,
    values: Mapping[str, Any],
    prompt: Any,
    answer: Any,
    mask: Sequence[int] | None,
) -> RawSequence | None:
    if not answer or ("prompt" in layout.columns and not prompt):
        return None
    if _is_ids(answer):
        before = prompt or []
        asked = values.get("attention_mask_prompt")
        ids = [*before, *answer]
        if mask is None and asked is None:
            return RawSequence(ids, prompt=prompt)
        flags = [*(asked or [1] * len(before)), *(mask or [1] * len(answer))]
        kept = [token for token, flag in zip(ids, flags, strict=True) if flag]
        shown = [token for token, flag in zip(before, flags, strict=False) if flag]
        return RawSequence(kept, unmasked=ids, prompt=shown)
    if isinstance(answer, str) and layout.text_style is TextStyle.RENDERED:
        return RawSequence(f"{prompt or ''}{answer}", prompt=prompt)
    before = [] if prompt is None else _turns(prompt, "user", layout)
    if layout.format is Format.STEPS:
        last: Message = {"role": "assistant", "content": ""}
        conversation = _in_context(values, [*before, last])
        return RawSequence(conversation, _arguments(values), _steps(answer), beside=_beside(values))
    if isinstance(answer, str) and layout.prompt_inside:
        answer = answer.lstrip().removeprefix(prompt.strip()).lstrip()
    after = _turns(answer, "assistant", layout, is_apart=prompt is not None)
    conversation = _in_context(values, [*before, *after])
    return RawSequence(conversation, _arguments(values), beside=_beside(values))


def _prompt(values: Mapping[str, Any], layout: Layout) -> Any:
    """The prompt, with the `input` that continues an instruction on a line of its own."""
    prompt = values.get("prompt")
    if isinstance(prompt, dict) and isinstance(prompt.get("problem"), str):
        prompt = prompt["problem"]  # PRM800K's question
    more = values.get("input")
    if not (isinstance(more, str) and more.strip()):
        return prompt
    return f"{prompt}\n{more}" if prompt and prompt.strip() else more


def _steps(answer: Any) -> tuple[str, ...]:
    """The steps of a list, or those that PRM800K's labelers went on with."""
    if isinstance(answer, list):
        return tuple(answer)
    steps: list[str] = []
    for step in answer["steps"]:
        completions, chosen = step.get("completions") or [], step.get("chosen_completion")
        taken = completions[chosen] if chosen is not None else step.get("human_completion")
        steps.append((taken or completions[0])["text"])
    return tuple(steps)


def _turns(value: Any, role: str, layout: Layout, *, is_apart: bool = True) -> Conversation:
    """Text, a message or messages as messages. HH text: of a prompt (`role` user), of an answer to
    a prompt that is apart, or of a whole dialogue."""
    if isinstance(value, dict):
        return [_message(value)]
    if isinstance(value, list):
        return [_message(item) for item in value]
    if not isinstance(value, str):
        raise TypeError(f"neither text nor messages: {type(value).__name__}")
    if layout.text_style is not TextStyle.HH:
        return [{"role": role, "content": value}]
    if role == "assistant" and is_apart:
        return [{"role": role, "content": value.strip()}]
    pieces = re.split(r"\n\n(Human|Assistant):", value)[1:]
    turns: Conversation = [
        {"role": "user" if mark == "Human" else "assistant", "content": text.strip()}
        for mark, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns[:-1] if role == "user" else turns


def _message(value: Mapping[str, Any]) -> Message:
    """The message with all its fields; ShareGPT's names of the first two mean the usual ones."""
    if value.get("role") is not None or "from" not in value:
        return dict(value)
    role = value["from"]
    others = {name: item for name, item in value.items() if name not in ("from", "value", "role")}
    return {"role": role_alias(role), "content": value.get("value"), **others}


def _in_context(values: Mapping[str, Any], conversation: Conversation) -> Conversation:
    """The conversation behind the row's own system message and history, each of them once."""
    first, *rest = conversation
    has_system = role_alias(first["role"]) == "system"
    system, turns = ([first], rest) if has_system else ([], conversation)
    history: Conversation = []
    for item in values.get("history") or []:
        if isinstance(item, dict):
            history.append(_message(item))
        else:
            history.append({"role": "user", "content": item[0]})
            history.append({"role": "assistant", "content": item[1]})
    if turns[: len(history)] == history:
        history = []
    text = values.get("system")
    if not system and isinstance(text, str) and text.strip():
        system = [{"role": "system", "content": text}]
    return [*system, *history, *turns]


def _arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template's arguments that the row has of its own."""
    found: dict[str, Any] = dict(_decoded(values.get("template_arguments")) or {})
    for name in ("tools", "documents"):
        if items := _decoded(values.get(name)):
            found[name] = _decoded(items)
    return found


def _beside(values: Mapping[str, Any]) -> str | None:
    """The reference or the principle; turns are joined by line feeds, as their parts are."""
    value = values.get("reference") or values.get("principle")
    if value is None or isinstance(value, str):
        return value
    texts: list[str] = []
    for item in value if isinstance(value, list) else [value]:
        content = _message(item).get("content") or ""
        texts += [content] if isinstance(content, str) else [part["text"] for part in content]
    return "\n".join(texts)


def _decoded(value: Any) -> Any:
    """What text says that is JSON, or Python's spelling of the same, also in a list; other values
    as they are."""
    if isinstance(value, list):
        return [_decoded(item) if isinstance(item, str) else item for item in value]
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        return ast.literal_eval(value.strip())


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict | str)
