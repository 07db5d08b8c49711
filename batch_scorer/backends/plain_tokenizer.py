"""Token ids as the model's own code gives them: transformers' call, one sequence at a time.

What a job's settings change about that call is done here once more, each in its simplest form, and
named: where the engine's ids are other than transformers' own, a recorded setting has to be why.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from batch_scorer.errors import RowNote
from batch_scorer.formats.kinds import role_alias
from batch_scorer.models.adapter import Prompt, Steps
from batch_scorer.models.files import read_json
from batch_scorer.models.tokenizer import load_tokenizer
from batch_scorer.records import Conversation, Message, SequenceInput

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_HERE = "\uf8f0the answer\uf8f0"
_FIRST_STAND_IN = 0xF0000
"""Characters for private use: one stands for each special token that a message spells."""


@dataclass(frozen=True, slots=True)
class PlainIds:
    """The ids, and the settings by which they differ from transformers' call on the same row."""

    ids: list[int]
    settings: tuple[str, ...]


class PlainTokenizer:
    """A directory's tokenizer, and what the job sets. The model's config is there too, unless there
    is a `config_dir`."""

    def __init__(
        self,
        model_dir: Path,
        prompt: Prompt,
        *,
        config_dir: Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
        self._prompt = prompt
        self._suffix_id: int | None = None
        if prompt.suffix_id_of is not None:
            config = read_json((config_dir or model_dir) / "config.json")
            self._suffix_id = config[prompt.suffix_id_of]

    @property
    def bos_id(self) -> int | None:
        return cast(int | None, self._tokenizer.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        return cast(int | None, self._tokenizer.eos_token_id)

    @property
    def compares(self) -> bool:
        """Whether a sequence holds both answers of its row."""
        return self._prompt.beside is not None and self._prompt.beside.field == "other"

    def visible(self, ids: list[int]) -> str:
        """Their text, special tokens included."""
        return cast(str, self._tokenizer.decode(ids, skip_special_tokens=False))

    def token_ids(
        self,
        content: SequenceInput,
        arguments: Mapping[str, Any],
        steps: tuple[str, ...] | None = None,
        notes: Collection[RowNote] = (),
        beside: str | Message | None = None,
    ) -> PlainIds:
        """The ids of one sequence; `beside` is what the model reads beside the conversation.

        `notes` are those of its row in the output: what they say was done to it is done here, and
        nothing else. Raises what the chat template raises.
        """
        if not content or isinstance(content[0], int):
            return PlainIds(self._suffixed(cast(list[int], content)), ())
        if isinstance(content, str):
            plain = self._tokenizer(content, add_special_tokens=False)["input_ids"]
            return self._ended(content, plain, [])
        conversation = cast(Conversation, content)
        if self._prompt.pair and not self._tokenizer.chat_template:
            *before, answer = map(joined, conversation)
            question = self._prompt.question_prefix + "\n\n".join(before)
            pair = self._tokenizer(question, answer)["input_ids"]
            return PlainIds(pair, ("pair",))
        used: list[str] = []
        if beside is not None:
            arguments = self._with_beside(arguments, beside)
        prepared = self._prepared(conversation, steps, notes, used)
        if self._needs_parts:
            used.append("parts_wrapped")
            prepared = list(map(_wrapped, prepared))
        spelt = prepared if beside is None else [*prepared, {"content": beside}]
        if self._prompt.special_text == "literal" and self._spells(spelt):
            return self._literally(prepared, arguments, [*used, "special_text"])
        text = self._text(prepared, arguments)
        if self._prompt.reasoning == "keep" and (kept := self._kept(prepared, arguments)):
            plain = self._tokenizer(kept, add_special_tokens=False)["input_ids"]
            return self._ended(kept, plain, [*used, "reasoning"])
        if self._prompt.begins:
            plain = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return self._ended(text, plain, [*used, "begins"])
        return self._ended(text, self._call(prepared, arguments, tokenize=True)["input_ids"], used)

    def answer_problem(
        self,
        content: SequenceInput,
        prompt: str | list[int] | None,
        arguments: Mapping[str, Any],
        steps: tuple[str, ...] | None,
        notes: Collection[RowNote],
        ids: list[int],
        start: int,
    ) -> str | None:
        """Why the answer of a sequence cannot begin at token `start` of its `ids`; None: it can.

        It begins no sooner than where prompt and whole part, as TRL has it, and all of its text is
        behind. `prompt` is that of text and ids, the other arguments are those of `token_ids`.
        """
        if not isinstance(content, str) and isinstance(content[0], int):
            is_right = start == len(prompt or [])
            return None if is_right else f"the prompt has {len(prompt or [])} tokens"
        if isinstance(content, str):
            asked = self._tokenizer(prompt or "", add_special_tokens=False)["input_ids"]
            answer = content[len(prompt or "") :].strip()
        else:
            talk = self._prepared(content, steps, notes, [])
            before = list(map(_wrapped, talk[:-1])) if self._needs_parts else talk[:-1]
            asking = {**arguments, "add_generation_prompt": True}
            try:
                asked = self._call(before, asking, tokenize=True)["input_ids"]
            except Exception:  # a template may refuse a conversation without its end
                asked = []
            answer = joined(talk[-1]).strip()
        bos = [[token for token in part[:1] if token == self.bos_id] for part in (ids, asked)]
        alike = zip(ids[len(bos[0]) :], asked[len(bos[1]) :], strict=False)
        border = len(bos[0]) + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], alike))
        # A prompt that does not stand in the whole may go on like the answer by chance.
        early = self.visible(ids[start:border]).strip()
        if start < border and not (early and answer.startswith(early)):
            return "a part of the prompt is in it"
        if answer in self.visible(ids) and answer not in self.visible(ids[start:]):
            return "a part of it is lost"
        return None

    def date_is_elsewhere(
        self,
        content: Conversation,
        arguments: Mapping[str, Any],
        ids: list[int],
        beside: str | Message | None = None,
    ) -> bool:
        """Whether these ids are those of the conversation with another date."""
        if beside is not None:
            arguments = self._with_beside(arguments, beside)
        mark = "\uf8f1"
        text = self._text(content, {**arguments, "strftime_now": lambda pattern: mark})
        shown = self.visible(ids)
        pieces = [re.escape(piece) for piece in text.split(mark)]
        return len(pieces) > 1 and re.search(r"[\w ,:/.-]{4,40}".join(pieces), shown) is not None

    @cached_property
    def _needs_parts(self) -> bool:
        """Whether the template renders no text but that of parts. No model that reads something
        beside the conversation has such a template."""
        if self._prompt.beside is not None:
            return False
        talk: Conversation = [
            {"role": "user", "content": "aquestion"},
            {"role": "assistant", "content": "ananswer"},
        ]
        found: list[bool] = []
        for messages in (talk, list(map(_wrapped, talk))):
            try:
                found.append("aquestion" in self._text(messages, {}))
            except Exception:  # a template may raise anything
                found.append(False)
        return found == [False, True]

    def _with_beside(
        self, arguments: Mapping[str, Any], beside: str | Message
    ) -> Mapping[str, Any]:
        """The arguments with a text of the row that the model's authors put into their own."""
        assert self._prompt.beside is not None
        if not isinstance(beside, str):
            drops, keeps = (self._prompt.reasoning == each for each in ("drop", "keep"))
            other = without_reasoning(beside) if drops else beside
            beside = whole(other) if keeps else joined(other)
        return {**arguments, self._prompt.beside.field: beside}

    # transformers' call

    def _call(self, conversation: Conversation, arguments: Mapping[str, Any], **more: Any) -> Any:
        prompt = self._prompt
        if prompt.beside is not None and prompt.beside.turn is not None:
            given = {**json.loads(prompt.arguments), **arguments}
            asked = self._tokenizer.apply_chat_template(
                conversation, chat_template=prompt.beside.turn, tokenize=False, **given
            )
            before = [] if prompt.beside.replaces else conversation
            conversation = [*before, {"role": "user", "content": asked}]
        today = prompt.date or datetime.now()
        return self._tokenizer.apply_chat_template(
            conversation,
            chat_template=prompt.template or prompt.template_name,
            return_dict=more.get("tokenize", False),
            **{"strftime_now": today.strftime, **json.loads(prompt.arguments), **arguments, **more},
        )

    def _text(self, conversation: Conversation, arguments: Mapping[str, Any]) -> str:
        text = cast(str, self._call(conversation, arguments, tokenize=False))
        return text + self._prompt.begins

    # What the settings do, and their names

    def _prepared(
        self,
        conversation: Conversation,
        steps: tuple[str, ...] | None,
        notes: Collection[RowNote],
        used: list[str],
    ) -> Conversation:
        prompt = self._prompt
        messages = list(conversation)
        if RowNote.ROLE_RENAMED in notes:
            used.append(RowNote.ROLE_RENAMED.value)
            messages = [{**m, "role": role_alias(m["role"])} for m in messages]
        if RowNote.PARTS_JOINED in notes:
            used.append(RowNote.PARTS_JOINED.value)
            messages = [{**m, "content": joined(m)} if _has_parts(m) else m for m in messages]
        if prompt.system is not None and role_alias(messages[0]["role"]) != "system":
            used.append("system_prompt")
            messages.insert(0, {"role": "system", "content": prompt.system})
        if prompt.reasoning == "drop":
            without = [without_reasoning(message) for message in messages]
            used += ["reasoning"] * (without != messages)
            messages = without
        if prompt.steps is not None:
            used.append("steps")
            return _in_steps(messages, prompt.steps, steps)
        if steps is not None:
            used.append("step_separator")
            text = prompt.step_separator.join(steps)
            messages[-1] = {**messages[-1], "content": text}
        return messages

    def _ended(self, text: str, plain: list[int], used: list[str]) -> PlainIds:
        """The ids with BOS and EOS as the settings have them."""
        bos, eos = self._prompt.bos, self._prompt.eos
        token, ids = self._tokenizer.bos_token, list(plain)
        if eos == "openrlhf":
            text = self._as_openrlhf(text)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if bos != "template" and not (token and text.startswith(token)):
            ids = self._tokenizer(text)["input_ids"]  # with what it puts around a text
        used = [*used, *["bos"] * (ids != plain and eos != "openrlhf")]
        return self._with_ends(ids, used)

    def _as_openrlhf(self, text: str) -> str:
        text = text.rstrip("\n")
        eos = self._tokenizer.eos_token
        return text if text.endswith(eos) else f"{text} {eos}"

    def _with_ends(self, ids: list[int], used: list[str]) -> PlainIds:
        bos, eos = self._prompt.bos, self._prompt.eos
        before = list(ids)
        if bos == "always" and ids[:1] != [self.bos_id]:
            ids = [cast(int, self.bos_id), *ids]
        while bos == "never" and ids[:1] == [self.bos_id]:
            ids = ids[1:]
        used = [*used, *["bos"] * (ids != before)]
        before = list(ids)
        if eos == "append" and ids[-1:] != [self.eos_id]:
            ids = [*ids, cast(int, self.eos_id)]
        while eos == "never" and ids[-1:] == [self.eos_id]:
            ids = ids[:-1]
        ended = self._suffixed(ids)
        used = [*used, *["eos"] * (ended != before or eos == "openrlhf")]
        return PlainIds(ended, tuple(dict.fromkeys(used)))

    def _suffixed(self, ids: list[int]) -> list[int]:
        if self._suffix_id is None or ids[-1:] == [self._suffix_id]:
            return ids
        return [*ids, self._suffix_id]

    def _kept(self, conversation: Conversation, arguments: Mapping[str, Any]) -> str | None:
        """The text with the answer's reasoning in it; None where it is there already."""
        *before, answer = conversation
        if not _thought(answer).strip():
            return None
        marked = _marked(answer)
        if self._needs_parts:
            marked = _wrapped(marked)
        if _HERE in self._text([*before, marked], arguments):
            return None  # the template writes it itself
        stand_in = {**without_reasoning(answer), "content": _HERE}
        if self._needs_parts:
            stand_in = _wrapped(stand_in)
        start, found, end = self._text([*before, stand_in], arguments).partition(_HERE)
        return re.sub(r"<think>\s*</think>\s*$", "", start) + whole(answer) + end if found else None

    # Special tokens that a message spells, kept as text

    @cached_property
    def _special(self) -> Mapping[str, Any]:
        """The special tokens by their spelling, long ones first."""
        added = self._tokenizer.added_tokens_decoder.values()
        found = {str(token): token for token in added if token.special}
        return {text: found[text] for text in sorted(found, key=len, reverse=True)}

    @cached_property
    def _kept_as_text(self) -> list[str]:
        """Those of them that have no place in a message: tags of steps and of reasoning do."""
        tag = self._prompt.steps.tag if self._prompt.steps else None
        return [text for text in self._special if text not in (tag, "<think>", "</think>")]

    def _spells(self, conversation: Conversation) -> bool:
        written = json.dumps([{**m, "role": ""} for m in conversation], ensure_ascii=False)
        return any(
            json.dumps(token, ensure_ascii=False)[1:-1] in written for token in self._kept_as_text
        )

    def _literally(
        self, conversation: Conversation, arguments: Mapping[str, Any], used: list[str]
    ) -> PlainIds:
        """Tokenised between the template's own special tokens, the others switched off."""
        stands_for = {
            chr(_FIRST_STAND_IN + place): token for place, token in enumerate(self._kept_as_text)
        }

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                for stand_in, token in stands_for.items():
                    value = value.replace(token, stand_in)
                return value
            if isinstance(value, list):
                return [hidden(item) for item in value]
            if isinstance(value, dict):
                return {key: hidden(item) for key, item in value.items()}
            return value

        if self._prompt.beside is not None and self._prompt.beside.field in arguments:
            field = self._prompt.beside.field
            arguments = {**arguments, field: hidden(arguments[field])}
        messages = [{**hidden(message), "role": message["role"]} for message in conversation]
        text = self._text(messages, arguments)
        if self._prompt.reasoning == "keep" and (kept := self._kept(messages, arguments)):
            text, used = kept, [*used, "reasoning"]
        if self._prompt.eos == "openrlhf":
            text = self._as_openrlhf(text)
        pieces = re.split("(" + "|".join(map(re.escape, self._special)) + ")", text)
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if piece in self._special:
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
                continue
            # As the tokenizer does it, a token may take in the blanks beside it.
            if place and self._special[pieces[place - 1]].rstrip:
                piece = piece.lstrip()
            if place + 1 < len(pieces) and self._special[pieces[place + 1]].lstrip:
                piece = piece.rstrip()
            for stand_in, token in stands_for.items():
                piece = piece.replace(stand_in, token)
            if piece:
                ids += self._tokenizer(piece, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
        bos = self._tokenizer.bos_token
        if self._prompt.bos != "template" and not (bos and text.startswith(bos)):
            around = self._tokenizer("a")["input_ids"]
            bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
            first = around.index(bare[0])
            ids = [*around[:first], *ids, *around[first + len(bare) :]]
        return self._with_ends(ids, used)


def joined(message: Message) -> str:
    """The content as one text, its parts' texts joined by line feeds."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if "text" in part)
    return str(content or "")


def _has_parts(message: Message) -> bool:
    """Whether the content is a list of texts; a tool may give any list."""
    content = message.get("content")
    if not isinstance(content, list) or not content:
        return False
    return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)


def _wrapped(message: Message) -> Message:
    """The same, text as a list of one part."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def without_reasoning(message: Message) -> Message:
    kept = {name: value for name, value in message.items() if name not in _REASONING_FIELDS}
    content = kept.get("content")
    if isinstance(content, str):
        kept["content"] = _unthought(content)
    elif isinstance(content, list) and _has_parts(kept):
        kept["content"] = [{**content[0], "text": _unthought(content[0]["text"])}, *content[1:]]
    return kept


def _unthought(text: str) -> str:
    found = _THOUGHT.match(text)
    return text[found.end() :] if found else text


def _thought(answer: Message) -> str:
    """The answer's reasoning: of a field of its own, or before its text."""
    for name in _REASONING_FIELDS:
        if str(answer.get(name) or "").strip():
            return str(answer[name])
    found = _THOUGHT.match(joined(answer))
    return found[1] if found else ""


def _marked(answer: Message) -> Message:
    """The answer with a mark in place of its reasoning."""
    fields = {key: _HERE for key in _REASONING_FIELDS if str(answer.get(key) or "").strip()}
    text = joined(answer)
    found = _THOUGHT.match(text)
    if found is None:
        return {**answer, **fields}
    return {**answer, **fields, "content": f"<think>\n{_HERE}\n</think>\n\n{text[found.end() :]}"}


def whole(answer: Message) -> str:
    """The answer's text behind its reasoning."""
    text, thought = joined(answer), _thought(answer).strip("\n")
    if not thought or _THOUGHT.match(text):
        return text
    return "<think>\n" + thought + "\n</think>\n\n" + text


def _in_steps(
    conversation: Conversation, rule: Steps, given: tuple[str, ...] | None
) -> Conversation:
    """The answer's steps with the tag after each, or as turns that the tag answers."""
    *before, answer = conversation
    if given is None:
        text = joined(answer)
        is_tagged = rule.layout == "tagged" and rule.tag in text
        given = tuple(part for part in text.split(rule.tag if is_tagged else rule.separator))
        given = tuple(part.strip() for part in given if part.strip())
    steps = [step.strip() for step in given]
    if rule.layout == "tagged":
        return [*before, {**answer, "content": rule.joint.join(s + rule.tag for s in steps)}]
    if before and before[-1]["role"] == "user":
        steps[0] = joined(before.pop()) + " " + steps[0]
    turns: Conversation = []
    for step in steps:
        turns.append({"role": "user", "content": step})
        turns.append({"role": "assistant", "content": rule.tag})
    return [*before, *turns]
