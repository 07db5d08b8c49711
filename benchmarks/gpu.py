"""Engines on one GPU, with models of the sizes that people score with, on real rows.

padded         transformers, padded batches of 16 in file order
sorted         the same, sorted by length under a token budget
trie KERNEL    this project's hf backend, with each attention kernel that runs here
trie compiled  the same with compiled layers and the kernel it chooses itself
vllm …         this project's vllm backend: with and without its prefix cache, and in fp8

The models are Llama-3.1-8B and Gemma-2-27B in shape; their weights are random, made on the spot
and the same for all, so nothing is fetched. Texts become ids at four characters a token, which
keeps lengths and shared prefixes and needs no tokenizer. One contestant at a time: two of these
models do not fit side by side. Utilisation is of a large bfloat16 matrix product, measured in the
contestant's own process; scores are compared with those of `padded`. The last line is the result
as JSON.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --model llama-3.1-8b --contestant padded 'trie compiled'
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from batch_scorer.backends import packed
from batch_scorer.backends.base import Backend, EngineSettings
from batch_scorer.backends.device import matmul_peak
from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.kernels import KERNELS
from batch_scorer.errors import MissingExtraError
from batch_scorer.models import registry
from batch_scorer.models.adapter import Body, ModelFiles
from batch_scorer.models.cost import ModelCost, model_cost
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.weights import body_tensors, checkpoint_tensors
from batch_scorer.records import Effort, TokenizedRows
from benchmarks.common import (
    WORKLOADS,
    Child,
    Floats,
    Padded,
    Sequences,
    agreement,
    by_length,
    command_line,
    in_a_line,
    in_file_order,
    padded_attention,
    print_table,
    report,
    tokenized,
)

REFERENCE = "padded"
PADDED_TOKEN_BUDGET = 16384
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForSequenceClassification"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForSequenceClassification"],
        "num_hidden_layers": 46,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 144,
        "attn_logit_softcapping": 50.0,
    },
}
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 500,
}

# Models


def write_model(shape: Mapping[str, Any], model_dir: Path) -> None:
    """A directory with a config and a head. In place of the body's weights stands the tensor
    `seed`, which RANDOM makes them of."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(1, shape["hidden_size"], generator=generator)
    config = {**shape, "num_labels": 1, "pad_token_id": 0}
    AutoConfig.for_model(config.pop("model_type"), **config).save_pretrained(model_dir)
    tensors = {
        "score.weight": head * 2 / shape["hidden_size"] ** 0.5,
        "seed": torch.zeros(1),
    }
    save_file(tensors, model_dir / "model.safetensors")


def random_weights(
    name: str, seed: Tensor, config: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the body, each another part of one pool of random numbers, so that 27 B of
    them take neither memory nor time."""
    for name, shape in body_shapes(config).items():
        if len(shape) == 1:  # of a norm; Gemma's are added to 1
            is_gemma = config["model_type"].startswith("gemma")
            yield name, torch.zeros(shape) if is_gemma else torch.ones(shape)
            continue
        count = int(np.prod(shape))
        numbers = pool(min(1 << 28, 4 * config["hidden_size"] * config["intermediate_size"]))
        if count > len(numbers):  # the embedding's
            numbers = numbers.repeat(-(-count // len(numbers)))
        start = zlib.crc32(name.encode()) % (len(numbers) - count + 1)
        yield name, numbers[start : start + count].view(shape)


@cache
def pool(count: int) -> Tensor:
    """As transformers begins these models: a standard deviation of 0.02."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return numbers.mul_(0.02).to(torch.bfloat16)


def body_shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """By name as in a checkpoint."""
    with torch.device("meta"):
        body = AutoModel.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(**config)
        )
    return {f"model.{name}": list(weight.shape) for name, weight in body.named_parameters()}


RANDOM = replace(registry.adapter_named("sequence_classifier"), body=Body(tensors=random_weights))


# Rows


def made_up_ids(text: str, vocabulary: int) -> list[int]:
    """One id from 1 up for every four characters, the same for the same four."""
    pieces = (text[start : start + 4] for start in range(0, len(text), 4))
    return [1 + zlib.crc32(piece.encode()) % (vocabulary - 1) for piece in pieces]


def texts(table: pa.Table) -> Iterator[str]:
    """Of pairs chosen and rejected, of rollouts prompt and response, row after row."""
    for row in table.to_pylist():
        if "responses" in row:
            yield from (dialogue(row["prompt"]) + response for response in row["responses"])
        else:
            yield from (dialogue(row["chosen"]), dialogue(row["rejected"]))


def dialogue(messages: Iterable[Mapping[str, str]]) -> str:
    return "".join(f"<|{message['role']}|>\n{message['content']}\n" for message in messages)


# Contestants


@dataclass(frozen=True)
class Setting:
    model_dir: Path
    shape: Mapping[str, Any]
    dtype: str
    device: str
    max_tokens: int


Scorer = Callable[[TokenizedRows], tuple[Floats, Effort]]


def padded(
    setting: Setting, batches: Callable[[TokenizedRows], Iterable[Sequences]] = in_file_order
) -> Scorer:
    config = AutoConfig.from_pretrained(setting.model_dir)
    files = read_model_files(setting.model_dir)
    head = checkpoint_tensors(files, RANDOM.is_head_tensor)
    model = getattr(transformers, setting.shape["architectures"][0]).from_pretrained(
        None,
        config=config,
        state_dict=dict(body_tensors(files, RANDOM)) | dict(head),
        dtype=getattr(torch, setting.dtype),
        attn_implementation=padded_attention(config),
    )
    scorer = Padded(model.to(setting.device))

    def score(rows: TokenizedRows) -> tuple[Floats, Effort]:
        places = sum(len(some) * int(rows.lengths[some].max()) for some in batches(rows))
        effort = Effort(
            computed_tokens=rows.num_tokens,
            padding_tokens=places - rows.num_tokens,
            attended_pairs=int((rows.lengths * (rows.lengths + 1)).sum()) // 2,
        )
        return scorer.score(rows, batches(rows)), effort

    return score


def engine_settings(setting: Setting) -> EngineSettings:
    return EngineSettings(
        setting.model_dir,
        dtype=setting.dtype,
        device=setting.device,
        adapter=RANDOM,
        max_tokens=setting.max_tokens,
    )


def trie(setting: Setting, kernel: str | None = None, *, compile: bool = False) -> Scorer:
    if kernel == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise MissingExtraError("flash-attn is not installed")
    # The backend chooses by itself; which kernel is no setting.
    chosen = patch.object(packed, "choose_kernel", return_value=kernel) if kernel else nullcontext()
    with chosen:
        backend = HFBackend(replace(engine_settings(setting), compile=compile))
    return partial(score_with, backend)


def vllm(
    setting: Setting, *, prefix_caching: bool = True, quantization: str | None = None
) -> Scorer:
    from batch_scorer.backends.vllm import VLLMBackend

    settings = replace(
        engine_settings(setting), prefix_caching=prefix_caching, quantization=quantization
    )
    # Its loader knows adapters by their names.
    with patch.object(registry, "adapters", return_value=(RANDOM,)):
        backend = VLLMBackend(settings)

    def score(rows: TokenizedRows) -> tuple[Floats, Effort]:
        backend._engine.clear_cache()
        return score_with(backend, rows)

    return score


def score_with(backend: Backend, rows: TokenizedRows) -> tuple[Floats, Effort]:
    scored = backend.score(rows)
    if scored.errors:
        raise RuntimeError(f"sequences without a score: {scored.errors}")
    return scored.values[:, 0], scored.effort


CONTESTANTS: dict[str, Callable[[Setting], Scorer]] = {
    REFERENCE: padded,
    "sorted": partial(padded, batches=partial(by_length, token_budget=PADDED_TOKEN_BUDGET)),
    **{f"trie {kernel}": partial(trie, kernel=kernel) for kernel in KERNELS},
    "trie compiled": partial(trie, compile=True),
    "vllm": vllm,
    "vllm without prefix cache": partial(vllm, prefix_caching=False),
    "vllm fp8": partial(vllm, quantization="fp8"),
}
NOT_IN_TINY = ("trie compiled", "vllm", "vllm without prefix cache", "vllm fp8")


# The contest


@dataclass(frozen=True)
class Turn:
    """What a contestant did with the rows of one workload, `seconds` of each round."""

    seconds: list[float]
    scores: Floats
    effort: Effort


@dataclass(frozen=True)
class Appearance:
    """`memory_gib` is the most that torch held on the device, None on a CPU."""

    load_s: float
    peak_flops: float
    memory_gib: float | None
    turns: dict[str, Turn]


def measure(
    name: str, setting: Setting, workloads: Mapping[str, TokenizedRows], rounds: int
) -> Appearance:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    peak_flops = matmul_peak(setting.device, setting.dtype)
    started = time.perf_counter()
    score = CONTESTANTS[name](setting)
    load_s = time.perf_counter() - started
    turns = {}
    for workload, rows in workloads.items():
        score(rows)
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            scores, effort = score(rows)
            seconds.append(time.perf_counter() - started)
        turns[workload] = Turn(seconds, scores, effort)
    on_gpu = setting.device == "cuda"
    memory_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Appearance(load_s, peak_flops, memory_gib, turns)


def run(
    name: str, setting: Setting, workloads: Mapping[str, TokenizedRows], rounds: int
) -> Appearance:
    """`measure` in a process of its own, which leaves the GPU empty; on a CPU in this one."""
    if setting.device == "cpu":
        return measure(name, setting, workloads, rounds)
    child = Child({})
    try:
        return child.call(measure, name, setting, workloads, rounds)
    finally:
        child.close()


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100, help="pairs or prompts of each workload")
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contestant", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.tiny:
        asked.rounds, asked.rows = 1, 3
    elif device == "cpu":
        parser.error("torch finds no CUDA device; --tiny runs on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        report("gpu", asked, contest(asked, device, Path(folder)))


def contest(asked: argparse.Namespace, device: str, folder: Path) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for model in asked.model:
        shape = SHAPES[model] | (TINY if asked.tiny else {})
        write_model(shape, folder / model)
        workloads = read_workloads(asked, shape["vocab_size"], left_out)
        setting = Setting(
            model_dir=folder / model,
            shape=shape,
            dtype="float32" if asked.tiny else "bfloat16",
            device=device,
            max_tokens=max(int(rows.lengths.max()) for rows in workloads.values()),
        )
        appearances: dict[str, Appearance] = {}
        for name in CONTESTANTS:
            if name not in asked.contestant:
                continue
            try:
                if asked.tiny and name in NOT_IN_TINY:
                    raise MissingExtraError("left out of --tiny")
                appearances[name] = run(name, setting, workloads, asked.rounds)
            except Exception as error:  # whatever somebody's library raises
                left_out[f"{model}, {name}"] = in_a_line(error)
                print(f"{model}: {name} is out: {in_a_line(error)}", flush=True)
            else:
                print(f"{model}: {name} took {appearances[name].load_s:.0f} s to load", flush=True)
        files = ModelFiles(setting.model_dir, model, shape, body_shapes(shape))
        for workload, rows in workloads.items():
            print(
                f"{model}, {workload}: {rows.num_sequences} sequences, {rows.num_tokens:,} tokens"
            )
            contestants = compare(appearances, workload, rows, model_cost(files, RANDOM))
            print_comparison(contestants)
            results.append(
                {
                    "model": model,
                    "workload": workload,
                    "sequences": rows.num_sequences,
                    "tokens": rows.num_tokens,
                    "contestants": contestants,
                }
            )
    return {
        "rounds": asked.rounds,
        "results": results,
        "left_out": left_out,
    }


def read_workloads(
    asked: argparse.Namespace, vocabulary: int, left_out: dict[str, str]
) -> dict[str, TokenizedRows]:
    workloads = {}
    for name in asked.workload:
        try:
            table = WORKLOADS[name].read(asked.rows, asked.data)
        except FileNotFoundError as error:
            left_out[name] = in_a_line(error)
        else:
            workloads[name] = tokenized([made_up_ids(text, vocabulary) for text in texts(table)])
    return workloads


def compare(
    appearances: Mapping[str, Appearance],
    workload: str,
    rows: TokenizedRows,
    cost: ModelCost | None,
) -> dict[str, dict[str, Any]]:
    """By contestant: its figures."""
    reference = appearances[REFERENCE].turns[workload]
    figures = {}
    for name, appearance in appearances.items():
        turn = appearance.turns[workload]
        seconds = statistics.median(turn.seconds)
        effort = turn.effort
        flop = cost.flops(effort.computed_tokens, effort.attended_pairs) if cost else 0.0
        figures[name] = {
            "tokens_per_s": round(rows.num_tokens / seconds),
            "ratio": round(statistics.median(reference.seconds) / seconds, 2),
            "computed_ratio": round(effort.computed_tokens / rows.num_tokens, 3),
            "utilisation": round(flop / seconds / appearance.peak_flops, 3),
            "peak_tflops": round(appearance.peak_flops / 1e12, 2),
            "memory_gib": appearance.memory_gib and round(appearance.memory_gib, 1),
            "load_s": round(appearance.load_s, 1),
            "seconds": [round(second, 3) for second in turn.seconds],
            **agreement(turn.scores, reference.scores),
        }
    return figures


def print_comparison(figures: Mapping[str, Mapping[str, Any]]) -> None:
    print_table(
        (
            "",
            "tokens/s",
            f"to {REFERENCE}",
            "computed",
            "utilisation",
            "GiB",
            "error",
            "rank correlation",
        ),
        (
            (
                name,
                f"{of['tokens_per_s']:,}",
                f"{of['ratio']:.2f}" if of["sound"] else "wrong scores",
                f"{of['computed_ratio']:.0%}",
                f"{of['utilisation']:.0%}",
                of["memory_gib"] or "-",
                f"{of['error']:.1e}",
                f"{of['rank_correlation']:.4f}",
            )
            for name, of in figures.items()
        ),
    )


if __name__ == "__main__":
    main()
