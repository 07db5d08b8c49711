"""Parsed rows → token ids: of the rows' own sequences, or of a judge's questions about them."""

import json
from dataclasses import replace

import numpy as np

from batch_scorer.config import Config
from batch_scorer.models.directory import ModelFacts
from batch_scorer.records import ParsedRows, RowError, TokenizedRows
from batch_scorer.render.questions import ask, seeds_of
from batch_scorer.render.renderer import renderer_of


def tokenized(parsed: ParsedRows, config: Config, model: ModelFacts) -> TokenizedRows:
    """Rows as token ids; of a judge, the questions about them. Raises ShardError for an over-long
    row under the `error` policy."""
    if model.judge is None:
        return renderer_of(config, model).tokenize(parsed)
    asked, questions = ask(parsed, model.judge, config.reasoning)
    rows = _written_out(asked) if model.is_served else renderer_of(config, model).tokenize(asked)
    seeds = seeds_of(rows, questions.votes, model.judge.generation.seed)
    return replace(rows, questions=questions, seeds=seeds, verdicts=questions.verdicts)


def _written_out(asked: ParsedRows) -> TokenizedRows:
    """Questions as messages in JSON, a byte for a token id: a served judge's server has the chat
    template and the tokenizer."""
    errors = {
        place: sequence
        for place, sequence in enumerate(asked.sequences)
        if isinstance(sequence, RowError)
    }
    texts = [
        b"" if place in errors else json.dumps(sequence, ensure_ascii=False).encode()
        for place, sequence in enumerate(asked.sequences)
    ]
    sizes = [len(text) for text in texts]
    return TokenizedRows(
        token_ids=np.frombuffer(b"".join(texts), np.uint8).astype(np.int32),
        sequence_offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
        row_offsets=asked.row_offsets,
        truncated_tokens=np.zeros(len(texts), np.int32),
        sequence_errors=errors,
        row_errors=asked.row_errors,
    )
