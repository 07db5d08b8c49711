"""What a comparison with plain Hugging Face ends in."""

from dataclasses import asdict, dataclass, field
from typing import Any

from batch_scorer.errors import ParityError
from batch_scorer.job import Job
from batch_scorer.parity.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """The result of a comparison. `problems` is empty exactly if the engine agrees.

    `rows_compared`, `covered` and `explained` are of the rows whose token ids were compared, as in
    `Sample`. `reference_streamed`: the reference read the model layer by layer.
    """

    backend: str
    dtype: str
    reference_dtype: str
    reference_streamed: bool = False
    problems: tuple[str, ...]
    rows_compared: int = 0
    covered: dict[str, int] = field(default_factory=dict)
    explained: dict[str, int] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"agrees": self.agrees, **asdict(self)}

    def require(self) -> None:
        """Raise ParityError if the engine does not agree."""
        if not self.agrees:
            raise ParityError(
                f"the {self.backend} backend does not give the model's scores: "
                + "; ".join(self.problems)
                + " (details: `batch-scorer check`; `--parity-check warn` continues anyway)"
            )


def common_facts(job: Job, sample: Sample) -> dict[str, Any]:
    """The fields that every report takes from the job and its sample."""
    return {
        "backend": job.backend,
        "dtype": job.dtype,
        "rows_compared": sample.compared,
        "covered": sample.covered,
        "explained": sample.explained,
    }


def finite_number(value: float) -> float:
    """Rounded, so that equal workers write one record; 1e9 means infinity in JSON."""
    return float(f"{min(value, 1e9):.3g}")
