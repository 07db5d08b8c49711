"""Which row kind a file holds, decided from its schema and a few of its rows."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace

import pyarrow as pa

from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.formats.held import Held, Sample, look_at
from batch_scorer.formats.kinds import (
    BESIDE_NAMES,
    CONTEXT_NAMES,
    KINDS,
    KNOWN_NAMES,
    MEDIA_NAMES,
    PROMPT_PARTS,
    STEP_LABELS,
    WATCHED_NAMES,
    Kind,
    Part,
    Prompt,
    mask_field,
    mask_names,
)
from batch_scorer.formats.settle import settle
from batch_scorer.formats.values import Columns, is_list
from batch_scorer.formats.wanted import Undecided, Wanted
from batch_scorer.records import DEFAULT_BOUNDS, Format, Layout, ReadBounds, TextStyle

_MAX_COLUMNS_LISTED = 40


def detect(
    schema: pa.Schema,
    rows: Columns,
    *,
    format: Format | None,
    columns: Mapping[str, str],
    text_style: TextStyle | None,
    ignore: Collection[str] = (),
    beside: str | None = None,
    bounds: ReadBounds = DEFAULT_BOUNDS,
) -> Layout:
    """The layout of a file with `schema`; `rows` are the values of its first rows, or of none.

    `format`, `columns` (field → column name; an empty name: the field is not used) and
    `text_style` are what is known, columns in `ignore` are as if they were not there; the rest is
    found as follows. `beside` is a field that the model reads beside each conversation.
    The rows are read by `bounds`.

    1. Columns go to fields by known names, and only where they hold what fits (`held`).
    2. chosen and rejected, or responses, or a prompt and a response or steps come before messages
       alone, and these before text or token ids alone. Two kinds of one rank are ambiguous.
    3. The prompt is inside the responses, and its column is left out, where most sampled
       responses hold a dialogue: messages that begin with another role than the assistant,
       HH text that begins with Human:, rendered text that contains the prompt, ids that begin
       with the prompt's. Plain responses that mostly begin with their prompt lose it. Rows that
       differ are marked by `parse`. Without evidence, a prompt of text is taken to be inside
       messages, any other prompt to be apart.
    4. Strings are HH dialogue where all that are sampled begin with the HH mark, rendered where
       most begin with a control mark; else plain next to a prompt, rendered in a text column
       alone, and an error elsewhere.
    5. Columns around the conversation are fields where their meaning is agreed, and watched where
       it is not. The field `beside` has to be there.

    Raises ShardError(WRONG_SCHEMA) where this gives no or more than one answer, or where a column
    holds a part of the conversation that would not be read. The message lists the columns and what
    to pass.
    """
    try:
        sample = look_at(schema, rows, decode=text_style is None, bounds=bounds)
        wanted = Wanted(columns, text_style, frozenset(ignore), beside, bounds)
        _check_named(schema, sample, columns, format)
        chosen, hits = _choose_kind(sample, _has_labels(schema, sample), wanted, format)
        return replace(settle(chosen, hits, sample, wanted), bounds=bounds)
    except Undecided as error:
        listed = [f"{field.name}: {field.type}" for field in schema][:_MAX_COLUMNS_LISTED]
        if more := len(schema) - len(listed):
            listed.append(f"and {more} more")
        raise ShardError(
            ShardReason.WRONG_SCHEMA, f"{error}. Columns: {', '.join(listed) or 'none'}"
        ) from None


def columns_judged(schema: pa.Schema, columns: Mapping[str, str]) -> list[str]:
    """The columns whose values `detect` looks at; the others may hold what they like.

    `columns` are those that are named, by field.
    """
    known = {name for tiers in KNOWN_NAMES.values() for _, names in tiers for name in names}
    known |= {STEP_LABELS, *WATCHED_NAMES, *MEDIA_NAMES, *columns.values()}
    known |= {name for names in BESIDE_NAMES.values() for name in names}
    known |= {name for field in KNOWN_NAMES for name in mask_names(field)}
    return [name for name in schema.names if name in known and schema.get_field_index(name) >= 0]


def describe(layout: Layout, schema: pa.Schema | None = None) -> str:
    """What was detected, in a line; `schema` distinguishes messages from token ids in a pair or
    group."""
    kind = KINDS[layout.format]
    names = [layout.columns[field] for field in kind.responses]
    masks = [mask_field(field) for field in kind.fields]
    if layout.format is Format.STEPS:
        what = "steps"
    elif layout.text_style is not None and not set(names) & set(layout.encoded):
        what = {
            TextStyle.PLAIN: "plain text",
            TextStyle.HH: "HH dialogue text",
            TextStyle.RENDERED: "rendered text",
        }[layout.text_style]
    elif layout.format is Format.TOKEN_IDS or (schema and _has_ids(kind, schema, names[0])):
        what = "token ids"
    else:
        what = "messages" + (" in writing" if set(names) & set(layout.encoded) else "")
    parts = [f"{what} in {', '.join(names)}"]
    if kind.prompt is not Prompt.NEVER:
        prompt = layout.columns.get("prompt")
        inside = f"prompt inside, cut off by {prompt}" if layout.prompt_inside else "prompt inside"
        parts.append(f"prompt in {prompt}" if prompt and not layout.prompt_inside else inside)
    for field in (*CONTEXT_NAMES, *BESIDE_NAMES, *masks):
        if field in layout.columns:
            parts.append(f"{field.replace('_', ' ')} in {layout.columns[field]}")
    return f"{kind.noun} ({'; '.join(parts)})"


def columns_needed(layout: Layout) -> list[str]:
    """The columns that `parse` reads, each once."""
    beside = () if layout.repeated is None else (layout.repeated,)
    columns = (*layout.columns.values(), *beside, *layout.watched, *layout.fields)
    return list(dict.fromkeys(columns))


# Columns to fields.


def _choose_kind(
    sample: Sample, has_labels: bool, wanted: Wanted, format: Format | None
) -> tuple[Format, dict[str, list[str]]]:
    kinds = {one: kind for one, kind in KINDS.items() if format in (None, one)}
    held = {
        name: what
        for name, what in sample.held.items()
        if name not in wanted.ignored or name in wanted.columns.values()
    }
    found = {
        one: hits
        for one, kind in kinds.items()
        if (hits := _match(kind, held, has_labels, wanted.columns))
    }
    if not found:
        needed = "; ".join(f"{one} ({', '.join(kind.fields)})" for one, kind in kinds.items())
        advice = "name them, e.g. --column prompt=question --column response=answer"
        if has_labels and format is Format.ROLLOUT_GROUP:
            advice = (
                "completions beside a list of labels are the steps of one answer: leave out "
                "--format, or pass --column responses=completions where each is an answer"
            )
        raise Undecided(f"no columns fit {needed}", advice)
    rank = min(KINDS[one].rank for one in found)
    best = [one for one in found if KINDS[one].rank == rank]
    if len(best) > 1:
        choices = ", ".join(f"{one} ({', '.join(found[one])})" for one in best)
        raise Undecided(f"the rows could be any of {choices}", f"pass e.g. --format {best[0]}")
    return best[0], found[best[0]]


def _match(
    kind: Kind, held: Mapping[str, Held], has_labels: bool, columns: Mapping[str, str]
) -> dict[str, list[str]]:
    """Field → the columns that can be it, best first; empty where a required field has none."""
    if any(field not in _fields(kind) for field in columns):
        return {}
    fitting = {
        name: part
        for name, what in held.items()
        if (part := what.items if kind.is_group else what.whole) in kind.parts
    }
    # A list of labels says that completions are steps; without one they are several answers.
    barred = {"responses": has_labels, "steps": not has_labels}
    hits = {
        field: [
            name
            for name in _named(field, fitting, columns)
            if not (name == "completions" and barred.get(field) and field not in columns)
        ]
        for field in kind.responses
    }
    parts = {fitting[names[0]] for names in hits.values() if names}
    if not all(hits.values()) or len(parts) != 1:
        return {}
    if kind.prompt is Prompt.NEVER:
        return hits
    used = {names[0] for names in hits.values()}
    wanted = PROMPT_PARTS[parts.pop()]
    fitting = {
        name: what.whole for name, what in held.items() if name not in used and what.whole in wanted
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


def _fields(kind: Kind) -> list[str]:
    """What a column can be named for in rows of this kind."""
    return [*kind.fields, *CONTEXT_NAMES, *BESIDE_NAMES, *map(mask_field, kind.fields)]


def _has_labels(schema: pa.Schema, sample: Sample) -> bool:
    at = schema.get_field_index(STEP_LABELS)
    return at >= 0 and (
        is_list(schema.field(at).type)
        or any(isinstance(value, list) for value in sample.of(STEP_LABELS))
    )


def _has_ids(kind: Kind, schema: pa.Schema, name: str) -> bool:
    alone = pa.schema([schema.field(name)])
    held = look_at(alone, {}, decode=False, bounds=DEFAULT_BOUNDS).held[name]
    return (held.items if kind.is_group else held.whole) is Part.TOKEN_IDS


def _check_named(
    schema: pa.Schema, sample: Sample, columns: Mapping[str, str], format: Format | None
) -> None:
    kinds = [KINDS[format]] if format else KINDS.values()
    fields = list(dict.fromkeys(field for kind in kinds for field in kind.fields))
    allowed = list(dict.fromkeys(field for kind in kinds for field in _fields(kind)))
    for field, column in columns.items():
        if not column and (field not in fields or field in CONTEXT_NAMES):
            raise Undecided(
                f"no column is given for {field}",
                f"to score without such a column, name it: --ignore-column {field}",
            )
        if field not in allowed:
            known = f"format {format} has" if format else "there are"
            raise Undecided(
                f"no field {field}: {known} {', '.join(allowed)}", _hint(field, allowed)
            )
        if not column:
            continue
        if schema.get_field_index(column) < 0:
            raise Undecided(f"no one column {column} for {field}", _hint(column, schema.names))
        held = sample.held[column]
        if field in fields and not (held.whole or held.items):
            raise Undecided(
                f"column {column}, named for {field}, is {schema.field(column).type}",
                "name one of text, messages or token ids, or lists of these",
            )


def _hint(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else "check the spelling"
