"""The embedded reward model on real pairs: packed scores against plain Hugging Face."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from batch_scorer import formats
from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.hf import HFBackend
from batch_scorer.config import OverLength
from batch_scorer.models.embedded import build_embedded_model, default_embedded_directory
from batch_scorer.records import Format, Layout, TokenizedRows
from batch_scorer.render import Renderer

pytestmark = pytest.mark.e2e

PAIRS = Path(__file__).parents[1] / "data" / "pairs-500" / "hh-helpful.parquet"
LAYOUT = Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"})
NUM_PAIRS = 200
NUM_PAIRS_IN_BFLOAT16 = 50


@pytest.fixture(scope="module")
def model_dir() -> Iterator[Path]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield build_embedded_model(default_embedded_directory(), lambda line: None)
    torch.set_num_threads(before)


def tokenized(model_dir: Path, count: int) -> TokenizedRows:
    pairs = pq.read_table(PAIRS).slice(0, count)
    parsed = formats.parse(formats.columns_of(pairs)[0], LAYOUT)
    rows = Renderer(model_dir, 8192, OverLength.MARK).tokenize(parsed)
    assert rows.num_sequences == 2 * count
    return rows


@torch.inference_mode()
def plain(model_dir: Path, rows: TokenizedRows, dtype: torch.dtype) -> npt.NDArray[np.float32]:
    """float32[S]: one sequence at a time, eager attention, the model's own pooling."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="eager"
    ).eval()
    return np.array(
        [
            model(input_ids=torch.from_numpy(ids.astype(np.int64))[None])
            .logits[0, 0]
            .float()
            .item()
            for ids in np.split(rows.token_ids, rows.sequence_offsets[1:-1])
        ],
        dtype=np.float32,
    )


def packed(model_dir: Path, rows: TokenizedRows, dtype: str) -> npt.NDArray[np.float32]:
    backend = HFBackend(EngineSettings(model_dir, dtype=dtype, device="cpu"))
    return backend.score(rows).values[:, 0]


@pytest.mark.slow
def test_packed_scores_of_200_real_pairs_are_those_of_plain_hugging_face(model_dir: Path) -> None:
    rows = tokenized(model_dir, NUM_PAIRS)
    reference = plain(model_dir, rows, torch.float32)
    scores = packed(model_dir, rows, "float32")
    assert reference.std() > 0.1
    assert np.abs(scores - reference).max() <= 1e-3 * max(1.0, np.abs(reference).max())
    margins, expected = scores[::2] - scores[1::2], reference[::2] - reference[1::2]
    decided = np.abs(expected) > 1e-3
    assert (np.sign(margins) == np.sign(expected))[decided].all()


@pytest.mark.slow
def test_in_bfloat16_packing_adds_no_error(model_dir: Path) -> None:
    rows = tokenized(model_dir, NUM_PAIRS_IN_BFLOAT16)
    reference = plain(model_dir, rows, torch.float32)

    def rms_error(scores: npt.NDArray[np.float32]) -> float:
        return float(np.sqrt(np.mean((scores - reference) ** 2)))

    of_plain = rms_error(plain(model_dir, rows, torch.bfloat16))
    assert rms_error(packed(model_dir, rows, "bfloat16")) <= 1.5 * of_plain
