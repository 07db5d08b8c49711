"""Quantised folders that cannot be scored are refused in one line, and engines chosen by them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batch_scorer.config import Config, Device, load_config
from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.models.directory import inspect_model
from batch_scorer.runs import engine_choice
from batch_scorer.runs.derive import derive, look_at_model
from batch_scorer.runs.engine_choice import supported_engines
from tests.helpers.language_models import random_language_model
from tests.helpers.tiny import tiny_reward_model
from tests.parity.tiny_models import change_config, change_weights

WEIGHT = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token"},
        }
    },
}
WEIGHT_ONLY = {**W8A8, "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}

Quantise = Callable[..., Path]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def quantised(plain: Path, tmp_path: Path) -> Quantise:
    """A copy of the model with this quantization_config, and these tensors over its own."""

    def make(config: dict[str, Any] | None, **tensors: torch.Tensor) -> Path:
        copy = tmp_path / "model"
        copy.mkdir()
        for file in plain.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        weights = {**load_file(plain / "model.safetensors"), **tensors}
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            stored = json.loads((copy / "config.json").read_text())
            stored["quantization_config"] = config
            (copy / "config.json").write_text(json.dumps(stored))
        return copy

    return make


def fp8(grid: tuple[int, ...] = (4, 2)) -> dict[str, torch.Tensor]:
    """One weight, [128, 64], in blocks of 32 x 32."""
    return {
        WEIGHT: torch.ones(128, 64).to(torch.float8_e4m3fn),
        f"{WEIGHT}_scale_inv": torch.full(grid, 0.01),
    }


def int8() -> dict[str, torch.Tensor]:
    scales = {f"{WEIGHT}_scale": torch.full((128, 1), 0.01)}
    return {WEIGHT: torch.ones(128, 64, dtype=torch.int8), **scales}


BITSANDBYTES = {"quant_method": "bitsandbytes"}
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
SCB = f"{WEIGHT[:-6]}SCB"


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def nf4(**state: Any) -> dict[str, torch.Tensor]:
    """The same weight in 128 blocks, whose scales are codes too."""
    stated = {"quant_type": "nf4", "blocksize": 64, "shape": [128, 64], "dtype": "float16"}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    return {
        WEIGHT: torch.zeros(128 * 32, 1, dtype=torch.uint8),
        f"{WEIGHT}.absmax": torch.zeros(128, dtype=torch.uint8),
        f"{WEIGHT}.quant_map": torch.zeros(16),
        f"{WEIGHT}.nested_absmax": torch.ones(1),
        f"{WEIGHT}.nested_quant_map": torch.zeros(256),
        STATE: as_bytes(json.dumps(stated | nested | state)),
    }


def llm_int8() -> dict[str, torch.Tensor]:
    return {WEIGHT: int8()[WEIGHT], SCB: torch.ones(128)}


def without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {n: tensor for n, tensor in tensors.items() if n != name}


def config_for(model: Path, **settings: Any) -> Config:
    settings = {"inputs": ("in.parquet",), "output": str(model.parent / "out"), **settings}
    return load_config(model=str(model), **settings)


PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (PACKED, int8(), r"quantised \(compressed-tensors, pack-quantized\), which is not"),
        ({"quant_method": "gptq", "bits": 3}, {}, r"quantised \(gptq, 3 bits\), which is not"),
        ({"quant_method": "awq", "version": "GEMV"}, {}, r"\(awq, 4 bits gemv\), which is not"),
        ({"quant_method": "gptq", "bits": 4}, {}, r"by config.json, but no tensor \*.qweight is"),
        (
            BITSANDBYTES,
            {},
            r"but no tensor \*.quant_state.bitsandbytes__nf4 or \*.SCB",
        ),
        ({"quant_algo": "NVFP4"}, {}, r"quantised \(NVFP4\), which is not supported"),
        ({**W8A8, "transform_config": {"config_groups": {"u": {}}}}, int8(), "and rotated"),
        ({**W8A8, "sparsity_config": {"format": "sparse-24-bitmask"}}, int8(), "stored sparse"),
        (W8A8, {**int8(), f"{WEIGHT[:-6]}weight_g_idx": torch.zeros(64)}, "reordered columns"),
        (FP8, {}, r"quantised \(fp8\) by config.json, but no tensor with scales is there"),
        (FP8, {**fp8(), "model.layers.1.mlp.up_proj.weight": fp8()[WEIGHT]}, "no scales beside it"),
        (FP8, fp8((3, 2)), r"is \[128, 64\], and its scales .* are \[3, 2\]"),
        (FP8, int8(), "quantised to 4 bits"),
        (None, fp8(), "config.json has no quantization_config"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    config: dict[str, Any] | None, tensors: dict[str, Any], message: str, quantised: Quantise
) -> None:
    model = quantised(config, **tensors)
    with pytest.raises(ModelError, match=message) as refused:
        look_at_model(config_for(model))
    assert "\n" not in str(refused.value) and str(model) in str(refused.value)


UP = re.escape(WEIGHT)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(nf4(), f"{WEIGHT}.absmax"), rf"weights lack {UP}\.absmax"),
        (without(nf4(), f"{WEIGHT}.quant_map"), rf"weights lack {UP}\.quant_map"),
        (without(nf4(), f"{WEIGHT}.nested_absmax"), rf"weights lack {UP}\.nested_absmax"),
        (without(nf4(), f"{WEIGHT}.nested_quant_map"), rf"lack {UP}\.nested_quant_map"),
        (without(nf4(), STATE), "but no tensor"),
        (without(nf4(), STATE) | llm_int8() | {"a.weight": nf4()[WEIGHT]}, "has no scales"),
        (nf4() | {WEIGHT: torch.zeros(128 * 31, 1, dtype=torch.uint8)}, r"be U8 \[4096, 1\]"),
        (nf4() | {WEIGHT: torch.zeros(128, 64)}, r"is F32 \[128, 64\], and should be U8"),
        (nf4() | {f"{WEIGHT}.absmax": torch.zeros(127, dtype=torch.uint8)}, r"be U8 \[128\]"),
        (nf4() | {f"{WEIGHT}.absmax": torch.zeros(128)}, r"is F32 \[128\], and should be U8"),
        (nf4() | {f"{WEIGHT}.quant_map": torch.zeros(15)}, r"is F32 \[15\], and should be"),
        (nf4() | {f"{STATE[:-3]}fp4": nf4()[STATE]}, "bitsandbytes__fp4 is there, and .*nf4 too"),
        (nf4(quant_type="int4"), r"is of type 'int4'; read are nf4 and fp4"),
        (nf4(quant_type="fp4"), r"is of type 'fp4'; read are"),
        (nf4(shape=[128, 32]), r"should be U8 \[2048, 1\]"),
        (nf4(shape=[64, 128]), r"is \[64, 128\], and .* expects \[128, 64\]"),
        (nf4(shape=[128, True]), r"shape is '\[128, True\]', and should be a list of whole"),
        (nf4(shape=None), "shape is 'None'"),
        (nf4(blocksize=0), "blocksize is '0', and should be a whole number above 0"),
        (nf4(nested_blocksize="256"), "nested_blocksize is '256'"),
        (nf4(nested_offset=float("nan")), "nested_offset is 'nan', and should be a number"),
        (nf4() | {STATE: as_bytes("{")}, "is no JSON: "),
        (nf4() | {STATE: as_bytes("[]")}, "is no JSON object"),
        (nf4() | {STATE: as_bytes("[" * 60_000)}, "is no JSON: "),
        (nf4() | {STATE: torch.zeros(99)}, r"is F32 \[99\], and should be a few bytes"),
        (nf4() | {STATE: torch.zeros(1 << 20, dtype=torch.uint8)}, "should be a few bytes"),
        (llm_int8() | {SCB: torch.ones(64)}, r"SCB is F32 \[64\], and should be"),
        (llm_int8() | {WEIGHT: torch.ones(128, 64)}, r"SCB beside it, and is F32 \[128, 64\]"),
        (llm_int8() | {f"{SCB[:-3]}weight_format": as_bytes("\2")}, "does not lie row by row"),
        (without(llm_int8(), WEIGHT) | {"a.SCB": torch.ones(1)}, "a.SCB beside it, and is not th"),
    ],
)
def test_codes_that_do_not_fit_are_refused_by_name(
    tensors: dict[str, Any], message: str, quantised: Quantise
) -> None:
    model = quantised(BITSANDBYTES, **tensors)
    with pytest.raises(ModelError, match=message) as refused:
        look_at_model(config_for(model))
    assert "\n" not in str(refused.value) and str(model) in str(refused.value)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"load_in_4bit": True}, llm_int8(), "load_in_4bit is true and .*up_proj.weight is not so"),
        ({"load_in_8bit": True}, nf4(), "load_in_8bit is true and .*up_proj.weight is not so"),
        (None, nf4(), "config.json has no quantization_config"),
        (None, llm_int8(), "config.json has no quantization_config"),
    ],
)
def test_a_config_that_contradicts_the_codes_is_refused(
    config: dict[str, Any] | None, tensors: dict[str, Any], message: str, quantised: Quantise
) -> None:
    model = quantised(None if config is None else BITSANDBYTES | config, **tensors)
    with pytest.raises(ModelError, match=message):
        look_at_model(config_for(model))


def test_codes_run_on_hf_only(quantised: Quantise) -> None:
    model = quantised(BITSANDBYTES, **nf4())
    facts = inspect_model(model, with_fit=True)
    assert facts.changes == (
        "1 weights are stored as nf4 (bitsandbytes) and stand for float32 ones",
    )
    assert supported_engines(config_for(model, backend="auto"), facts) == ["hf"]
    asked = config_for(model, backend="vllm")
    with pytest.raises(
        ModelError, match=r"vllm cannot .* \(nf4, bitsandbytes\); set backend to hf"
    ):
        supported_engines(asked, facts, Device.CUDA)


def test_scales_are_no_tensors_of_the_model(quantised: Quantise) -> None:
    """But ArmoRM's `logit_scale`, which ends like one, stays."""
    of_others = {
        "gating.logit_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    facts = inspect_model(quantised(FP8, **fp8(), **of_others))
    assert facts.quantisation is not None and facts.quantisation.name == "fp8"
    assert facts.changes == (
        "1 weights are stored in 8 bits (fp8) and stand for float32 ones",
        "1 scales of a quantised cache are not used",
    )
    assert facts.cost is not None


def test_older_compressed_tensors_names_its_entry_otherwise(quantised: Quantise) -> None:
    model = quantised(None, **int8())
    stored = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**stored, "compression_config": W8A8}))
    assert inspect_model(model).quantisation is not None


def test_engines_are_chosen_by_what_they_can_compute_with(
    quantised: Quantise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "_is_installed", lambda engine: True)
    model = quantised(FP8, **fp8())
    facts = inspect_model(model)
    auto = config_for(model, backend="auto")
    assert supported_engines(auto, facts, Device.CPU) == ["hf"]
    assert supported_engines(auto, facts, Device.CUDA) == ["hf", "vllm"]
    assert supported_engines(auto, facts) == ["hf", "vllm"]
    asked = config_for(model, backend="vllm", device="cpu", use_ray=False)
    with pytest.raises(ModelError, match=r"cannot compute with these weights \(fp8\) on dev"):
        derive(asked, look_at_model(asked))


def test_int8_on_a_cpu_needs_its_instructions(
    quantised: Quantise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "_is_installed", lambda engine: True)
    model = quantised(W8A8, **int8())
    facts = inspect_model(model)
    auto, asked = config_for(model, backend="auto"), config_for(model, backend="vllm")
    monkeypatch.setattr(engine_choice, "cpu_has_int8", lambda: False)
    assert supported_engines(auto, facts, Device.CPU) == ["hf"]
    with pytest.raises(ModelError, match="without VNNI, as this is; set backend to hf"):
        supported_engines(asked, facts, Device.CPU)
    monkeypatch.setattr(engine_choice, "cpu_has_int8", lambda: True)
    assert supported_engines(asked, facts, Device.CPU) == ["vllm"]


def test_int8_on_a_cpu_with_tiles_needs_16_bits(
    quantised: Quantise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with vLLM 0.32 on a Xeon: its kernel for tiles refuses activations of 32 bits."""
    monkeypatch.setattr(engine_choice, "cpu_has_int8", lambda: True)
    monkeypatch.setattr(engine_choice, "cpu_has_amx", lambda: True)
    model = quantised(W8A8, **int8())
    facts = inspect_model(model)
    for dtype in (None, "bfloat16"):
        asked = config_for(model, backend="vllm", dtype=dtype)
        assert supported_engines(asked, facts, Device.CPU) == ["vllm"]
    asked = config_for(model, backend="vllm", dtype="float32")
    with pytest.raises(ModelError, match="in 16 bits on a CPU with AMX"):
        supported_engines(asked, facts, Device.CPU)
    assert supported_engines(asked, facts, Device.CUDA) == ["vllm"]


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (WEIGHT_ONLY, {}),
        (W8A8, {f"{WEIGHT}_zero_point": torch.zeros(128, 1, dtype=torch.int8)}),
        (W8A8, {f"{WEIGHT}_scale": torch.ones(128, 4)}),
    ],
)
def test_int8_that_vllm_has_no_product_for_runs_on_hf_only(
    config: dict[str, Any], more: dict[str, torch.Tensor], quantised: Quantise
) -> None:
    """Float activations, zero points, several scales in a row."""
    model = quantised(config, **int8() | more)
    asked = config_for(model, backend="vllm")
    with pytest.raises(ModelError, match="vllm cannot compute with these weights"):
        supported_engines(asked, inspect_model(model), Device.CUDA)


def test_a_judge_that_writes_needs_an_engine_that_can_compute_with_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by reading: only scoring engines were refused, and a judge would have been let write
    with products that overflow."""
    monkeypatch.setattr(engine_choice, "cpu_has_int8", lambda: False)
    model = random_language_model(tmp_path / "model", intermediate_size=128)
    change_weights(model, lambda weights: weights | int8())
    change_config(model, quantization_config=W8A8)
    asked = config_for(model, task="judge", judge="critique_then_grade", backend="vllm")
    facts = look_at_model(asked)
    with pytest.raises(ModelError, match="without VNNI, as this is; use the checkpoint"):
        supported_engines(asked, facts, Device.CPU)
    assert supported_engines(asked, facts, Device.CUDA) == ["vllm"]


def test_it_is_not_quantised_twice(quantised: Quantise) -> None:
    model = quantised(FP8, **fp8())
    with pytest.raises(ConfigError, match="quantised already"):
        look_at_model(config_for(model, backend="vllm", quantization="fp8"))


def test_only_an_engine_that_computes_with_the_numbers_is_allowed_their_error(
    quantised: Quantise,
) -> None:
    """hf reads the same float weights as the gate's reference: it is held to rounding."""
    model = quantised(FP8, **fp8())
    config = config_for(model, use_ray=False, device="cuda")
    job = derive(config, look_at_model(config))
    assert not job.on_engine("hf").computes_quantised
    assert job.on_engine("vllm").computes_quantised
