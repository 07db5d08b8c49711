"""Parsed rows → token ids: of the rows' own sequences, or of a judge's questions about them."""

import json
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from batch_scorer.config import Config
from batch_scorer.models.directory import ModelFacts
from batch_scorer.models.files import read_json
from batch_scorer.records import ParsedRows, RowError, TokenizedRows
from batch_scorer.render.questions import ask, seeds_of
from batch_scorer.render.renderer import max_tokens_of, renderer_of


class Tokenizing(Protocol):
    """A model and its settings, which say how rows become its token ids."""

    @property
    def config(self) -> Config: ...

    @property
    def model(self) -> ModelFacts: ...


def tokenized_for(parsed: ParsedRows, models: Sequence[Tokenizing]) -> list[TokenizedRows]:
    """`tokenized` for each of them; once, and as one object, for all that read the same ids."""
    made: dict[Hashable, TokenizedRows] = {}
    found = []
    for place, each in enumerate(models):
        key = _ids_of(each.config, each.model) or place
        if key not in made:
            made[key] = tokenized(parsed, each.config, each.model)
        found.append(made[key])
    return found


def _ids_of(config: Config, model: ModelFacts) -> Hashable | None:
    """What the token ids of all rows follow from; None where that is not known for certain."""
    if config.trust_remote_code or model.judge is not None or not model.tokenizer_digest:
        return None
    suffix = None
    if (name := model.prompt.suffix_id_of) is not None:
        suffix = read_json(model.path / "config.json").get(name)
    return (
        *(model.tokenizer_digest, model.prompt, suffix, model.vocab_size),
        *(max_tokens_of(config, model), config.over_length, config.fast_tokenizer),
    )


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
