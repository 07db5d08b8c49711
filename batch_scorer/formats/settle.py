"""The layout of a file whose columns are assigned: prompt, style and context, from sampled rows."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from batch_scorer.formats import hh
from batch_scorer.formats.context import READERS
from batch_scorer.formats.held import Sample
from batch_scorer.formats.kinds import (
    CONTEXT_NAMES,
    KINDS,
    MEDIA_NAMES,
    WATCHED_NAMES,
    Kind,
    Part,
    is_assistant,
    mask_field,
    mask_names,
    role_alias,
)
from batch_scorer.formats.tokens import look_padded, without_padding
from batch_scorer.formats.values import is_empty
from batch_scorer.records import Format, Layout, RowError, TextStyle

_CONTROL_MARK = re.compile(
    r"\s*(<\|[^|>\s]{1,40}\|>|<\uff5c[^\uff5c>]{1,40}\uff5c>|<s>|<bos>|<start_of_turn>|\[INST\])"
)
"""What begins text that went through a chat template."""

_NO_CHANCE = 12
"""Characters of a prompt that no answer holds unless it repeats the prompt."""


class Undecided(Exception):
    """What is unclear, and what to pass; `detect` adds the columns."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the settings say of the files: columns by field, how text is read, and the columns that
    are as if they were not there."""

    columns: Mapping[str, str]
    text_style: TextStyle | None
    ignored: frozenset[str]

    def is_free(self, name: str, used: Mapping[str, str]) -> bool:
        """Whether nobody has said yet what to do with a column."""
        return name not in used.values() and name not in self.ignored


def settle(format: Format, hits: Mapping[str, list[str]], sample: Sample, wanted: Wanted) -> Layout:
    """The layout of rows of this format; `hits` are the columns that can be each of its fields,
    best first.

    Raises Undecided.
    """
    kind = KINDS[format]
    names = {field: _only(field, hits[field]) for field in kind.responses}
    first = sample.held[names[kind.responses[0]]]
    part = first.items if kind.is_group else first.whole
    assert part is not None  # it was chosen for what it holds
    for name in (*names.values(), *hits.get("prompt", [])[:1]):
        if name in sample.unreadable:
            raise Undecided(
                f"the texts in {name} look like messages in JSON or Python's spelling, and most "
                "cannot be read as such",
                "write them as lists of messages, or pass --text-style plain to score them as they "
                "are",
            )
    prompt = next(iter(hits.get("prompt", [])), None)
    masks = {}
    if part is Part.TOKEN_IDS:
        fields = {**names, **({"prompt": prompt} if prompt else {})}
        masks = _masks(fields, sample, wanted)
        sample = _without_padding(fields, masks, sample)
    pairs = _pairs(kind, sample, prompt, list(names.values()))
    prompt_is_text = prompt is not None and sample.held[prompt].whole in (Part.TEXT, Part.PROBLEM)
    is_named = "prompt" in wanted.columns

    style = None
    if part is Part.TEXT:
        style = wanted.text_style or _seen_hh("responses", [text for _, text in pairs])
        if style is None and prompt_is_text:
            style = _seen_rendered(pairs)
    if prompt and not is_named:
        inside = sum(_is_inside(part, style, *pair) for pair in pairs)
        by_type = part is Part.MESSAGES and prompt_is_text
        if 2 * inside > len(pairs) or (2 * inside == len(pairs) and by_type):
            _check_system(prompt, names, pairs)
            prompt = None
    if prompt:
        names["prompt"] = _only("prompt", hits["prompt"])
        if prompt_is_text and style is None:
            texts = [text for text, _ in pairs if text]
            style = wanted.text_style or _seen_hh(prompt, texts)
            style = style or (TextStyle.RENDERED if _are_rendered(texts) else TextStyle.PLAIN)
    if part is Part.TEXT and style is None:
        style = _default_style(format, [text for _, text in pairs], has_prompt=bool(prompt))
    _check_parts(part, style, prompt, prompt_is_text=prompt_is_text)
    is_plain = bool(prompt) and prompt_is_text and style is TextStyle.PLAIN
    inside = 0
    if is_plain and part is Part.TEXT and not is_named:
        inside = sum(_begins(*pair) for pair in pairs)
        if 2 * inside <= len(pairs) < 2 * sum(_repeats(*pair) for pair in pairs):
            raise Undecided(
                f"most responses hold the text of {prompt}, though not at their beginning",
                f"pass --column prompt={prompt} to put it before them even so, or --text-style "
                "rendered where a chat template was applied",
            )
    layout = Layout(
        format,
        {field: names[field] for field in kind.fields if field in names}
        | {
            mask: column for mask, column in masks.items() if prompt or mask != mask_field("prompt")
        },
        style,
        prompt_inside=2 * inside > len(pairs),
        encoded=tuple(sorted(sample.encoded & set(names.values()))),
    )
    is_dialogue = part is not Part.TOKEN_IDS and style is not TextStyle.RENDERED
    return _with_context(layout, sample, wanted, is_dialogue=is_dialogue, is_plain=is_plain)


# The prompt and the style of texts


def _pairs(
    kind: Kind, sample: Sample, prompt: str | None, names: list[str]
) -> list[tuple[Any, Any]]:
    """(prompt, response) for every response sampled; the prompt may be None, the response not."""
    cells = [sample.of(name) for name in names]
    prompts = sample.of(prompt) if prompt else [None] * len(cells[0])
    found = []
    for asked, *row in zip(prompts, *cells, strict=True):
        for cell in row:
            values = cell if kind.is_group and isinstance(cell, list) else [cell]
            found += [(asked, value) for value in values if value]
    return found


def _is_inside(part: Part, style: TextStyle | None, prompt: Any, response: Any) -> bool:
    """Whether this response holds its prompt."""
    if part is Part.MESSAGES:
        role = _role(response[0]) if isinstance(response, list) else None
        return role is not None and not is_assistant(role)
    if part is Part.TOKEN_IDS:
        return bool(prompt) and response[: len(prompt)] == prompt
    if not isinstance(response, str):
        return False
    if style is TextStyle.HH:
        return hh.is_dialogue(response)
    if style is TextStyle.RENDERED:
        return isinstance(prompt, str) and prompt.strip() in response
    return False


def _begins(prompt: Any, response: Any) -> bool:
    """Whether a text begins with its prompt."""
    both_text = isinstance(prompt, str) and isinstance(response, str)
    return both_text and bool(prompt.strip()) and response.lstrip().startswith(prompt.strip())


def _repeats(prompt: Any, response: Any) -> bool:
    """Whether a text holds its prompt anywhere, and not by chance as it may hold a short one."""
    both_text = isinstance(prompt, str) and isinstance(response, str)
    return both_text and len(prompt.strip()) >= _NO_CHANCE and prompt.strip() in response


def _role(message: Any) -> str | None:
    if not isinstance(message, dict):
        return None
    role = message.get("role") or message.get("from")
    return role if isinstance(role, str) else None


def _check_system(prompt: str, names: Mapping[str, str], pairs: list[tuple[Any, Any]]) -> None:
    """Raise where the prompt has a system message that the whole dialogues beside it lack."""
    for asked, response in pairs:
        if isinstance(asked, list) and asked and isinstance(response, list):
            roles = [role_alias(_role(messages[0]) or "") for messages in (asked, response)]
            if roles[0] == "system" != roles[1] and not is_empty(asked[0].get("content")):
                raise Undecided(
                    f"{prompt} begins with a system message, which the whole dialogues in "
                    f"{', '.join(names.values())} lack",
                    "write it into them, or pass --ignore-column "
                    f"{prompt} to score them as they are",
                )


def _seen_hh(what: str, texts: list[Any]) -> TextStyle | None:
    texts = [text for text in texts if isinstance(text, str)]
    marked = sum(map(hh.is_dialogue, texts))
    if 0 < marked < len(texts):
        raise Undecided(
            f"{marked} of {len(texts)} sampled texts in {what} begin with Human:",
            "pass --text-style hh or --text-style plain",
        )
    return TextStyle.HH if marked else None


def _seen_rendered(pairs: list[tuple[Any, Any]]) -> TextStyle | None:
    """Rendered, where responses beside a prompt of text went through a chat template."""
    if not _are_rendered([response for _, response in pairs]):
        return None
    inside = sum(_is_inside(Part.TEXT, TextStyle.RENDERED, *pair) for pair in pairs)
    if 2 * inside > len(pairs) or _are_rendered([prompt for prompt, _ in pairs]):
        return TextStyle.RENDERED
    raise Undecided(
        "the responses begin with marks of a chat template, the prompts do not",
        "pass --text-style rendered (both are joined as they are) or --text-style plain",
    )


def _are_rendered(texts: list[Any]) -> bool:
    marked = [text for text in texts if isinstance(text, str) and _CONTROL_MARK.match(text)]
    return 2 * len(marked) > len(texts)


def _default_style(format: Format, texts: list[Any], *, has_prompt: bool) -> TextStyle:
    if has_prompt:
        return TextStyle.PLAIN
    if format is Format.TEXT or _are_rendered(texts):
        return TextStyle.RENDERED
    if not texts:
        # Nothing to judge by; a row that is no HH dialogue will be marked, not mis-scored.
        return TextStyle.HH
    raise Undecided(
        "the strings to score have neither a prompt beside them nor HH marks",
        "pass --text-style rendered (a chat template was applied) or --text-style hh, "
        "or name the prompt: --column prompt=column",
    )


def _check_parts(
    part: Part, style: TextStyle | None, prompt: str | None, *, prompt_is_text: bool
) -> None:
    """Raise where prompt and response do not make a sequence."""
    if prompt is None and (part is Part.MESSAGE or style is TextStyle.PLAIN):
        raise Undecided("a response has no prompt beside it", "pass --column prompt=column")
    if prompt is None or style in (None, TextStyle.PLAIN):
        return
    if not prompt_is_text or (style is TextStyle.RENDERED and part is not Part.TEXT):
        raise Undecided(
            f"text style {style} does not fit messages",
            "pass --text-style plain, or leave out the prompt: --column prompt=",
        )


# Padding


def _masks(fields: Mapping[str, str], sample: Sample, wanted: Wanted) -> dict[str, str]:
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


def _without_padding(fields: Mapping[str, str], masks: Mapping[str, str], sample: Sample) -> Sample:
    values = dict(sample.values)
    for field, name in fields.items():
        if mask := masks.get(mask_field(field)):
            rows = zip(sample.of(name), sample.of(mask), strict=True)
            found = (without_padding(ids, flags, name) for ids, flags in rows)
            values[name] = [None if isinstance(ids, RowError) else ids for ids in found]
    return replace(sample, values=values)


# What stands around the conversation


def _with_context(
    layout: Layout, sample: Sample, wanted: Wanted, *, is_dialogue: bool, is_plain: bool
) -> Layout:
    """The layout with the fields around the conversation, and the columns that are watched.

    Raises Undecided where a sampled row holds something that would not be read.
    """
    columns = dict(layout.columns)
    fits: Mapping[str, bool] = {
        **dict.fromkeys(CONTEXT_NAMES, is_dialogue),
        "input": is_plain and not layout.prompt_inside,
        "history": is_dialogue and "prompt" in columns and layout.text_style is not TextStyle.HH,
    }
    for field, known in CONTEXT_NAMES.items():
        read = READERS.get(field, _text)
        if field in wanted.columns:
            columns[field] = _named_context(field, fits[field], sample, wanted, read)
        elif fits[field]:
            free = [name for name in known if name in sample.held and wanted.is_free(name, columns)]
            free = [name for name in free if _unread(sample.of(name), name, read) is None]
            if free:
                columns[field] = _only(field, free)
    masks = {mask_field(field) for field in (*KINDS[layout.format].fields,)}
    for field in wanted.columns:
        if field in masks and field not in columns:
            raise Undecided(
                f"column {wanted.columns[field]}, named for {field}, belongs to no token ids",
                f"leave out --column {field}=",
            )
    watched = []
    for name in (*WATCHED_NAMES, *sorted(MEDIA_NAMES)):
        if name not in sample.held or not wanted.is_free(name, columns):
            continue
        # An input belongs to an instruction of text; one that the user named is whole.
        is_whole = name == "input" and (not is_plain or "prompt" in wanted.columns)
        if name in MEDIA_NAMES or (is_dialogue and not is_whole):
            _check_unread(name, sample)
            watched.append(name)
    return replace(layout, columns=columns, watched=tuple(watched))


def _named_context(
    field: str, fits: bool, sample: Sample, wanted: Wanted, read: Callable[[Any, str], Any]
) -> str:
    name = wanted.columns[field]
    if not fits:
        raise Undecided(
            f"column {name}, named for {field}, has no place in these rows",
            f"leave out --column {field}={name}",
        )
    if (why := _unread(sample.of(name), name, read)) is not None:
        raise Undecided(f"column {name}, named for {field}: {why}", "name another column")
    return name


def _unread(values: list[Any], name: str, read: Callable[[Any, str], Any]) -> str | None:
    """Why a value cannot be read, or None."""
    found = (read(value, name) for value in values if not is_empty(value))
    return next((value.detail for value in found if isinstance(value, RowError)), None)


def _text(value: Any, name: str) -> Any:
    return READERS["system"](value, name)


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


def _only(field: str, hits: list[str]) -> str:
    if len(hits) > 1:
        what = f"{' and '.join(hits)} could both be the {field}"
        raise Undecided(what, f"pass e.g. --column {field}={hits[0]}")
    return hits[0]
