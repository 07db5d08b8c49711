"""Every setting, on one page: the CLI's flags, the YAML file's keys and the Python API's arguments.

Each field says what it may change:

scores    the score of a row; enters the fingerprint, so a run never mixes two values of it
layout    how shards and columns are cut; fixed for an output once it has been written to
runtime   only how fast and where; free to change when a run is resumed
"""

import difflib
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batch_scorer.errors import ConfigError
from batch_scorer.records import Format, TextStyle

Role = Literal["scores", "layout", "runtime"]

_PREFIX = re.compile("[A-Za-z0-9][A-Za-z0-9_]*")
"""It is the name of a folder too."""


class Device(StrEnum):
    """Where a scoring worker computes."""

    CPU = "cpu"
    CUDA = "cuda"


class OverLength(StrEnum):
    """What happens to a sequence longer than `max_tokens`; see `Config.over_length`."""

    MARK = "mark"
    ERROR = "error"
    TRUNCATE_LEFT = "truncate_left"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the rest of the program has to know about an engine.

    options          settings that it takes and not every engine does; the others are refused.
    runs_model       whether the model gives the scores. Then plain Hugging Face gives the same,
                     the model's family decides which engines can run it, and a score costs
                     floating-point operations. Otherwise there is one score a sequence.
    package          what must be installed beside the requirements of this package.
    shares_prefixes  whether it computes once a prefix that several sequences of a shard have, in
                     packed batches. `shares_in_steps`: also where all tokens of a sequence are
                     read.
    """

    options: frozenset[str] = frozenset()
    runs_model: bool = True
    package: str | None = None
    shares_prefixes: bool = False
    shares_in_steps: bool = False


ENGINES = {
    "hf": EngineFacts(
        options=frozenset({"attention", "compile"}), shares_prefixes=True, shares_in_steps=True
    ),
    "vllm": EngineFacts(
        options=frozenset({"compile", "quantization", "tensor_parallel"}),
        package="vllm",
        shares_prefixes=True,  # but requests for all tokens do not read its cache
    ),
    "fake": EngineFacts(runs_model=False),
}
"""The engines by name, in the order in which `auto` prefers them; each is `backends/<name>.py`."""


def _setting(default: Any, role: Role, **limits: Any) -> Any:
    return Field(default, json_schema_extra={"role": role}, **limits)


class Config(BaseModel):
    """One scoring job. Frozen; unknown keys are refused. `None` means "derive"."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = _setting(..., "runtime")
    """Model directory, or a hub id where a hub can be reached. The fingerprint takes the bytes
    found there, not this name."""

    inputs: tuple[str, ...] = _setting(..., "runtime", min_length=1)
    """Files, directories, globs or s3://, gs://, az:// URLs. Paths below the longest common
    folder are kept in the output. More inputs may join an output later."""

    output: str = _setting(..., "runtime")
    """Folder or URL that receives the scored shards. One output holds one fingerprint."""

    also: dict[str, str] = _setting({}, "runtime")
    """More models for `nightly`, by the prefix of their columns: {"safety_": "/models/safety"}.
    They score the same rows one after the other, and all columns stand side by side. `adapter` and
    `step_aggregation` are of `model` alone; every other setting is of all."""

    # What is scored, and how.

    task: Literal["score", "embed"] = _setting("score", "scores")
    """`score`: rewards. `embed`: the model's hidden states as embeddings, for clustering and
    finding near-duplicates in the same shards; needs no score head."""

    adapter: str | None = _setting(None, "scores")
    """Family of the reward model (docs/models.md). None: told from architecture and weights."""

    format: Format | None = _setting(None, "scores")
    """What a row is. None: detected from each file's schema, and said."""

    columns: dict[str, str] = _setting({}, "scores")
    """Field of the format to column of the file, where the usual names are not used:
    {"chosen": "better_answer"}."""

    text_style: TextStyle | None = _setting(None, "scores")
    """How strings that hold dialogue are read. None: detected."""

    max_tokens: int | None = _setting(None, "scores", gt=0)
    """Longest sequence that is scored whole. None: the model's own limit."""

    over_length: OverLength = _setting(OverLength.MARK, "scores")
    """What happens to a longer one. `mark`: its row keeps its place, with a reason and no score.
    `error`: its shard is not committed. `truncate_left`: the oldest tokens are cut, BOS and the
    judged answer stay, and `num_truncated_tokens` says how many."""

    backend: Literal["auto", "hf", "vllm", "fake"] = _setting("hf", "scores")
    """Engine. `hf`: Hugging Face model, packed without padding. `vllm`: vLLM's pooling runner.
    `auto`: whichever supports the model; if both do and the job is long enough to repay it, the
    faster of the two on some of the job's own rows. `fake`: no model, scores are a hash of the
    tokens; for dry runs."""

    dtype: Literal["bfloat16", "float32", "float16"] | None = _setting(None, "scores")
    """Of the model's body; the head is always float32. None: bfloat16 where the device has it,
    float32 elsewhere."""

    attention: Literal["packed", "flash_attention_2", "sdpa", "eager"] = _setting(
        "packed", "scores"
    )
    """`packed`: variable-length attention without padding, on CPU and CUDA. The others are
    transformers' own, run on padded batches."""

    quantization: str | None = _setting(None, "scores")
    """Of the body under vLLM, e.g. fp8; the head stays float32. None: as the weights are."""

    step_aggregation: Literal["min", "last", "mean", "product"] | None = _setting(None, "scores")
    """How a process reward model's step scores become the score. None: as the model's authors
    do. The step scores are kept either way."""

    embedding_pooling: Literal["last", "mean", "cls"] | None = _setting(None, "scores")
    """Token or tokens that an embedding is read from. None: what the model's sentence-transformers
    files say, otherwise `last` for decoders and `mean` for encoders."""

    normalize: bool | None = _setting(None, "scores")
    """Scale embeddings to length 1. None: what the model's sentence-transformers files say."""

    trust_remote_code: bool = _setting(False, "scores")
    """Run Python code that comes with the model. Recorded with the run."""

    # What the output looks like.

    column_prefix: str = _setting("", "layout")
    """Put before every added column, for inputs that already hold a `score`."""

    shard_rows: int = _setting(8192, "layout", gt=0)
    """Most rows of one shard. Smaller shards lose less to a crash and show progress sooner;
    larger ones cost the store fewer requests."""

    shard_tokens: int = _setting(1_000_000, "layout", gt=0)
    """Most (estimated) tokens of one shard; about half a minute of an 8B model on one H100."""

    # How fast, and where.

    device: Device | None = _setting(None, "runtime")
    """None: CUDA where the cluster has GPUs, otherwise CPU. Part of the provenance."""

    workers: int | None = _setting(None, "runtime", gt=0)
    """Scoring workers, one model each. None: one per GPU, or one per machine on CPU."""

    tensor_parallel: int = _setting(1, "runtime", gt=0)
    """GPUs that one vLLM worker splits the model over."""

    parity_check: Literal["stop", "warn", "off"] = _setting("stop", "runtime")
    """Before its first shard every worker scores a sample of the job's rows, which plain Hugging
    Face scores too, one by one. `stop`: the job ends where they disagree. `warn`: it goes on."""

    token_budget: int | None = _setting(None, "runtime", gt=0)
    """Most tokens of one forward pass. None: what suits the device and fits its memory."""

    compile: bool | None = _setting(None, "runtime")
    """Have torch compile the model's layers: some percent faster, after a minute of compiling in
    every worker; on a CPU it takes a C++ compiler. None: the engine's own habit, which is to
    compile only in vLLM on a GPU."""

    attempts: int = _setting(3, "runtime", gt=0)
    """Worker deaths that one shard is allowed before it is searched for the rows that cause them
    (docs/survival.md), and failed tries before it is recorded as failed."""

    hang_s: float = _setting(600.0, "runtime", gt=0)
    """A forward pass that takes longer has hung: its worker is ended, which counts as a death. A
    pass is a few thousand tokens, whatever the shard's size."""

    use_ray: bool = _setting(True, "runtime")
    """False: one shard after the other in this process."""

    ray_address: str | None = _setting(None, "runtime")
    """Cluster to join. None: RAY_ADDRESS if set, otherwise a private Ray on this machine."""

    lease_s: float = _setting(30.0, "runtime", gt=0)
    """A run that has not renewed its hold on the output for so long counts as dead."""

    store_options: dict[str, str] = _setting({}, "runtime")
    """Passed to the object store: endpoint, region, allow_http, …. Keys and secrets are read
    from the environment and do not belong here."""

    @model_validator(mode="after")
    def _no_secrets_in_options(self) -> Self:
        for key in self.store_options:
            if any(word in key.lower() for word in ("secret", "token", "password", "access_key")):
                raise ValueError(
                    f"store_options.{key}: credentials are not settings (they would be recorded "
                    "with the run); set them in the environment, e.g. AWS_SECRET_ACCESS_KEY"
                )
        return self

    @model_validator(mode="after")
    def _columns_do_not_collide(self) -> Self:
        for prefix in self.also:
            if not _PREFIX.fullmatch(prefix) or prefix in ("main", self.column_prefix):
                raise ValueError(
                    f"also: {prefix!r} is no prefix for columns beside the others: letters, digits "
                    "and underscores, neither `main` nor column_prefix"
                )
        return self

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        """A setting that would be ignored is a mistake, not a wish."""
        options = self.engine_options
        if self.backend != "auto":
            for name in sorted(options - ENGINES[self.backend].options):
                takers = " or ".join(e for e, facts in ENGINES.items() if name in facts.options)
                raise ValueError(
                    f"{name}: the {self.backend} backend does not take it; set backend: {takers}"
                )
        elif not any(options <= facts.options for facts in ENGINES.values()):
            raise ValueError(f"{' and '.join(sorted(options))}: no backend takes them together")
        if self.compile and self.attention != "packed":
            raise ValueError("compile: only packed batches are compiled; leave attention out")
        if self.task == "score":
            for name in ("embedding_pooling", "normalize"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: only for embeddings; set task: embed")
        else:
            for name in ("adapter", "step_aggregation"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: only for scores; an embedding has no head")
            if self.backend != "auto" and not ENGINES[self.backend].runs_model:
                raise ValueError(f"backend: {self.backend} makes scores, not embeddings")
        return self

    @property
    def engine_options(self) -> frozenset[str]:
        """The settings with another value than their default that not every engine takes."""
        options = frozenset[str]().union(*(facts.options for facts in ENGINES.values()))
        return options & self.model_dump(exclude_defaults=True).keys()

    @classmethod
    def roles(cls) -> dict[str, Role]:
        """Role of each field."""
        roles: dict[str, Role] = {}
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra
            assert isinstance(extra, dict), name
            roles[name] = extra["role"]  # type: ignore[assignment]  # set by _setting
        return roles

    def with_role(self, role: Role) -> dict[str, Any]:
        """The JSON values of the fields with this role."""
        roles = self.roles()
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if roles[name] == role}


def load_config(path: Path | None = None, **settings: Any) -> Config:
    """A config from a YAML file, with `settings` on top; `None` settings count as not given.

    Raises ConfigError with one line per wrong field; an unknown key gets a suggestion.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"no config file at {path}") from None
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not readable as YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"{path}: expected `setting: value` lines, got {type(loaded).__name__}"
            )
        values.update(loaded or {})
    values.update({name: value for name, value in settings.items() if value is not None})
    if isinstance(values.get("inputs"), str):
        values["inputs"] = (values["inputs"],)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, Config.model_fields, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            lines.append(f"unknown setting `{name}`{hint}")
        elif problem["type"] == "missing":
            lines.append(f"`{name}` is needed")
        else:
            given = f" (got {problem['input']!r})" if name else ""
            lines.append(f"{name + ': ' if name else ''}{problem['msg']}{given}")
    return "\n".join(lines)
