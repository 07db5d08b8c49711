"""What a run would do (`plan`), and whether its scores would be right (`check`)."""

from dataclasses import dataclass, replace
from functools import partial, reduce

from batch_scorer.config import Config
from batch_scorer.errors import ConfigError, InputError, ModelError
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.job import Job, Member
from batch_scorer.models.hub import NotHereError
from batch_scorer.parity import (
    ParityReport,
    Sample,
    Seen,
    check_engine,
    choose_sample,
    look_at_first,
)
from batch_scorer.pipeline.session import on_worker, ray_session
from batch_scorer.rewards.functions import Reward, find_rewards
from batch_scorer.runs.derive import (
    derive,
    known_files,
    look_at_model,
    look_at_models,
    plan_for,
    require_answers,
    require_columns,
    require_template,
)
from batch_scorer.runs.estimate import Estimate, estimate


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` found: the settings it derived, the sample, what the model sees of its first
    sequence, and the comparison."""

    job: Job
    sample: Sample
    seen: Seen
    report: ParityReport


def check(config: Config) -> Checked:
    """Compare an engine's scores with plain Hugging Face on a sample of the inputs.

    Under `backend: auto` that is the first engine that supports the model; nothing is raced.
    Writes nothing. Raises what `score` raises before its first shard, but not for scores that
    differ: see `Checked.report`.
    """
    if not isinstance(config.model, str):
        raise ConfigError("model: one at a time is checked; `score` checks each of several models")
    model = look_at_model(config)
    plan = plan_for(config, {"": Member(config, model)})
    with ray_session(config):
        job = derive(config, model).with_rewards(find_rewards(config))
        require_template(job, plan)
        require_answers(job, plan)
        require_columns(job.rewards, plan)
        sample = choose_sample(job, plan.shards)
        if sample is None:
            raise InputError(f"{', '.join(config.inputs)}: none of the first rows can be scored")
        report = on_worker(job, partial(check_engine, sample=sample))
        return Checked(job, sample, look_at_first(job, sample), report)


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
        return Outlook(make_plan(config, known=known_files(config)))
    try:
        members = look_at_models(config, with_weights=False)
    except NotHereError as error:
        return Outlook(make_plan(config, known=known_files(config)), unknown=str(error))
    plan = plan_for(config, members)
    if any(member.model.is_served for member in members.values()):
        return Outlook(plan, unknown="a served judge's tokens are counted by its server")
    try:
        found = [estimate(each.config, each.model, plan.shards) for each in members.values()]
    except ModelError as error:
        return Outlook(plan, unknown=str(error))
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return Outlook(plan, unknown="none of the sampled rows can be scored")
    return Outlook(plan, reduce(Estimate.plus, known))
