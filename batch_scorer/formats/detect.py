"""Which row kind a file holds, decided from its schema and a few of its rows."""

import difflib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.formats import hh
from batch_scorer.formats.kinds import (
    CONTEXT_NAMES,
    KINDS,
    KNOWN_NAMES,
    MESSAGE_KEYS,
    PROMPT_PARTS,
    Kind,
    Part,
    Prompt,
    is_text,
    item_type,
    part_of,
    response_part,
    role_of,
)
from batch_scorer.records import Format, Layout, TextStyle

_MAX_COLUMNS_LISTED = 40


class _Undecided(Exception):
    """What is unclear, and what to pass; `detect` adds the columns."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")


def detect(
    schema: pa.Schema,
    sample: pa.Table,
    *,
    format: Format | None,
    columns: Mapping[str, str],
    text_style: TextStyle | None,
) -> Layout:
    """The layout of a file with `schema`; `sample` is its first rows, or none.

    `format`, `columns` (field → column name; an empty name: the field is not used) and
    `text_style` are what is known; the rest is found as follows.

    1. Columns go to fields by known names, and only where their Arrow type fits.
    2. chosen and rejected, or responses, or a prompt and a response come before messages
       alone, and these before text or token ids alone. Two kinds of one rank are ambiguous.
    3. The prompt is inside the responses, and its column is left out, where most sampled
       responses hold a dialogue: messages that begin with another role than the assistant,
       HH text that begins with Human:, rendered text that contains the prompt, ids that begin
       with the prompt's. Rows that differ are marked by `parse`. Without evidence, a prompt
       of text is taken to be inside messages, any other prompt to be apart.
    4. Strings are HH dialogue where all that are sampled begin with the HH mark; else plain
       next to a prompt, rendered in a text column alone, and an error elsewhere.

    Raises ShardError(WRONG_SCHEMA) where this gives no or more than one answer. The message
    lists the columns and what to pass.
    """
    try:
        _check_named(schema, columns, format)
        chosen, hits = _choose_kind(schema, columns, format)
        return _settle(chosen, hits, schema, sample, columns, text_style)
    except _Undecided as error:
        listed = [f"{field.name}: {field.type}" for field in schema][:_MAX_COLUMNS_LISTED]
        if more := len(schema) - len(listed):
            listed.append(f"and {more} more")
        raise ShardError(
            ShardReason.WRONG_SCHEMA, f"{error}. Columns: {', '.join(listed) or 'none'}"
        ) from None


def describe(layout: Layout, schema: pa.Schema | None = None) -> str:
    """What was detected, in a line; `schema` distinguishes messages from token ids in a pair or
    group."""
    kind = KINDS[layout.format]
    names = [layout.columns[field] for field in kind.responses]
    if layout.text_style is not None:
        what = {
            TextStyle.PLAIN: "plain text",
            TextStyle.HH: "HH dialogue text",
            TextStyle.RENDERED: "rendered text",
        }[layout.text_style]
    elif layout.format is Format.TOKEN_IDS or (
        schema and response_part(kind, schema.field(names[0]).type) is Part.TOKEN_IDS
    ):
        what = "token ids"
    else:
        what = "messages"
    where = f"{what} in {', '.join(names)}"
    if kind.prompt is not Prompt.NEVER:
        prompt = layout.columns.get("prompt")
        where += f"; prompt in {prompt}" if prompt else "; prompt inside"
    return f"{kind.noun} ({where})"


def columns_needed(layout: Layout) -> list[str]:
    """The columns that `parse` reads, each once."""
    return list(dict.fromkeys(layout.columns.values()))


# Columns to fields.


def _choose_kind(
    schema: pa.Schema, columns: Mapping[str, str], format: Format | None
) -> tuple[Format, dict[str, list[str]]]:
    kinds = {one: kind for one, kind in KINDS.items() if format in (None, one)}
    found = {one: hits for one, kind in kinds.items() if (hits := _match(kind, schema, columns))}
    if not found:
        needed = "; ".join(f"{one} ({', '.join(kind.fields)})" for one, kind in kinds.items())
        raise _Undecided(f"no columns fit {needed}", "name them: --column field=column")
    rank = min(KINDS[one].rank for one in found)
    best = [one for one in found if KINDS[one].rank == rank]
    if len(best) > 1:
        choices = ", ".join(f"{one} ({', '.join(found[one])})" for one in best)
        raise _Undecided(f"the rows could be any of {choices}", f"pass e.g. --format {best[0]}")
    return best[0], found[best[0]]


def _match(kind: Kind, schema: pa.Schema, columns: Mapping[str, str]) -> dict[str, list[str]]:
    """Field → the columns that can be it, best first; empty where a required field has none."""
    if any(field not in kind.fields for field in columns if field not in CONTEXT_NAMES):
        return {}
    types = [(f.name, f.type) for f in schema if schema.get_field_index(f.name) >= 0]
    fitting = {
        name: part for name, dtype in types if (part := response_part(kind, dtype)) in kind.parts
    }
    hits = {field: _named(field, fitting, columns) for field in kind.responses}
    parts = {fitting[names[0]] for names in hits.values() if names}
    if not all(hits.values()) or len(parts) != 1:
        return {}
    if kind.prompt is Prompt.NEVER:
        return hits
    used = {names[0] for names in hits.values()}
    wanted = PROMPT_PARTS[parts.pop()]
    fitting = {
        name: part
        for name, dtype in types
        if name not in used and (part := part_of(dtype)) in wanted
    }
    hits["prompt"] = _named("prompt", fitting, columns)
    is_missing = not hits["prompt"] and (kind.prompt is Prompt.REQUIRED or columns.get("prompt"))
    return {} if is_missing else hits


def _named(field: str, fitting: Mapping[str, Part], columns: Mapping[str, str]) -> list[str]:
    if field in columns:
        return [columns[field]] if columns[field] in fitting else []
    for parts, names in KNOWN_NAMES[field]:
        if known := [name for name in names if fitting.get(name) in parts]:
            return known
    return []


# Style and prompt, from the sampled rows.


def _settle(
    format: Format,
    hits: Mapping[str, list[str]],
    schema: pa.Schema,
    sample: pa.Table,
    columns: Mapping[str, str],
    text_style: TextStyle | None,
) -> Layout:
    kind = KINDS[format]
    names = {field: _only(field, hits[field]) for field in kind.responses}
    part = response_part(kind, schema.field(names[kind.responses[0]]).type)
    prompt = next(iter(hits.get("prompt", [])), None)
    prompt_is_text = prompt is not None and is_text(schema.field(prompt).type)
    pairs = _pairs(kind, sample, prompt, list(names.values()))

    style = None
    if part is Part.TEXT:
        style = text_style or _seen_style("responses", [response for _, response in pairs])
    if prompt and "prompt" not in columns:
        inside = sum(_is_inside(part, style, *pair) for pair in pairs)
        by_type = part is Part.MESSAGES and prompt_is_text
        if 2 * inside > len(pairs) or (2 * inside == len(pairs) and by_type):
            prompt = None
    if prompt:
        names["prompt"] = _only("prompt", hits["prompt"])
        if prompt_is_text and style is None:
            style = text_style or _seen_style(prompt, [text for text, _ in pairs if text])
            style = style or TextStyle.PLAIN
    if part is Part.TEXT and style is None:
        style = _default_style(format, has_prompt=bool(prompt), is_empty=not pairs)

    text_prompt = prompt if prompt_is_text else None
    _check_parts(part, style, prompt, text_prompt)
    if part is not Part.TOKEN_IDS and style is not TextStyle.RENDERED:
        _check_context(sample, columns, names, text_prompt)
    return Layout(format, {field: names[field] for field in kind.fields if field in names}, style)


def _pairs(
    kind: Kind, sample: pa.Table, prompt: str | None, names: list[str]
) -> list[tuple[Any, Any]]:
    """(prompt, response) for every response sampled; the prompt may be None, the response not."""
    if not sample.num_rows:
        return []
    return [
        (row[prompt] if prompt else None, value)
        for row in sample.select([*names, prompt] if prompt else names).to_pylist()
        for name in names
        for value in ((row[name] or []) if kind.is_group else [row[name]])
        if value
    ]


def _is_inside(part: Part | None, style: TextStyle | None, prompt: Any, response: Any) -> bool:
    """Whether this response holds its prompt."""
    if part is Part.MESSAGES:
        first = response[0] or {}
        role = next((first[key] for key, _ in MESSAGE_KEYS if first.get(key)), None)
        return role is not None and role_of(role) != "assistant"
    if part is Part.TOKEN_IDS:
        return bool(prompt) and response[: len(prompt)] == prompt
    if style is TextStyle.HH:
        return hh.is_dialogue(response)
    if style is TextStyle.RENDERED:
        return isinstance(prompt, str) and prompt.strip() in response
    return False


def _seen_style(what: str, texts: list[str]) -> TextStyle | None:
    marked = sum(map(hh.is_dialogue, texts))
    if 0 < marked < len(texts):
        raise _Undecided(
            f"{marked} of {len(texts)} sampled texts in {what} begin with Human:",
            "pass --text-style hh or --text-style plain",
        )
    return TextStyle.HH if marked else None


def _default_style(format: Format, *, has_prompt: bool, is_empty: bool) -> TextStyle:
    if has_prompt:
        return TextStyle.PLAIN
    if format is Format.TEXT:
        return TextStyle.RENDERED
    if is_empty:
        # Nothing to judge by; a row that is no HH dialogue will be marked, not mis-scored.
        return TextStyle.HH
    raise _Undecided(
        "the strings to score have neither a prompt beside them nor HH marks",
        "pass --text-style rendered (a chat template was applied) or --text-style hh, "
        "or name the prompt: --column prompt=column",
    )


def _check_parts(
    part: Part | None, style: TextStyle | None, prompt: str | None, text_prompt: str | None
) -> None:
    """Raise where prompt and response do not make a sequence."""
    if prompt is None and (part is Part.MESSAGE or style is TextStyle.PLAIN):
        raise _Undecided("a response has no prompt beside it", "pass --column prompt=column")
    if prompt is None or style in (None, TextStyle.PLAIN):
        return
    if text_prompt is None or (style is TextStyle.RENDERED and part is not Part.TEXT):
        raise _Undecided(
            f"text style {style} does not fit messages",
            "leave out --text-style, or the prompt: --column prompt=",
        )


def _check_context(
    sample: pa.Table,
    columns: Mapping[str, str],
    names: Mapping[str, str],
    text_prompt: str | None,
) -> None:
    """Raise where a part of the conversation would be left out."""
    for name in CONTEXT_NAMES:
        if name in names.values() or name in columns or sample.schema.get_field_index(name) < 0:
            continue
        # An input belongs to an instruction of text; one that the user named is whole.
        if name == "input" and (text_prompt is None or "prompt" in columns):
            continue
        if any(sample.column(name).to_pylist()):
            raise _Undecided(
                f"column {name} looks like a part of the conversation that would not be scored",
                f"write it into the prompt, or pass --column {name}= to score without it",
            )


def _check_named(schema: pa.Schema, columns: Mapping[str, str], format: Format | None) -> None:
    kinds = [KINDS[format]] if format else KINDS.values()
    fields = list(dict.fromkeys(field for kind in kinds for field in kind.fields))
    for field, column in columns.items():
        if field not in fields and (column or field not in CONTEXT_NAMES):
            known = f"format {format} has" if format else "there are"
            raise _Undecided(f"no field {field}: {known} {', '.join(fields)}", _hint(field, fields))
        if not column:
            continue
        if schema.get_field_index(column) < 0:
            raise _Undecided(f"no one column {column} for {field}", _hint(column, schema.names))
        dtype = schema.field(column).type
        if not (part_of(dtype) or part_of(item_type(dtype) or pa.null())):
            raise _Undecided(
                f"column {column}, named for {field}, is {dtype}",
                "name one of text, messages or token ids, or lists of these",
            )


def _only(field: str, hits: list[str]) -> str:
    if len(hits) > 1:
        what = f"{' and '.join(hits)} could both be the {field}"
        raise _Undecided(what, f"pass e.g. --column {field}={hits[0]}")
    return hits[0]


def _hint(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else "check the spelling"
