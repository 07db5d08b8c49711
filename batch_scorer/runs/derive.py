"""From settings to a job: device, dtype, engine, fingerprint."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.backends.registry import endpoint_of
from batch_scorer.config import ENGINES, NO_REFERENCE, Config, Device
from batch_scorer.errors import (
    ConfigError,
    IncompleteError,
    ModelError,
    OutputError,
    StorageError,
    cause_of,
)
from batch_scorer.fingerprint import Fingerprint, score_fingerprint
from batch_scorer.formats.kinds import BESIDE_NAMES
from batch_scorer.inputs.known import KnownFiles
from batch_scorer.inputs.plan import Choice, Plan, make_plan
from batch_scorer.job import (
    AnyJob,
    Job,
    Member,
    Members,
    attention_of,
    families_of,
    job_of,
    unpackable_part,
)
from batch_scorer.judges.judgements import UNREAD
from batch_scorer.judges.page import Page, load_page
from batch_scorer.models.adapter import Prompt, output_entries, verdict_entries
from batch_scorer.models.directory import (
    ModelFacts,
    find_base,
    find_model,
    inspect_model,
    served_model,
    with_reference,
    without_reference,
)
from batch_scorer.models.embedding import embedding_of
from batch_scorer.models.files import reading
from batch_scorer.models.hub import repository_of
from batch_scorer.models.kept import kept
from batch_scorer.models.registry import JUDGE, NAMED
from batch_scorer.outputs.claim import claimed, claimed_parts
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.pipeline.session import RaySession, has_gpus, on_worker, worker_pool
from batch_scorer.records import Format, TextStyle, TokenizedRows
from batch_scorer.render import Probe, max_tokens_of, rendering_of
from batch_scorer.render.questions import check_templates
from batch_scorer.rewards.functions import Reward, find_rewards
from batch_scorer.runs.engine_choice import (
    is_raced,
    supported_engines,
    tokens_per_second,
    trial_rows,
)
from batch_scorer.storage import Store, open_store

log = logging.getLogger("batch_scorer")

P = ParamSpec("P")
T = TypeVar("T")


def _reads_model(
    function: Callable[Concatenate[Config, P], T],
) -> Callable[Concatenate[Config, P], T]:
    @wraps(function)
    def guarded(config: Config, /, *arguments: P.args, **named: P.kwargs) -> T:
        with reading(config.one_model):
            return function(config, *arguments, **named)

    return guarded


@_reads_model
def look_at_model(config: Config, *, with_weights: bool = True) -> ModelFacts:
    """Find the model and check that it can score, or embed.

    Without `with_weights` nothing is fetched, and the digest is left out. Raises ModelError, and
    ConfigError for a setting that this model has no use for.
    """
    entries = output_entries(config.output_names, config.output_weights)
    page = None if config.judge is None else load_page(config.judge)
    if page is not None:
        check_templates(page)
        if config.backend == "endpoint":
            endpoint_of(config)  # raises before anything is begun
            return served_model(config.one_model, page)
        entries = verdict_entries([*page.verdict.choices])
        if not page.samples and (same := UNREAD.intersection(config.retry_marked)):
            raise ConfigError(
                f"retry_marked: {', '.join(sorted(same))}: {page.name} does not sample, so the "
                "judge would say the same again; leave it out"
            )

    def inspected(name: str, revision: str | None, base_model: str | None) -> ModelFacts:
        with reading(name):
            path = find_model(
                name, revision, with_code=config.trust_remote_code, fetch=with_weights
            )
            base = find_base(path, base_model, fetch=with_weights)
            asked: dict[str, Any] = {
                "name": repository_of(name),
                "adapter": config.adapter or (JUDGE if page else NAMED if entries else None),
                "entries": entries,
                "embeds": config.task == "embed",
                "trust_remote_code": config.trust_remote_code,
                "with_fit": config.backend == "auto" or ENGINES[config.backend].runs_model,
                "with_digest": with_weights,
            }
            facts = kept(
                ModelFacts,
                [path] if base is None else [path, base],
                asked,
                partial(inspect_model, path, base=base, **asked),
            )
        for change in facts.changes:
            log.info("%s: %s", name, change)
        return facts

    model = inspected(config.one_model, config.revision, config.base_model)
    if config.reference_model == NO_REFERENCE:
        model = without_reference(model)
    elif config.reference_model is not None:
        model = with_reference(model, inspected(config.reference_model, None, None))
    for name, part in ((config.one_model, model), (config.reference_model, model.reference)):
        for doubt in part.doubts if part else ():
            log.warning("%s: %s", name, doubt)
    if config.attention is None and (part := unpackable_part(model)):
        log.info("%s: %s; on hf it runs padded (attention: eager)", part.path, part.unpackable)
    if not (model.has_score or config.task != "score"):
        log.warning(
            "%s: no score, only rewards (%s); --output-weights makes a score of them",
            *(config.one_model, ", ".join(model.attributes)),
        )
    if config.step_aggregation is not None and not model.has_steps:
        raise ConfigError(
            f"step_aggregation: {model.adapter} models give no step scores; leave it out"
        )
    if config.quantization is not None and model.quantisation is not None:
        raise ConfigError(
            f"quantization: {config.one_model} is quantised already ({model.quantisation.name}); "
            "leave it out"
        )
    if config.token_scores and not model.reads_any_token:
        raise ConfigError(
            f"token_scores: {model.adapter} models give none: their head reads other than a "
            "sequence's last token alone; leave it out"
        )
    if config.token_scores and not model.has_score:
        raise ConfigError(
            f"token_scores: nothing makes a score of {', '.join(model.attributes)}; set "
            "output_weights"
        )
    if config.max_tokens is not None and config.max_tokens > model.positions:
        log.warning(
            "max_tokens: %d, but the model has %d positions; longer sequences are not scored whole",
            config.max_tokens,
            model.positions,
        )
    prompt = _with_settings(model.prompt, config)
    if page is not None:
        prompt = _asking(prompt, page, config)
    for field in BESIDE_NAMES.keys() & config.columns.keys() - {prompt.column_beside}:
        raise ConfigError(f"columns: {model.adapter} models read no {field} of a row; leave it out")
    model = replace(model, prompt=prompt, judge=page)
    rendering_of(config, model)  # raises what is wrong with them
    return model


def _with_settings(prompt: Prompt, config: Config) -> Prompt:
    """What the model's family was trained on, and what the settings say instead.

    The file of a chat template is read here, once.
    """
    template, name = prompt.template, config.chat_template
    if name is not None and Path(name).is_file():
        try:
            template, name = Path(name).read_text(), None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template: {name}: not readable: {cause_of(error)}") from error
    elif name is not None:
        template = None
    steps = prompt.steps
    if steps is not None and config.step_separator is not None:
        steps = replace(steps, separator=config.step_separator)
    return replace(
        prompt,
        template=template,
        template_name=name,
        arguments=json.dumps(
            json.loads(prompt.arguments) | config.template_arguments, sort_keys=True
        ),
        system=prompt.system if config.system_prompt is None else config.system_prompt,
        steps=steps,
        step_separator=config.step_separator or prompt.step_separator,
        bos=prompt.bos if config.bos == "auto" else config.bos,
        eos=prompt.eos if config.eos == "auto" else config.eos,
        reasoning=config.reasoning,
        special_text=config.special_text,
    )


def _asking(prompt: Prompt, page: Page, config: Config) -> Prompt:
    """How a judge's questions become text: ending where the judge's reply begins, and, unless a
    setting says otherwise, without special tokens that an answer spells."""
    arguments = {"add_generation_prompt": True, **json.loads(prompt.arguments)}
    is_set = "special_text" in config.model_fields_set
    return replace(
        prompt,
        arguments=json.dumps(arguments, sort_keys=True),
        begins=page.begins,
        special_text=config.special_text if is_set else "literal",
    )


def look_at_models(config: Config, *, with_weights: bool = True) -> Members:
    """`look_at_model` for each model of the settings, by name.

    Raises as that does; ConfigError also where several models do not go together, or no one of them
    reads a column that is named for it.
    """
    if isinstance(config.model, str):
        return {"": Member(config, look_at_model(config, with_weights=with_weights))}
    members: dict[str, Member] = {}
    beside = BESIDE_NAMES.keys() & config.columns.keys()
    for name, own in config.members.items():
        # A column beside the conversation is for those that read it.
        columns = {field: column for field, column in own.columns.items() if field not in beside}
        plain = own.model_copy(update={"columns": columns})
        model = look_at_model(plain, with_weights=with_weights)
        if not model.has_score:
            raise ConfigError(
                f"model: {name} gives no score, only rewards ({', '.join(model.attributes)}); "
                "set its output_weights"
            )
        is_read = model.prompt.column_beside in beside
        members[name] = Member(own if is_read else plain, model)
    read = {member.model.prompt.column_beside for member in members.values()} - {None}
    if len(read) > 1:
        fields = ", ".join(sorted(map(str, read)))
        raise ConfigError(
            f"model: these models read different columns beside a conversation ({fields}); score "
            "with them in jobs of their own"
        )
    for field in beside - read:
        raise ConfigError(f"columns: none of the models reads a {field} of a row; leave it out")
    return members


def plan_for(config: Config, members: Members, choose: Choice | None = None) -> Plan:
    """The plan of the inputs for these models. Raises as `make_plan` does."""
    models = [member.model for member in members.values()]
    return make_plan(
        config,
        families_of(members),
        choose,
        beside=next(filter(None, (model.prompt.column_beside for model in models)), None),
        fields=models[0].columns_beside,  # of a judge, which is alone
        known=known_files(config),
    )


def known_files(config: Config) -> KnownFiles | None:
    """What is known of input files at the output, if the settings name one."""
    return KnownFiles(config, f"{RECORDS}/inputs") if config.output else None


def as_begun(config: Config, members: Members, output: Store) -> AnyJob | None:
    """The job as it was when the output was begun, where the settings leave device, dtype or
    engine open; None if it is not begun, or was with other settings.

    Needs no Ray: which devices there are matters only to a run that has something to score.
    """
    claim = claimed(output)
    if claim is None or claim.parts_by_model.keys() != members.keys():
        return None
    device = config.device or claim.provenance.get("device")
    if device not in set(Device):
        return None
    date = _one_date(claim.parts_by_model)
    jobs: dict[str, Job] = {}
    for name, member in members.items():
        job = _as_begun(member, claim.parts_by_model[name], Device(device), date)
        if job is None:
            return None
        jobs[name] = job
    whole = job_of(config, jobs, find_rewards(config))
    return whole if whole.fingerprint.digest == Fingerprint(claim.fingerprint).digest else None


def _as_begun(
    member: Member, parts: Mapping[str, Any], device: Device, date: datetime | None
) -> Job | None:
    """The job of one model, with what the settings leave open as in these parts of the fingerprint
    that the output was begun with; None where they do not say it."""
    config = member.config
    dtype = config.dtype or parts.get("dtype")
    then = config.model_copy(update={"device": device, "dtype": dtype})
    job = derive(then, member.model, date)
    if config.backend == "auto":
        if (engine := parts.get("backend")) not in ENGINES:
            return None
        job = job.on_engine(engine)
    return job


def settle(config: Config, members: Members, plan: Plan, session: RaySession) -> AnyJob:
    """Derive what the settings leave open from the devices there are, and from what the output was
    begun with. Raises ConfigError where these devices hold no worker."""
    session.start()
    begun = claimed_parts(open_output(config))
    date = _one_date(begun)
    jobs = {name: derive(each.config, each.model, date) for name, each in members.items()}
    rewards = find_rewards(config)
    # Raises where the devices are too few, before the output is claimed.
    worker_pool(job_of(config, jobs, rewards))
    jobs = {name: _with_engine(job, plan, begun.get(name, {})) for name, job in jobs.items()}
    return job_of(config, jobs, rewards)


def date_of(output: Store) -> datetime | None:
    """The date that was today's for the templates of an output; None for one that asked for none,
    or is not begun."""
    return _one_date(claimed_parts(output))


def _one_date(parts_by_model: Mapping[str, Mapping[str, Any]]) -> datetime | None:
    """The date of those models whose templates ask for one: the same day for all."""
    dates = (parts.get("text", {}).get("date") for parts in parts_by_model.values())
    date = next(filter(None, dates), None)
    return None if date is None else datetime.fromisoformat(date)


@_reads_model
def derive(config: Config, model: ModelFacts, date: datetime | None = None) -> Job:
    """The job, its engines those that support it.

    Templates get the setting's date for today's, or else `date`, or else that of this day. Raises
    ModelError for a tokenizer that fails or does not fit the model, and ConfigError for a
    precision that the device has not.
    """
    if model.is_served:
        return _derive_served(config, model)
    device = config.device or (Device.CUDA if has_gpus(config) else Device.CPU)
    if config.precision == "fp8" and device is Device.CPU:
        raise ConfigError("precision: no CPU multiplies fp8; set int8, or device: cuda")
    has_bfloat16 = device is Device.CUDA or cpu_has_bfloat16()
    dtype = config.dtype or ("bfloat16" if has_bfloat16 else "float32")
    embedding = None
    if config.task == "embed":
        if model.lora_dir and config.embedding_pooling is None:
            raise ConfigError("embedding_pooling: needed for a LoRA adapter; its files do not say")
        embedding = embedding_of(
            model.path, config.embedding_pooling, config.normalize, is_decoder=model.is_decoder
        )
    engines = tuple(supported_engines(config, model, device))
    today = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    date = config.template_date or date or today
    model = replace(model, prompt=replace(model.prompt, date=date))
    rendering = rendering_of(config, model)
    if rendering.vocab_size > model.vocab_size:
        raise ModelError(
            f"{model.path}: the tokenizer knows {rendering.vocab_size} tokens, the model "
            f"{model.vocab_size}: they do not belong together"
        )
    probe = rendering.probe
    model = replace(model, verdict_ids=rendering.choice_ids)
    if probe and model.reference and (lacking := _unread_ids(probe, model.vocab_size)):
        raise ModelError(
            f"{model.path}: its chat template writes token id {lacking[0]}, which only one of the "
            "two models knows, so that no row could be scored; name a template without it: "
            "--chat-template"
        )
    prompt = model.prompt if rendering.asks_for_date else replace(model.prompt, date=None)
    fingerprint = score_fingerprint(
        config,
        model_digest=model.digest,
        base_digest=model.base_digest,
        reference_digest=model.reference.digest if model.reference else None,
        adapter=model.adapter,
        backend=engines[0],
        attention=attention_of(config, model, engines[0]),
        embedding=(embedding.pooling, embedding.normalize) if embedding else None,
        dtype=dtype,
        max_tokens=max_tokens_of(config, model),
        text=prompt.to_json(),
        probe_digest=probe.digest if probe else None,
        judge_digest=model.judge.digest if model.judge else None,
    )
    return Job(config, model, engines, embedding, device, dtype, probe, fingerprint)


def _derive_served(config: Config, model: ModelFacts) -> Job:
    """The job of a judge that is served elsewhere: nothing is computed or rendered here."""
    assert model.judge is not None
    fingerprint = score_fingerprint(
        config,
        model_digest=model.digest,
        base_digest=None,
        reference_digest=None,
        adapter=model.adapter,
        backend=config.backend,
        attention="served",
        embedding=None,
        dtype="served",
        max_tokens=model.max_tokens,
        text={},
        probe_digest=None,
        judge_digest=model.judge.digest,
    )
    engines = tuple(supported_engines(config, model))
    return Job(config, model, engines, None, Device.CPU, "served", None, fingerprint)


def _unread_ids(probe: Probe, vocab_size: int) -> list[int]:
    return sorted({token for ids in probe.token_ids for token in ids if token >= vocab_size})


def _with_engine(job: Job, plan: Plan, begun: Mapping[str, Any]) -> Job:
    """Settle `backend: auto`: as the output was `begun`, by the parts of this model's fingerprint
    there, else by support, else by a race."""
    if len(job.engines) == 1:
        return job
    begun_with = begun.get("backend")
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
        return on_worker(job, partial(tokens_per_second, rows=rows))
    except IncompleteError as error:
        log.warning("%s: %s", job.backend, error)
        return 0.0


def open_output(config: Config) -> Store:
    """The output store, made if it is a local folder. Raises OutputError."""
    try:
        return open_store(config.output, config.store_options, create=True)
    except StorageError as error:
        raise OutputError(str(error)) from error


def require_answers(job: Job, plan: Plan) -> None:
    """Raise ConfigError where the score is of the answer alone and rows do not show where it
    begins."""
    if not job.model.prompt.answer:
        return
    for alike, places in plan.files.by_alike():
        layout = alike.layout
        is_one = layout.format in (Format.TEXT, Format.TOKEN_IDS)
        if is_one or (layout.text_style is TextStyle.RENDERED and "prompt" not in layout.columns):
            raise ConfigError(
                f"{plan.files.sources[places[0]].key}: {layout.format.value}: an implicit reward "
                "is of the answer alone, and these rows do not show where it begins; give prompt "
                "and answer in columns of their own, or conversations"
            )


def require_columns(rewards: Sequence[Reward], plan: Plan) -> None:
    """Raise ConfigError for a column that a reward function asks for and that no file has. In a
    file without it, as in a row, its values are None."""
    known = {name for file in plan.files for name in file.schema.names}
    if not plan.files or plan.aside:  # those aside may have it
        return
    for reward in rewards:
        for parameter, column in reward.columns.items():
            if column not in known:
                raise ConfigError(
                    f"rewards: {reward.name}: no input has a column {column!r}, which "
                    f"{reward.function} asks for as {parameter}; there are "
                    f"{', '.join(sorted(known))}. Name another one with `columns`, or give the "
                    "parameter a default"
                )


def require_template(job: Job, plan: Plan) -> None:
    """Raise ModelError where rows have to be rendered and the model has no chat template."""
    if job.model.is_served:
        return
    needs_none = {Format.TEXT, Format.TOKEN_IDS}
    alike = plan.files.facts.alike
    if job.probe is None and any(each.layout.format not in needs_none for each in alike):
        raise ModelError(rendering_of(job.config, job.model).problem)
