"""The whole job against what people run today, on real preference pairs.

(a) padded    Hugging Face batches of 16 in file order, padded to the longest: the way of
              RewardBench's scripts (allenai/reward-bench, rewardbench/models/pipeline.py)
(b) sorted    the same after sorting by length
(c) backend   this project's hf backend alone: token ids in, scores out
(d) job       the whole job: S3 in, Ray Data, S3 out, committed

All in the model's default dtype, on the same rows, in turn, several rounds. (d) is counted from
the first committed shard to the last, so without start-up; that is reported beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from batch_scorer import formats
from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.backends.hf import HFBackend
from batch_scorer.commits import Receipt
from batch_scorer.config import Config, OverLength, load_config
from batch_scorer.models.embedded import build_embedded_model, default_embedded_directory
from batch_scorer.pipeline import ray_session
from batch_scorer.records import Format, Layout, TokenizedRows
from batch_scorer.render import Renderer
from batch_scorer.run import Work, score
from batch_scorer.storage import open_store

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
from machine import machine  # noqa: E402
from seaweed import s3_server  # noqa: E402
from tiny import tiny_reward_model  # noqa: E402

PADDED_BATCH = 16
LAYOUT = Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"})


@dataclass
class Contest:
    """Tokens per second of each contestant, one figure a round."""

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


class Padded:
    """Plain transformers: right padding, the model's own pooling."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="right")
        self._model = AutoModelForSequenceClassification.from_pretrained(
            model_dir, dtype=getattr(torch, dtype)
        ).eval()

    @torch.inference_mode()
    def score(self, conversations: list[Any], *, by_length: bool) -> np.ndarray[Any, Any]:
        texts: Any = self._tokenizer.apply_chat_template(conversations, tokenize=False)
        order = list(range(len(texts)))
        if by_length:
            order.sort(key=lambda i: -len(texts[i]))
        scores = np.empty(len(texts), dtype=np.float32)
        for start in range(0, len(order), PADDED_BATCH):
            some = order[start : start + PADDED_BATCH]
            batch = self._tokenizer(
                [texts[i] for i in some],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
            scores[some] = self._model(**batch).logits[:, 0].float().numpy()
        return scores


class Watch:
    """When the shards of a run were committed."""

    def __init__(self) -> None:
        self.planned_at = 0.0
        self.commits: list[tuple[float, int, float]] = []

    def planned(self, work: Work) -> None:
        self.planned_at = time.perf_counter()

    def finished(self, receipt: Receipt) -> None:
        assert receipt.commit is not None, receipt.detail
        self.commits.append((time.perf_counter(), receipt.commit.tokens, receipt.score_s))

    @property
    def start_up_s(self) -> float:
        """From the plan until the first shard began to be scored."""
        at, _, score_s = self.commits[0]
        return at - self.planned_at - score_s

    @property
    def rate(self) -> float:
        """Tokens per second after the first commit."""
        tokens = sum(tokens for _, tokens, _ in self.commits[1:])
        return tokens / (self.commits[-1][0] - self.commits[0][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="show that it runs; no real figures")
    tiny = parser.parse_args().tiny
    rounds, num_pairs, shard_rows = (1, 12, 3) if tiny else (3, 120, 12)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = (
            tiny_reward_model(Path(folder) / "model")
            if tiny
            else build_embedded_model(default_embedded_directory(), print)
        )
        print(json.dumps(contest(model_dir, rounds, num_pairs, shard_rows, tiny=tiny)))


def contest(
    model_dir: Path, rounds: int, num_pairs: int, shard_rows: int, *, tiny: bool
) -> dict[str, Any]:
    dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    table = real_pairs(num_pairs)
    rows = tokenize(table, model_dir)
    # Interleaved, as the token ids are: chosen, rejected, chosen, …
    conversations = [
        side for pair in table.to_pylist() for side in (pair["chosen"], pair["rejected"])
    ]
    padded = Padded(model_dir, dtype)
    backend = HFBackend(model_dir, dtype=dtype, attention="packed", device="cpu")
    result = Contest()
    watches: list[Watch] = []
    with s3_server() as server, with_environment(server.environment):
        upload(table, server.url("in"), server.options)
        base = load_config(
            model=str(model_dir),
            inputs=(server.url("in"),),
            output=server.url("out"),
            store_options=server.options,
            shard_rows=shard_rows,
            dtype=dtype,
        )
        warm_up(padded, backend, rows, conversations)
        with ray_session(base):
            for number in range(rounds):
                with result.timed("a_padded", rows.num_tokens):
                    reference = padded.score(conversations, by_length=False)
                with result.timed("b_sorted", rows.num_tokens):
                    padded.score(conversations, by_length=True)
                with result.timed("c_backend", rows.num_tokens):
                    scores = backend.score(rows).values[:, 0]
                watches.append(run_job(base, server.url(f"out-{number}")))
                result.add("d_job", watches[-1].rate)
                print(f"round {number + 1}: " + describe(result))
    return {
        "benchmark": "end_to_end",
        "tiny": tiny,
        "pairs": num_pairs,
        "tokens": rows.num_tokens,
        "dtype": dtype,
        "rounds": rounds,
        "tokens_per_s": {name: round(result.median(name)) for name in result.rates},
        "ratios": {
            "c_over_a": ratio(result, "c_backend", "a_padded"),
            "c_over_b": ratio(result, "c_backend", "b_sorted"),
            "d_over_c": ratio(result, "d_job", "c_backend"),
            "d_over_a": ratio(result, "d_job", "a_padded"),
        },
        "job_start_up_s": round(statistics.median(w.start_up_s for w in watches), 1),
        "largest_difference_a_c": round(float(np.abs(reference - scores).max()), 4),
        "machine": machine(),
    }


def real_pairs(count: int) -> pa.Table:
    """The first real pairs of the shipped sample, in file order."""
    sample = ROOT / "batch_scorer" / "data" / "pairs"
    tables = [pq.read_table(file) for file in sorted(sample.glob("*.parquet"))]
    return pa.concat_tables(tables).slice(0, count)


def tokenize(table: pa.Table, model_dir: Path) -> TokenizedRows:
    renderer = Renderer(model_dir, 10**6, OverLength.MARK)
    return renderer.tokenize(formats.parse(table, LAYOUT))


def upload(table: pa.Table, url: str, options: dict[str, str]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    open_store(url, options).create("pairs.parquet", sink.getvalue().to_pybytes())


def run_job(base: Config, output: str) -> Watch:
    watch = Watch()
    summary = score(base.model_copy(update={"output": output}), watch)
    assert summary.is_complete
    return watch


def warm_up(padded: Padded, backend: HFBackend, rows: TokenizedRows, talks: list[Any]) -> None:
    padded.score(talks[:4], by_length=False)
    backend.score(rows)


@contextmanager
def with_environment(values: dict[str, str]) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def ratio(result: Contest, name: str, other: str) -> float:
    """Median over rounds of one rate by the other of the same round."""
    pairs = zip(result.rates[name], result.rates[other], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 2)


def describe(result: Contest) -> str:
    return ", ".join(f"{name} {rates[-1]:,.0f} tokens/s" for name, rates in result.rates.items())


if __name__ == "__main__":
    main()
