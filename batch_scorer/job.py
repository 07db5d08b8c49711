"""A run's settings with everything derived filled in: made once, the same on every worker."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from batch_scorer.config import ENGINES, Config, Device, EngineFacts
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.judges.page import Page, judge_columns
from batch_scorer.models.directory import ModelFacts
from batch_scorer.models.hub import commit_of, on_this_node
from batch_scorer.records import SCALAR, Embedding, Families, Outputs, ReadBounds
from batch_scorer.render import Probe, TemplateFacts, max_tokens_of
from batch_scorer.rewards.functions import Reward
from batch_scorer.version import __version__


@dataclass(frozen=True, slots=True)
class Member:
    """A model of a job, as its files show it, and its own settings."""

    config: Config
    model: ModelFacts


Members: TypeAlias = Mapping[str, Member]
"""The models of a job by name, in the order of their columns; the name of a single one is ""."""


@dataclass(frozen=True, slots=True)
class Judging:
    """How replies become scores: by which page, and whether they are written, too."""

    page: Page
    keeps_replies: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A model and settings that have been checked, before any row is read.

    `engines` are those that can run the job, the first one does; `trial` holds their tokens per
    second where that decided. `probe` is None where nothing can be rendered. `placement_group` is
    Ray's with the devices of this worker, where they are on several nodes. `rewards` are the
    functions that are asked about the same rows.
    """

    config: Config
    model: ModelFacts
    engines: tuple[str, ...]
    embedding: Embedding | None
    device: Device
    dtype: str
    probe: Probe | None
    fingerprint: Fingerprint
    trial: dict[str, float] | None = None
    placement_group: Any = None
    rewards: tuple[Reward, ...] = ()

    @property
    def members(self) -> "Mapping[str, Job]":
        """The jobs of all its models, by name."""
        return {"": self}

    @property
    def stages(self) -> list[list[str]]:
        """The models that a worker holds, by name, for each kind of worker."""
        return [[""]]

    @property
    def is_served(self) -> bool:
        """Whether another program scores, which is asked by one worker."""
        return self.engine.is_served

    @property
    def backend(self) -> str:
        """The engine that scores."""
        return self.engines[0]

    @property
    def engine(self) -> EngineFacts:
        """What is known of that engine."""
        return ENGINES[self.backend]

    @property
    def computes_quantised(self) -> bool:
        """Whether the engine computes with quantised weights, as stored or by the setting: its
        scores are then off by more than rounding."""
        is_stored = self.model.quantisation is not None and "quantization" in self.engine.options
        return is_stored or self.config.quantization is not None

    @property
    def model_dir(self) -> Path:
        return self.model.path

    @property
    def adapter(self) -> str:
        return self.model.adapter

    @property
    def attention(self) -> str:
        return attention_of(self.config, self.model, self.backend)

    @property
    def max_tokens(self) -> int:
        return max_tokens_of(self.config, self.model)

    @property
    def outputs(self) -> Outputs:
        return outputs_of(self.config, self.model)

    @property
    def judging(self) -> Judging | None:
        """How a judge's replies become scores; None without a judge."""
        page = self.model.judge
        return None if page is None else Judging(page, self.config.keep_judgement)

    @property
    def step_separator(self) -> str:
        """What stands between the steps of an answer."""
        prompt = self.model.prompt
        return prompt.steps.separator if prompt.steps else prompt.step_separator

    @property
    def writes(self) -> bool:
        """Whether the engine writes a judge's replies."""
        return self.model.judge is not None and self.model.judge.generates

    @property
    def asks_together(self) -> bool:
        """Whether several shards are asked of the engine together: of a judge that writes or is
        served, whose questions end one by one, so that the last ones of a shard would leave it
        half idle. Other engines work batch by batch, and a batch never mixes shards, because a
        score's last bits depend on its neighbours."""
        return self.model.judge is not None and (self.writes or self.engine.is_served)

    @property
    def template_facts(self) -> TemplateFacts | None:
        """What the chat template does to a conversation; None where there is none."""
        return self.probe.template if self.probe else None

    @property
    def provenance(self) -> dict[str, Any]:
        """What does the work, for the record; none of it enters the fingerprint."""
        facts, reference = self.template_facts, self.model.reference
        return {
            "batch_scorer": __version__,
            "model": self.config.one_model,
            "revision": commit_of(self.model.lora_dir or self.model.path),
            "base_model": str(self.model.path) if self.model.lora_dir else None,
            "model_changes": [*self.model.changes, *self.model.doubts],
            "reference_model": str(reference.lora_dir or reference.path) if reference else None,
            "architecture": self.model.architecture,
            "adapter": self.model.adapter,
            "backend": self.backend,
            "trial_tokens_per_s": self.trial,
            "trust_remote_code": self.config.trust_remote_code,
            "device": self.device,
            **({"judge": self.model.judge.model_dump(mode="json")} if self.model.judge else {}),
            **_identities(self.rewards),
            "rendered_probe": list(self.probe.texts) if self.probe else None,
            "template": asdict(facts) if facts else None,
        }

    def on_this_node(self, *, weights: bool = True) -> "Job":
        """The same job with the model's folders as this node has them (`models.hub`).

        Raises ModelError.
        """
        if self.model.is_served:
            return self
        code = self.config.trust_remote_code

        def here(path: Path, weights: bool) -> Path:
            return on_this_node(path, weights=weights, code=code)

        def moved(model: ModelFacts) -> ModelFacts:
            return replace(
                model,
                path=here(model.path, weights),
                tokenizer_path=here(model.tokenizer_path, False),
                lora_dir=model.lora_dir and here(model.lora_dir, weights),
                reference=model.reference and moved(model.reference),
            )

        return replace(self, model=moved(self.model))

    def with_rewards(self, rewards: tuple[Reward, ...]) -> "Job":
        """The same job with these functions, which the fingerprint then covers."""
        parts = {**self.fingerprint.parts, **_identities(rewards)}
        return replace(self, rewards=rewards, fingerprint=Fingerprint(parts))

    def on_engine(self, engine: str) -> "Job":
        """The same job on this engine alone."""
        attention = attention_of(self.config, self.model, engine)
        parts = {**self.fingerprint.parts, "backend": engine, "attention": attention}
        return replace(self, engines=(engine,), fingerprint=Fingerprint(parts))


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Several models that score the same rows in one pass, into one output.

    `config` has what they have in common; `members` are the jobs of the models by name, each as it
    would be alone, but for its columns' prefix. `rewards` are as in `Job`: they are asked once.
    """

    config: Config
    members: Mapping[str, Job]
    rewards: tuple[Reward, ...] = ()

    @property
    def fingerprint(self) -> Fingerprint:
        """That of all scores. What inputs are read by stands beside the models' own, as verifying
        an output needs it."""
        bounds = {bound.name for bound in fields(ReadBounds)}
        common = {n: v for n, v in self.config.with_role("scores").items() if n in bounds}
        own = {name: dict(member.fingerprint.parts) for name, member in self.members.items()}
        return Fingerprint({**common, "models": own, **_identities(self.rewards)})

    @property
    def device(self) -> Device:
        return self._first.device

    @property
    def stages(self) -> list[list[str]]:
        """As `Job.stages`."""
        names = [*self.members]
        return [[name] for name in names] if self.config.model_workers == "own" else [names]

    @property
    def is_served(self) -> bool:
        return False  # no served judge is one of several models

    @property
    def asks_together(self) -> bool:
        return False

    @property
    def step_separator(self) -> str:
        return self._first.step_separator

    @property
    def provenance(self) -> dict[str, Any]:
        """As `Job.provenance`, of each model under `models`."""
        return {
            "batch_scorer": __version__,
            "model": self.config.shown_model,
            "device": self.device,
            "models": {name: member.provenance for name, member in self.members.items()},
            **_identities(self.rewards),
        }

    def on_this_node(self, *, weights: bool = True) -> "Ensemble":
        """As `Job.on_this_node`."""
        here = {n: member.on_this_node(weights=weights) for n, member in self.members.items()}
        return replace(self, members=here)

    @property
    def _first(self) -> Job:
        return next(iter(self.members.values()))


AnyJob: TypeAlias = Job | Ensemble
"""The job of one model, or of several."""


def job_of(config: Config, jobs: Mapping[str, Job], rewards: tuple[Reward, ...]) -> AnyJob:
    """The job of all these models, which are named as in `Config.members`, with these functions."""
    return jobs[""].with_rewards(rewards) if "" in jobs else Ensemble(config, jobs, rewards)


def _identities(rewards: tuple[Reward, ...]) -> dict[str, Any]:
    """What the functions are, for the fingerprint and the record; without any neither has them."""
    return {"rewards": {each.name: each.identity for each in rewards}} if rewards else {}


def families_of(models: Mapping[str, Member] | Mapping[str, Job]) -> Families:
    """What each of these models adds to a sequence."""
    return {name: outputs_of(each.config, each.model) for name, each in models.items()}


def attention_of(config: Config, model: ModelFacts, engine: str) -> str:
    """How this engine attends. For one that does not take the setting `packed` is recorded."""
    if config.attention is not None:
        return config.attention
    takes_it = "attention" in ENGINES[engine].options
    return "eager" if takes_it and unpackable_part(model) else "packed"


def unpackable_part(model: ModelFacts) -> ModelFacts | None:
    """The model, or its reference, that cannot be packed; None: all can."""
    parts = (model, *([model.reference] if model.reference else []))
    return next((part for part in parts if part.unpackable), None)


def outputs_of(config: Config, model: ModelFacts) -> Outputs:
    """What the job adds to a sequence."""
    if config.task == "embed":
        return Outputs(embedding_size=model.hidden_size)
    if model.judge is not None:
        return Outputs(judge=judge_columns(model.judge))
    if config.backend != "auto" and not ENGINES[config.backend].runs_model:
        return SCALAR
    return Outputs(
        attributes=model.attributes,
        steps=model.has_steps,
        tokens=config.token_scores,
        only_attributes=not model.has_score,
    )
