"""What it costs that a score's bits depend on nothing else in its batch, and that they do not.

    python -m benchmarks.invariant           # about 20 minutes on 2 cores
    python -m benchmarks.invariant --tiny    # a smoke test: sizes too small to mean anything

The same rows with the setting `invariant` and without it, on one model after the other, in both
dtypes. A price is CPU time by CPU time of the same round, and the median over the rounds: both take
turns, so that other programs slow both. It holds the padding of the last batch of each lane, whose
share is told; a shard of a million tokens has next to none. Then the rows are scored in other
company, order and token budgets, and the scores whose bits differ are counted. The last line is the
whole result as JSON.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.hf import HFBackend
from batch_scorer.records import Scores, TokenizedRows
from benchmarks.common import (
    FAMILIES,
    WORKLOADS,
    command_line,
    model_of,
    print_table,
    random_config,
    report,
    tokenize,
    tokenized,
    write_random_model,
)

DTYPES = ("bfloat16", "float32")
MODELS = ("embedded", *(family for family in FAMILIES if family != "llama"))
CONTESTANTS = {"default": False, "invariant": True}


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--rows", type=int, default=32, help="of each workload")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workload", nargs="*", default=["hh", "rollouts-4"], choices=WORKLOADS)
    parser.add_argument("--model", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--dtype", nargs="*", default=DTYPES, choices=DTYPES)
    asked = parser.parse_args()
    if asked.tiny:
        asked.rows, asked.rounds = 3, 1
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        embedded = model_of(asked, Path(folder))
        workloads = {
            name: tokenize(
                WORKLOADS[name].read(asked.rows, asked.data), WORKLOADS[name].layout, embedded
            )
            for name in asked.workload
        }
        sample = id_lists(workloads[asked.workload[0]])
        for model in asked.model:
            model_dir = embedded
            if model != "embedded":
                model_dir = random_model(model, Path(folder), sample, tiny=asked.tiny)
            for dtype in asked.dtype:
                results += compare(model, model_dir, dtype, workloads, asked.rounds)
    print_table(
        ["model, dtype, rows", "price", "least", "most", "padding", "other bits", "invariant"],
        [
            [
                f"{of['model']}, {of['dtype']}, {of['workload']}",
                *(of["price"][key] for key in ("median", "least", "most")),
                f"{of['padding_share']:.1%}",
                *(f"{of['other_bits'][name]} of {of['sequences']}" for name in CONTESTANTS),
            ]
            for of in results
        ],
    )
    figures = {"threads": asked.threads, "rounds": asked.rounds, "results": results}
    report("invariant", asked, figures)


def random_model(family: str, folder: Path, sample: list[list[int]], *, tiny: bool) -> Path:
    """97 M random parameters in 14 layers, and the embeddings."""
    config = random_config(
        family,
        layers=2 if tiny else 14,
        hidden=192 if tiny else 768,
        vocabulary=49152,
        positions=8192,
    )
    write_random_model(config, folder / family, [ids[:256] for ids in sample[:16]])
    return folder / family


def compare(
    model: str, model_dir: Path, dtype: str, workloads: dict[str, TokenizedRows], rounds: int
) -> list[dict[str, Any]]:
    backends = {
        name: HFBackend(EngineSettings(model_dir, dtype=dtype, device="cpu", invariant=invariant))
        for name, invariant in CONTESTANTS.items()
    }
    found = []
    for workload, rows in workloads.items():
        part = rows.part(0, -(-rows.num_rows // 4))
        for backend in backends.values():
            backend.score(part)  # pays for memory and the set-up of kernels
        spent: dict[str, list[float]] = {name: [] for name in backends}
        scores: dict[str, Scores] = {}
        for _ in range(rounds):
            for name, backend in backends.items():
                started = time.process_time()
                scores[name] = backend.score(rows)
                spent[name].append(time.process_time() - started)
        effort = scores["invariant"].effort
        rows_computed = effort.padding_tokens + effort.computed_tokens
        pairs = zip(spent["invariant"], spent["default"], strict=True)
        ratios = [invariant / default for invariant, default in pairs]
        price = statistics.median(ratios)
        found.append(
            {
                "model": model,
                "dtype": dtype,
                "workload": workload,
                "sequences": rows.num_sequences,
                "computed_tokens": effort.computed_tokens,
                "price": {
                    "median": round(price, 3),
                    "least": round(min(ratios), 3),
                    "most": round(max(ratios), 3),
                },
                "padding_share": round(effort.padding_tokens / rows_computed, 3),
                "other_bits": {
                    name: other_bits(model_dir, dtype, rows, scores[name], invariant)
                    for name, invariant in CONTESTANTS.items()
                },
            }
        )
        print(found[-1], flush=True)
    for backend in backends.values():
        backend.close()
    return found


def other_bits(
    model_dir: Path, dtype: str, rows: TokenizedRows, together: Scores, invariant: bool
) -> int:
    """How many sequences get other bits in parts of a few, in another order, under a token budget
    of 500, than together."""
    sequences = id_lists(rows)
    order = np.random.default_rng(1).permutation(len(sequences))
    backend = HFBackend(
        EngineSettings(model_dir, dtype=dtype, device="cpu", token_budget=500, invariant=invariant)
    )
    parts = np.array_split(order, -(-len(order) // 5))
    scores = [backend.score(tokenized([sequences[i] for i in part])) for part in parts]
    backend.close()
    apart = np.concatenate([score.values for score in scores])  # float32[S, 1]
    return int((apart.view(np.int32) != together.values[order].view(np.int32)).sum())


def id_lists(rows: TokenizedRows) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(rows.token_ids, rows.sequence_offsets[1:-1])]


if __name__ == "__main__":
    main()
