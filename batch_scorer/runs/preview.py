"""What a run would do (`plan`), and whether its scores would be right (`check`)."""

from dataclasses import dataclass, replace
from functools import partial

from batch_scorer.config import Config
from batch_scorer.errors import InputError, ModelError
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.job import Job
from batch_scorer.models.hub import NotHereError
from batch_scorer.parity import ParityReport, Sample, check_engine, choose_sample
from batch_scorer.pipeline.session import on_worker, ray_session
from batch_scorer.rewards.functions import Reward, find_rewards
from batch_scorer.runs.derive import (
    derive,
    look_at_model,
    plan_for,
    require_answers,
    require_columns,
    require_template,
)
from batch_scorer.runs.estimate import Estimate, estimate


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` found: the settings it derived, the sample, and the comparison."""

    job: Job
    sample: Sample
    report: ParityReport


def check(config: Config) -> Checked:
    """Compare an engine's scores with plain Hugging Face on a sample of the inputs.

    Under `backend: auto` that is the first engine that supports the model; nothing is raced.
    Writes nothing. Raises what `score` raises before its first shard, but not for scores that
    differ: see `Checked.report`.
    """
    model = look_at_model(config)
    plan = plan_for(config, model)
    with ray_session(config):
        job = derive(config, model)
        require_template(job, plan)
        require_answers(job, plan)
        require_columns(job.rewards, plan)
        sample = choose_sample(job, plan.shards)
        if sample is None:
            raise InputError(f"{', '.join(config.inputs)}: none of the first rows can be scored")
        return Checked(job, sample, on_worker(job, partial(check_engine, sample=sample)))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run would do, and the reward functions that it would ask. Without an `estimate`,
    `unknown` is the reason; None: no model given."""

    plan: Plan
    estimate: Estimate | None = None
    unknown: str | None = None
    rewards: tuple[Reward, ...] = ()


def look_ahead(config: Config, *, with_model: bool) -> Outlook:
    """Plan a run and, where the model is at hand, estimate what it takes from a sample of rows.

    Writes nothing, starts no Ray, fetches no model. Raises ConfigError and InputError, and
    ModelError for a model that is at hand and cannot score.
    """
    rewards = find_rewards(config)
    ahead = _look_ahead(config, with_model=with_model)
    require_columns(rewards, ahead.plan)
    return replace(ahead, rewards=rewards)


def _look_ahead(config: Config, *, with_model: bool) -> Outlook:
    if not with_model:
        return Outlook(make_plan(config))
    try:
        model = look_at_model(config, with_weights=False)
    except NotHereError as error:
        return Outlook(make_plan(config), unknown=str(error))
    plan = plan_for(config, model)
    if model.is_served:
        return Outlook(plan, unknown="a served judge's tokens are counted by its server")
    try:
        estimated = estimate(config, model, plan.shards)
    except ModelError as error:
        return Outlook(plan, unknown=str(error))
    unknown = None if estimated else "none of the sampled rows can be scored"
    return Outlook(plan, estimated, unknown)
