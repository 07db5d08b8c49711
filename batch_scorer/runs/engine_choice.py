"""Which engine: by support, and for a long job by a short trial of all engines that can run it.

Engines give the same scores within rounding (`parity`), but not the same bits, so an output keeps
the engine of its first run.
"""

import importlib.util
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.device import cpu_has_amx, cpu_has_int8
from batch_scorer.backends.registry import make_backend
from batch_scorer.config import ENGINES, Config, Device
from batch_scorer.errors import BatchScorerError, ConfigError, ModelError, ShardError
from batch_scorer.job import Job, unpackable_part
from batch_scorer.judges.page import Page
from batch_scorer.models.directory import ModelFacts
from batch_scorer.records import Shard, TokenizedRows
from batch_scorer.shard import read_shard

log = logging.getLogger("batch_scorer")

TRIAL_ROWS = {Device.CPU: 64, Device.CUDA: 1024}
"""The first half warms an engine up, the second half is timed."""

WORTH_A_RACE = {Device.CPU: 2_000_000, Device.CUDA: 20_000_000}
"""Tokens of the smallest job that gets a trial: minutes of scoring, against the half minute or
minute that it takes to start both engines."""


def supported_engines(config: Config, model: ModelFacts, device: Device | None = None) -> list[str]:
    """Engines that can run this job, our own first. Raises ModelError if the one asked for cannot.

    Without `device`, any may come. Under `auto` an engine also has to be installed, and to take
    all settings that are given.
    """
    if model.judge is not None and model.judge.generates:
        writer = _writing_engine(config, model.judge)
        if why := _quantised_refusal(config, writer, model, device):
            raise ModelError(
                f"{model.path}: {why}; use the checkpoint that it was made from, or a server that "
                "can (backend: endpoint)"
            )
        return [writer]
    if config.backend != "auto":
        if ENGINES[config.backend].runs_model and config.backend not in model.engines:
            raise ModelError(
                f"{model.path}: {model.adapter} models do not run on {config.backend}; "
                f"set backend to {' or '.join(model.engines)}"
            )
        if why := _quantised_refusal(config, config.backend, model, device):
            raise ModelError(f"{model.path}: {why}; set backend to hf")
        if config.backend == "hf":
            _refuse_unpackable(config, model)
        return [config.backend]
    asked = config.engine_options
    engines = [
        engine
        for engine in model.engines
        if asked <= ENGINES[engine].options
        and _is_installed(engine)
        and not _quantised_refusal(config, engine, model, device)
    ]
    if not engines:
        takers = " or ".join(e for e, facts in ENGINES.items() if asked <= facts.options)
        raise ModelError(
            f"{model.path}: only the {takers} backend takes {' and '.join(sorted(asked))}, and it "
            f"is not installed or does not run {model.adapter} models"
        )
    if "hf" in engines:
        _refuse_unpackable(config, model)
    return engines


def _writing_engine(config: Config, page: Page) -> str:
    """The engine of a judge that writes. Raises ConfigError where the one asked for does not."""
    writers = [name for name, facts in ENGINES.items() if facts.writes]
    if config.backend == "auto":
        return writers[0]
    if config.backend not in writers:
        raise ConfigError(
            f"judge: {page.name} writes its verdict, which {config.backend} does not let it; set "
            f"backend to {' or '.join(writers)}, or take a page that is read by probability"
        )
    return config.backend


def _quantised_refusal(
    config: Config, engine: str, model: ModelFacts, device: Device | None
) -> str | None:
    """Why an engine that computes with the stored numbers cannot with these; None: it can."""
    stored = model.quantisation
    if stored is None or "quantization" not in ENGINES[engine].options:
        return None
    if not stored.vllm_devices:
        return f"{engine} cannot compute with these weights ({stored.name})"
    if device is not None and device not in stored.vllm_devices:
        return f"{engine} cannot compute with these weights ({stored.name}) on device {device}"
    if device is Device.CPU and not cpu_has_int8():
        return f"{engine} computes wrong products of int8 weights on a CPU without VNNI, as this is"
    if device is Device.CPU and config.dtype == "float32" and cpu_has_amx():
        return (
            f"{engine} multiplies int8 weights in 16 bits on a CPU with AMX, as this is, and dtype "
            "is float32"
        )
    if model.converts:
        return f"{engine} cannot compute with quantised weights of {model.adapter} models"
    return None


def _refuse_unpackable(config: Config, model: ModelFacts) -> None:
    """Raise ModelError for a body that the hf engine cannot run with this attention."""
    part = unpackable_part(model)
    if part and config.attention == "packed":
        raise ModelError(f"{part.path}: {part.unpackable}; set attention to eager")
    if part and config.compile:
        raise ModelError(f"{part.path}: {part.unpackable}; leave compile out")
    if part and config.precision:
        raise ModelError(f"{part.path}: {part.unpackable}; leave precision out")


def _is_installed(engine: str) -> bool:
    package = ENGINES[engine].package
    return package is None or importlib.util.find_spec(package) is not None


def is_raced(engines: Sequence[str], device: Device, num_tokens: int) -> bool:
    """Whether a job of `num_tokens` tokens gets a trial to choose its engine."""
    return len(engines) > 1 and num_tokens >= WORTH_A_RACE[device]


def trial_rows(job: Job, shards: Sequence[Shard]) -> TokenizedRows | None:
    """Some of the job's rows, from its first readable shard."""
    for shard in shards:
        part = replace(shard, num_rows=min(TRIAL_ROWS[job.device], shard.num_rows))
        try:
            return read_shard(part, [job]).rows[0]
        except ShardError:
            continue
    return None


def tokens_per_second(job: Job, rows: TokenizedRows) -> float:
    """Real tokens per second of this job's engine on the second half of the rows.

    The first half warms it up: with the same rows, a prefix cache would do the work. 0 for an
    engine that does not start, or dies; the log shows why.
    """
    try:
        backend = make_backend(job)
    except (BatchScorerError, RuntimeError) as error:
        log.warning("%s does not start: %s", job.backend, error)
        return 0.0
    try:
        half = -(-rows.num_rows // 2)
        backend.score(rows.part(0, half))
        timed = rows.part(half, rows.num_rows) if half < rows.num_rows else rows
        started = time.perf_counter()
        backend.score(timed)
        return timed.num_tokens / (time.perf_counter() - started)
    except EngineDied as error:
        log.warning("%s died: %s", job.backend, error)
        return 0.0
    finally:
        backend.close()
