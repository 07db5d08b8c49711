"""This project's engines against what people score reward models with today, on real rows.

padded       transformers, padded batches of 16 in file order: RewardBench's way
sorted       the same, sorted by length under a token budget: the best of what is padded
padded-float32, sorted-float32  both in float32, which on some CPUs is faster when padded
ray-data     Ray Data's LLM processor with `task_type="classify"`: the way of Ray's own benchmark
vllm         vLLM's offline API in file order, as its own example has it
vllm-best    vLLM as it is fastest here: this project's vllm backend (grouped by prefix, small
             blocks of the prefix cache, no tokenizer), compiled
trie         this project's hf backend: every common prefix once, no padding
trie-int8    the same with linear layers of 8 bits (`precision: int8`)
trie-compiled, trie-int8-compiled  both with compiled layers

All get the same token ids, so tokenising is in nobody's time, and have the same number of threads
and, where their names say nothing else, the same dtype. Every scorer lives in a process of its own
kind and waits while another has its turn. A turn starts with an empty prefix cache. Ratios are to
the faster of the two dtypes of `padded`. Whoever's scores are not those of `padded`, in float32
where that takes part, is out, however fast. The last line is the whole result as JSON.

    python -m benchmarks.engines                 # the rows of this repository
    python -m benchmarks.engines --data DIR      # larger files of these kinds; 64 answers a prompt
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
import transformers

from batch_scorer.backends.base import Backend, EngineSettings
from batch_scorer.backends.device import CPU_ENVIRONMENT, cpu_has_bfloat16
from batch_scorer.backends.packing import build_trie
from batch_scorer.models.embedded import build_embedded_model, default_embedded_directory
from batch_scorer.records import TokenizedRows
from benchmarks.common import (
    WORKLOADS,
    Child,
    Contest,
    Floats,
    Padded,
    Sequences,
    agreement,
    by_length,
    command_line,
    copy_tokenizer,
    in_a_line,
    in_file_order,
    print_table,
    random_config,
    report,
    same_winner,
    tokenize,
    write_random_model,
)
from tests.helpers.tiny import tiny_reward_model

P = ParamSpec("P")
T = TypeVar("T")
Found = TypeVar("Found")
Found_co = TypeVar("Found_co", covariant=True)
Asked = TypeVar("Asked", bound="Setting")

REFERENCE = "padded"
EXACT = "padded-float32"
OPENMP = ("OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "LD_PRELOAD")
KV_CACHE_GIB = 2
"""Of every vLLM: more tokens than these workloads have, and room for all contestants at a time."""


@dataclass(frozen=True)
class Setting:
    """What a scorer is built for."""

    model_dir: Path
    dtype: str
    threads: int
    max_tokens: int


class Scorer(Protocol[Found_co]):
    """A contestant at work."""

    def score(self, rows: TokenizedRows) -> tuple[float, Found_co]:
        """Seconds, and what it found about all sequences: here float32[S]."""

    def close(self) -> None: ...


class PaddedScorer:
    def __init__(
        self, setting: Setting, batches: Callable[[TokenizedRows], Iterable[Sequences]]
    ) -> None:
        self._padded = Padded.load(setting.model_dir, setting.dtype)
        self._batches = batches

    def score(self, rows: TokenizedRows) -> tuple[float, Floats]:
        started = time.perf_counter()
        scores = self._padded.score(rows, self._batches(rows))
        return time.perf_counter() - started, scores

    def close(self) -> None:
        del self._padded


class BackendScorer:
    """A backend of this project."""

    def __init__(self, backend: Backend, reset: Callable[[], object] = lambda: None) -> None:
        self._backend = backend
        self._reset = reset

    def score(self, rows: TokenizedRows) -> tuple[float, Floats]:
        self._reset()
        started = time.perf_counter()
        scored = self._backend.score(rows)
        seconds = time.perf_counter() - started
        if scored.errors:
            raise RuntimeError(f"sequences without a score: {scored.errors}")
        return seconds, scored.values[:, 0]

    def close(self) -> None:
        self._backend.close()


class VLLMScorer:
    """vLLM's offline API, as in examples/pooling/reward/sequence_reward_offline.py of
    vllm-project/vllm, which turns compiling off besides; faster with it, so it stays on here. Raw
    scores, which a reward model's are, have to be asked for."""

    def __init__(self, setting: Setting) -> None:
        from vllm import LLM, PoolingParams

        self._llm = LLM(
            model=str(setting.model_dir),
            runner="pooling",
            dtype=setting.dtype,
        )
        self._params = PoolingParams(use_activation=False)

    def score(self, rows: TokenizedRows) -> tuple[float, Floats]:
        self._llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = self._llm.encode(
            [{"prompt_token_ids": ids} for ids in id_lists(rows)],
            pooling_params=self._params,
            pooling_task="classify",
            use_tqdm=False,
        )
        scores = np.array([float(output.outputs.data[0]) for output in outputs], np.float32)
        return time.perf_counter() - started, scores

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


RAY_DATA_BATCH_ROWS = 64


class RayDataScorer:
    """Ray Data's LLM processor as in `build_classify_processor` of Ray's own benchmark
    (ray-project/ray, python/ray/llm/_internal/batch/benchmark/benchmark_processor.py), given
    token ids and told to leave scores raw."""

    def __init__(self, setting: Setting) -> None:
        start_ray(setting.threads)
        self._setting = setting

    def score(self, rows: TokenizedRows) -> tuple[float, Floats]:
        seconds, found = through_ray_data(
            self._setting,
            rows,
            task="classify",
            options={"pooling_params": {"use_activation": False}},
            read=lambda row: float(row["embeddings"][0]),
        )
        return seconds, np.array(found, np.float32)

    def close(self) -> None:
        import ray

        ray.shutdown()


def start_ray(threads: int) -> None:
    import ray
    from ray.data import DataContext

    ray.init(
        address="local",
        num_cpus=threads + 3,  # its source, preparing and gathering beside the engine
        include_dashboard=False,
        log_to_driver=False,
    )
    DataContext.get_current().enable_progress_bars = False


def through_ray_data(
    setting: Setting,
    rows: TokenizedRows,
    *,
    task: str,
    options: Mapping[str, Any],
    read: Callable[[dict[str, Any]], Any],
) -> tuple[float, list[Any]]:
    """Seconds, and what `read` finds in the processor's row of each sequence. `options` are the
    columns beside its token ids.

    A processor starts its engine anew for every dataset. That is not counted: rows of random
    tokens go first, and the others wait until these have come out at the other end.
    """
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=str(setting.model_dir),
        task_type=task,
        engine_kwargs={
            "dtype": setting.dtype,
            "max_num_batched_tokens": 4096,
        },
        batch_size=RAY_DATA_BATCH_ROWS,
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,  # they want Ray's own Prometheus client
        placement_group_config={"bundles": [{"CPU": 1}]},  # without a GPU
        runtime_env={"env_vars": vllm_environment(setting.threads)},
    )
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"

        def prepare(row: dict[str, Any]) -> dict[str, Any]:
            while row["place"] >= 0 and not warm.exists():
                time.sleep(0.01)
            return {"place": row["place"], "tokenized_prompt": row["ids"], **options}

        def finish(row: dict[str, Any]) -> dict[str, Any]:
            if row["place"] < 0:
                warm.touch()
            return {"place": row["place"], "found": read(row), "at": time.time()}

        processor = build_processor(config, preprocess=prepare, postprocess=finish)
        random = np.random.default_rng(0)
        warm_up = [
            {"place": -1, "ids": random.choice(rows.token_ids, 64).tolist()}
            for _ in range(RAY_DATA_BATCH_ROWS)
        ]
        items = [{"place": i, "ids": ids} for i, ids in enumerate(id_lists(rows))]
        given = ray.data.from_items(warm_up, override_num_blocks=1)
        try:
            done = processor(given.union(ray.data.from_items(items))).take_all()
        except ray.exceptions.RayTaskError as error:  # no other process can read one
            raise RuntimeError(str(error)) from None
    started = max(row["at"] for row in done if row["place"] < 0)
    found = {row["place"]: row["found"] for row in done}
    in_order = [found[place] for place in range(rows.num_sequences)]
    return max(row["at"] for row in done) - started, in_order


def id_lists(rows: TokenizedRows) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(rows.token_ids, rows.sequence_offsets[1:-1])]


def padded(setting: Setting) -> Scorer[Floats]:
    return PaddedScorer(setting, in_file_order)


def padded_sorted(setting: Setting) -> Scorer[Floats]:
    return PaddedScorer(setting, by_length)


def float32(build: Callable[[Setting], Scorer[Floats]], setting: Setting) -> Scorer[Floats]:
    return build(replace(setting, dtype="float32"))


def trie(
    setting: Setting, *, compile: bool = False, precision: str | None = None
) -> Scorer[Floats]:
    from batch_scorer.backends.hf import HFBackend

    settings = EngineSettings(
        setting.model_dir,
        dtype=setting.dtype,
        device="cpu",
        compile=compile,
        precision=precision,
    )
    return BackendScorer(HFBackend(settings))


def vllm_best(setting: Setting) -> Scorer[Floats]:
    from batch_scorer.backends.vllm import VLLMBackend

    settings = EngineSettings(
        setting.model_dir,
        dtype=setting.dtype,
        device="cpu",
        max_tokens=setting.max_tokens,
        compile=True,
    )
    backend = VLLMBackend(settings)
    return BackendScorer(backend, backend._engine.clear_cache)


# The contest


@dataclass(frozen=True)
class Contestant(Generic[Asked, Found]):
    """`process` names the process it lives in; `warm` is one whose every turn begins warm.

    This project's engines live apart: what they set for their process, the others go without.
    """

    build: Callable[[Asked], Scorer[Found]]
    process: str = "transformers"
    in_tiny: bool = False
    warm: bool = False


CONTESTANTS: dict[str, Contestant[Setting, Floats]] = {
    REFERENCE: Contestant(padded, in_tiny=True),
    EXACT: Contestant(partial(float32, padded)),
    "sorted": Contestant(padded_sorted, in_tiny=True),
    "sorted-float32": Contestant(partial(float32, padded_sorted)),
    "ray-data": Contestant(RayDataScorer, "ray", warm=True),
    "vllm": Contestant(VLLMScorer, "vllm"),
    "vllm-best": Contestant(vllm_best, "vllm-best"),
    "trie": Contestant(trie, "trie", in_tiny=True),
    "trie-int8": Contestant(partial(trie, precision="int8"), "trie", in_tiny=True),
    "trie-compiled": Contestant(partial(trie, compile=True), "trie"),
    "trie-int8-compiled": Contestant(partial(trie, compile=True, precision="int8"), "trie"),
}
RANDOM_MODELS = ("qwen3", "gemma2")
MODELS = ("embedded", *RANDOM_MODELS)

_scorers: dict[str, Scorer[Any]] = {}
"""Those of this process, where it is a child."""


def process_environment(process: str, threads: int) -> dict[str, str]:
    """What is set already stands: `OMP_WAIT_POLICY=active python -m benchmarks.engines`."""
    ours = {"OMP_NUM_THREADS": str(threads), **CPU_ENVIRONMENT}
    wanted = ours if process in ("transformers", "trie") else vllm_environment(threads)
    inherited = {name: os.environ[name] for name in OPENMP if name in os.environ}
    return wanted | inherited


def vllm_environment(threads: int) -> dict[str, str]:
    """All cores for computing: by itself vLLM keeps one for its scheduler, half of a small
    machine."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def build(name: str, make: Callable[[Asked], Scorer[Any]], setting: Asked) -> float:
    """Seconds until the contestant is up."""
    started = time.perf_counter()
    torch.set_num_threads(setting.threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _scorers[name] = make(setting)
    return time.perf_counter() - started


def score(name: str, rows: TokenizedRows) -> tuple[float, Any]:
    return _scorers[name].score(rows)


def close_all() -> None:
    while _scorers:
        _scorers.popitem()[1].close()


class Field(Generic[Asked, Found]):
    """The contestants with one model, each in its process; `left_out` says why one is not among
    the `running`. Without the first of them, to which the others are compared, there is none."""

    def __init__(self, contestants: Mapping[str, Contestant[Asked, Found]], setting: Asked) -> None:
        self.running: list[str] = []
        self.left_out: dict[str, str] = {}
        self._contestants = contestants
        self._reference = next(iter(contestants))
        self._children: dict[str, Child] = {}
        for name, contestant in contestants.items():
            process = contestant.process
            if process not in self._children:
                self._children[process] = Child(process_environment(process, setting.threads))
            self.running.append(name)
            seconds = self._call(name, build, name, contestant.build, setting)
            if seconds is not None:
                print(f"  {name} is up after {seconds:.0f} s", flush=True)

    def turn(self, name: str, rows: TokenizedRows) -> tuple[float, Found] | None:
        """Seconds and what it found; None from one that fails and is out from now on."""
        return self._call(name, score, name, rows)

    def rounds(self, rows: TokenizedRows, count: int, amount: int, unit: str) -> "Rounds[Found]":
        """Everybody's turns, after one that does not count for those that have to warm up. The
        rates are those of an `amount` of a `unit`."""
        for name in list(self.running):
            if not self._contestants[name].warm:
                self.turn(name, rows)
        contest = Contest()
        found: dict[str, Found] = {}
        for number in range(count):
            for name in list(self.running):
                done = self.turn(name, rows)
                if done is not None:
                    contest.add(name, amount / done[0])
                    found[name] = done[1]
            print(f"  round {number + 1}: {contest.describe_round()} {unit}/s", flush=True)
        return Rounds(contest, found)

    def close(self) -> None:
        for child in self._children.values():
            with suppress(BrokenProcessPool):
                child.call(close_all)
            child.close()

    def _call(
        self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        try:
            child = self._children[self._contestants[name].process]
            return child.call(function, *args, **kwargs)
        except Exception as error:  # whatever somebody's library raises
            if name == self._reference:
                raise
            self.left_out[name] = in_a_line(error)
            self.running.remove(name)
            print(f"  {name} is out: {self.left_out[name]}", flush=True)
            return None


@dataclass(frozen=True)
class Rounds(Generic[Found]):
    """The rates of all rounds, and what each contestant found in the last one."""

    contest: Contest
    found: dict[str, Found]


def compare(
    field: Field[Setting, Floats], rows: TokenizedRows, rounds: int
) -> dict[str, dict[str, Any]]:
    """By contestant: its figures. `ratio` is to the faster dtype of padded batches in file order,
    and scores are compared with those of padded batches in float32, where they are there."""
    done = field.rounds(rows, rounds, rows.num_tokens, "tokens")
    contest, scores = done.contest, done.found
    padded = [name for name in (REFERENCE, EXACT) if name in field.running]
    baseline, exact = max(padded, key=contest.median), scores[padded[-1]]
    return {
        name: {
            "tokens_per_s": round(contest.median(name)),
            "ratio": contest.ratio(name, baseline),
            "ratio_to": baseline,
            "rounds": [round(rate) for rate in contest.rates[name]],
            **agreement(scores[name], exact),
            "same_winner": same_winner(scores[name], exact, rows),
        }
        for name in field.running
    }


def print_comparison(figures: dict[str, dict[str, Any]]) -> None:
    print_table(
        ("", "tokens/s", "ratio", "error", "largest", "rank correlation", "same winner"),
        (
            (
                name,
                f"{of['tokens_per_s']:,}",
                f"{of['ratio']:.2f}" if of["sound"] else "wrong scores",
                f"{of['error']:.1e}",
                f"{of['largest_difference']:.1e}",
                f"{of['rank_correlation']:.4f}",
                f"{of['same_winner']:.1%}",
            )
            for name, of in figures.items()
        ),
    )


# What they score


def random_model(family: str, folder: Path, tokenizer: Path, rows: TokenizedRows) -> Path:
    """134 M random parameters, 97 M of them in 14 layers."""
    config = random_config(family, layers=14, hidden=768, vocabulary=49152, positions=8192)
    directory = folder / family
    write_random_model(config, directory, [ids[:256] for ids in id_lists(rows)[:16]])
    copy_tokenizer(tokenizer, directory)
    return directory


def read_workloads(
    names: Iterable[str], count: int | None, data: Path | None, model_dir: Path
) -> tuple[dict[str, TokenizedRows], dict[str, str]]:
    """Rows by workload, and the workloads left out with the reason."""
    found: dict[str, TokenizedRows] = {}
    left_out: dict[str, str] = {}
    for name in names:
        workload = WORKLOADS[name]
        try:
            table = workload.read(count, data)
        except FileNotFoundError as error:
            left_out[name] = str(error)
            print(f"{name} ({workload.title}) is left out: {error}")
        else:
            found[name] = tokenize(table, workload.layout, model_dir)
    return found, left_out


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="pairs or prompts of each workload")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["embedded", "qwen3"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contestant", nargs="+", choices=CONTESTANTS, help=f"and {REFERENCE}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    if asked.tiny:
        asked.rounds, asked.rows, asked.model = 1, 3, ["tiny"]
    names = asked.contestant or [
        name for name, contestant in CONTESTANTS.items() if contestant.in_tiny or not asked.tiny
    ]
    names = [name for name in CONTESTANTS if name in names or name == REFERENCE]
    with tempfile.TemporaryDirectory() as folder:
        report("engines", asked, contest(asked, names, Path(folder)))


def contest(asked: argparse.Namespace, names: list[str], folder: Path) -> dict[str, Any]:
    dtype = "bfloat16" if cpu_has_bfloat16() and not asked.tiny else "float32"
    if dtype == "float32":
        names = [name for name in names if not name.endswith(dtype)]
    home = (
        tiny_reward_model(folder / "tiny")
        if asked.tiny
        else build_embedded_model(default_embedded_directory(), print)
    )
    workloads, no_rows = read_workloads(asked.workload, asked.rows, asked.data, home)
    some_rows = next(iter(workloads.values()))
    results: list[dict[str, Any]] = []
    left_out: dict[str, dict[str, str]] = {}
    for model in asked.model:
        is_random = model in RANDOM_MODELS
        setting = Setting(
            model_dir=random_model(model, folder, home, some_rows) if is_random else home,
            dtype=dtype,
            threads=asked.threads,
            max_tokens=max(int(rows.lengths.max()) for rows in workloads.values()),
        )
        print(f"{model}, {dtype}, {asked.threads} threads")
        field = Field({name: CONTESTANTS[name] for name in names}, setting)
        try:
            for name, rows in workloads.items():
                distinct = build_trie(rows).num_tokens
                print(
                    f"{model}, {name}: {WORKLOADS[name].title}; {rows.num_rows} rows, "
                    f"{rows.num_tokens:,} tokens, {distinct / rows.num_tokens:.0%} of them left "
                    "when common prefixes count once"
                )
                figures = compare(field, rows, asked.rounds)
                print_comparison(figures)
                results.append(
                    {
                        "model": model,
                        "workload": name,
                        "rows": rows.num_rows,
                        "sequences": rows.num_sequences,
                        "tokens": rows.num_tokens,
                        "distinct_tokens": distinct,
                        "contestants": figures,
                    }
                )
        finally:
            field.close()
        left_out[model] = field.left_out | {
            name: "left out of --tiny" for name in CONTESTANTS if asked.tiny and name not in names
        }
    return {
        "data": "the repository's" if asked.data is None else "larger",
        "dtype": dtype,
        "threads": asked.threads,
        "rounds": asked.rounds,
        "environment": {
            process: process_environment(process, asked.threads)
            for process in dict.fromkeys(CONTESTANTS[name].process for name in names)
        },
        "results": results,
        "contestants_left_out": left_out,
        "workloads_left_out": no_rows,
    }


if __name__ == "__main__":
    main()
