"""The engine's and plain Hugging Face's scores of the sample, and the comparison. What judges
write is compared by `replies`.

Legend: S sampled sequences, O outputs, E errors as a share of the scores' spread.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from batch_scorer.backends.base import Backend, WritingBackend
from batch_scorer.backends.device import device_name
from batch_scorer.backends.registry import BackendFactory, import_engine, make_backend, settings_of
from batch_scorer.job import Job
from batch_scorer.models.directory import ModelFacts
from batch_scorer.models.kept import kept
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.parity.replies import WrittenReference, compare_replies, compute_written
from batch_scorer.parity.report import ParityReport, common_facts, finite_number
from batch_scorer.parity.sample import Sample
from batch_scorer.records import Outputs, Scores
from batch_scorer.records.reading import read_record
from batch_scorer.storage import ObjectChanged, ObjectDamaged, ObjectMissing, open_store

log = logging.getLogger("batch_scorer")

FloatArray = npt.NDArray[np.float32]

EXACT_ALLOWANCE = 1e-3
"""Error that float32 may have, as a share of the spread. Seen: 1e-5 (docs/numerics.md)."""
WORST_FACTOR, RMS_FACTOR = 3.0, 2.0
"""How far one sequence, and all together, may be off: factors on plain Hugging Face's rounding in
the engine's dtype. Packed bfloat16 is seen at 0.6 to 1.1 (docs/numerics.md)."""
HALF_ALLOWANCE = (0.15, 0.06)
"""Worst and rms that a half-precision engine may be off even where plain Hugging Face happens to
be closer: with a few sequences the size of its rounding is chance. Plain bfloat16 is seen at
(0.11, 0.03) on random models of 8 layers (docs/numerics.md)."""
MOST_ALLOWED = (0.3, 0.1)
"""Upper bounds of worst and rms, however much plain Hugging Face loses in the engine's dtype; also
the limits where that loss is not measured (the model fits the memory in half precision only, or is
quantised)."""

IN_8_BITS_ALLOWED = (1.0, 0.3)
"""Worst and rms of scores with `precision`. Wide, since such errors are part of what was asked for:
a layer that 8 bits do not hold is beyond them, and the ranks below decide."""
LEAST_AGREEMENT = 0.95
"""With `precision`: of every two sampled sequences that plain Hugging Face's rounding in the
engine's dtype leaves apart, the share that has to rank alike."""

_LEAST_PROBABLE = 1e-30
"""Where a logarithm is taken of what may be 0."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Plain Hugging Face's scores, float32[S, O], and their rounding, float32[S] (E).

    `rounding` is None where it was not measured. `streamed`: the model was read layer by layer.
    Steps as in `Scores`.
    """

    dtype: str
    streamed: bool
    values: FloatArray
    rounding: FloatArray | None
    step_values: FloatArray | None = None
    step_offsets: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    """A reference as it is kept."""

    dtype: str
    streamed: bool
    values: list[list[float]]
    rounding: list[float] | None
    step_values: list[float] | None
    step_offsets: list[int] | None

    @classmethod
    def of(cls, reference: Reference) -> Self:
        fields = asdict(reference).items()
        return cls(**{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields})

    def reference(self) -> Reference:
        def array(values: list[Any] | None, dtype: Any) -> Any:
            return None if values is None else np.array(values, dtype=dtype)

        return Reference(
            dtype=self.dtype,
            streamed=self.streamed,
            values=np.array(self.values, dtype=np.float32),
            rounding=array(self.rounding, np.float32),
            step_values=array(self.step_values, np.float32),
            step_offsets=array(self.step_offsets, np.int64),
        )


Sampled: TypeAlias = Callable[[], Sample | None]
"""Waits for the sample; None: nothing is compared."""
Samples: TypeAlias = Mapping[str, Sample]
"""The samples of a job's models by name; of one without, nothing is compared."""

K = TypeVar("K", _Kept, WrittenReference)


@dataclass(frozen=True, slots=True)
class Compared:
    """One sequence: its first output from each side, and the error over all outputs (E)."""

    name: str
    tokens: int
    reference: float | None
    engine: float | None
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoresReport(ParityReport):
    """The largest error, that of all sequences together and the mean (E), what plain Hugging Face's
    rounding in the engine's dtype makes of the largest and the mean (None: not measured), and the
    clear pairs that rank alike."""

    worst: float
    allowed_worst: float
    rms: float
    allowed_rms: float
    mean: float
    rounding_worst: float | None = None
    rounding_mean: float | None = None
    pairs: int
    pairs_agree: int
    compared: tuple[Compared, ...]


# The scores


def reference_of(job: Job, sample: Sample) -> Reference | WrittenReference:
    """What plain Hugging Face gives for the sample.

    Computed once: the output keeps it for other workers and later runs, the user's cache for other
    outputs of the same model, rows and libraries on the same kind of device.
    """
    if job.writes:
        return _once(job, sample, WrittenReference, partial(compute_written, job, sample))
    return _once(job, sample, _Kept, lambda: _Kept.of(compute_scores(job, sample))).reference()


def _once(job: Job, sample: Sample, shape: type[K], find: Callable[[], K]) -> K:
    key = f"{RECORDS}/parity/{job.fingerprint.digest[:12]}-{sample.digest[:12]}.json"
    store = open_store(job.config.output, job.config.store_options, create=True)
    with suppress(ObjectMissing, ObjectDamaged):  # what is damaged is computed anew
        return read_record(store, key, shape)
    asked = {
        "fingerprint": job.fingerprint.digest,
        "sample": sample.digest,
        "device": device_name(settings_of(job).own_device),
    }
    # Another dtype stood in for float32 while memory was short.
    found = kept(shape, _folders(job.model), asked, find, lambda found: found.dtype == "float32")
    with suppress(ObjectChanged):  # another worker was first, with the same one
        store.create(key, json.dumps(asdict(found)).encode())
    return found


def _folders(model: ModelFacts) -> list[Path]:
    """Where the model's files are, and those of the model that it is compared with."""
    folders = [model.path, *([model.lora_dir] if model.lora_dir else [])]
    return folders if model.reference is None else folders + _folders(model.reference)


def compute_scores(job: Job, sample: Sample) -> Reference:
    """Plain Hugging Face in float32 where that is possible, and in the engine's dtype, for the
    rounding."""
    from batch_scorer.backends.plain import reference_road

    road = reference_road(settings_of(job))
    dtype = road.dtype

    def scored(dtype: str) -> Scores:
        return road.scores(replace(settings_of(job), dtype=dtype), sample.rows)

    exact = scored(dtype)
    rounding = None
    if not job.computes_quantised:
        if job.dtype == dtype == "float32":
            rounding = np.zeros(len(exact.values), dtype=np.float32)
        elif dtype == "float32":
            rounding = errors_of(exact, scored(job.dtype), job.outputs)
    return Reference(
        dtype, road.streamed, exact.values, rounding, exact.step_values, exact.step_offsets
    )


def check_engine(job: Job, sample: Sample) -> ParityReport:
    """Compare the engine with plain Hugging Face on the sample; nothing is stored."""
    reference = (compute_written if job.writes else compute_scores)(job, sample)
    backend = make_backend(job)
    try:
        return compare_engine(job, sample, reference, backend)
    finally:
        backend.close()


def proven_backend(job: Job, sampled: Sampled, make: BackendFactory | None = None) -> Backend:
    """The job's engine, after it has agreed with plain Hugging Face on the sample.

    `make` builds another engine in its place. The report is in its provenance as `parity`; without
    a sample nothing is compared. Raises ParityError under `parity_check: stop`, and what `sampled`
    raises.
    """
    if make is None:
        import_engine(job)  # the sample may still be on its way
        make = make_backend
    sample = sampled()
    if sample is None:
        return make(job)
    reference = reference_of(job, sample)
    backend = make(job)
    report = compare_engine(job, sample, reference, backend)
    backend.provenance["parity"] = report.to_json()
    if job.config.parity_check == "stop":
        report.require()
    elif not report.agrees:
        log.warning("the engine is not proven: %s", "; ".join(report.problems))
    return backend


# The comparison


def compare_engine(
    job: Job, sample: Sample, reference: Reference | WrittenReference, backend: Backend
) -> ParityReport:
    """Ask the engine about the sample, and compare what it gives with the reference."""
    if isinstance(reference, WrittenReference):
        assert isinstance(backend, WritingBackend)
        return compare_replies(job, sample, reference, backend)
    return compare(sample, reference, backend.score(sample.rows), job)


def errors_of(exact: Scores | Reference, scores: Scores, outputs: Outputs) -> FloatArray:
    """float32[S]: the largest error of a sequence over its outputs, as a share of their spread.

    Spread is the standard deviation over the sample, or a tenth of the scores' size where they
    hardly differ; for embeddings it is the vector's length. The scores of a sequence's tokens count
    as one output, their errors' rms: the largest of thousands grows with their number. Of a judge's
    choices the logarithms are compared, and their spread counts as 1 at least: rounding moves a
    logit, and the same answers may be as probable in every row. Infinite where only one side has a
    number.
    """
    with np.errstate(invalid="ignore"):
        if outputs.embedding_size is not None:
            lengths = np.linalg.norm(exact.values, axis=1)
            errors = np.linalg.norm(scores.values - exact.values, axis=1) / lengths
        else:
            one, other = (_comparable(each.values, outputs) for each in (exact, scores))
            errors = _scaled(one, other, _least_spread(outputs)).max(axis=1)
    if exact.step_values is not None and exact.step_offsets is not None:
        assert scores.step_values is not None and scores.step_offsets is not None
        if not np.array_equal(exact.step_offsets, scores.step_offsets):
            return np.full(len(errors), np.inf, dtype=np.float32)
        steps = _scaled(exact.step_values[:, None], scores.step_values[:, None])[:, 0]
        has_steps = np.diff(exact.step_offsets) > 0
        starts = exact.step_offsets[:-1][has_steps]
        if not len(starts):
            of_steps = steps
        elif outputs.tokens:
            counts = np.diff(exact.step_offsets)[has_steps]
            of_steps = np.sqrt(np.add.reduceat(steps.astype(np.float64) ** 2, starts) / counts)
        else:
            of_steps = np.maximum.reduceat(steps, starts)
        errors[has_steps] = np.maximum(errors[has_steps], of_steps)
    both_missing = np.isnan(exact.values).all(axis=1) & np.isnan(scores.values).all(axis=1)
    errors = np.where(np.isnan(errors), np.inf, errors)
    return np.where(both_missing, 0.0, errors).astype(np.float32)


def _comparable(values: FloatArray, outputs: Outputs) -> FloatArray:
    return np.log(np.maximum(values, _LEAST_PROBABLE)) if outputs.judge else values


def _least_spread(outputs: Outputs) -> float:
    return 1.0 if outputs.judge else 1e-6


def _scaled(exact: FloatArray, values: FloatArray, least: float = 1e-6) -> FloatArray:
    numbers = np.ma.masked_invalid(exact)
    spread = numbers.std(axis=0).filled(0)
    size = np.sqrt((numbers**2).mean(axis=0).filled(0))
    scale = np.maximum(np.maximum(spread, size / 10), least)
    scaled: FloatArray = np.abs(values - exact) / scale
    return scaled


def compare(sample: Sample, reference: Reference, scores: Scores, job: Job) -> ScoresReport:
    """Compare the engine's scores of the sample with plain Hugging Face's.

    Where the engine multiplies in 8 bits, more is lost than rounding: the limits are those of
    IN_8_BITS_ALLOWED, and LEAST_AGREEMENT of every two sequences that `reference.rounding` leaves
    apart.
    """
    is_embedding = job.embedding is not None
    errors, rounding = errors_of(reference, scores, job.outputs), reference.rounding
    in_8_bits = job.config.precision is not None
    allowed_worst, allowed_rms = (
        MOST_ALLOWED if is_embedding or not in_8_bits else IN_8_BITS_ALLOWED
    )
    if rounding is not None and not in_8_bits:
        least = (EXACT_ALLOWANCE,) * 2 if job.dtype == "float32" else HALF_ALLOWANCE
        worst_rounding = WORST_FACTOR * float(rounding.max())
        allowed_worst = min(allowed_worst, max(least[0], worst_rounding))
        # With few sequences, a single one at its limit already makes this rms.
        least_rms = max(least[1], least[0] / len(errors) ** 0.5)
        allowed_rms = min(allowed_rms, max(least_rms, RMS_FACTOR * _rms(rounding)))
    worst, rms = float(errors.max()), _rms(errors)
    problems = []
    if not np.isfinite(worst):
        lost = int(np.isinf(errors).sum())
        problems.append(f"{lost} of {len(errors)} sequences are scored by one side only")
    elif worst > allowed_worst or rms > allowed_rms:
        where = int(errors.argmax())
        problems.append(
            f"{sample.names[where]} is {scores.values[where, 0]:.4g}, and "
            f"{reference.values[where, 0]:.4g} in plain Hugging Face: off by {worst:.1%} of the "
            f"spread, {allowed_worst:.1%} is allowed (rms {rms:.1%}, {allowed_rms:.1%} is allowed)"
        )
    asked, clear, share = sample.pairs, allowed_worst, 1.0
    if in_8_bits:
        asked = tuple(combinations(range(len(errors)), 2))
        clear = max(EXACT_ALLOWANCE, 0.0 if rounding is None else float(rounding.max()))
        share = LEAST_AGREEMENT
    pairs = agree = 0
    if not is_embedding:
        pairs, agree = _pairs_in_order(asked, reference, scores, clear, job.outputs)
    if np.isfinite(worst) and agree < share * pairs:
        problems.append(
            f"{pairs - agree} of {pairs} pairs are ranked the other way round"
            + (f", {1 - share:.0%} may be" if in_8_bits else "")
        )
    return ScoresReport(
        **common_facts(job, sample),
        reference_dtype=reference.dtype,
        reference_streamed=reference.streamed,
        worst=finite_number(worst),
        allowed_worst=allowed_worst,
        rms=finite_number(rms),
        allowed_rms=allowed_rms,
        mean=finite_number(float(errors.mean())),
        rounding_worst=None if rounding is None else finite_number(float(rounding.max())),
        rounding_mean=None if rounding is None else finite_number(float(rounding.mean())),
        pairs=pairs,
        pairs_agree=agree,
        compared=tuple(
            Compared(name, int(tokens), _finite(exact), _finite(got), finite_number(float(error)))
            for name, tokens, exact, got, error in zip(
                sample.names,
                sample.rows.lengths,
                reference.values[:, 0],
                scores.values[:, 0],
                errors,
                strict=True,
            )
        ),
        problems=tuple(problems),
    )


def _pairs_in_order(
    pairs: Sequence[tuple[int, int]],
    reference: Reference,
    scores: Scores,
    allowed: float,
    outputs: Outputs,
) -> tuple[int, int]:
    """The number of pairs whose margin exceeds what two errors of `allowed` make, and how many of
    them have the same order."""
    exact, found = (_comparable(each.values[:, 0], outputs) for each in (reference, scores))
    scale = max(float(np.nanstd(exact)), _least_spread(outputs))
    compared = agree = 0
    for one, other in pairs:
        margin = exact[one] - exact[other]
        if abs(margin) > 2 * allowed * scale:
            compared += 1
            agree += bool(np.sign(found[one] - found[other]) == np.sign(margin))
    return compared, agree


def _rms(errors: FloatArray) -> float:
    return float(np.sqrt(np.mean(errors.astype(np.float64) ** 2)))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
