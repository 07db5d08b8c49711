"""What is known about a family of reward models, as data: the vocabulary of `families/`.

An adapter describes how a checkpoint of its family gives scores: which text the model was trained
on, which tokens are pooled, where the head is and what its outputs mean. Body and head are
separate: the body is a transformers model that either engine runs; the head is small, computed by
this package, and always float32. No family needs remote code.

Legend: S sequences, k pooled tokens per sequence, H hidden, A named attributes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.config import ENGINES
from batch_scorer.errors import ModelError, RowReason
from batch_scorer.models.cross_encoder import CrossEncoder
from batch_scorer.records import RowError

if TYPE_CHECKING:
    from torch import Tensor, nn

Ids: TypeAlias = npt.NDArray[np.int32]
Positions: TypeAlias = npt.NDArray[np.int64]
ModelConfig: TypeAlias = Mapping[str, Any]
"""A model's config.json."""
StepAggregation: TypeAlias = Literal["min", "last", "mean", "product"]
"""How the scores of an answer's steps become its score."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor is stored: the file, its name in there, and its dtype as safetensors writes
    it (`BF16`)."""

    file: Path
    name: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Delta:
    """What a LoRA adapter adds to a stored tensor: `scale` times the product of `up` and `down`.

    up         [out, r]; or all that is added, where `down` is None (a bias, [out]).
    down       [r, in].
    magnitude  DoRA's length of each row, [out]: the sum's rows are scaled to it.
    transposed  the tensor is stored as [in, out] (embeddings, GPT-2's layers).
    """

    up: Source
    down: Source | None
    scale: float
    magnitude: Source | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """What the numbers of a quantised weight are multiplied by: the tensor of scales; the rows and
    columns that share one of them (`block`, None: all do); what is taken off the numbers first,
    laid out alike, if anything is; and what the scales are divided by."""

    source: Source
    block: tuple[int, int] | None
    zero_point: Source | None = None
    divisor: float = 1.0


@dataclass(frozen=True, slots=True)
class Packed:
    """How a weight [out, in] lies in 32-bit words of `bits` wide numbers, as GPTQ and AWQ store it.

    The words run along the inputs or (`along_outputs`) the outputs, and the numbers are transposed,
    [in, out]. Each stands for the number less its zero point, times its scale. `scales` are
    [groups, out]; `zeros` too, in words along the outputs, every one of them `zero_offset` too
    small. A word holds the numbers in this `order`, from its lowest bits. `groups` gives every
    input's group, int32[in]; None: the inputs in order, as many in every group.
    """

    bits: int
    along_outputs: bool
    order: tuple[int, ...]
    scales: Source
    zeros: Source
    zero_offset: int
    groups: Source | None


@dataclass(frozen=True, slots=True)
class CodedScales:
    """How scales are stored as bytes, which are places in a `table`, [256]: the number there, times
    the byte's own scale (one of `scales` for every `block_size` bytes), plus `offset`."""

    table: Source
    scales: Source
    block_size: int
    offset: float


@dataclass(frozen=True, slots=True)
class Coded:
    """How a weight of this `shape` lies in codes of 4 bits, as bitsandbytes stores it.

    A byte holds two, the first in its upper half, row after row of the weight. A code is a place in
    `table`, [16]; the number there is multiplied by its scale. `scales` has one for every
    `block_size` numbers of the flat weight, as floats or, with `nested`, as bytes of those. `kind`
    is the table's name, nf4 or fp4.
    """

    kind: str
    shape: tuple[int, ...]
    table: Source
    scales: Source
    block_size: int
    nested: CodedScales | None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model directory as far as it is known without loading it.

    `name` is the user's name for it, a hub id or the last parts of a path. `shapes` has the shape
    of every tensor of its weights and `sources` its place, both under the names that the families
    know. `lora_dir` has a LoRA adapter that is merged into these weights while they are read:
    `deltas` are what it adds to tensors, and `tokenizer_path` is its directory where that has a
    tokenizer. `scales` has what makes floats of quantised weights, by the weight's name;
    `companions` the places of all tensors that only an engine reads which computes with quantised
    weights (`models/quantised.py`). `cross_encoder` is None for a model that was not saved as
    sentence-transformers' CrossEncoder. `changes` says in a line each what was done to the files as
    they are stored, for the record.
    """

    path: Path
    name: str
    config: ModelConfig
    shapes: Mapping[str, list[int]]
    sources: Mapping[str, Source] = field(default_factory=dict)
    lora_dir: Path | None = None
    changes: tuple[str, ...] = ()
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    scales: Mapping[str, Scale | Packed | Coded] = field(default_factory=dict)
    companions: Mapping[str, Source] = field(default_factory=dict)
    cross_encoder: CrossEncoder | None = None

    @property
    def architecture(self) -> str:
        return str((self.config.get("architectures") or ["unknown"])[0])

    @property
    def tokenizer_path(self) -> Path:
        if self.lora_dir and (self.lora_dir / "tokenizer_config.json").is_file():
            return self.lora_dir
        return self.path


OUTPUT_WEIGHTS = "_output_weights"
"""The entry of a `ModelFiles.config` that holds the setting `output_weights`."""


VERDICTS = "_verdicts"
"""The entry of a `ModelFiles.config` that holds a judge's choices, each with its token id."""


def verdict_entries(
    choices: Sequence[str], token_ids: Sequence[int | None] | None = None
) -> dict[str, Any]:
    """A judge's choices, with their token ids where these are known, as an entry of a config."""
    return {VERDICTS: dict(zip(choices, token_ids or [None] * len(choices), strict=True))}


def output_entries(names: Sequence[str], weights: Mapping[str, float]) -> dict[str, Any]:
    """What the settings `output_names` and `output_weights` say, as entries of a config."""
    entries: dict[str, Any] = {OUTPUT_WEIGHTS: dict(weights)} if weights else {}
    return entries | ({"id2label": {str(i): n for i, n in enumerate(names)}} if names else {})


class Pooling(Protocol):
    """Which tokens of a sequence the head reads."""

    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions | RowError:
        """int64[k], ascending, of int32[n] with n > 0; an error where the row has none."""


@dataclass(frozen=True, slots=True)
class LastToken:
    """The last token. With `skips_pad`, the last one that is not the config's pad id, which is
    what transformers' sequence classifiers read and were trained with (transformers 5.19,
    `GenericForSequenceClassification`). With `must_be`, the name of a config entry, a sequence
    whose last token has another id is an error."""

    skips_pad: bool = False
    must_be: str | None = None

    def is_at_end(self, last_ids: Ids, config: ModelConfig) -> npt.NDArray[np.bool_]:
        """bool[S]: whether sequences that end in these ids pool their last token.

        For the others, which are rare, `positions` has the answer.
        """
        pad = config.get("pad_token_id")
        at_end = np.ones(len(last_ids), dtype=np.bool_)
        if self.must_be is not None:
            at_end &= last_ids == config[self.must_be]
        if self.skips_pad and pad is not None:
            at_end &= last_ids != pad
        return at_end

    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions | RowError:
        last = len(token_ids) - 1
        if self.must_be is not None and token_ids[last] != config[self.must_be]:
            detail = f"the sequence does not end in {self.must_be} {config[self.must_be]}"
            return RowError(RowReason.NO_MARK, detail)
        pad = config.get("pad_token_id")
        if self.skips_pad and pad is not None and token_ids[last] == pad:
            real = np.flatnonzero(token_ids != pad)
            last = int(real[-1]) if len(real) else last
        return np.array([last], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class LastOrAll:
    """By the config entry `pooling`: the last token (`last`), or all of them (`mean`).

    Belongs with `Adapter.averages`.
    """

    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions | RowError:
        if is_mean_pooled(config):
            return np.arange(len(token_ids), dtype=np.int64)
        return np.array([len(token_ids) - 1], dtype=np.int64)


def is_mean_pooled(config: ModelConfig) -> bool:
    """Raises ModelError for a config entry `pooling` that is neither `last` nor `mean`."""
    pooling = config.get("pooling") or "last"
    if pooling not in ("last", "mean"):
        raise ModelError(f"the config's pooling is {pooling}; known are last and mean")
    return bool(pooling == "mean")


@dataclass(frozen=True, slots=True)
class MarkAndLast:
    """The first token of the last occurrence of a mark, and the last token: [mark, last].

    `marks` are token ids by the config's model_type.
    """

    marks: Mapping[str, tuple[int, ...]]

    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions | RowError:
        mark = np.array(self.marks[config["model_type"]], dtype=np.int32)
        starts = np.flatnonzero(token_ids == mark[0])
        starts = starts[starts <= len(token_ids) - len(mark)]
        found = [s for s in starts.tolist() if np.array_equal(token_ids[s : s + len(mark)], mark)]
        if not found:
            return RowError(RowReason.NO_MARK, "the end of the prompt is not in the token ids")
        return np.array([found[-1], len(token_ids) - 1], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """One position for each step of the answer: `offset` from each token `token_id`.

    With `after` (token ids), only those preceded by exactly these ids count.
    """

    token_id: int
    offset: int = 0
    after: tuple[int, ...] = ()

    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions | RowError:
        places = np.flatnonzero(token_ids == self.token_id)
        places = places[places >= max(len(self.after), -self.offset)]
        for back, wanted in enumerate(reversed(self.after), start=1):
            places = places[token_ids[places - back] == wanted]
        if not len(places):
            return RowError(RowReason.NO_STEPS, "the answer has no step that could be judged")
        return (places + self.offset).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Steps:
    """How an answer is cut into steps for a process reward model.

    The answer is split at `separator`, unless it contains `tag` already. `tagged`: every step is
    followed by the tag. `turns`: every step becomes a user turn, answered by the tag; the
    prompt and the first step share a turn, joined by a space. `joint` is put between tagged steps.
    """

    layout: Literal["tagged", "turns"]
    tag: str
    separator: str = "\n\n"
    joint: str = ""


@dataclass(frozen=True, slots=True)
class OneOfEach:
    """The tokens whose ids are these config entries, in this order; each is there exactly once."""

    entries: tuple[str, ...]

    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions | RowError:
        found = [np.flatnonzero(token_ids == config[entry]) for entry in self.entries]
        for entry, places in zip(self.entries, found, strict=True):
            if len(places) != 1:
                detail = f"the token of {entry} is there {len(places)} times, not once"
                return RowError(RowReason.NO_MARK, detail)
        return np.concatenate(found).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Beside:
    """A text of the row that a model reads beside the conversation.

    field    `reference` and `principle` are columns of the row (`formats.kinds.BESIDE_NAMES`);
             `other` is the other answer of a row with two.
    turn     Jinja template of a user's turn, given the conversation and the text under the field's
             name; None: the chat template gets the text, as an argument of that name.
    replaces whether that turn stands in place of the whole conversation, or follows the answer.
    """

    field: Literal["reference", "principle", "other"]
    turn: str | None = None
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a conversation becomes text, and text becomes token ids.

    A family sets what its models were trained on, where the tokenizer does not do it; a job adds
    its settings, and the whole enters the fingerprint (`to_json`).

    template      Jinja chat template in place of the tokenizer's.
    template_name which of the tokenizer's templates, where it has several.
    arguments     the template's arguments, as the text of a JSON object.
    system        put first where a conversation has no system message.
    suffix_id_of  name of the config entry whose token id ends every sequence, exactly once.
    pair          without a template: tokenizer(question, answer).
    question_prefix  what stands before the question of such a pair.
    steps         the answer is cut into steps.
    step_separator  what joins steps that come as a list, where `steps` is None.
    bos           as the setting of that name. TRL, OpenRLHF, verl and RLHFlow tokenise rendered
                  text without adding tokens: `template`.
    eos           `keep`: nothing is done. `append`, `never`: as the setting. `openrlhf`: line feeds
                  at the end are stripped, and a blank and EOS follow where the text does not end
                  in EOS.
    date          what a template gets for today, None: the day on which it is loaded.
    reasoning, special_text   as the settings.
    answer       where the judged answer begins is found, too (`TokenizedRows.answer_starts`).
    begins       what a judge's reply begins with, behind the rendered text.
    beside        what of the row is read beside the conversation.
    """

    template: str | None = None
    template_name: str | None = None
    arguments: str = "{}"
    system: str | None = None
    suffix_id_of: str | None = None
    pair: bool = False
    question_prefix: str = ""
    steps: Steps | None = None
    step_separator: str = "\n\n"
    bos: Literal["auto", "always", "never", "template"] = "auto"
    eos: Literal["keep", "append", "never", "openrlhf"] = "keep"
    date: datetime | None = None
    reasoning: Literal["template", "keep", "drop"] = "template"
    special_text: Literal["parse", "literal", "mark"] = "parse"
    answer: bool = False
    begins: str = ""
    beside: Beside | None = None

    @property
    def column_beside(self) -> str | None:
        """The field of the row that has to be there beside the conversation; None for the other
        answer, and where an argument of the template gives the text for all rows."""
        if self.beside is None or self.beside.field == "other":
            return None
        return None if self.beside.field in json.loads(self.arguments) else self.beside.field

    def to_json(self) -> dict[str, Any]:
        """All of it; a template as its sha256. `beside` and `begins` are left out where there is
        nothing."""
        parts = asdict(self)
        for name in ("beside", "begins"):
            if not parts[name]:
                del parts[name]
        return {
            **parts,
            "template": self.template and hashlib.sha256(self.template.encode()).hexdigest(),
            "arguments": json.loads(self.arguments),
            "date": self.date and self.date.isoformat(),
        }


@dataclass(frozen=True, slots=True)
class Body:
    """How the checkpoint's body becomes a transformers model, where it is not one already.

    model_type  transformers' name for the architecture, where the config has another.
    config      config.json → the entries that model type expects.
    tensors     one checkpoint tensor → the transformers tensors in it, named as in the
                causal language model (`model.layers.0.…`).
    """

    model_type: str | None = None
    config: Callable[[ModelConfig], dict[str, Any]] | None = None
    tensors: "Callable[[str, Tensor, ModelConfig], Iterable[tuple[str, Tensor]]] | None" = None


@dataclass(frozen=True, slots=True)
class Reference:
    """A published score: the model, the input, the score, and who published it."""

    model: str
    case: str
    score: float
    source: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """One family of reward models.

    name           also the value of the setting `adapter`.
    architectures  fnmatch patterns for the first of config.architectures.
    head           the head's tensors and their shapes, None for any size; all must be there.
                   Empty: the model's own forward gives the score (encoders).
    head_extra     fnmatch patterns for tensors that belong to the head if they are there.
    head_rows      rows of the head's tensors that are read, where a tensor has one row for every
                   token of the vocabulary; () reads all.
    head_files     files beside the safetensors that contain head tensors (`torch.save`), and the
                   prefix to put before the tensors' names.
    tied           head tensor → the body's tensor with the same values, where a checkpoint leaves
                   the head's out to save space (tied embeddings).
    unused         fnmatch patterns for tensors that neither body nor head reads.
    build_head     head tensors (float32) and config → module. It takes float32[S, k, H] and gives
                   float32[S, 1 + A], the score and then the attributes; with `step_aggregation`
                   it takes [K, H] and gives [K, 1].
    log_probs      whether the head gives log probabilities of next tokens, of which those of the
                   judged answer are added up: it takes [K, H] and int64[K], the next tokens, and
                   gives float32[K]. `pooling` is not used.
    verdicts       whether the head gives the probabilities of the tokens that a judge may answer
                   with (`VERDICTS`), from the whole vocabulary's logits.
    max_tokens     the longest sequence that its models were made for, where the config's limit is
                   none.
    averages       whether the pooled hidden states of a sequence are averaged before the head.
    attributes     names of the A outputs beside the score, from the config.
    is_cross_encoder  fits only what was saved as sentence-transformers' CrossEncoder. The
                   activation that its files name is applied to the one output, and the raw output
                   comes beside it as an attribute.
    has_score      whether there is a score beside them, from the config; without one the module
                   gives float32[S, A].
    tokens         by the config's model_type: token ids that pooling or head rely on, under their
                   spelling in tokenizer.json. Another id there is an error.
    model_ids      fnmatch patterns for the model's name (lower case), where architecture and
                   tensors do not identify the family; () fits all. `fits_config` checks the config
                   for the same reason. `asked_only`: chosen by the setting or by the model's name
                   only.
    engines        engines that can run it: all that run models, unless the family names its own.
    step_aggregation  how step scores become the score, unless the setting changes it; None: not a
                   process reward model.
    forbidden_dtypes  dtypes in which it is known to fail.
    refused        why models of this family cannot be scored here at all; None: they can.
    summary, models, reads, references, traps   for docs/models.md; `reads` are the pooled tokens.
    """

    name: str
    summary: str
    architectures: tuple[str, ...]
    head: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    head_extra: tuple[str, ...] = ()
    head_rows: tuple[int, ...] = ()
    head_files: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    build_head: "Callable[[Mapping[str, Tensor], ModelConfig], nn.Module] | None" = None
    pooling: Pooling = LastToken()
    log_probs: bool = False
    verdicts: bool = False
    max_tokens: int | None = None
    averages: Callable[[ModelConfig], bool] = field(default=lambda config: False)
    prompt: Prompt = Prompt()
    body: Body = Body()
    attributes: Callable[[ModelConfig], tuple[str, ...]] = field(default=lambda config: ())
    is_cross_encoder: bool = False
    has_score: Callable[[ModelConfig], bool] = field(default=lambda config: True)
    tokens: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    model_ids: tuple[str, ...] = ()
    asked_only: bool = False
    fits_config: Callable[[ModelConfig], bool] = field(default=lambda config: True)
    engines: tuple[str, ...] = tuple(name for name, facts in ENGINES.items() if facts.runs_model)
    step_aggregation: StepAggregation | None = None
    forbidden_dtypes: tuple[str, ...] = ()
    refused: str | None = None
    models: tuple[str, ...] = ()
    reads: str = "the last token"
    references: tuple[Reference, ...] = ()
    traps: tuple[str, ...] = ()

    def fits(self, files: ModelFiles) -> bool:
        """Whether the model belongs to this family; its head may still be missing."""
        name = files.name.lower()
        return (
            any(fnmatchcase(files.architecture, pattern) for pattern in self.architectures)
            and self.fits_config(files.config)
            and not (self.is_cross_encoder and files.cross_encoder is None)
            and (
                any(fnmatchcase(name, pattern) for pattern in self.model_ids)
                or not (self.model_ids or self.asked_only)
            )
        )

    def cross_encoder(self, files: ModelFiles) -> CrossEncoder | None:
        """How sentence-transformers would score, its defaults where the files do not say; None in
        families that are no cross encoders."""
        return files.cross_encoder or CrossEncoder() if self.is_cross_encoder else None

    def missing_tensors(self, files: ModelFiles) -> list[str]:
        """Names of the head's tensors that the checkpoint lacks."""
        return [name for name in self.head if not self._has(files, name)]

    def _has(self, files: ModelFiles, name: str) -> bool:
        return (
            name in files.shapes
            or self.tied.get(name) in files.shapes
            or any(
                name.startswith(prefix) and (files.path / file).is_file()
                for file, prefix in self.head_files.items()
            )
        )

    def num_outputs(self, config: ModelConfig) -> int:
        """Outputs per sequence: the score, if there is one, and the attributes."""
        return int(self.has_score(config)) + len(self.attributes(config))

    def is_head_tensor(self, name: str) -> bool:
        return name in self.head or any(fnmatchcase(name, pattern) for pattern in self.head_extra)

    @property
    def reads_any_token(self) -> bool:
        """Whether the head gives a score at any token: it reads one, the last, whichever it is. A
        token that is there to be read (`must_be`) is no answer's token, and the logit of a token of
        the vocabulary (`head_rows`, `log_probs`) is about the next one."""
        return (
            self.build_head is not None
            and isinstance(self.pooling, LastToken)
            and self.pooling.must_be is None
            and not (self.head_rows or self.log_probs or self.verdicts)
            and self.step_aggregation is None
        )

    def is_body_tensor(self, name: str) -> bool:
        return not self.is_head_tensor(name) and not any(
            fnmatchcase(name, pattern) for pattern in self.unused
        )
