"""From settings to a job: device, dtype, engine, fingerprint."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.config import Config, Device
from batch_scorer.errors import (
    ConfigError,
    IncompleteError,
    ModelError,
    OutputError,
    StorageError,
)
from batch_scorer.fingerprint import Fingerprint, score_fingerprint
from batch_scorer.inputs.plan import Plan
from batch_scorer.job import Job
from batch_scorer.models.adapter import Prompt
from batch_scorer.models.directory import ModelFacts, find_model, inspect_model
from batch_scorer.models.embedding import embedding_of
from batch_scorer.outputs.claim import claimed, claimed_fingerprint
from batch_scorer.pipeline.session import RaySession, has_gpus, on_worker
from batch_scorer.records import Format, TokenizedRows
from batch_scorer.render import max_tokens_of, renderer_of
from batch_scorer.runs.engine_choice import (
    is_raced,
    supported_engines,
    tokens_per_second,
    trial_rows,
)
from batch_scorer.storage import Store, open_store

log = logging.getLogger("batch_scorer")


def look_at_model(config: Config, *, with_weights: bool = True) -> ModelFacts:
    """Find the model and check that it can score, or embed.

    Without `with_weights` nothing is fetched, and the digest is left out. Raises ModelError, and
    ConfigError for a setting that this model has no use for.
    """
    model = inspect_model(
        find_model(config.model, with_code=config.trust_remote_code, fetch=with_weights),
        config.model,
        config.adapter,
        embeds=config.task == "embed",
        trust_remote_code=config.trust_remote_code,
        with_digest=with_weights,
    )
    if config.step_aggregation is not None and not model.has_steps:
        raise ConfigError(
            f"step_aggregation: {model.adapter} models give no step scores; leave it out"
        )
    if config.max_tokens is not None and config.max_tokens > model.positions:
        log.warning(
            "max_tokens: %d, but the model has %d positions; longer sequences are not scored whole",
            config.max_tokens,
            model.positions,
        )
    return replace(model, prompt=_with_settings(model.prompt, config))


def _with_settings(prompt: Prompt, config: Config) -> Prompt:
    """What the model's family was trained on, and what the settings say instead.

    The file of a chat template is read here, once.
    """
    template, name = prompt.template, config.chat_template
    if name is not None and Path(name).is_file():
        try:
            template, name = Path(name).read_text(), None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template: {name}: not readable: {error}") from error
    elif name is not None:
        template = None
    steps = prompt.steps
    if steps is not None and config.step_separator is not None:
        steps = replace(steps, separator=config.step_separator)
    return replace(
        prompt,
        template=template,
        template_name=name,
        arguments=json.dumps(config.template_arguments, sort_keys=True),
        system=prompt.system if config.system_prompt is None else config.system_prompt,
        steps=steps,
        step_separator=config.step_separator or prompt.step_separator,
        bos=prompt.bos if config.bos == "auto" else config.bos,
        eos=prompt.eos if config.eos == "auto" else config.eos,
        reasoning=config.reasoning,
        special_text=config.special_text,
    )


def as_begun(config: Config, model: ModelFacts, output: Store) -> Job | None:
    """The job as it was when the output was begun, where the settings leave device, dtype or
    engine open; None if it is not begun, or was with other settings.

    Needs no Ray: which devices there are matters only to a run that has something to score.
    """
    claim = claimed(output)
    if not claim:
        return None
    parts = claim["fingerprint"]
    then = config.model_copy(
        update={
            "device": config.device or Device(claim["provenance"]["device"]),
            "dtype": config.dtype or parts["dtype"],
        }
    )
    job = derive(then, model, date_of(parts))
    if config.backend == "auto":
        job = job.on_engine(parts["backend"])
    return job if job.fingerprint.digest == Fingerprint(parts).digest else None


def settle(config: Config, model: ModelFacts, plan: Plan, session: RaySession) -> Job:
    """Derive what the settings leave open from the devices there are, and from what the output was
    begun with."""
    session.start()
    output = open_output(config)
    job = derive(config, model, date_of(claimed_fingerprint(output)))
    return _with_engine(job, plan, output)


def date_of(fingerprint: Mapping[str, Any]) -> datetime | None:
    """The date that was today's for the templates of an output; None for one that asked for none,
    or is not begun."""
    date = fingerprint.get("text", {}).get("date")
    return date and datetime.fromisoformat(date)


def derive(config: Config, model: ModelFacts, date: datetime | None = None) -> Job:
    """The job, its engines those that support it.

    Templates get the setting's date for today's, or else `date`, or else that of this day. Raises
    ModelError for a tokenizer that fails or does not fit the model.
    """
    device = config.device or (Device.CUDA if has_gpus(config) else Device.CPU)
    has_bfloat16 = device is Device.CUDA or cpu_has_bfloat16()
    dtype = config.dtype or ("bfloat16" if has_bfloat16 else "float32")
    embedding = None
    if config.task == "embed":
        embedding = embedding_of(model.path, config.embedding_pooling, config.normalize)
    engines = tuple(supported_engines(config, model))
    today = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    date = config.template_date or date or today
    model = replace(model, prompt=replace(model.prompt, date=date))
    renderer = renderer_of(config, model)
    if renderer.vocab_size > model.vocab_size:
        raise ModelError(
            f"{model.path}: the tokenizer knows {renderer.vocab_size} tokens, the model "
            f"{model.vocab_size}: they do not belong together"
        )
    probe = renderer.probe() if renderer.renders else None
    prompt = model.prompt if renderer.asks_for_date else replace(model.prompt, date=None)
    fingerprint = score_fingerprint(
        config,
        model_digest=model.digest,
        adapter=model.adapter,
        backend=engines[0],
        embedding=(embedding.pooling, embedding.normalize) if embedding else None,
        dtype=dtype,
        max_tokens=max_tokens_of(config, model),
        text=prompt.to_json(),
        probe_digest=probe.digest if probe else None,
    )
    return Job(config, model, engines, embedding, device, dtype, probe, fingerprint)


def _with_engine(job: Job, plan: Plan, output: Store) -> Job:
    """Settle `backend: auto`: as the output was begun, else by support, else by a race."""
    if len(job.engines) == 1:
        return job
    begun_with = claimed_fingerprint(output).get("backend")
    if begun_with in job.engines:
        return job.on_engine(begun_with)
    if not is_raced(job.engines, job.device, plan.estimated_tokens):
        return job
    rows = trial_rows(job, plan.shards)
    if rows is None:
        return job
    speeds = {engine: _speed(job.on_engine(engine), rows) for engine in job.engines}
    log.info("tokens per second on the job's own rows: %s", speeds)
    return replace(job.on_engine(max(speeds, key=lambda engine: speeds[engine])), trial=speeds)


def _speed(job: Job, rows: TokenizedRows) -> float:
    """Tokens per second of the job's engine on a worker; 0 if it takes its process down."""
    try:
        return on_worker(job, partial(tokens_per_second, job, rows))
    except IncompleteError as error:
        log.warning("%s: %s", job.backend, error)
        return 0.0


def open_output(config: Config) -> Store:
    """The output store, made if it is a local folder. Raises OutputError."""
    try:
        return open_store(config.output, config.store_options, create=True)
    except StorageError as error:
        raise OutputError(str(error)) from error


def require_template(job: Job, plan: Plan) -> None:
    """Raise ModelError where rows have to be rendered and the model has no chat template."""
    needs_none = {Format.TEXT, Format.TOKEN_IDS}
    if job.probe is None and any(f.layout.format not in needs_none for f in plan.files):
        renderer_of(job.config, job.model).probe()  # raises, and names what is missing
