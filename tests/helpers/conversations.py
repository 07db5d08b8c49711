"""Generated conversations with all that chat templates read.

One family of rows for each way in which files hold them: a column of Parquet has one type.
"""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, Any]

_WORDS = (
    "Paris is the capital of France.",
    "How many sides does a square have?",
    "Zähle bis drei, bitte: eins, zwei, drei!",
    "今日はとても良い天気ですね。",
    "x = {'a': 1}\nprint(x['a'])  # {{ not a template }}",
    "  leading and trailing blanks  ",
    "A line.\n\nAnother line, after a blank one.\n",
    "The mark <|im_end|> closes a turn, <|eot_id|> does too, and </s> as well.",
    "🙂 emoji, a tab\tand a no-break\u00a0space",
    "Four.",
    "[INST] is a mark of old; <think> is one of new.",
    "Answer: <b>42</b> & \"more\" 'quotes' \\ backslash",
)
_CITIES = ("Paris", "Köln", "東京", 'a "quoted" city', "São Paulo\nBrazil")


class _Maker:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        return " ".join(self.random.choices(_WORDS, k=self.random.randint(1, 2)))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def turns(self) -> list[Message]:
        """User and assistant in turn, with or without a system message."""
        messages = [{"role": "system", "content": self.text()}] if self.chance(0.4) else []
        for _ in range(self.random.randint(1, 3)):
            messages.append({"role": "user", "content": self.text()})
            messages.append({"role": "assistant", "content": self.text()})
        return messages

    def call(self, as_text: bool) -> Message:
        """A tool call; the functions take different arguments, so a struct has all their keys."""
        if self.chance(0.5):
            name, arguments = "weather", {"city": self.random.choice(_CITIES), "days": 2}
        else:
            name = "search"
            arguments = {"query": self.text(), "filter": {"lang": "de"} if self.chance(0.5) else {}}
        function = {"name": name, "arguments": _json(arguments) if as_text else arguments}
        call: Message = {"type": "function", "function": function}
        return {"id": f"call{self.random.randint(10000, 99999)}", **call}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(make: _Maker) -> Row:
    messages = make.turns()
    if make.chance(0.2):
        messages.insert(-2, {"role": "user", "content": make.text()})  # twice the user
    if make.chance(0.1):
        messages.insert(-1, {"role": "assistant", "content": make.text()})
    if make.chance(0.1):
        messages.insert(-2, {"role": "user", "content": ""})
    return {"messages": messages}


def _called(make: _Maker, as_text: bool) -> Row:
    messages = make.turns()
    call = make.call(as_text)
    calling: Message = {"role": "assistant", "content": None, "tool_calls": [call]}
    if make.chance(0.3):
        calling["content"] = make.text()
    elif make.chance(0.3):
        del calling["content"]
    answer: Message = {"role": "tool", "content": _json({"found": make.text()})}
    answer["tool_call_id"] = call["id"]
    if make.chance(0.6):
        answer["name"] = call["function"]["name"]
    if make.chance(0.3):
        messages[-1]["tool_calls"] = None  # a null that says nothing
    if make.chance(0.15):  # the judged turn is a call
        return {"messages": [*messages[:-1], calling], "tools": _tools(make)}
    before = [*messages[:-1], calling, answer]
    return {"messages": [*before, messages[-1]], "tools": _tools(make)}


def _tools(make: _Maker) -> list[Row] | None:
    city = {"type": "string", "description": "Where, e.g. Köln"}
    weather = {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": city, "days": {"type": "integer", "default": None}},
            "required": ["city"],
        },
    }
    search = {
        "name": "search",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "filter": {"type": "object", "enum": ["a", "b"]},
            },
            "required": ["query"],
        },
    }
    chosen = make.random.choice(([weather], [search], [weather, search], None))
    return chosen and [{"type": "function", "function": function} for function in chosen]


def _tools_as_text(make: _Maker) -> Row:
    row = _called(make, as_text=True)
    return {**row, "tools": row["tools"] and _json(row["tools"])}


def _reasoning(make: _Maker) -> Row:
    messages = make.turns()
    key = make.random.choice(("reasoning_content", "thinking", "reasoning"))
    for message in messages:
        if message["role"] == "assistant" and make.chance(0.7):
            if make.chance(0.7):
                message[key] = make.text()
            else:
                message["content"] = f"<think>\n{make.text()}\n</think>\n\n{message['content']}"
        elif make.chance(0.2):
            message[key] = None
    row: Row = {"messages": messages}
    if make.chance(0.5):
        row["chat_template_kwargs"] = {"enable_thinking": make.chance(0.5)}
    return row


def _parts(make: _Maker) -> Row:
    messages = make.turns()
    for message in messages:
        texts = [message["content"], *([make.text()] if make.chance(0.4) else [])]
        message["content"] = [{"type": "text", "text": text} for text in texts]
    return {"messages": messages}


def _documents(make: _Maker) -> Row:
    documents = [
        {"title": f"Page {n}", "text": make.text()} for n in range(make.random.randint(1, 2))
    ]
    messages = make.turns()
    messages[-2]["name"] = "alice"
    messages[-1]["note_to_self"] = "a field that no template knows"
    return {"messages": messages, "documents": documents if make.chance(0.7) else None}


def _aliases(make: _Maker) -> Row:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"messages": [{**m, "role": names[m["role"]]} for m in make.turns()]}


FAMILIES: Mapping[str, Callable[[_Maker], Row]] = {
    "plain": _plain,
    "tool calls as structs": lambda make: _called(make, as_text=False),
    "tool calls as text": _tools_as_text,
    "reasoning": _reasoning,
    "parts": _parts,
    "documents and unknown fields": _documents,
    "aliases of roles": _aliases,
}


def rows_of(family: str, count: int) -> list[Row]:
    """`count` rows of one family, the same at every call; every row has the keys of all."""
    make = _Maker(seed=sum(map(ord, family)))
    rows = [FAMILIES[family](make) for _ in range(count)]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]
