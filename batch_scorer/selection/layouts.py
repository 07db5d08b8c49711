"""Pairs in the columns that each trainer loads (docs/training-layouts.md).

No layout has a column `margin`: TRL's and OpenRLHF's reward trainers take one to be part of the
loss. Ours is called `score_margin`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.selection.flat import FlatPart
from batch_scorer.selection.recipe import Columns
from batch_scorer.selection.texts import NoColumn

Messages = list[dict[str, Any]]


class Unfit(Exception):
    """This pair cannot be written in that layout; the text says why."""


_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_MESSAGES = pa.list_(_MESSAGE)


SIDE_FIELDS = ("prompt", "response", "messages")
"""The fields of a format that sides are made of."""


def sides_of(part: FlatPart, rows: pa.Table) -> pa.Table:
    """Flat rows of responses as sides of pairs: `prompt`, `side`, `source`, `score`, `tokens`, the
    first two as they are stored. Raises NoColumn where a row is no response with its prompt."""
    prompt, response, messages = (part.column_of(field) for field in SIDE_FIELDS)
    if prompt and response:
        prompts, sides = rows[prompt], rows[response]
    elif messages:
        lists, kind = rows[messages].to_pylist(), rows.schema.field(messages).type
        prompts = pa.array([each and each[:-1] for each in lists], kind)
        sides = pa.array([each and each[-1:] for each in lists], kind)
    else:
        raise NoColumn("pairs are made of responses with a prompt, in columns or as messages")

    def column(name: str, kind: pa.DataType) -> Any:
        found = rows[name] if name in rows.column_names else pa.nulls(rows.num_rows)
        return found.cast(kind)

    return pa.table(
        {
            "prompt": prompts,
            "side": sides,
            "source": column("source", pa.string()),
            "score": column(f"{part.prefix}score", pa.float64()),
            "tokens": column(f"{part.prefix}num_tokens", pa.int32()),
        }
    )


def fits(sides: pa.Table, columns: Columns) -> list[bool]:
    """Which sides the layout has a form for; `Columns.INPUT` takes all."""
    kinds = {sides.schema.field(name).type for name in ("prompt", "side")}
    if columns is Columns.INPUT or all(pa.types.is_string(kind) for kind in kinds):
        return [True] * sides.num_rows

    def fit(prompt: str | Messages, side: str | Messages) -> bool:
        try:
            pair_in(columns, prompt, side, side)
        except Unfit:
            return False
        return True

    both = zip(sides["prompt"].to_pylist(), sides["side"].to_pylist(), strict=True)
    return [prompt is not None and side is not None and fit(prompt, side) for prompt, side in both]


def paired_table(chosen: pa.Table, rejected: pa.Table, columns: Columns) -> pa.Table:
    """The pairs of n sides each, in the layout's columns; with `Columns.INPUT` their prompts and
    sides as they are stored. All fit."""
    scores, tokens = ((chosen[name], rejected[name]) for name in ("score", "tokens"))
    margin = pc.subtract(*scores)
    if columns is Columns.INPUT:
        parts = {"prompt": chosen["prompt"], "chosen": chosen["side"], "rejected": rejected["side"]}
        return pa.table(parts | _beside(chosen["source"], scores, margin, tokens))
    prompts, ours, theirs = (
        column.to_pylist() for column in (chosen["prompt"], chosen["side"], rejected["side"])
    )
    made = [pair_in(columns, *each) for each in zip(prompts, ours, theirs, strict=True)]
    return made_table(made, columns, chosen["source"], scores, margin, tokens)


def made_table(
    made: Sequence[Mapping[str, Any]],
    columns: Columns,
    source: pa.ChunkedArray,
    scores: Sequence[pa.ChunkedArray],
    margin: pa.ChunkedArray,
    tokens: Sequence[pa.ChunkedArray],
) -> pa.Table:
    """Pairs of `pair_in` as a table; `scores` and `tokens` are those of chosen and rejected."""
    table = pa.Table.from_pylist(made, schema=_schema(columns))
    for name, column in _beside(source, scores, margin, tokens).items():
        table = table.append_column(name, column)
    return table


def _beside(
    source: pa.ChunkedArray,
    scores: Sequence[pa.ChunkedArray],
    margin: pa.ChunkedArray,
    tokens: Sequence[pa.ChunkedArray],
) -> dict[str, Any]:
    return {
        "source": source,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
        "score_margin": margin,
        "tokens_chosen": tokens[0],
        "tokens_rejected": tokens[1],
    }


def _schema(columns: Columns) -> pa.Schema:
    side = pa.string() if columns is Columns.VERL else _MESSAGES
    match columns:
        case Columns.SKYWORK:
            fields = [("chosen", side), ("rejected", side)]
        case Columns.LLAMA_FACTORY:
            fields = [("conversations", side), ("chosen", _MESSAGE), ("rejected", _MESSAGE)]
        case _:
            fields = [("prompt", side), ("chosen", side), ("rejected", side)]
    return pa.schema(fields)


def pair_in(
    columns: Columns, prompt: str | Messages, chosen: str | Messages, rejected: str | Messages
) -> dict[str, Any]:
    """One pair in the columns of `_schema`; raises Unfit."""
    prompt = _messages(prompt, "user")
    chosen, rejected = _messages(chosen, "assistant"), _messages(rejected, "assistant")
    match columns:
        case Columns.SKYWORK:
            return {"chosen": prompt + chosen, "rejected": prompt + rejected}
        case Columns.LLAMA_FACTORY:
            _require_turns(prompt)
            return {
                "conversations": prompt,
                "chosen": _only(chosen, "assistant"),
                "rejected": _only(rejected, "assistant"),
            }
        case Columns.VERL:
            return {
                "prompt": _only(prompt, "user")["content"],
                "chosen": _only(chosen, "assistant")["content"],
                "rejected": _only(rejected, "assistant")["content"],
            }
        case _:
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _messages(part: str | Messages, role: str) -> Messages:
    """Messages of role and text alone. Arrow gives every message of a column all keys of any, so
    a key that only some have would come back as null, and templates ask whether it is there."""
    messages = [{"role": role, "content": part}] if isinstance(part, str) else part
    for message in messages:
        extra = sorted(
            key
            for key, value in message.items()
            if key not in ("role", "content") and value is not None
        )
        if extra:
            raise Unfit(
                f"a message has {', '.join(extra)}, which trainers' layouts have no place for"
            )
        if not isinstance(message.get("content"), str):
            raise Unfit("the content of a message is no text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _only(messages: Messages, role: str) -> dict[str, Any]:
    if [message["role"] for message in messages] != [role]:
        raise Unfit(f"this layout takes one message of the {role} there")
    return messages[0]


def _require_turns(prompt: Messages) -> None:
    """LLaMA-Factory empties, with a warning, what does not alternate from user to user."""
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if len(turns) % 2 == 0 or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise Unfit("the prompt's turns do not go from user to user")
