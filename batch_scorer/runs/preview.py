"""What a run would do (`plan`), and whether its scores would be right (`check`)."""

from dataclasses import dataclass
from functools import partial

from batch_scorer.config import Config, Device
from batch_scorer.errors import InputError, ModelError
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.job import Job
from batch_scorer.models.registry import adapter_named
from batch_scorer.parity import ParityReport, Sample, check_engine, choose_sample
from batch_scorer.pipeline.session import on_worker, ray_session
from batch_scorer.runs.derive import (
    Prepared,
    look_at_model,
    max_tokens_of,
    outputs_of,
    prepare,
    require_template,
)
from batch_scorer.runs.engine_choice import supported_engines
from batch_scorer.runs.estimate import Estimate, estimate


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` found: the settings it derived, the sample, and the comparison."""

    prepared: Prepared
    sample: Sample
    report: ParityReport


def check(config: Config) -> Checked:
    """Hold an engine against plain Hugging Face on a sample of the inputs.

    Under `backend: auto` that is the first engine that supports the model; nothing is raced.
    Writes nothing. Raises what `score` raises before its first shard, but not for scores that
    differ: see `Checked.report`.
    """
    model = look_at_model(config)
    plan = make_plan(config, outputs_of(config, model))
    with ray_session(config):
        prepared = prepare(config, model)
        require_template(prepared, plan)
        job = prepared.job(epoch=0)
        sample = choose_sample(job, plan.shards)
        if sample is None:
            raise InputError(f"{', '.join(config.inputs)}: none of the first rows can be scored")
        return Checked(prepared, sample, on_worker(job, partial(check_engine, job, sample)))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run would do. Without an `estimate`, `unknown` says why; None: no model is named."""

    plan: Plan
    estimate: Estimate | None = None
    unknown: str | None = None


def look_ahead(config: Config, *, with_model: bool) -> Outlook:
    """Plan a run and, where the model is at hand, estimate what it takes from a sample of rows.

    Writes nothing, starts no Ray, fetches no model. Raises ConfigError and InputError.
    """
    if not with_model:
        return Outlook(make_plan(config))
    try:
        model = look_at_model(config, with_weights=False)
        plan = make_plan(config, outputs_of(config, model))
        job = Job(
            config=config,
            model_dir=model.path,
            adapter=model.adapter,
            prompt=adapter_named(model.adapter).prompt,
            backend=supported_engines(config, model)[0],
            outputs=outputs_of(config, model),
            embedding=None,
            device=Device.CPU,
            dtype="float32",
            max_tokens=max_tokens_of(config, model),
            fingerprint="",
            epoch=0,
        )
        estimated = estimate(job, model, plan.shards)
    except ModelError as error:
        return Outlook(make_plan(config), unknown=str(error))
    unknown = None if estimated else "none of the sampled rows can be scored"
    return Outlook(plan, estimated, unknown)
