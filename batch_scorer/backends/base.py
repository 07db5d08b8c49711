"""What an engine is to the rest of the package.

A backend is built once per worker, scores one shard at a time, and never sees text.
"""

from typing import Any, Protocol

from batch_scorer.records import Scores, TokenizedRows


class Backend(Protocol):
    """Token ids in, raw scores out.

    `num_outputs` is O, the outputs per sequence. `provenance` says what did the work
    (library versions, device, dtype, attention kernel); it is recorded with the run and does
    not enter the fingerprint.
    """

    num_outputs: int
    provenance: dict[str, Any]

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order.

        A sequence that cannot be scored (out of memory on its own, non-finite result) is NaN
        and named in `Scores.errors`; one that arrives with an error keeps NaN.
        """

    def close(self) -> None:
        """Free the device."""
