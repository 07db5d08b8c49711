"""What stands beside prompt and responses in a file: attention masks, the context, what a model
judges the answer by, and columns that are watched because nobody says what they mean."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from batch_scorer.errors import RowReason
from batch_scorer.formats.bounded import BOUND_REASONS
from batch_scorer.formats.context import READERS, Reader, read_beside
from batch_scorer.formats.held import Sample
from batch_scorer.formats.kinds import (
    BESIDE_NAMES,
    CONTEXT_NAMES,
    KINDS,
    MEDIA_NAMES,
    WATCHED_NAMES,
    mask_field,
    mask_names,
)
from batch_scorer.formats.tokens import look_padded, without_padding
from batch_scorer.formats.values import is_empty
from batch_scorer.formats.wanted import Undecided, Wanted, only
from batch_scorer.records import Layout, RowError, TextStyle

# Padding


def masks_of(fields: Mapping[str, str], sample: Sample, wanted: Wanted) -> dict[str, str]:
    """Field → column of the attention masks; raises where ids without one look padded."""
    masks = {}
    for field, name in fields.items():
        found = [wanted.columns[mask_field(field)]] if mask_field(field) in wanted.columns else []
        known = {*mask_names(field), "attention_mask"}
        if not found:
            found = [n for n in mask_names(field) if n in sample.held and n not in wanted.ignored]
        if found:
            masks[mask_field(field)] = found[0]
        elif not known & wanted.ignored and _looks_padded(sample.of(name)):
            raise Undecided(
                f"the token ids in {name} look padded, and no column says where",
                f"pass --column {mask_field(field)}=column, or --ignore-column attention_mask to "
                "score them as they are",
            )
    return masks


def _looks_padded(values: list[Any]) -> bool:
    lists = [value for value in values if isinstance(value, list) and value]
    if lists and isinstance(lists[0][0], list):
        lists = [item for value in lists for item in value if item]
    return look_padded(lists)


def without_masked(fields: Mapping[str, str], masks: Mapping[str, str], sample: Sample) -> Sample:
    """The sample with the token ids of these fields as they are scored."""
    values = dict(sample.values)
    for field, name in fields.items():
        if mask := masks.get(mask_field(field)):
            rows = zip(sample.of(name), sample.of(mask), strict=True)
            found = (without_padding(ids, flags, name) for ids, flags in rows)
            values[name] = [None if isinstance(ids, RowError) else ids for ids in found]
    return replace(sample, values=values)


# The context


def with_context(
    layout: Layout,
    sample: Sample,
    wanted: Wanted,
    prompt: str | None,
    *,
    is_dialogue: bool,
    is_plain: bool,
) -> Layout:
    """The layout with the fields around the conversation, and the columns that are watched.

    `prompt` is the column of the prompt, even where the responses hold it and it is not read.
    Raises Undecided where a sampled row holds something that would not be read.
    """
    columns = dict(layout.columns)
    fits: Mapping[str, bool] = {
        **dict.fromkeys(CONTEXT_NAMES, is_dialogue),
        "input": is_plain and not layout.prompt_inside,
        "history": is_dialogue and "prompt" in columns and layout.text_style is not TextStyle.HH,
    }
    for field, known in CONTEXT_NAMES.items():
        read = READERS.get(field, READERS["system"])  # an input is text, too
        if field in wanted.columns:
            columns[field] = _named_context(field, fits[field], sample, wanted, read)
        elif fits[field]:
            free = [
                name
                for name in known
                if name in sample.held
                and wanted.is_free(name, columns)
                and _unread(sample.of(name), name, read, wanted) is None
            ]
            if free:
                columns[field] = only(field, free)
    for field in BESIDE_NAMES:
        if field in wanted.columns:
            columns[field] = _named_context(field, is_dialogue, sample, wanted, read_beside)
        elif field == wanted.beside and is_dialogue:
            columns[field] = _column_beside(field, columns, sample, wanted)
        elif field == wanted.beside:
            _check_none_beside(field, columns, sample, wanted)
    masks = {mask_field(field) for field in (*KINDS[layout.format].fields,)}
    for field in wanted.columns:
        if field in masks and field not in columns:
            raise Undecided(
                f"column {wanted.columns[field]}, named for {field}, belongs to no token ids",
                f"leave out --column {field}=",
            )
    watched = []
    for name in (*WATCHED_NAMES, *sorted(MEDIA_NAMES)):
        if name not in sample.held or name == prompt or not wanted.is_free(name, columns):
            continue
        # An input belongs to an instruction of text; one that the user named is whole.
        is_whole = name == "input" and (not is_plain or "prompt" in wanted.columns)
        if name in MEDIA_NAMES or (is_dialogue and not is_whole):
            _check_unread(name, sample)
            watched.append(name)
    beside = {columns[field] for field in BESIDE_NAMES if field in columns}
    encoded = tuple(sorted({*layout.encoded, *(beside & sample.encoded)}))
    return replace(layout, columns=columns, watched=tuple(watched), encoded=encoded)


def _column_beside(field: str, used: Mapping[str, str], sample: Sample, wanted: Wanted) -> str:
    """The column of what the model judges the answer by. Raises Undecided where there is none."""
    free = [n for n in BESIDE_NAMES[field] if n in sample.held and wanted.is_free(n, used)]
    free = [n for n in free if _unread(sample.of(n), n, read_beside, wanted) is None]
    if not free:
        raise Undecided(
            f"the model judges an answer by a {field}, and no column holds one",
            f"pass --column {field}=column",
        )
    return only(field, free)


def _check_none_beside(field: str, used: Mapping[str, str], sample: Sample, wanted: Wanted) -> None:
    """Raise Undecided where rows that are scored as they are have it in a column of its own."""
    for name in BESIDE_NAMES[field]:
        if name in sample.held and wanted.is_free(name, used):
            raise Undecided(
                f"the model judges an answer by a {field}; these rows are scored as they are, so "
                f"column {name} would not be read",
                f"give conversations, or --ignore-column {name} if it stands in the rows already",
            )


def _named_context(field: str, fits: bool, sample: Sample, wanted: Wanted, read: Reader) -> str:
    name = wanted.columns[field]
    if not fits:
        raise Undecided(
            f"column {name}, named for {field}, has no place in these rows",
            f"leave out --column {field}={name}",
        )
    if (why := _unread(sample.of(name), name, read, wanted)) is not None:
        raise Undecided(f"column {name}, named for {field}: {why}", "name another column")
    return name


def _unread(values: list[Any], name: str, read: Reader, wanted: Wanted) -> str | None:
    """Why a value cannot be read, or None."""
    found = (read(value, name, wanted.bounds) for value in values if not is_empty(value))
    errors = (value for value in found if isinstance(value, RowError))
    is_of_row = BOUND_REASONS | {RowReason.EMPTY}  # and says nothing of the column
    return next((e.detail for e in errors if e.reason not in is_of_row), None)


def _check_unread(name: str, sample: Sample) -> None:
    for row, value in enumerate(sample.of(name)):
        if not is_empty(value):
            if name in MEDIA_NAMES:
                what, way = "holds media, and only text is scored", ""
            else:
                what = "looks like a part of the conversation that would not be scored"
                way = f"{WATCHED_NAMES[name]}, or "
            raise Undecided(
                f"column {name} {what} (row {row})",
                f"{way}pass --ignore-column {name} to score without it",
            )
