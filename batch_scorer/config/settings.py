"""Every setting, on one page: the CLI's flags, the YAML file's keys and the Python API's arguments.

Each field has a role, what it may change:

scores    the score of a row; enters the fingerprint, so a run never mixes two values of it
layout    how shards and columns are cut; fixed for an output once it has been written to
runtime   only how fast and where; free to change when a run is resumed
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from batch_scorer.config.engines import ENGINES
from batch_scorer.config.rewards import RewardEntry
from batch_scorer.credentials import wrong_options, wrong_url
from batch_scorer.errors import RowReason
from batch_scorer.quarantine import Bounds
from batch_scorer.records import (
    AGGREGATES,
    DISAGREEMENT,
    Format,
    ReadBounds,
    TextStyle,
    family_prefix,
)
from batch_scorer.storage import is_speakable

_LARGEST = 2**63 - 1
"""Whole numbers beyond it stand in no record."""

_PATHS = (
    "model", "revision", "base_model", "inputs", "exclude", "output", "reference_model",
    "chat_template", "ray_address", "judge",
)  # fmt: skip
"""Settings that name something: a file, a model, a pattern, a cluster."""

Role = Literal["scores", "layout", "runtime"]

_PREFIX = re.compile("[A-Za-z0-9][A-Za-z0-9_]*")
"""The name of a model, which its columns begin with."""

_REWARD_NAME = re.compile("(?!score)[A-Za-z][A-Za-z0-9_]*")
"""Not like the model's own columns: what begins with `score` is read as one of them, under other
prefixes too."""


OF_ONE_MODEL = (
    *("revision", "base_model", "adapter", "reference_model", "beta", "length_normalize"),
    *("chat_template", "template_arguments", "system_prompt", "reasoning", "special_text"),
    *("bos", "eos", "step_separator", "max_tokens", "backend", "dtype", "attention"),
    *("quantization", "step_aggregation", "token_scores", "output_names", "output_weights"),
    *("token_budget", "compile", "precision", "invariant"),
)
"""The settings that each of several models may have of its own."""

_OF_TASKS = {
    **dict.fromkeys(("embedding_pooling", "normalize"), "embed"),
    **dict.fromkeys(("judge", "keep_judgement"), "judge"),
    **dict.fromkeys(
        ("adapter", "step_aggregation", "token_scores", "output_names", "output_weights"), "score"
    ),
}
"""The settings that one task alone takes."""

PLACES = (
    *("model", "base_model", "reference_model", "inputs", "output", "chat_template"),
    *("judge", "ray_address", "endpoint"),
)
"""The settings that may be URLs."""

IMPLICIT_REWARD = "implicit_reward"
"""The family that scores with two models."""
NO_REFERENCE = "none"
"""The reference model of an implicit reward that has none."""


class Device(StrEnum):
    """Where a scoring worker computes."""

    CPU = "cpu"
    CUDA = "cuda"


class OverLength(StrEnum):
    """What happens to a sequence longer than `max_tokens`; see `Config.over_length`."""

    MARK = "mark"
    ERROR = "error"
    TRUNCATE_LEFT = "truncate_left"
    TRUNCATE_MIDDLE = "truncate_middle"
    TRUNCATE_RIGHT = "truncate_right"

    @property
    def cuts(self) -> bool:
        """Whether a sequence that is too long is cut and scored."""
        return self in (self.TRUNCATE_LEFT, self.TRUNCATE_MIDDLE, self.TRUNCATE_RIGHT)


_RETRIED = [reason.value for reason in RowReason if reason.may_pass]


def _that_may_pass(reason: Any) -> Any:
    if reason not in _RETRIED:
        raise ValueError(f"only what may pass on another try: {', '.join(_RETRIED)}")
    return reason


RetriedReason: TypeAlias = Annotated[
    RowReason,
    BeforeValidator(_that_may_pass),
    WithJsonSchema({"enum": _RETRIED, "type": "string"}),
]
"""A reason for which rows may be scored again."""


_RESERVED = (*AGGREGATES, DISAGREEMENT.split("_")[0])
"""Names that no model has: those of the columns that several models have together."""


def _models(given: Any) -> str | dict[str, dict[str, Any]]:
    """A model; or several, by name, each as a mapping of `model` and settings of its own."""
    if isinstance(given, str) and given:
        return given
    if not isinstance(given, Mapping) or not given:
        raise ValueError("a model, or a mapping of names to models")
    return {name: _named_model(name, own) for name, own in sorted(given.items(), key=_name)}


def _name(item: tuple[Any, Any]) -> str:
    return str(item[0])


def _named_model(name: Any, own: Any) -> dict[str, Any]:
    if not isinstance(name, str) or not _PREFIX.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a model's name; use letters, digits and underscores")
    if name in _RESERVED:
        raise ValueError(f"{name!r} is the name of what all models have together; choose another")
    if isinstance(own, str):
        own = {"model": own}
    if not isinstance(own, Mapping) or not isinstance(own.get("model"), str):
        raise ValueError(f"{name}: a model, or a mapping with a `model` and settings of its own")
    if unknown := own.keys() - {"model", *OF_ONE_MODEL}:
        raise ValueError(
            f"{name}: {', '.join(sorted(map(str, unknown)))}: not a setting of one model; they are "
            f"{', '.join(OF_ONE_MODEL)}"
        )
    return dict(own)


Models: TypeAlias = Annotated[
    str | dict[str, dict[str, Any]],
    PlainValidator(_models),
    WithJsonSchema(
        {
            "anyOf": [
                {"minLength": 1, "type": "string"},
                {
                    "additionalProperties": {
                        "anyOf": [
                            {"minLength": 1, "type": "string"},
                            {
                                "properties": {key: {} for key in ("model", *OF_ONE_MODEL)},
                                "required": ["model"],
                                "additionalProperties": False,
                                "type": "object",
                            },
                        ]
                    },
                    "minProperties": 1,
                    "propertyNames": {"pattern": f"^{_PREFIX.pattern}$"},
                    "type": "object",
                },
            ]
        }
    ),
]
"""A model, or several by name, each with settings of its own."""


_WORKERS = re.compile(r"([1-9][0-9]{0,8})(?:\.\.([1-9][0-9]{0,8}))?")


def _workers(given: Any) -> int | str | None:
    """A number, also as a flag spells it, or a range of two different numbers."""
    if given is None or (type(given) is int and given > 0):
        return given
    found = _WORKERS.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        raise ValueError("a number above 0, or a range such as 1..64")
    least, most = int(found[1]), int(found[2] or found[1])
    if least > most:
        raise ValueError(f"a range begins with its smaller number: {most}..{least}")
    return given if least < most else least


Workers: TypeAlias = Annotated[
    int | str | None,
    PlainValidator(_workers),
    WithJsonSchema(
        {
            "anyOf": [
                {"exclusiveMinimum": 0, "type": "integer"},
                {"pattern": f"^{_WORKERS.pattern}$", "type": "string"},
                {"type": "null"},
            ]
        }
    ),
]
"""How many workers: a number, a range such as "1..64", or None."""


NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _recordable(digits: str) -> int:
    if (number := int(digits)) > _LARGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return number


def _setting(default: Any, role: Role, **limits: Any) -> Any:
    return Field(default, json_schema_extra={"role": role}, **limits)


class Config(BaseModel):
    """One scoring job. Frozen; unknown keys are refused. `None` means "derive"."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: Models = _setting(..., "runtime")
    """Model directory, or a model of the Hugging Face hub: ORG/NAME, or ORG/NAME@REVISION
    (docs/hub.md). The fingerprint is computed from the files found there, not from this name.
    Several models score the rows in one pass: `--model helpful=/models/a --model
    safety=/models/b` on the command line, `model: {helpful: /models/a, safety: /models/b}` in YAML
    (docs/ensembles.md)."""

    revision: str | None = _setting(None, "runtime", min_length=1)
    """The branch, tag or commit of `model`, where that is a hub's; the same as ORG/NAME@REVISION.
    The commit that is found is recorded. Default: the hub's main branch."""

    base_model: str | None = _setting(None, "runtime", min_length=1)
    """The base of a LoRA adapter that `model` names: a directory or a hub id. Default: the model
    that lies beside the adapter, or else the one that its adapter_config.json names. The
    fingerprint covers the files of both (docs/checkpoints.md)."""

    inputs: tuple[str, ...] = _setting(..., "runtime", min_length=1)
    """Files, directories, globs or s3://, gs://, az:// URLs, or hf://datasets/ORG/NAME@REVISION
    (docs/formats.md). The output keeps their paths below the longest common folder. An output may
    get more inputs later."""

    exclude: tuple[str, ...] = _setting((), "runtime")
    """Input files to leave out, as globs over their paths below the input: `--exclude "test/*"`."""

    output: str = _setting(..., "runtime", min_length=1)
    """Folder or URL that receives the scored shards. An output holds one fingerprint's scores."""

    # What is scored, and how.

    task: Literal["score", "embed", "judge"] = _setting("score", "scores")
    """`score`: rewards. `embed`: the model's hidden states as embeddings, for clustering and for
    finding near-duplicates in the same shards; needs no score head. `judge`: verdicts of a language
    model that is asked about the answers (docs/judges.md)."""

    judge: str | None = _setting(None, "runtime", min_length=1)
    """The page by which a judge is asked: the name of one that comes with this package, or the path
    of a YAML file (docs/judges.md). What it says enters the fingerprint, not its path."""

    adapter: str | None = _setting(None, "scores")
    """The reward model's family (docs/models.md). Default: detected from the model's architecture
    and weights."""

    reference_model: str | None = _setting(None, "runtime", min_length=1)
    """The model that an implicit reward is measured against (`--adapter implicit_reward`): a
    directory or a hub id, as `model`. For a DPO policy it is the model that DPO began with; its
    files enter the fingerprint. `none`: no model, so the score is `beta` times the log probability
    under `model` alone."""

    beta: float = _setting(0.1, "scores", gt=0, allow_inf_nan=False)
    """What an implicit reward multiplies the difference of the log probabilities by. Default: as
    TRL's DPO trainer. A density ratio has 1."""

    length_normalize: bool = _setting(False, "scores")
    """Divide an implicit reward by the number of the answer's tokens."""

    format: Format | None = _setting(None, "scores")
    """What a row is. Default: detected from each file's schema; the run prints what it found."""

    columns: dict[str, str] = _setting({}, "scores")
    """The file's column for a field of the format, where it is not named as usual: `--column
    chosen=better_answer` on the command line, `columns: {chosen: better_answer}` in YAML."""

    text_style: TextStyle | None = _setting(None, "scores")
    """How strings that hold a dialogue are read. `plain`: a string is one message. `hh`: a whole
    dialogue with turn marks, as in Anthropic's HH-RLHF. `rendered`: text that went through a chat
    template already; it is tokenised as it is. Default: detected."""

    ignore_columns: tuple[str, ...] = _setting((), "scores")
    """Columns that look like a part of the conversation and are none: `--ignore-column system` on
    the command line, `ignore_columns: [system]` in YAML. Without it a row where such a column holds
    something is not scored."""

    chat_template: str | None = _setting(None, "runtime")
    """A file with the Jinja chat template to use in place of the model's own, or the name of one of
    the model's templates where it has several. The template itself enters the fingerprint, not its
    path."""

    template_arguments: dict[str, Any] = _setting({}, "scores")
    """Arguments that the chat template takes: `--template-argument enable_thinking=false` on the
    command line, `template_arguments: {enable_thinking: false}` in YAML."""

    template_date: datetime | None = _setting(None, "runtime")
    """The date that a template prints as today's, e.g. 2026-11-28. Enters the fingerprint where the
    template asks for a date. Default: the day on which the output was begun, for all its rows."""

    system_prompt: str | None = _setting(None, "scores")
    """The system message of conversations that have none. Default: as the model's family was
    trained."""

    reasoning: Literal["template", "keep", "drop"] = _setting("template", "scores")
    """What happens to the reasoning of the judged answer (`reasoning_content`, `thinking`, or
    `<think>…</think>` in its text). `template`: what the chat template does with it. `keep`: it is
    scored even where the template would cut it. `drop`: it is removed from all messages."""

    special_text: Literal["parse", "literal", "mark"] = _setting("parse", "scores")
    """Text inside a message that spells a special token, such as `<|im_end|>`. `parse`: it becomes
    that token, as in the model's own code. `literal`: it stays text. `mark`: its row is not scored.
    `num_special_tokens` counts it in any case."""

    bos: Literal["auto", "always", "never", "template"] = _setting("auto", "scores")
    """The token that begins a sequence. `auto`: once, where the template writes it or the tokenizer
    adds it. `always`: once. `never`: not at all. `template`: only as the template writes it."""

    eos: Literal["auto", "append", "never"] = _setting("auto", "scores")
    """The token that ends a sequence. `auto`: as the model's family was trained. `append`: added
    where it is not the last token. `never`: taken off."""

    step_separator: str | None = _setting(None, "scores", min_length=1)
    """What stands between the steps of an answer: a process reward model's answers are cut there,
    and steps that come as a list are joined with it. Default: as the model's family was trained, or
    a blank line."""

    max_tokens: int | None = _setting(None, "scores", gt=0)
    """Tokens of the longest sequence that is scored whole. Default: the model's own limit, the
    smaller of its positions and its tokenizer's `model_max_length`."""

    over_length: OverLength = _setting(OverLength.MARK, "scores")
    """What happens to a longer sequence. `mark`: its row keeps its place, with a reason and no
    score. `error`: its shard is not committed. `truncate_left`: the oldest tokens are cut, BOS and
    the judged answer stay. `truncate_right`: the last tokens are cut, as some trainers do.
    `truncate_middle`: both ends stay. `num_truncated_tokens` counts the tokens cut from each
    sequence."""

    backend: Literal["auto", "hf", "vllm", "endpoint", "fake"] = _setting("hf", "scores")
    """The engine. `hf`: Hugging Face model, packed without padding. `vllm`: vLLM's pooling runner;
    a judge that writes needs it. `endpoint`: a judge that is served elsewhere (docs/endpoints.md).
    `auto`: the one that supports the model; if both do and the job is long enough to repay a trial,
    the one that is faster on some of the job's own rows. `fake`: no model, scores are a hash of the
    tokens; for dry runs."""

    dtype: Literal["bfloat16", "float32", "float16"] | None = _setting(None, "scores")
    """Number format of the model's body; the head is always float32. Default: bfloat16 where the
    device has it, otherwise float32."""

    attention: Literal["packed", "flash_attention_2", "sdpa", "eager"] | None = _setting(
        None, "scores"
    )
    """`packed`: variable-length attention without padding, on CPU and CUDA. The others are
    transformers' own, run on padded batches. Default: packed, or eager for a body that cannot be
    packed, such as one with Mamba layers."""

    quantization: str | None = _setting(None, "scores")
    """How vLLM quantises the model's body, e.g. fp8; the head stays float32. Default: as the
    weights are stored."""

    precision: Literal["int8", "fp8"] | None = _setting(None, "scores")
    """Multiply the body's linear layers in 8 bits: faster, and less exact (docs/quantised.md).
    Weights are rounded for each output, activations for each token; head, norms, embeddings and
    attention stay as `dtype` says. `int8`: on a CPU with VNNI or AMX, and on CUDA. `fp8`: on CUDA
    only. Default: as `dtype` says."""

    step_aggregation: Literal["min", "last", "mean", "product"] | None = _setting(None, "scores")
    """How a process reward model's step scores become the score. Default: as the model's authors do
    it. The step scores are kept either way."""

    token_scores: bool = _setting(False, "scores")
    """Also write what the head gives at every token of a sequence, as a list under `token_scores`,
    in the order of the tokens: for value heads and linear score heads. Such columns are many times
    as large as the scores. The score itself stays the same."""

    output_names: tuple[str, ...] = _setting((), "scores")
    """Names of a head's outputs, in order, where it has several: `--output-names
    helpful,honest,harmless`. They stand in `rewards`. Default: as the config's id2label names
    them."""

    output_weights: dict[str, float] = _setting({}, "scores")
    """What makes a score of several outputs, their weighted sum: `--output-weights
    helpful=0.7,harmless=0.3` on the command line, `output_weights: {helpful: 0.7, harmless: 0.3}`
    in YAML; an output that is not named counts nothing. Default: there is no score, only
    `rewards`."""

    embedding_pooling: Literal["last", "mean", "cls"] | None = _setting(None, "scores")
    """Which tokens an embedding is read from. Default: as set in the model's sentence-transformers
    files; without such files `last` for decoders and `mean` for encoders."""

    max_row_bytes: int = _setting(ReadBounds.max_row_bytes, "scores", gt=0)
    """Most bytes in a row: of its line, or of the columns that scoring reads. A row with more is
    marked. Default: 64 MiB."""

    max_nesting: int = _setting(ReadBounds.max_nesting, "scores", gt=0, le=900)
    """How deep lists and objects of a JSON line, or of a text that holds JSON, may lie in each
    other. A row with more is marked."""

    max_keys: int = _setting(ReadBounds.max_keys, "scores", gt=0)
    """Most keys in one object of a JSON line. A row with more is marked."""

    normalize: bool | None = _setting(None, "scores")
    """Scale embeddings to length 1. Default: as set in the model's sentence-transformers files."""

    invariant: bool = _setting(False, "scores")
    """Give a row's score the same bits whatever is scored beside it: alone, in any shard, with any
    token budget, order of rows and number of workers and threads, on machines of one kind
    (docs/numerics.md). `hf`: in fixed shapes, at a small price; what cannot be packed runs one
    sequence at a time. `vllm`: its own batch-invariant mode, on GPUs only. `--invariant` on the
    command line."""

    trust_remote_code: bool = _setting(False, "scores")
    """Run Python code that comes with the model. Recorded with the run."""

    rewards: dict[str, RewardEntry] = _setting({}, "runtime")
    """Your own functions beside the model, by name: `--reward length=./rewards.py:length` on the
    command line, `rewards: {length: ./rewards.py:length}` in YAML. What they give for the same rows
    stands in columns of that name, `length_score` and so on (docs/rewards.md). A function is
    `module:function`, `file.py:function`, or one that is shipped: exact_match, format, length,
    math, repetition. In place of it a mapping may also set arguments, columns, timeout_s, attempts
    and per_minute. What the function is enters the fingerprint, not its path."""

    # A judge that is served elsewhere.

    endpoint: str | None = _setting(None, "runtime", min_length=1)
    """What stands before `/chat/completions` of an OpenAI-compatible server, as a rule ending in
    `/v1`. `model` is then the name that the server knows the judge by, which enters the
    fingerprint."""

    api_key_env: str | None = _setting(None, "runtime", min_length=1)
    """The environment variable that holds the server's key, on every machine that asks. The key
    itself is no setting."""

    api_key_file: Path | None = _setting(None, "runtime")
    """The file that holds it instead."""

    requests_in_flight: int = _setting(32, "runtime", gt=0)
    """Most requests that have no answer yet. One worker asks for the whole job."""

    requests_per_minute: float | None = _setting(None, "runtime", gt=0, allow_inf_nan=False)
    """Most requests in a minute. Default: as many as the server takes."""

    tokens_per_minute: float | None = _setting(None, "runtime", gt=0, allow_inf_nan=False)
    """Most tokens of prompts and replies in a minute."""

    request_timeout_s: float = _setting(600.0, "runtime", gt=0, allow_inf_nan=False)
    """Seconds that a request may take, to the end of its answer."""

    request_attempts: int = _setting(6, "runtime", gt=0)
    """How often a request is sent that fails for a cause that may pass, before its row is marked.
    `attempts` is about workers and shards."""

    token_prices: dict[Literal["prompt", "generated"], NonNegative] = _setting({}, "runtime")
    """Prices of a million tokens, for the summary: `--token-prices prompt=0.5,generated=1.5`."""

    # What the output looks like.

    column_prefix: str = _setting("", "layout")
    """Put before every added column's name, for inputs that already hold a `score`."""

    keep_columns: tuple[str, ...] = _setting((), "layout")
    """The only input columns that are written: `--keep-columns id,source` on the command line.
    Default: all."""

    drop_columns: tuple[str, ...] = _setting((), "layout")
    """Input columns that are not written."""

    keep_judgement: bool = _setting(False, "layout")
    """Also write what a judge wrote, in `judgements`."""

    limit: int | None = _setting(None, "layout", gt=0)
    """Score only so many rows, the first ones of every file in proportion to its size; with
    `where`, the first ones that match. The others are counted as not asked for."""

    where: str | None = _setting(None, "layout", min_length=1)
    """Score only the rows for which this pyarrow expression is true, e.g. `(field("source") ==
    "math") & (field("turns") < 3)`. The others are not written, and counted as not asked for."""

    shard_rows: int = _setting(8192, "layout", gt=0)
    """Most rows in a shard. A crash loses less of smaller shards, and their progress shows sooner;
    larger ones need fewer requests to the store."""

    shard_tokens: int = _setting(1_000_000, "layout", gt=0)
    """Most (estimated) tokens in a shard. The default keeps an 8B model busy for about half a
    minute on one H100."""

    # How fast, and where.

    device: Device | None = _setting(None, "runtime")
    """Where workers compute. Default: cuda where the cluster has GPUs, otherwise cpu. Recorded with
    the run."""

    workers: Workers = _setting(None, "runtime")
    """Scoring workers, each with its own copy of the model. A range such as `1..64` lets their
    number change during a run: more start while shards wait and the cluster has room, also on
    machines that join it, and those without work are given back (docs/clusters.md). Default: one
    per GPU, or one per machine on CPU."""

    model_workers: Literal["shared", "own"] = _setting("shared", "runtime")
    """Where several models are. `shared`: every worker holds all of them, and scores a shard with
    one after the other. `own`: each model has workers of its own, for models that do not fit a
    device together; `workers` are then those of each model. Needs Ray."""

    tensor_parallel: int = _setting(1, "runtime", gt=0)
    """GPUs over which one vLLM worker splits every layer of the model. They are those of one
    machine, because they exchange numbers in every layer."""

    pipeline_parallel: int = _setting(1, "runtime", gt=0)
    """Stages into which one vLLM worker cuts the model's layers, each on `tensor_parallel` GPUs.
    For a model that is too large for one machine's GPUs: its stages may lie on several machines
    (docs/clusters.md)."""

    parity_check: Literal["stop", "warn", "off"] = _setting("stop", "runtime")
    """Before its first shard, every worker scores a sample of the job's rows, and plain Hugging
    Face scores it too, one sequence at a time. `stop`: the job ends where they disagree. `warn`: it
    continues with a warning. `off`: no comparison."""

    token_budget: int | None = _setting(None, "runtime", gt=0)
    """Most tokens in one forward pass. Default: what suits the device and fits its memory."""

    compile: bool | None = _setting(None, "runtime")
    """Have torch compile the model's layers: some percent faster, after a minute of compiling in
    every worker; on a CPU it needs a C++ compiler. Default: only under vLLM on a GPU."""

    attempts: int = _setting(3, "runtime", gt=0)
    """How often a shard may kill its worker before the program bisects it for the row at fault
    (docs/survival.md), and how often it may fail before it is recorded as failed."""

    retry_marked: tuple[RetriedReason, ...] = _setting((), "runtime")
    """Score again, in place, the rows that earlier runs have marked for one of these reasons:
    `--retry-marked out_of_memory,worker_crash` on the command line, `retry_marked: [out_of_memory,
    worker_crash]` in YAML. Only what may pass on another try: out_of_memory, non_finite_score,
    engine_error, worker_crash, no_verdict, verdict_out_of_range, cut_off, reward_raised,
    reward_timed_out, reward_died. All other rows keep their scores (docs/survival.md); reward
    functions are asked again about all rows of a shard that has such a row."""

    hang_s: float = _setting(600.0, "runtime", gt=0)
    """Seconds after which a forward pass counts as hung; its worker is killed and the shard
    retried. A pass is a few thousand tokens, whatever the shard's size."""

    read_timeout_s: float = _setting(600.0, "runtime", gt=0)
    """Seconds that looking at a file, or reading, rendering and tokenising a shard of it, may take;
    one more is allowed for each MB of the file. The process that takes longer is ended, and the
    file or shard fails. The trial of the model's tokenizer and chat template has the same bound."""

    read_memory_gib: float = _setting(4.0, "runtime", gt=0)
    """Memory that may be taken by what `read_timeout_s` bounds. A file or shard that needs more
    fails."""

    fast_tokenizer: bool = _setting(True, "runtime")
    """Whether texts are read with fastokens, many times as fast as with Hugging Face's tokenizer,
    as long as it gives the same ids (docs/text.md). `--no-fast-tokenizer` on the command line,
    `fast_tokenizer: false` in YAML: only with Hugging Face's."""

    max_unpacked_gib: float = _setting(ReadBounds.max_unpacked_gib, "runtime", gt=0)
    """What a packed file (gzip, zstd), or the pages of a Parquet file, may unpack to."""

    max_expansion: float = _setting(ReadBounds.max_expansion, "runtime", gt=1)
    """How many times its stored size a packed file, or a Parquet file's pages, may unpack to,
    beyond the first 64 MiB."""

    use_ray: bool = _setting(True, "runtime")
    """Whether workers run on Ray. `--no-ray` on the command line, `use_ray: false` in YAML: one
    shard after the other in this process."""

    ray_address: str | None = _setting(None, "runtime")
    """Cluster to join. Default: RAY_ADDRESS if set, otherwise a private Ray on this machine."""

    lease_s: float = _setting(30.0, "runtime", gt=0)
    """Seconds without a renewal after which a run is considered dead, and another may take over its
    output."""

    report: bool = _setting(False, "runtime")
    """Whether `score` and `nightly` end with writing the page about their output into it, as
    `_report.html` (docs/report.md): `--report` on the command line, `report: true` in YAML. A page
    that cannot be written costs a warning and no more."""

    store_options: dict[str, str] = _setting({}, "runtime")
    """For the object store: `--store-option region=eu-central-1` on the command line,
    `store_options: {region: eu-central-1}` in YAML; also endpoint, allow_http (an `http://`
    endpoint needs none), …. Keys, tokens and secrets are refused here and in URLs: they are read
    from the environment, or from AWS's own files (docs/security.md)."""

    @model_validator(mode="after")
    def _paths_can_be_named(self) -> Self:
        for name in _PATHS:
            value = getattr(self, name)
            if isinstance(value, dict):  # several models are looked at one by one
                found = [path for path in value.values() if isinstance(path, str)]
            elif isinstance(value, tuple):
                found = [*value]
            else:
                found = [value] if name in self.model_fields_set and value is not None else []
            for path in found:
                if not path.strip() or not is_speakable(path):
                    raise ValueError(f"{name}: {path!r} is not a path, a name or a URL")
        return self

    @model_validator(mode="after")
    def _template_arguments_are_json(self) -> Self:
        try:
            text = json.dumps(self.template_arguments, allow_nan=False)
            json.loads(text, parse_int=_recordable)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"template_arguments: not JSON values: {error}; quote a date"
            ) from None
        return self

    @model_validator(mode="after")
    def _numbers_can_be_recorded(self) -> Self:
        for name in type(self).model_fields:
            if isinstance(value := getattr(self, name), int) and value > _LARGEST:
                raise ValueError(f"{name}: at most {_LARGEST}")
        return self

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        if lines := credentials_in(self.model_dump(include={"store_options", *PLACES})):
            raise ValueError("\n".join(lines))
        return self

    @model_validator(mode="after")
    def _rewards_have_names(self) -> Self:
        families = [*AGGREGATES, *(self.model if isinstance(self.model, dict) else ())]
        for name in self.rewards:
            if not _REWARD_NAME.fullmatch(name):
                raise ValueError(
                    f"rewards: {name!r} cannot begin a column's name; use letters, digits and "
                    "underscores, a letter first, and not `score` at the beginning"
                )
            if name in _RESERVED:
                raise ValueError(
                    f"rewards: {name!r} is the name of what all models have together; choose "
                    "another"
                )
            if name in families or name.startswith(tuple(f"{each}_score" for each in families)):
                raise ValueError(
                    f"rewards: {name!r}: a model has columns of that name; choose another"
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
        if self.compile and self.attention not in (None, "packed"):
            raise ValueError("compile: only packed batches are compiled; leave attention out")
        if self.precision and self.attention not in (None, "packed"):
            raise ValueError("precision: only packed batches run in 8 bits; leave attention out")
        if self.compile and self.invariant and self.backend != "vllm":
            raise ValueError("compile: compiled layers are not proven invariant; leave it out")
        if self.precision and self.invariant:
            raise ValueError("precision: products in 8 bits are not proven invariant; leave it out")
        for name, task in _OF_TASKS.items():
            if task != self.task and getattr(self, name) not in (None, False, (), {}):
                raise ValueError(f"{name}: only where task is {task}")
        if self.task == "judge" and self.judge is None:
            raise ValueError("judge: a judge needs a page by which it is asked")
        if self.task == "judge" and self.over_length.cuts:
            raise ValueError("over_length: a question that is cut asks something else; use mark")
        if self.task != "score" and self.backend == "fake":
            raise ValueError("backend: fake makes scores; leave task out")
        if self.backend != "endpoint":
            return self
        if self.task != "judge":
            raise ValueError("backend: endpoint asks a judge; set task: judge")
        if self.endpoint is None:
            raise ValueError("endpoint: the address of the server that the judge is behind")
        if self.workers not in (None, 1):
            raise ValueError(
                "workers: one worker asks the server, so that the limits are those of the job; "
                "leave it out and set requests_in_flight"
            )
        if self.token_prices and len(self.token_prices) < 2:
            raise ValueError("token_prices: both of prompt and generated")
        return self

    @model_validator(mode="after")
    def _outputs_are_named(self) -> Self:
        names, weights = self.output_names, self.output_weights
        if not (names or weights):
            return self
        if self.adapter not in (None, "named_outputs"):
            raise ValueError(
                f"output_names, output_weights: {self.adapter} models have outputs of their own"
            )
        if self.backend != "auto" and not ENGINES[self.backend].runs_model:
            raise ValueError(
                f"output_names, output_weights: {self.backend} gives one score; leave them out"
            )
        if not all(names) or len(set(names)) < len(names):
            raise ValueError("output_names: every output needs a name of its own")
        if not all(map(math.isfinite, weights.values())):
            raise ValueError("output_weights: a weight is a finite number")
        if weights and not any(weights.values()):
            raise ValueError("output_weights: every weight is 0, and so would be every score")
        return self

    @model_validator(mode="after")
    def _models_go_together(self) -> Self:
        if isinstance(self.model, str):
            if self.model_workers != "shared":
                raise ValueError("model_workers: only for several models; leave it out")
            return self
        if self.task != "score":
            raise ValueError(f"model: several models score; a job with task {self.task} takes one")
        if self.model_workers == "own" and not self.use_ray:
            raise ValueError("model_workers: without Ray one worker holds all models")
        backends = []
        for name in self.model:
            try:
                backends.append(self._member(name).backend)
            except ValidationError as error:
                raise ValueError(f"model: {name}: {_in_a_line(error)}") from None
        if self.model_workers == "shared" and len(backends) > 1 and "vllm" in backends:
            raise ValueError(
                "backend: vLLM takes the memory of a device for one model; set model_workers: own"
            )
        return self

    @property
    def members(self) -> dict[str, Self]:
        """The settings of each model, by its name and in the order of names; those of a single one
        are these, under ""."""
        if isinstance(self.model, str):
            return {"": self}
        return {name: self._member(name) for name in self.model}

    def _member(self, name: str) -> Self:
        assert not isinstance(self.model, str)
        shared = self.model_dump(exclude_unset=True, exclude={"model", "model_workers", "rewards"})
        prefix = family_prefix(self.column_prefix, name)
        return self.model_validate({**shared, **self.model[name], "column_prefix": prefix})

    @property
    def one_model(self) -> str:
        """The model of settings that have a single one, such as those of a member."""
        assert isinstance(self.model, str), "these settings have several models"
        return self.model

    @property
    def shown_model(self) -> str:
        """The model, or all of them with their names, in a line."""
        if isinstance(self.model, str):
            return self.model
        return ", ".join(f"{name}={own['model']}" for name, own in self.model.items())

    @property
    def read_bounds(self) -> ReadBounds:
        """What a row and a packed file may take."""
        return ReadBounds(**{bound.name: getattr(self, bound.name) for bound in fields(ReadBounds)})

    def reader_bounds(self, size_bytes: int = 0) -> Bounds:
        """What a process that reads a file of so many bytes, or tries the tokenizer, may take.

        A tokenizer that is the model's own code may need torch, which the others do without.
        """
        return Bounds.of_file(
            size_bytes,
            memory_bytes=int(self.read_memory_gib * 2**30),
            seconds=self.read_timeout_s,
            kind="own code" if self.trust_remote_code else "",
        )

    @property
    def devices_per_worker(self) -> int:
        """Over how many devices a worker splits its model."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def worker_bounds(self) -> tuple[int, int] | None:
        """Fewest and most workers that the settings ask for; None where they leave it open."""
        if isinstance(self.workers, str):
            least, most = self.workers.split("..")
            return int(least), int(most)
        return None if self.workers is None else (self.workers, self.workers)

    @property
    def engine_options(self) -> frozenset[str]:
        """The settings with another value than their default that not every engine takes."""
        options = frozenset[str]().union(*(facts.options for facts in ENGINES.values()))
        return options & self.model_dump(exclude_defaults=True).keys()

    @model_validator(mode="after")
    def _two_models_or_one(self) -> Self:
        if self.adapter != IMPLICIT_REWARD:
            given = self.model_dump(exclude_defaults=True).keys()
            for name in ("reference_model", "beta", "length_normalize"):
                if name in given:
                    raise ValueError(
                        f"{name}: only for implicit rewards; set adapter: {IMPLICIT_REWARD}"
                    )
        elif self.reference_model is None:
            raise ValueError(
                "reference_model: an implicit reward needs the model that DPO began with; for the "
                f"log probability under `model` alone, set reference_model: {NO_REFERENCE}"
            )
        return self

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


class PartialConfig(Config):
    """Settings of a command that needs no model, inputs or output: those not given are empty.

    For functions that do not use what is absent, as `make_plan` uses no model.
    """

    model: Models = _setting("", "runtime")
    inputs: tuple[str, ...] = _setting((), "runtime")
    output: str = _setting("", "runtime")


def _in_a_line(error: ValidationError) -> str:
    """What is wrong with the settings of one of several models."""
    found = []
    for problem in error.errors():
        name = ".".join(part for part in problem["loc"] if isinstance(part, str))
        message = problem["msg"].removeprefix("Value error, ")  # pydantic's, before ours
        found.append(f"{name}: {message}" if name else message)
    return "; ".join(found)


def credentials_in(settings: Mapping[str, Any]) -> list[str]:
    """A line for each credential among the settings, and for each unknown option of a store.

    They may be of any type, as a file has them.
    """
    options = settings.get("store_options")
    named = {str(k): str(v) for k, v in options.items()} if isinstance(options, Mapping) else {}
    lines = [f"store_options.{line}" for line in wrong_options(named)]
    for name in PLACES:
        lines += [f"{name}: {why}" for why in map(wrong_url, _texts(settings.get(name))) if why]
    return lines


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []
