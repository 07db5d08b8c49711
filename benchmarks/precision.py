"""What linear layers of 8 bits do to scores and to the order of real pairs, by model family.

Every model scores the same pairs with the hf backend in float32, in bfloat16, and in bfloat16 with
`precision: int8`. The embedded model is trained; those of the other families are random ones with
peaked attention, whose scores say how rounding spreads and nothing about pairs that people judged.
Nothing is timed: `engines.py` does that. The last line is the whole result as JSON.

    python -m benchmarks.precision                # the pairs of this repository
    python -m benchmarks.precision --data DIR     # larger files of these kinds
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import transformers

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.hf import HFBackend
from batch_scorer.records import TokenizedRows
from benchmarks.common import (
    FAMILIES,
    WORKLOADS,
    Floats,
    agreement,
    command_line,
    model_of,
    print_table,
    report,
    same_winner,
    tokenize,
)
from benchmarks.engines import random_model

EXACT = "float32"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "precision": "int8"},
}
PAIRS = ("hh", "mixed")
MODELS = ("embedded", *FAMILIES)


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--pairs", type=int, default=200, help="of each kind, embedded model")
    parser.add_argument("--random-pairs", type=int, default=48, help="of each kind, random models")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    asked = parser.parse_args()
    if asked.tiny:
        asked.pairs, asked.model = 3, ["embedded"]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        report("precision", asked, {"results": compared(asked, Path(folder))})


def compared(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    home = model_of(asked, folder)
    results = []
    for model in asked.model:
        count = asked.pairs if model == "embedded" else asked.random_pairs
        rows = {name: pairs_of(name, count, asked.data, home) for name in PAIRS}
        model_dir = home if model == "embedded" else random_model(model, folder, home, rows["hh"])
        for name, found in scored(model_dir, rows).items():
            figures = {
                way: quality(values, found[EXACT], rows[name]) for way, values in found.items()
            }
            results.append({"model": model, "pairs": rows[name].num_rows, "of": name, **figures})
            print(f"{model}, {rows[name].num_rows} pairs of {name}, against {EXACT}")
            print_table(
                ("", "error", "largest", "rank correlation", "same winner", "chosen higher"),
                (
                    (
                        way,
                        f"{of['error']:.1%}",
                        f"{of['largest_difference']:.3f}",
                        f"{of['rank_correlation']:.4f}",
                        f"{of['same_winner']:.1%}",
                        f"{of['chosen_higher']:.1%}",
                    )
                    for way, of in figures.items()
                ),
            )
    return results


def quality(values: Floats, exact: Floats, rows: TokenizedRows) -> dict[str, float | bool]:
    """How far scores are from the exact ones, and how often a pair has the same winner."""
    figures = {
        **agreement(values, exact),
        "same_winner": same_winner(values, exact, rows),
        "chosen_higher": round(float((values[::2] > values[1::2]).mean()), 4),
    }
    del figures["sound"]  # how near is near enough is for the reader to say
    return figures


def pairs_of(name: str, count: int, data: Path | None, tokenizer: Path) -> TokenizedRows:
    workload = WORKLOADS[name]
    return tokenize(workload.read(count, data), workload.layout, tokenizer)


def scored(model_dir: Path, rows: dict[str, TokenizedRows]) -> dict[str, dict[str, Floats]]:
    """By kind of pairs and way: float32[S]."""
    found: dict[str, dict[str, Floats]] = {name: {} for name in rows}
    for way, settings in WAYS.items():
        backend = HFBackend(EngineSettings(model_dir, device="cpu", **settings))
        for name, some in rows.items():
            scores = backend.score(some)
            if scores.errors:
                raise RuntimeError(f"sequences without a score: {scores.errors}")
            found[name][way] = scores.values[:, 0]
        backend.close()
    return found


if __name__ == "__main__":
    main()
