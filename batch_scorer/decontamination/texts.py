"""The texts of rows that are compared, from a table of a scored shard or an evaluation file."""

from itertools import pairwise
from typing import Any

import pyarrow as pa

from batch_scorer import formats
from batch_scorer.decontamination.recipe import Scope
from batch_scorer.errors import InputError, ShardError, ShardReason
from batch_scorer.formats.messages import messages_of
from batch_scorer.records import DEFAULT_BOUNDS, Conversation, RowError, TextStyle

_SAMPLED_ROWS = 100
_PROMPT_NAMES = ("prompt", "instruction", "question", "problem")
"""What a column of prompts is called wherever it stands; it is read by itself, so that a row whose
answer cannot be read has its prompt."""
_OTHER_NAMES = ("messages", "conversations", "conversation", "text")
"""What one is called in a file that has nothing to score."""


def texts_of_rows(table: pa.Table, scope: Scope, column: str | None, name: str) -> list[list[str]]:
    """The texts of each row; a row without any has an empty list. `name` is the file's, for errors.

    Raises InputError where no column has such texts.
    """
    if column is not None:
        if column not in table.column_names:
            raise InputError(f"{name}: no column {column}; there are {table.column_names}")
        return _of_column(table, column, scope)
    known = next((one for one in _PROMPT_NAMES if one in table.column_names), None)
    if scope is Scope.PROMPT and known is not None:
        return _of_column(table, known, scope)
    try:
        return _of_sequences(table, scope)
    except ShardError as error:
        names = (*_PROMPT_NAMES, *_OTHER_NAMES)
        known = next((one for one in names if one in table.column_names), None)
        if known is None:
            raise InputError(f"{name}: {error}; name the column of prompts") from None
    return _of_column(table, known, scope)


def _of_column(table: pa.Table, column: str, scope: Scope) -> list[list[str]]:
    columns, _ = formats.columns_of(table, [column], DEFAULT_BOUNDS)
    return [_texts(value, scope) for value in columns[column]]


def _of_sequences(table: pa.Table, scope: Scope) -> list[list[str]]:
    names = formats.columns_judged(table.schema, {})
    head = table.slice(0, _SAMPLED_ROWS)
    sampled, _ = formats.columns_of(head, names, DEFAULT_BOUNDS)
    layout = formats.detect(table.schema, sampled, format=None, columns={}, text_style=None)
    if scope is Scope.PROMPT and layout.text_style is TextStyle.RENDERED:
        raise ShardError(
            ShardReason.WRONG_SCHEMA, "prompt and answer are one text here: compare conversations"
        )
    columns, _ = formats.columns_of(table, formats.columns_needed(layout), DEFAULT_BOUNDS)
    parsed = formats.parse(columns, layout)
    offsets = parsed.row_offsets.tolist()
    return [
        list(
            dict.fromkeys(
                text
                for sequence in parsed.sequences[start:stop]
                if not isinstance(sequence, RowError)
                for text in _texts(sequence, scope)
            )
        )
        for start, stop in pairwise(offsets)
    ]


def _texts(value: Any, scope: Scope) -> list[str]:
    """The text of a string or of messages, none of anything else."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return []
    messages = messages_of(value, "messages")
    return [] if isinstance(messages, RowError) else _spoken(messages, scope)


def _spoken(messages: Conversation, scope: Scope) -> list[str]:
    said = [
        content
        for message in messages
        if (scope is Scope.CONVERSATION or message["role"] == "user")
        and isinstance(content := message.get("content"), str)
    ]
    text = "\n".join(said)
    return [text] if text.strip() else []
