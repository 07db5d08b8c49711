"""The score fingerprint: a digest of everything that can change a score.

Two runs with the same fingerprint give the same scores (up to the numerics that
docs/numerics.md bounds), so one may finish the other's work. The parts are kept beside the
digest, so that a mismatch can say what differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batch_scorer.config import Config
from batch_scorer.records.digest import digest_of

SCORING_VERSION = 2
"""Raised when a change of this package changes scores (rendering, pooling, head)."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`parts` is what enters, by name; `digest` its sha256."""

    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest_of(self.parts)

    def differences(self, other: "Fingerprint") -> list[str]:
        """One line for each part that differs, theirs first."""
        names = sorted({*self.parts, *other.parts})
        return [
            f"{name}: {_short(other.parts.get(name))} there, {_short(self.parts.get(name))} here"
            for name in names
            if self.parts.get(name) != other.parts.get(name)
        ]


def score_fingerprint(
    config: Config,
    *,
    model_digest: str,
    adapter: str,
    backend: str,
    embedding: tuple[str, bool] | None,
    dtype: str,
    max_tokens: int,
    probe_digest: str | None,
) -> Fingerprint:
    """The fingerprint of `config` with everything derived filled in.

    `probe_digest` is None where nothing is rendered (token ids, or no model at all).
    """
    parts = config.with_role("scores")
    parts |= {
        "model": model_digest,
        "adapter": adapter,
        "backend": backend,
        "embedding": embedding and list(embedding),
        "dtype": dtype,
        "max_tokens": max_tokens,
        "template_probe": probe_digest,
        "scoring_version": SCORING_VERSION,
    }
    return Fingerprint(parts)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"
