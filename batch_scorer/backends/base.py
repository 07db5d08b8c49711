"""What an engine is to the rest of the package, and the rules that all engines share.

A backend is built once per worker, scores one shard at a time, and never sees text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from batch_scorer.errors import ModelError, RowReason
from batch_scorer.judges.page import Page
from batch_scorer.models.adapter import (
    Adapter,
    ModelFiles,
    StepAggregation,
    output_entries,
    verdict_entries,
)
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.files import reading
from batch_scorer.records import Embedding, RowError, Scores, TokenizedRows

if TYPE_CHECKING:
    from batch_scorer.backends.endpoint_client import EndpointSettings

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""How far another sequence of the batch may move a hidden state, relative to its size: rounding
stays far below this, a leak between sequences lies far above."""


@dataclass(frozen=True, slots=True)
class ImplicitReward:
    """How an answer's log probabilities become a score.

    `beta` times the log probability under the policy minus that under the model of `reference`,
    or minus nothing where that is None; per token of the answer with `length_normalize`.
    """

    beta: float
    length_normalize: bool
    reference: "EngineSettings | None"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with. It ignores the options that it does not take (`ENGINES`).

    model_dir          the model's directory, with config and weights.
    lora_dir           a LoRA adapter's directory, merged into the weights while they are read.
    dtype, device      of the body; the head is float32. The device is `cpu` or `cuda`.
    adapter            the model's family; None finds it from the model's files.
    max_tokens         the longest sequence, for which vLLM reserves memory; None: the longest that
                       the model has positions for.
    step_aggregation   how step scores become the score; None: as the family does.
    token_scores       whether every token gets a score beside the sequence's.
    output_names, output_weights  of a head with several outputs, as the settings.
    embedding          what to read as an embedding, in place of the model's head.
    implicit           for a family of log probabilities, how these become a score; None: the log
                       probability of the answer is the score.
    attention          `packed`, or the name of an implementation in transformers.
    quantization       vLLM's name of a method that quantises the body, such as fp8.
    precision          `int8` or `fp8`: the body's linear layers multiply in it; None: in `dtype`.
    tensor_parallel    how many GPUs one vLLM splits the layers of the body over.
    pipeline_parallel  into how many stages it cuts the body, each on `tensor_parallel` GPUs.
    placement_group    Ray's, with a bundle for each of these GPUs; None: they are all here.
    token_budget       most tokens of a forward pass; None: what suits the device.
    compile            whether torch compiles the body's layers; None: the engine's default.
    invariant          whether a sequence's score has the same bits whatever is scored beside it.
    trust_remote_code  whether Python code that comes with the model is run.
    judge              the page that a judge is asked by; None: the model is none. `verdict_ids` are
                       the tokens of its choices, where it is read by their probability, and
                       `tokenizer_dir` is what its replies are decoded with.
    endpoint           where a judge is served that is not here; None: the model is here.
    prefix_caching     False only to measure what vLLM's prefix cache brings.
    """

    model_dir: Path
    dtype: str
    device: str
    lora_dir: Path | None = None
    adapter: Adapter | None = None
    max_tokens: int | None = None
    step_aggregation: StepAggregation | None = None
    token_scores: bool = False
    output_names: tuple[str, ...] = ()
    output_weights: Mapping[str, float] = field(default_factory=dict)
    embedding: Embedding | None = None
    implicit: ImplicitReward | None = None
    attention: str = "packed"
    quantization: str | None = None
    precision: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    placement_group: Any = None
    token_budget: int | None = None
    compile: bool | None = None
    invariant: bool = False
    trust_remote_code: bool = False
    judge: Page | None = None
    verdict_ids: tuple[int, ...] = ()
    tokenizer_dir: Path | None = None
    endpoint: "EndpointSettings | None" = None
    prefix_caching: bool = True

    @property
    def own_device(self) -> str:
        """Where the process that holds the engine may compute itself: not on GPUs of a placement
        group, which are those of vLLM's processes."""
        return self.device if self.placement_group is None else "cpu"

    def read_files(self) -> ModelFiles:
        """What the directories hold. Raises ModelError."""
        entries = output_entries(self.output_names, self.output_weights)
        if self.judge is not None:
            entries = verdict_entries([*self.judge.verdict.choices], self.verdict_ids or None)
        with reading(self.model_dir):
            return read_model_files(self.model_dir, lora_dir=self.lora_dir, entries=entries)


class EngineDied(Exception):
    """The engine stopped half-way and cannot be used again: its process has to end.

    The cause may be neither the model nor the shard, so it is neither a `ModelError` nor a
    `ShardError`; the caller counts it as a death of the worker.
    """


class Backend(Protocol):
    """Token ids in, raw scores out.

    `num_outputs` is O, the outputs per sequence. `provenance` shows what computed the scores
    (library versions, device, dtype, attention kernel); it is recorded with the run and does
    not enter the fingerprint.
    """

    num_outputs: int
    provenance: dict[str, Any]

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order.

        A sequence that cannot be scored (out of memory on its own, non-finite result) is NaN
        and named in `Scores.errors`; one that arrives with an error keeps NaN. Raises
        EngineDied where the engine cannot continue.
        """

    def close(self) -> None:
        """Free the device."""


@runtime_checkable
class WritingBackend(Backend, Protocol):
    """A backend that lets a judge write its verdicts, and whose model the gate can ask."""

    def greedy(self, rows: TokenizedRows, max_tokens: int) -> list[list[int] | None]:
        """The `max_tokens` most probable tokens behind each sequence, one after the other: without
        sampling, schema, stop text or an end, whatever the page says.

        `max_tokens` is no more than the page lets the judge write. None for a sequence that would
        be marked, fewer tokens where the logits are no numbers. Raises EngineDied.
        """


MakeBackend: TypeAlias = Callable[[EngineSettings], Backend]
"""The type of `BACKEND`, with which the file of every engine ends. Raises ModelError where the
directory cannot give true scores with these settings, and ConfigError."""


def unscorable(
    rows: TokenizedRows, *, max_tokens: int | None, vocabulary_size: int
) -> dict[int, RowError]:
    """Sequences that must not reach the model, though they have no error yet."""
    errors: dict[int, RowError] = {}
    for sequence in np.flatnonzero(rows.lengths == 0).tolist():
        if sequence not in rows.sequence_errors:
            errors[sequence] = RowError(RowReason.EMPTY, "the sequence has no tokens")
    if max_tokens is not None:
        for sequence in np.flatnonzero(rows.lengths > max_tokens).tolist():
            detail = f"{rows.lengths[sequence]} tokens; the model takes {max_tokens}"
            errors[sequence] = RowError(RowReason.TOO_LONG, detail)
    foreign = (rows.token_ids < 0) | (rows.token_ids >= vocabulary_size)  # bool[T]
    places = np.flatnonzero(foreign)
    owners = np.searchsorted(rows.sequence_offsets, places, side="right") - 1
    for sequence, first in zip(*np.unique(owners, return_index=True), strict=True):
        errors[int(sequence)] = RowError(
            RowReason.BAD_TOKEN_ID,
            f"token id {rows.token_ids[places[first]]} is outside the model's vocabulary "
            f"of {vocabulary_size}",
        )
    return errors


def mark_non_finite(scores: Scores, planned: npt.NDArray[np.int64]) -> None:
    """NaN and an error in place of a score that is not finite."""
    broken = np.nonzero(~np.isfinite(scores.values))[0]
    for sequence in np.intersect1d(planned, broken).tolist():
        if sequence not in scores.errors:
            detail = f"the model gave {scores.values[sequence].tolist()}"
            scores.errors[sequence] = RowError(RowReason.NON_FINITE_SCORE, detail)
            scores.values[sequence] = np.nan


def refuse_dtype(adapter: Adapter, model_type: str, dtype: str) -> None:
    """Raise ModelError for a dtype in which the body is known to fail."""
    if dtype in adapter.forbidden_dtypes:
        raise ModelError(f"{dtype} is known to fail in {adapter.name} models; set another dtype")
    if dtype == "float16" and model_type.startswith("gemma2"):
        raise ModelError("float16 overflows in Gemma-2; set dtype to bfloat16 or float32")
