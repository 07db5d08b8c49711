"""A model read layer by layer gives the scores of the model read whole."""

import sys
import threading
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from batch_scorer.backends import plain
from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.plain import Road, plain_scores, reference_road
from batch_scorer.backends.streaming import LayerByLayer, can_stream, streamed_scores
from batch_scorer.config import load_config
from batch_scorer.errors import ModelError
from batch_scorer.models.registry import EMBEDDING, adapter_named
from batch_scorer.records import Embedding
from batch_scorer.runs.preview import check
from tests.helpers.inputs import pairs, parquet
from tests.helpers.tiny import tiny_reward_model
from tests.parity.families import FAMILIES
from tests.parity.tiny_models import (
    ModelDir,
    build_model,
    change_weights,
    engine_settings,
    random_sequences,
    tokenized,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = [*random_sequences(6), [7]]
ROWS = tokenized(SEQUENCES)


def assert_same(settings: EngineSettings, rows: Any = ROWS, tolerance: float = 1e-6) -> None:
    streamed, whole = streamed_scores(settings, rows), plain_scores(settings, rows)
    assert np.isfinite(whole.values).any()
    np.testing.assert_allclose(streamed.values, whole.values, rtol=0, atol=tolerance)
    assert streamed.errors == whole.errors
    if whole.step_values is not None:
        np.testing.assert_allclose(streamed.step_values, whole.step_values, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "float32"), ("gemma2", "float32"), ("gemma2", "bfloat16"), ("gpt2", "float32")],
)
def test_a_sequence_classifier(name: str, dtype: str, model_dir: ModelDir) -> None:
    """Gemma-2 has layers of two kinds and a softcap; GPT-2 names its layers in another way."""
    assert_same(engine_settings(model_dir(name), dtype=dtype))
    assert can_stream(engine_settings(model_dir(name)))


@pytest.mark.parametrize(
    "name",
    ["openrlhf_value_head-plain", "token_logit", "internlm2_reward", "qwen2_math_prm", "armorm"],
)
def test_a_body_with_a_head_of_its_own(name: str, tmp_path: Path) -> None:
    """The value head is on Qwen2; internlm2_reward renames and splits the tensors of its layers."""
    family = next(family for family in FAMILIES if family.id == name)
    known = family.build(tmp_path / family.directory)
    settings = engine_settings(known.model_dir, adapter=adapter_named(family.adapter))
    assert_same(settings, tokenized(known.sequences[:6]))


def test_fused_experts(tmp_path: Path) -> None:
    """Stored one by one; transformers 5 stacks a layer's experts while it loads them."""
    build_model("mixtral", tmp_path)
    assert_same(engine_settings(tmp_path))


def test_an_embedding(model_dir: ModelDir) -> None:
    embedding = Embedding("mean", normalize=True)
    assert_same(engine_settings(model_dir("qwen3"), adapter=EMBEDDING, embedding=embedding))


def test_every_layer_is_read_once_and_none_stays(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    hold = LayerByLayer.hold

    def counted(self: LayerByLayer, index: int) -> None:
        hold(self, index)
        held.append(index)
        in_memory = {
            number
            for number, layer in enumerate(self._layers)
            for weight in layer.parameters()
            if not weight.is_meta
        }
        assert in_memory == {index}

    monkeypatch.setattr(LayerByLayer, "hold", counted)
    streamed_scores(engine_settings(model_dir("llama")), ROWS)
    assert held == [0, 1, 2, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of the memory")
def test_no_more_than_two_layers_are_in_memory(tmp_path: Path) -> None:
    """Mapped pages of the file counted in. glibc kept the weights of former layers in the heaps of
    their threads, and MKL buffers for the thread of every sequence."""
    layers, hidden, vocabulary = 7, 1152, 500
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=18,
        num_key_value_heads=6,
        vocab_size=vocabulary,
        num_labels=1,
        pad_token_id=0,
    )
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(config)
    weights = {
        name: torch.zeros(weight.shape, dtype=torch.bfloat16)
        for name, weight in skeleton.state_dict().items()
    }
    wide = tmp_path / "wide"
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(wide)
    save_file(weights, wide / "model.safetensors")
    of_a_layer = sum(4 * w.numel() for name, w in weights.items() if ".layers.0." in name)
    others = 4 * vocabulary * hidden
    del weights
    build_model("llama", tmp_path / "small")
    # A process of its own: in ours the heaps of earlier tests would be counted.
    with get_context("spawn").Pool(1) as process:
        peak = process.apply(peak_of_streaming, (wide, tmp_path / "small"))
    assert peak < 2 * of_a_layer + others


def peak_of_streaming(model: Path, small: Path) -> int:
    """Bytes of memory that streaming `model` adds to a process that has streamed another."""
    torch.set_num_threads(1)
    rows = tokenized([[*range(3, 27)] for _ in range(12)])
    streamed_scores(engine_settings(small), rows)  # now all code is loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_bytes("VmRSS")
    streamed_scores(engine_settings(model), rows)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def test_a_sequence_that_fails_ends_all(model_dir: ModelDir) -> None:
    before = threading.active_count()
    with pytest.raises(IndexError):
        streamed_scores(engine_settings(model_dir("llama")), tokenized([*SEQUENCES, [10**6]]))
    assert threading.active_count() == before


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    build_model("llama", tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    change_weights(tmp_path, lambda weights: {n: w for n, w in weights.items() if n != name})
    for scores in (streamed_scores, plain_scores):
        with pytest.raises(ModelError, match=r"lacks weights of LlamaFor.*layers\.2\.mlp\.up_proj"):
            scores(engine_settings(tmp_path), ROWS)


def test_the_road_depends_on_the_memory(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, encoder = (engine_settings(model_dir(name)) for name in ("llama", "bert"))
    assert reference_road(decoder) == reference_road(encoder) == Road("float32", streamed=False)
    monkeypatch.setattr(plain, "_available_memory", lambda: 0)
    assert reference_road(decoder) == Road("float32", streamed=True)
    assert reference_road(encoder) == Road("bfloat16", streamed=False)


def test_the_gate_streams_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_reward_model(tmp_path / "model")
    (tmp_path / "pairs.parquet").write_bytes(parquet(pairs(8)))
    config = load_config(
        model=str(model),
        inputs=(str(tmp_path / "pairs.parquet"),),
        output=str(tmp_path / "out"),
        use_ray=False,
        dtype="bfloat16",
    )
    whole = check(config).report
    monkeypatch.setattr(plain, "_available_memory", lambda: 0)
    streamed = check(config).report
    assert (streamed.reference_dtype, streamed.reference_streamed) == ("float32", True)
    assert streamed.agrees and streamed.allowed_worst == pytest.approx(whole.allowed_worst)
    assert not whole.reference_streamed
