"""The engine of judges that are served elsewhere (`endpoint_client.py`).

A question's token ids are the bytes of its messages as JSON (`render.rows`): the server has the
chat template and the tokenizer, and its counts of tokens are the ones that are kept.
"""

import json
from typing import Any

import numpy as np

from batch_scorer.backends.base import EngineDied, EngineSettings, MakeBackend
from batch_scorer.backends.endpoint_client import Endpoint, ServedQuestion, Usage
from batch_scorer.errors import ConfigError, RowReason
from batch_scorer.records import Effort, Reply, RowError, Scores, TokenizedRows


class EndpointBackend:
    """A judge behind an OpenAI-compatible server; see `Backend` for what it does. Where the page
    lets it write, `Scores.values` is float32[S, 0] and what it wrote is in `Scores.replies`.

    Raises ConfigError where the key cannot be had, or the server refuses the settings or what the
    page needs.
    """

    def __init__(self, settings: EngineSettings) -> None:
        assert settings.judge is not None and settings.endpoint is not None
        self._page = settings.judge
        self._client = Endpoint(settings.endpoint, settings.judge)
        self._client.try_out()
        self.num_outputs = 0 if self._page.generates else len(self._page.verdict.choices)
        self.provenance: dict[str, Any] = self._client.provenance

    def score(self, rows: TokenizedRows) -> Scores:
        """The replies to all questions in `rows`, or the probabilities of their choices.

        Raises EngineDied where the server refuses the settings that it has taken before: the next
        engine's trial then says why.
        """
        try:
            return self._score(rows)
        except ConfigError as error:
            raise EngineDied(str(error)) from error

    def _score(self, rows: TokenizedRows) -> Scores:
        asked = np.flatnonzero(rows.lengths)
        questions = [_question(rows, sequence) for sequence in asked.tolist()]
        values = np.full((rows.num_sequences, self.num_outputs), np.nan, np.float32)
        scores = Scores(values, prompt_tokens=np.zeros(rows.num_sequences, np.int32))
        assert scores.prompt_tokens is not None
        if self._page.generates:
            written, usage = self._client.ask(questions)
            replies: list[Reply | None] = [None] * rows.num_sequences
            for sequence, reply in zip(asked.tolist(), written, strict=True):
                replies[sequence] = reply
                scores.prompt_tokens[sequence] = reply.prompt_tokens
            scores.replies = replies
        else:
            found, usage = self._client.probabilities(questions)
            # A choice that is not among the most probable tokens is as improbable as can be told.
            values[asked] = np.nan_to_num(found.values)
            scores.prompt_tokens[asked] = found.prompt_tokens
            for place, detail in found.errors.items():
                sequence = int(asked[place])
                values[sequence] = np.nan
                scores.errors[sequence] = RowError(RowReason.ENGINE_ERROR, detail)
        scores.effort = _effort(usage)
        self.provenance = self._client.provenance  # who answered is known by now
        return scores

    def close(self) -> None:
        """Nothing is held between shards."""


def _question(rows: TokenizedRows, sequence: int) -> ServedQuestion:
    start, stop = rows.sequence_offsets[sequence : sequence + 2]
    messages = json.loads(rows.token_ids[start:stop].astype(np.uint8).tobytes())
    seed = 0 if rows.seeds is None else int(rows.seeds[sequence])
    verdicts = 1 if rows.verdicts is None else int(rows.verdicts[sequence])
    return ServedQuestion(messages, seed, verdicts)


def _effort(usage: Usage) -> Effort:
    return Effort(
        num_batches=usage.requests,
        computed_tokens=usage.prompt_tokens - usage.cached_prompt_tokens,
        shared_tokens=usage.cached_prompt_tokens,
        generated_tokens=usage.generated_tokens,
    )


BACKEND: MakeBackend = EndpointBackend
