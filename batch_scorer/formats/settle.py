"""The layout of a file whose columns are assigned: where the prompt is and how texts are read, from
sampled rows."""

import re
from collections.abc import Mapping
from typing import Any

from batch_scorer.formats import hh
from batch_scorer.formats.beside import masks_of, with_context, without_masked
from batch_scorer.formats.held import Sample
from batch_scorer.formats.kinds import KINDS, Kind, Part, is_assistant, mask_field
from batch_scorer.formats.repeated import missing_text, texts_asked
from batch_scorer.formats.wanted import Undecided, Wanted, only
from batch_scorer.records import Format, Layout, TextStyle

_CONTROL_MARK = re.compile(
    r"\s*(<\|[^|>\s]{1,40}\|>|<\uff5c[^\uff5c>]{1,40}\uff5c>|<s>|<bos>|<start_of_turn>|\[INST\])"
)
"""What begins text that went through a chat template."""

_NO_CHANCE = 12
"""Characters of a prompt that no answer holds unless it repeats the prompt."""
_TEXT_SHOWN = 60


def settle(format: Format, hits: Mapping[str, list[str]], sample: Sample, wanted: Wanted) -> Layout:
    """The layout of rows of this format; `hits` are the columns that can be each of its fields,
    best first.

    Raises Undecided.
    """
    kind = KINDS[format]
    names = {field: only(field, hits[field]) for field in kind.responses}
    first = sample.held[names[kind.responses[0]]]
    part = first.items if kind.is_group else first.whole
    assert part is not None  # it was chosen for what it holds
    prompt = next(iter(hits.get("prompt", [])), None)
    prompt_is_text = prompt is not None and sample.held[prompt].whole in (Part.TEXT, Part.PROBLEM)
    is_free = "prompt" not in wanted.columns
    _check_readable(sample, [*names.values(), prompt])
    masks = {}
    if part is Part.TOKEN_IDS:
        fields = {**names, **({"prompt": prompt} if prompt else {})}
        masks = masks_of(fields, sample, wanted)
        sample = without_masked(fields, masks, sample)
    pairs = _pairs(kind, sample, prompt, list(names.values()))

    style = None
    if part is Part.TEXT:
        style = _seen_style(pairs, wanted, prompt_is_text=prompt_is_text)
    repeated = None
    if prompt and is_free and _are_whole(part, style, pairs, prompt_is_text=prompt_is_text):
        _check_turns(prompt, names, pairs)
        repeated = prompt if _can_be_checked(part, style, masks, pairs) else None
        masks.pop(mask_field("prompt"), None)
        prompt = None
    if prompt:
        names["prompt"] = only("prompt", hits["prompt"])
        if prompt_is_text and style is None:
            style = _style_of_prompts(prompt, pairs, wanted)
    if part is Part.TEXT and style is None:
        style = _default_style(format, [text for _, text in pairs], has_prompt=bool(prompt))
    _check_parts(part, style, prompt, prompt_is_text=prompt_is_text)
    is_plain = bool(prompt) and prompt_is_text and style is TextStyle.PLAIN
    layout = Layout(
        format,
        {field: names[field] for field in kind.fields if field in names} | masks,
        style,
        prompt_inside=is_plain and part is Part.TEXT and is_free and _are_begun(prompt, pairs),
        repeated=repeated,
        encoded=tuple(sorted(sample.encoded & {*names.values(), repeated})),
    )
    is_dialogue = part is not Part.TOKEN_IDS and style is not TextStyle.RENDERED
    beside = next(iter(hits.get("prompt", [])), None)
    return with_context(layout, sample, wanted, beside, is_dialogue=is_dialogue, is_plain=is_plain)


def _check_readable(sample: Sample, names: list[str | None]) -> None:
    """Raise where texts look like messages in writing and are none."""
    for name in names:
        if name in sample.unreadable:
            raise Undecided(
                f"the texts in {name} look like messages in JSON or Python's spelling, and most "
                "cannot be read as such",
                "write them as lists of messages, or pass --text-style plain to score them as they "
                "are",
            )


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


def _are_whole(
    part: Part, style: TextStyle | None, pairs: list[tuple[Any, Any]], *, prompt_is_text: bool
) -> bool:
    """Whether most responses hold their prompt, as dialogues, rendered texts and token ids do."""
    inside = 2 * sum(_is_inside(part, style, *pair) for pair in pairs)
    by_type = part is Part.MESSAGES and prompt_is_text
    return inside > len(pairs) or (inside == len(pairs) and by_type)


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


def _can_be_checked(
    part: Part, style: TextStyle | None, masks: Mapping[str, str], pairs: list[tuple[Any, Any]]
) -> bool:
    """Whether every row shows if its responses hold the prompt beside them."""
    if part is Part.TEXT:
        return style is TextStyle.RENDERED
    if part is Part.TOKEN_IDS:
        return mask_field("prompt") not in masks
    # A column of whole dialogues, such as the chosen ones once more, is no prompt.
    prompts = [prompt for prompt, _ in pairs if isinstance(prompt, list) and prompt]
    return bool(prompts) and not any(is_assistant(_role(prompt[-1]) or "") for prompt in prompts)


def _are_begun(prompt: str | None, pairs: list[tuple[Any, Any]]) -> bool:
    """Whether most plain responses begin with their prompt; raises where they hold it elsewhere."""
    texts = [(asked.strip(), said.strip()) for asked, said in pairs if _are_texts(asked, said)]
    if 2 * sum(bool(asked) and said.startswith(asked) for asked, said in texts) > len(pairs):
        return True
    if 2 * sum(len(asked) >= _NO_CHANCE and asked in said for asked, said in texts) > len(pairs):
        raise Undecided(
            f"most responses hold the text of {prompt}, though not at their beginning",
            f"pass --column prompt={prompt} to put it before them even so, or --text-style "
            "rendered where a chat template was applied",
        )
    return False


def _are_texts(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _role(message: Any) -> str | None:
    if not isinstance(message, dict):
        return None
    role = message.get("role") or message.get("from")
    return role if isinstance(role, str) else None


def _check_turns(prompt: str, names: Mapping[str, str], pairs: list[tuple[Any, Any]]) -> None:
    """Raise where the prompt has messages that the whole dialogues beside it lack."""
    for asked, response in pairs:
        if isinstance(asked, list) and isinstance(response, list):
            missing = missing_text(texts_asked(asked), response)
            if missing is not None:
                raise Undecided(
                    f"{prompt} has a message ({missing[:_TEXT_SHOWN]!r}) that the whole dialogues "
                    f"in {', '.join(names.values())} lack",
                    "write it into them, or pass --ignore-column "
                    f"{prompt} to score them as they are",
                )


def _seen_style(
    pairs: list[tuple[Any, Any]], wanted: Wanted, *, prompt_is_text: bool
) -> TextStyle | None:
    """The style of responses, as it is wanted, or where they show it."""
    responses = [response for _, response in pairs]
    if style := wanted.text_style or _seen_hh("responses", responses):
        return style
    if not prompt_is_text or not _are_rendered(responses):
        return None
    inside = sum(_is_inside(Part.TEXT, TextStyle.RENDERED, *pair) for pair in pairs)
    if 2 * inside > len(pairs) or _are_rendered([prompt for prompt, _ in pairs]):
        return TextStyle.RENDERED
    raise Undecided(
        "the responses begin with marks of a chat template, the prompts do not",
        "pass --text-style rendered (both are joined as they are) or --text-style plain",
    )


def _style_of_prompts(name: str, pairs: list[tuple[Any, Any]], wanted: Wanted) -> TextStyle:
    prompts = [prompt for prompt, _ in pairs if prompt]
    rendered = TextStyle.RENDERED if _are_rendered(prompts) else TextStyle.PLAIN
    return wanted.text_style or _seen_hh(name, prompts) or rendered


def _seen_hh(what: str, texts: list[Any]) -> TextStyle | None:
    texts = [text for text in texts if isinstance(text, str)]
    marked = sum(map(hh.is_dialogue, texts))
    if 0 < marked < len(texts):
        raise Undecided(
            f"{marked} of {len(texts)} sampled texts in {what} begin with Human:",
            "pass --text-style hh or --text-style plain",
        )
    return TextStyle.HH if marked else None


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
