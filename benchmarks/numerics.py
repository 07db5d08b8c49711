"""How far the hf backend's scores are from exact ones, and what its choices cost on this device.

    python -m benchmarks.numerics            # about 5 minutes on 2 cores
    python -m benchmarks.numerics --tiny     # a smoke test: sizes too small to mean anything

Models are random, their queries and keys scaled until attention is peaked and their heads until
scores have a standard deviation of 2. Exact means float32, eager, one sequence at a time. The
last line is the whole result as JSON.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.kernels import KERNELS, LayerSettings
from batch_scorer.backends.packing import build_trie
from benchmarks.common import (
    FAMILIES,
    Floats,
    command_line,
    last_hidden,
    padded_attention,
    random_config,
    report,
    tokenized,
    write_random_model,
)

Sequences = list[list[int]]


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    layers: int
    hidden: int
    vocabulary: int
    sequences: int
    median_length: int
    longest: int
    rounds: int


FULL = Scale(8, 768, 32000, 48, 100, 512, 5)
TINY = Scale(2, 192, 500, 12, 20, 64, 1)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    scale = TINY if asked.tiny else FULL
    result: dict[str, Any] = {
        "threads": asked.threads,
        "errors": {},
        "jitter": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            model_dir = Path(folder) / family
            build_model(scale, family, model_dir)
            errors, jitter = accuracy(scale, model_dir)
            result["errors"][family], result["jitter"][family] = errors, jitter
            print_accuracy(family, errors, jitter)
    result["attention_ms"] = attention_times(scale)
    print_attention_times(result["attention_ms"])
    result["body_tokens_per_s"] = body_rates(scale)
    print(f"\npacked Llama body, tokens per second: {result['body_tokens_per_s']}\n")
    report("numerics", asked, result)


# Accuracy


def accuracy(
    scale: Scale, model_dir: Path
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Each scoring path's errors against exact scores, and its jitter over batch compositions."""
    sequences = random_sequences(scale)
    exact, _ = one_at_a_time(model_dir, "float32", sequences)
    padded = padded_attention(AutoConfig.from_pretrained(model_dir))
    plain, float32_head = one_at_a_time(model_dir, "bfloat16", sequences)
    errors = {
        "plain bfloat16": error(plain, exact),
        "plain, fp32 head": error(float32_head, exact),
    }
    jitter = {}
    for dtype in ("bfloat16", "float32"):
        for attention in ("packed", padded):
            name = f"{'packed' if attention == 'packed' else 'padded'} {dtype}"
            runs = compositions(scale, model_dir, dtype, attention, sequences)
            errors[name] = error(runs[0], exact)
            spread = runs.max(axis=0) - runs.min(axis=0)
            jitter[name] = {"median": float(np.median(spread)), "max": float(spread.max())}
    return errors, jitter


def error(values: Floats, exact: Floats) -> dict[str, float]:
    difference = values - exact
    return {
        "rms": float(np.sqrt(np.mean(difference**2))),
        "max": float(np.abs(difference).max()),
        "score_std": float(exact.std()),
    }


def compositions(
    scale: Scale, model_dir: Path, dtype: str, attention: str, sequences: Sequences
) -> Floats:
    """float32[3, S]: the same sequences with three token budgets, the last in another order."""
    order = np.random.default_rng(1).permutation(len(sequences))
    runs = []
    for token_budget, chosen in (
        (4 * scale.longest, np.arange(len(sequences))),
        (scale.longest, np.arange(len(sequences))),
        (3 * scale.longest, order),
    ):
        backend = HFBackend(
            EngineSettings(
                model_dir,
                dtype=dtype,
                device="cpu",
                attention=attention,
                token_budget=token_budget,
            )
        )
        values = np.empty(len(sequences), dtype=np.float32)
        values[chosen] = backend.score(tokenized([sequences[i] for i in chosen])).values[:, 0]
        runs.append(values)
        backend.close()
    return np.stack(runs)


@torch.inference_mode()
def one_at_a_time(model_dir: Path, dtype: str, sequences: Sequences) -> tuple[Floats, Floats]:
    """float32[S] from plain transformers with eager attention, and with the head in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    hidden = last_hidden(model, sequences)
    head = model.score.weight
    return (
        (hidden @ head.T).float().numpy()[:, 0],
        (hidden.float() @ head.float().T).numpy()[:, 0],
    )


def build_model(scale: Scale, family: str, model_dir: Path, layers: int | None = None) -> None:
    config = random_config(
        family,
        layers=layers or scale.layers,
        hidden=scale.hidden,
        vocabulary=scale.vocabulary,
        positions=scale.longest,
    )
    write_random_model(config, model_dir, random_sequences(scale)[:24])


def random_sequences(scale: Scale) -> Sequences:
    """Lognormal lengths, as responses have them."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(scale.median_length), 0.8, scale.sequences)
    return [
        random.integers(3, scale.vocabulary, int(length)).tolist()
        for length in lengths.clip(2, scale.longest)
    ]


def print_accuracy(
    family: str, errors: dict[str, dict[str, float]], jitter: dict[str, dict[str, float]]
) -> None:
    plain = errors["plain bfloat16"]
    print(f"{family}, score std {plain['score_std']:.2f}: rms error, largest; jitter, largest")
    for name, measured in errors.items():
        spread = jitter.get(name)
        print(
            f"  {name:16s} {measured['rms']:.1e} {measured['max']:.1e}  "
            f"{measured['rms'] / plain['rms']:5.2f} x plain   "
            + (f"jitter {spread['median']:.1e} {spread['max']:.1e}" if spread else ""),
            flush=True,
        )


# What the choices cost


@torch.inference_mode()
def attention_times(scale: Scale) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer's attention over one packed batch, the best of some rounds."""
    tokens = 4 * scale.longest
    times: dict[str, dict[str, float]] = {}
    random = np.random.default_rng(0)
    for dtype in (torch.bfloat16, torch.float32):
        query, key, value = (torch.randn(heads, tokens, 64).to(dtype) for heads in (9, 3, 3))
        for length in (scale.longest // 16, scale.longest // 2, 2 * scale.longest):
            ids = random.integers(0, 10**6, (tokens // length, length)).tolist()
            batch = build_trie(tokenized(ids)).batch(0, tokens)
            row = times.setdefault(f"{str(dtype)[6:]}, {tokens // length} x {length}", {})
            for softcap in (None, 50.0):
                for window in (None, length // 4):
                    plan = KERNELS["blocks"].plan(batch, None, window, query, key)
                    layer = LayerSettings(0.125, window, softcap)
                    call = partial(KERNELS["blocks"].attend, query, key, value, plan, layer)
                    name = "blocks" + (", softcap" if softcap else "")
                    row[name + (", window length/4" if window else "")] = best_ms(scale, call)
            row["one square mask"] = best_ms(scale, partial(square_mask, query, key, value, length))
    return times


def square_mask(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """What transformers does with a packed row and sdpa: one call under a T x T mask."""
    owners = torch.arange(query.shape[1]) // length
    return torch.nn.functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=(owners[:, None] == owners).tril(),
        enable_gqa=True,
    )


def best_ms(scale: Scale, call: Callable[[], object]) -> float:
    call()
    durations = []
    for _ in range(scale.rounds):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return round(1000 * min(durations), 1)


def print_attention_times(times: dict[str, dict[str, float]]) -> None:
    print("\nattention of one layer (9 query and 3 key/value heads of 64), milliseconds")
    for name, row in times.items():
        print(f"  {name}: " + ", ".join(f"{label} {ms}" for label, ms in row.items()))


def body_rates(scale: Scale) -> dict[str, float]:
    """Tokens per second of a packed Llama body of 14 layers: 100 M parameters in full size.

    The dtypes take turns, so that a busy machine slows both.
    """
    rows = tokenized(random_sequences(scale)[: max(1, scale.sequences // 4)])
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    with tempfile.TemporaryDirectory() as folder:
        build_model(scale, "llama", Path(folder), layers=14)
        backends = {
            dtype: HFBackend(EngineSettings(Path(folder), dtype=dtype, device="cpu"))
            for dtype in seconds
        }
        for _ in range(max(scale.rounds, 2)):
            for dtype, backend in backends.items():
                start = time.perf_counter()
                backend.score(rows)
                seconds[dtype].append(time.perf_counter() - start)
    # The first round pays for memory and kernel set-up.
    return {dtype: round(rows.num_tokens / min(times[1:])) for dtype, times in seconds.items()}


if __name__ == "__main__":
    main()
