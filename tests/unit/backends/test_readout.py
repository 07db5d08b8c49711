"""Which tokens are read: what is told in bulk is what one sequence at a time gives."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.readout import Readout
from batch_scorer.models.adapter import LastToken, ModelFiles
from batch_scorer.models.registry import adapter_named
from batch_scorer.records import Embedding, PooledTokens, RowError, TokenizedRows

PAD, END, WORD = 0, 1, 2
CONFIG = LlamaConfig(
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    pad_token_id=PAD,
    eos_token_id=END,
)
SEQUENCES = st.lists(st.lists(st.sampled_from([PAD, END, WORD]), max_size=4), max_size=6)


def _rows(sequences: list[list[int]]) -> TokenizedRows:
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    ids = np.array([i for sequence in sequences for i in sequence], dtype=np.int32)
    places = np.arange(len(offsets), dtype=np.int64)
    return TokenizedRows(ids, offsets, places, np.zeros(len(sequences), np.int32), {}, {})


def _readout(embedding: Embedding) -> Readout:
    """Without a head, which would be loaded."""
    settings = EngineSettings(Path(), dtype="float32", device="cpu", embedding=embedding)
    no_files = ModelFiles(Path(), "", {}, {})
    return Readout(settings, no_files, adapter_named("sequence_classifier"), CONFIG)


def _lists(pooled: PooledTokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(pooled.positions, pooled.offsets[1:-1])]


@pytest.mark.parametrize(
    "pooling",
    [LastToken(), LastToken(skips_pad=True), LastToken(must_be="eos_token_id")],
    ids=["last", "skips pad", "must be"],
)
@given(SEQUENCES)
def test_last_tokens_in_bulk_are_those_found_one_by_one(
    pooling: LastToken, sequences: list[list[int]]
) -> None:
    readout = _readout(Embedding("last", False))
    readout._pooling = pooling
    pooled, errors = readout.pooled_tokens(_rows(sequences))
    expected = [
        pooling.positions(np.array(ids, np.int32), CONFIG.to_dict()) if ids else np.zeros(0)
        for ids in sequences
    ]
    assert {i: e for i, e in enumerate(expected) if isinstance(e, RowError)} == errors
    if sequences:
        assert _lists(pooled) == [[] if isinstance(e, RowError) else e.tolist() for e in expected]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("last", [[2], [], [0]]), ("mean", [[0, 1, 2], [], [0]]), ("cls", [[0], [], [0]])],
)
def test_an_embedding_reads_what_it_pools(pooling: str, expected: list[list[int]]) -> None:
    readout = _readout(Embedding(pooling, False))  # type: ignore[arg-type]
    pooled, errors = readout.pooled_tokens(_rows([[WORD, END, PAD], [], [PAD]]))
    assert (_lists(pooled), errors) == (expected, {})
