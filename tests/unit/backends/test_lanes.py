"""Threads that compute in parallel: each with its share of the cores, whatever ran before."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.hf import HFBackend
from tests.parity.tiny_models import random_sequences, tokenized


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_engine_gives_the_same_bits(tiny_model: Path) -> None:
    """Products have other last bits with another number of threads, of which MKL keeps one for the
    whole process: the first engine's lanes once found another than those of later ones."""
    rows = tokenized([[number % 500 for number in ids] for ids in random_sequences(12)])
    values = []
    for _ in range(4):
        backend = HFBackend(EngineSettings(tiny_model, dtype="float32", device="cpu"))
        values += [backend.score(rows).values for _ in range(2)]
        backend.close()
    for later in values[1:]:
        np.testing.assert_array_equal(later, values[0])
