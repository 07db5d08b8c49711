"""Quantised checkpoints give the scores of the float weights that they stand for.

The tiny checkpoints are made here from the formats' definitions: number times scale is the weight.
"""

import importlib.util
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from batch_scorer.backends.device import cpu_has_amx
from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.plain import plain_scores
from batch_scorer.backends.streaming import streamed_scores
from batch_scorer.errors import ModelError
from batch_scorer.judges.page import Generation, Page, VerdictRule
from batch_scorer.models.directory import inspect_model, read_model_files
from batch_scorer.models.fit import check_fit
from batch_scorer.models.quantised import as_stored, vllm_config
from batch_scorer.models.registry import adapter_named
from batch_scorer.models.weights import checkpoint_tensors
from tests.helpers.language_models import (
    next_token_probabilities,
    plain_reply,
    random_language_model,
)
from tests.parity.tiny_models import (
    TOLERANCE,
    build_model,
    change_config,
    change_weights,
    engine_settings,
    load_reference,
    random_sequences,
    reference_scores,
    tokenized,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = random_sequences(12)
FP8_MAX = 448.0  # the largest number of float8_e4m3fn
IS_LINEAR = re.compile(r"_proj\.weight$")
IS_LINEAR_OR_HEAD = re.compile(r"(_proj|^lm_head)\.weight$")
PATTERN = VerdictRule(by="pattern", pattern="(A|B)", choices={"A": 1, "B": 0})
JUDGE = Page.model_validate(
    {
        "about": "A test.",
        "mode": "pointwise",
        "messages": [{"role": "user", "content": "{{ response }}"}],
        "verdict": {"by": "probability", "choices": {"A": 1, "B": 0, "C": 0.5}},
    }
)

NOISE = 0.2
"""How close two logits may be for 8 bits and bfloat16 to change their places, where logits have a
standard deviation of 3.2. Seen: up to 0.06."""

Quantise = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A weight → its tensors by what follows the weight's name, and the weight that they stand for."""


def in_blocks(height: int, width: int, end: str) -> Quantise:
    """FP8 with one scale for each block, those at the edges smaller."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        grid = torch.empty(-(-rows // height), -(-columns // width))
        numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        meant = torch.empty(rows, columns)
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                block = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
                grid[i, j] = weight[block].abs().max() / FP8_MAX
                numbers[block] = (weight[block] / grid[i, j]).to(torch.float8_e4m3fn)
                meant[block] = numbers[block].float() * grid[i, j]
        return {"": numbers, end: grid}, meant

    return quantise


def fp8_of_tensor(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / FP8_MAX
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"": numbers, "_scale": scale.reshape(1)}, numbers.float() * scale


def fp8_of_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / FP8_MAX
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"": numbers, "_scale": scale}, numbers.float() * scale


def int8_of_rows(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    numbers = (weight / scale).round().to(torch.int8)
    return {"": numbers, "_scale": scale}, numbers.float() * scale


def int8_up_to_63(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 63
    numbers = (weight / scale).round().to(torch.int8)
    return {"": numbers, "_scale": scale}, numbers.float() * scale


def int8_with_zero_points(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    least, most = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    scale = (most - least) / 255
    zero_point = (-128 - least / scale).round().clamp(-128, 127).to(torch.int8)
    numbers = (weight / scale).round() + zero_point
    numbers = numbers.clamp(-128, 127).to(torch.int8)
    meant = (numbers.float() - zero_point.float()) * scale
    return {"": numbers, "_scale": scale, "_zero_point": zero_point}, meant


def int8_of_groups(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, 16))
    scale = groups.abs().amax(dim=2) / 127
    numbers = (groups / scale[..., None]).round()
    return (
        {"": numbers.flatten(1).to(torch.int8), "_scale": scale},
        (numbers * scale[..., None]).flatten(1),
    )


def packed(method: str, bits: int, *, older: bool = True, shuffled: bool = False) -> Quantise:
    """GPTQ's and AWQ's words, filled number by number; groups of 16 inputs."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        outputs, inputs = weight.shape
        group = torch.arange(inputs) // 16
        if shuffled:  # as GPTQ's desc_act leaves the inputs
            group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
        count, largest = int(group.max()) + 1, 2**bits - 1
        scales, zeros = torch.empty(count, outputs), torch.empty(count, outputs, dtype=torch.long)
        numbers = torch.empty(inputs, outputs, dtype=torch.long)
        meant = torch.empty(outputs, inputs)
        for g in range(count):
            part = weight[:, group == g]
            least, most = part.amin(dim=1).clamp(max=0), part.amax(dim=1).clamp(min=0)
            scales[g] = ((most - least) / largest).half().float()
            zeros[g] = (-least / scales[g]).round().clamp(1, largest)
            found = (part / scales[g][:, None] + zeros[g][:, None]).round().clamp(0, largest)
            numbers[group == g] = found.long().T
            meant[:, group == g] = (found - zeros[g][:, None]) * scales[g][:, None]
        is_awq = method == "awq"
        stored_zeros = zeros if is_awq or not older else zeros - 1
        words = in_words(numbers, bits, is_awq) if is_awq else in_words(numbers.T, bits, False).T
        tensors = {
            "qweight": words.contiguous(),
            "qzeros": in_words(stored_zeros, bits, is_awq),
            "scales": scales.half(),
        }
        return tensors | ({} if is_awq else {"g_idx": group.int()}), meant

    return quantise


def in_words(numbers: Tensor, bits: int, is_awq: bool) -> Tensor:
    """int32[rows, columns * bits / 32]; AWQ puts even columns before odd ones in every word."""
    rows, columns = numbers.shape
    per_word = 32 // bits
    order = [0, 2, 4, 6, 1, 3, 5, 7] if is_awq else range(per_word)
    words = np.zeros((rows, columns // per_word), dtype=np.uint32)
    for word in range(columns // per_word):
        for place, column in enumerate(order):
            number = numbers[:, word * per_word + column].numpy().astype(np.uint32)
            words[:, word] |= number << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32).copy())


def in_codes(kind: str, *, nested: bool = False, block_size: int = 64) -> Quantise:
    """bitsandbytes' own codes, and its own numbers for them. But where blocks run over the ends of
    rows its kernel for CPUs reads them wrongly (findings/)."""

    def quantise(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(
            weight, blocksize=block_size, compress_statistics=nested, quant_type=kind
        )
        scales = state.absmax
        if nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        places = torch.stack((codes >> 4, codes & 15), dim=-1).flatten()[: weight.numel()]
        scales = scales.repeat_interleave(block_size)[: weight.numel()]
        meant = (state.code[places.long()] * scales).reshape(weight.shape)
        if weight.shape[1] % block_size == 0:
            torch.testing.assert_close(meant, functional.dequantize_4bit(codes, state))
        parts = {f"weight.{end}": part for end, part in state.as_dict(packed=True).items()}
        return {"weight": codes} | parts, meant

    return quantise


def llm_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    from bitsandbytes import functional

    numbers, largest, _ = functional.int8_vectorwise_quant(weight.half())
    meant = numbers * (largest / 127)[:, None]
    torch.testing.assert_close(meant, functional.int8_vectorwise_dequant(numbers, largest))
    parts = {"SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {"weight": numbers} | parts, meant


def compressed(form: str, strategy: str, kind: str, **weights: Any) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True, "symmetric": True}
    group = {
        "weights": {
            "num_bits": 8,
            "type": kind,
            "strategy": strategy,
            "symmetric": True,
            **weights,
        },
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "score"],
        "kv_cache_scheme": None,
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BITSANDBYTES = {"quant_method": "bitsandbytes"}
INT8_OF_ROWS = compressed("int-quantized", "channel", "int")
FORMATS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "fp8 blocks": (in_blocks(32, 32, "_scale_inv"), FP8 | {"weight_block_size": [32, 32]}),
    "fp8 blocks, cut at the edges": (
        in_blocks(48, 40, "_scale_inv"),
        FP8 | {"weight_block_size": [48, 40]},
    ),
    "fp8 tensor": (fp8_of_tensor, FP8 | {"weight_block_size": None}),
    "float-quantized tensor": (fp8_of_tensor, compressed("float-quantized", "tensor", "float")),
    "float-quantized channel": (fp8_of_rows, compressed("float-quantized", "channel", "float")),
    "float-quantized block": (
        # compressed-tensors itself reads only blocks that divide the weight (findings/).
        in_blocks(32, 16, "_scale"),
        compressed("float-quantized", "block", "float", block_structure=[32, 16]),
    ),
    "gptq": (packed("gptq", 4), {"quant_method": "gptq", "bits": 4, "group_size": 16}),
    "gptq, inputs shuffled": (
        packed("gptq", 4, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
    ),
    "gptq, 8 bits, version 2": (
        packed("gptq", 8, older=False),
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (packed("awq", 4), {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "bitsandbytes nf4": (
        in_codes("nf4", block_size=32),
        BITSANDBYTES | {"load_in_4bit": True},
    ),
    "bitsandbytes nf4, nested": (in_codes("nf4", nested=True), BITSANDBYTES),
    "bitsandbytes fp4": (in_codes("fp4", block_size=32), BITSANDBYTES),
    "bitsandbytes fp4, blocks cut": (in_codes("fp4", nested=True, block_size=4096), BITSANDBYTES),
    "bitsandbytes int8": (llm_int8, BITSANDBYTES | {"load_in_8bit": True}),
    "int-quantized channel": (int8_of_rows, INT8_OF_ROWS),
    "int-quantized zero points": (
        int8_with_zero_points,
        compressed("int-quantized", "channel", "int", symmetric=False),
    ),
    "int-quantized group": (
        int8_of_groups,
        compressed("int-quantized", "group", "int", group_size=16),
    ),
}


def write(
    plain: Path,
    folder: Path,
    quantise: Quantise,
    config: dict[str, Any],
    is_linear: re.Pattern[str] = IS_LINEAR,
) -> tuple[Path, Path]:
    """The model quantised, and the float model that it stands for."""
    quantised, meant = folder / "quantised", folder / "meant"
    for copy in (quantised, meant):
        shutil.copytree(plain, copy)
    parts = {
        name: quantise(tensor)
        for name, tensor in load_file(plain / "model.safetensors").items()
        if is_linear.search(name)
    }
    is_packed = config["quant_method"] in ("gptq", "awq", "bitsandbytes")
    stored = {
        (name.removesuffix("weight") if is_packed else name) + end: tensor
        for name, (tensors, _) in parts.items()
        for end, tensor in tensors.items()
    }
    gone = parts.keys() if is_packed else ()
    change_weights(
        quantised, lambda weights: {n: t for n, t in weights.items() if n not in gone} | stored
    )
    change_weights(meant, lambda weights: weights | {n: values for n, (_, values) in parts.items()})
    change_config(quantised, quantization_config=config)
    return quantised, meant


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantised") / "llama"
    build_model("llama", path, num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_language_model(tmp_path_factory.mktemp("quantised") / "judge")


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_weights_are_what_the_numbers_stand_for(name: str, llama: Path, tmp_path: Path) -> None:
    quantised, meant = write(llama, tmp_path, *FORMATS[name])
    files = read_model_files(quantised)
    read = dict(checkpoint_tensors(files, lambda name: True))
    expected = load_file(meant / "model.safetensors")
    assert read.keys() == expected.keys() == files.shapes.keys()
    for tensor_name, tensor in expected.items():
        torch.testing.assert_close(read[tensor_name], tensor, rtol=1e-6, atol=0)
    family = adapter_named("sequence_classifier")
    check_fit(files, family, embeds=False, trust_remote_code=False)
    facts = inspect_model(quantised)
    assert facts.quantisation is not None
    assert any("stand for float32 ones" in change for change in facts.changes)


@pytest.mark.parametrize(
    "name",
    [
        "fp8 blocks, cut at the edges",
        "int-quantized zero points",
        "gptq",
        "awq",
        "bitsandbytes nf4, nested",
        "bitsandbytes int8",
    ],
)
def test_engine_and_reference_score_with_them(name: str, llama: Path, tmp_path: Path) -> None:
    quantised, meant = write(llama, tmp_path, *FORMATS[name])
    expected = reference_scores(load_reference(meant), SEQUENCES)
    before = reference_scores(load_reference(llama), SEQUENCES)
    assert np.abs(expected - before).max() > 10 * TOLERANCE, "quantising moved nothing"
    settings = engine_settings(quantised)
    backend = HFBackend(settings)
    values = backend.score(tokenized(SEQUENCES)).values
    np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)
    for scores in (plain_scores, streamed_scores):
        values = scores(settings, tokenized(SEQUENCES)).values
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_linear", [IS_LINEAR, IS_LINEAR_OR_HEAD], ids=["body", "head too"])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_judge_gives_the_probabilities_of_the_float_weights(
    name: str, is_linear: re.Pattern[str], judge: Path, tmp_path: Path
) -> None:
    """The language model's head may be quantised too, or left as it was."""
    quantised, meant = write(judge, tmp_path, *FORMATS[name], is_linear=is_linear)
    assert ("lm_head.weight" in read_model_files(quantised).scales) == (is_linear is not IS_LINEAR)
    wanted, before = (next_token_probabilities(path, SEQUENCES) for path in (meant, judge))
    moved = np.abs(wanted - before).max(axis=0)
    choices = np.argsort(-moved)[:3]
    assert moved[choices].min() > 10 * TOLERANCE, "quantising moved nothing"
    settings = engine_settings(
        quantised, adapter=adapter_named("judge"), judge=JUDGE, verdict_ids=tuple(choices.tolist())
    )
    with closing(HFBackend(settings)) as backend:
        values = backend.score(tokenized(SEQUENCES)).values
    np.testing.assert_allclose(values, wanted[:, choices], rtol=0, atol=TOLERANCE)
    values = plain_scores(settings, tokenized(SEQUENCES)).values
    np.testing.assert_allclose(values, wanted[:, choices], rtol=0, atol=TOLERANCE / 10)


def test_experts_and_the_head_are_read_as_well(tmp_path: Path) -> None:
    """transformers stacks Mixtral's experts while it loads them; the head stays float32."""
    build_model("mixtral", tmp_path / "plain")
    is_linear = re.compile(r"(_proj|\.w[123]|^score)\.weight$")
    quantised, meant = write(
        tmp_path / "plain", tmp_path, *FORMATS["fp8 tensor"], is_linear=is_linear
    )
    assert sum(".experts." in name for name in read_model_files(quantised).scales) == 4 * 4 * 3
    expected = reference_scores(load_reference(meant), SEQUENCES)
    settings = engine_settings(quantised, dtype="float32")
    values = HFBackend(settings).score(tokenized(SEQUENCES)).values
    np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)


def test_zero_points_that_overflow_are_refused(llama: Path, tmp_path: Path) -> None:
    quantise, config = FORMATS["gptq"]
    quantised, _ = write(llama, tmp_path, quantise, config)
    name = "model.layers.0.mlp.up_proj.qzeros"
    change_weights(quantised, lambda old: old | {name: torch.full_like(old[name], -1)})
    with pytest.raises(ModelError, match="qzeros has zero points that overflow"):
        dict(checkpoint_tensors(read_model_files(quantised), lambda name: True))


def test_transformers_dequantises_blocks_alike(llama: Path, tmp_path: Path) -> None:
    """Without a GPU it turns FP8 blocks into bfloat16 or float32 weights by itself."""
    quantised, _ = write(llama, tmp_path, *FORMATS["fp8 blocks"])
    ours = plain_scores(engine_settings(quantised), tokenized(SEQUENCES)).values
    theirs = reference_scores(load_reference(quantised), SEQUENCES)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True, "llm_int8_skip_modules": ["score", "o_proj"]},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_what_transformers_saves_scores_as_what_it_dequantises(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """A folder as users have it, with all names and config entries; modules may be left out.

    Every row is whole blocks: others bitsandbytes reads wrongly on CPUs (findings/).
    """
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    plain, saved = tmp_path / "plain", tmp_path / "saved"
    build_model("llama", plain, num_hidden_layers=2, intermediate_size=128)
    quantisation = BitsAndBytesConfig(**settings)
    model = AutoModelForSequenceClassification.from_pretrained(
        plain, quantization_config=quantisation, dtype=torch.float32
    )
    model.save_pretrained(saved)
    left = settings.get("llm_int8_skip_modules", ["score"])
    scales = read_model_files(saved).scales
    assert len(scales) == 2 * (7 - ("o_proj" in left))
    assert not any(name.endswith(f"{module}.weight") for name in scales for module in left)
    theirs = AutoModelForSequenceClassification.from_pretrained(saved).dequantize().float()
    expected = reference_scores(theirs.eval(), SEQUENCES)
    before = reference_scores(load_reference(plain), SEQUENCES)
    assert np.abs(expected - before).max() > 10 * TOLERANCE, "quantising moved nothing"
    ours = plain_scores(engine_settings(saved), tokenized(SEQUENCES)).values
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE / 10)


@pytest.mark.parametrize("name", [name for name in sorted(FORMATS) if "quantized" in name])
def test_compressed_tensors_gives_the_same_weights(name: str, llama: Path, tmp_path: Path) -> None:
    """Its own compressor gives the numbers above, and reads the same weights from them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    quantise, config = FORMATS[name]
    quantised, _ = write(llama, tmp_path, quantise, config)
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    weight_name = "model.layers.1.mlp.down_proj.weight"
    stored = load_file(quantised / "model.safetensors")
    prefix = weight_name.removesuffix("weight")
    parts = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    files = read_model_files(quantised)
    ((_, ours),) = checkpoint_tensors(files, weight_name.__eq__)
    theirs = compressor.decompress(dict(parts), scheme)["weight"]
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=0)
    float_weight = load_file(llama / "model.safetensors")[weight_name]
    numbers = compressor.compress({**parts, "weight": float_weight}, scheme)["weight"]
    assert (numbers.float() - parts["weight"].float()).abs().max() <= 1, "other numbers"
    assert (numbers.float() == parts["weight"].float()).float().mean() > 0.99


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's CPU build")
def test_vllm_packs_words_alike() -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

    numbers = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(in_words(numbers, 4, is_awq=True), awq_pack(numbers, 4, 64, 32))
    assert torch.equal(in_words(numbers.T, 4, is_awq=False).T, gptq_pack(numbers, 4, 64, 32))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's CPU build")
def test_vllm_computes_with_int8_as_it_is_stored(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds the activations of every token to 8 bits, which is part of the engine's error; with
    that rounding in plain Hugging Face too, the scores are the same.

    With numbers up to 63, because on CPUs without VNNI pairs of larger ones overflow.
    """
    from batch_scorer.backends.vllm import VLLMBackend

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    config = INT8_OF_ROWS | {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
    quantised, meant = write(llama, tmp_path, int8_up_to_63, config)
    exact = reference_scores(load_reference(meant), SEQUENCES)
    model = load_reference(meant)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, inputs: (_in_8_bits(inputs[0]),))
    rounded = reference_scores(model, SEQUENCES)
    # On a CPU with tiles vLLM takes no wider activations; float32 is refused (unit tests).
    dtype = "bfloat16" if cpu_has_amx() else "float32"
    backend = VLLMBackend(engine_settings(quantised, max_tokens=160, dtype=dtype))
    try:
        scores = backend.score(tokenized(SEQUENCES)).values
        assert backend.provenance["stored_quantised"] == "int8, compressed-tensors"
    finally:
        backend.close()
    if dtype == "bfloat16":
        np.testing.assert_allclose(scores, exact, rtol=0, atol=0.5)
        return
    # Where a number lies half-way between two of 8 bits, the last bit before decides.
    assert np.median(np.abs(scores - rounded)) < 1e-5 < 1e-3 < np.median(np.abs(rounded - exact))
    np.testing.assert_allclose(scores, rounded, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("fp8 blocks", None),
        ("float-quantized channel", ("ignore", ["lm_head", "score", "lm_head"])),
        ("int-quantized channel", ("ignore", ["lm_head", "score", "lm_head"])),
        ("gptq", ("lm_head", False)),
        ("awq", ("lm_head", False)),
    ],
)
def test_vllm_is_given_the_stored_body_and_a_head_of_floats(
    name: str, entry: tuple[str, Any] | None, judge: Path, tmp_path: Path
) -> None:
    quantised, meant = write(judge, tmp_path, *FORMATS[name], is_linear=IS_LINEAR_OR_HEAD)
    files, head = read_model_files(quantised), "lm_head.weight"
    given = dict(checkpoint_tensors(as_stored(files, but={head}), lambda name: True))
    stored = load_file(quantised / "model.safetensors")
    expected = {n: tensor for n, tensor in stored.items() if not n.startswith("lm_head.")}
    expected[head] = load_file(meant / "model.safetensors")[head]
    assert given.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert given[tensor_name].dtype == tensor.dtype
        torch.testing.assert_close(given[tensor_name].float(), tensor.float(), rtol=1e-6, atol=0)
    if entry is not None:
        assert vllm_config(files)[entry[0]] == entry[1]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM's CPU build")
@pytest.mark.parametrize("is_linear", [IS_LINEAR, IS_LINEAR_OR_HEAD], ids=["body", "head too"])
def test_vllm_writes_with_int8_as_it_is_stored(
    is_linear: re.Pattern[str], judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body in 8 bits, and the head as the floats that it stands for."""
    from batch_scorer.backends.vllm_generation import VLLMGenerationBackend

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    quantised, meant = write(judge, tmp_path, int8_up_to_63, INT8_OF_ROWS, is_linear)
    page = JUDGE.model_copy(update={"verdict": PATTERN, "generation": Generation(max_tokens=8)})
    settings = engine_settings(
        quantised, adapter=adapter_named("judge"), judge=page, tokenizer_dir=judge, max_tokens=160,
        dtype="bfloat16" if cpu_has_amx() else "float32",
    )  # fmt: skip
    with closing(VLLMGenerationBackend(settings)) as backend:
        assert backend.provenance["stored_quantised"] == "int8, compressed-tensors"
        found = backend.greedy(tokenized(SEQUENCES), 8)
    model: Any = AutoModelForCausalLM.from_pretrained(meant, attn_implementation="eager")
    compared = 0
    for prompt, written in zip(SEQUENCES, found, strict=True):
        ids, _ = plain_reply(model, prompt, 8, [-1], noise=NOISE)
        assert written is not None and written[: len(ids)] == ids
        compared += len(ids)
    assert compared > 24


def _in_8_bits(inputs: Tensor) -> Tensor:
    scale = inputs.abs().amax(dim=-1, keepdim=True) / 127
    return (inputs / scale).round() * scale
