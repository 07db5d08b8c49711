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

SCORING_VERSION = 3
"""Raised when a change of this package changes scores (rendering, pooling, head)."""
_PARTS_BY_NAME = {"models", "rewards"}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`parts` is what enters, by name; `digest` its sha256."""

    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest_of(self.parts)

    def differences(self, other: "Fingerprint") -> list[str]:
        """One line for each part that differs, theirs first."""
        here, there = _flat(self.parts), _flat(other.parts)
        return [
            f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} here"
            for name in sorted({*here, *there})
            if here.get(name) != there.get(name)
        ]


def score_fingerprint(
    config: Config,
    *,
    model_digest: str,
    base_digest: str | None,
    reference_digest: str | None,
    adapter: str,
    backend: str,
    attention: str,
    embedding: tuple[str, bool] | None,
    dtype: str,
    max_tokens: int,
    text: Mapping[str, Any],
    probe_digest: str | None,
    judge_digest: str | None = None,
) -> Fingerprint:
    """The fingerprint of `config` with everything derived filled in.

    `base_digest` is that of a LoRA adapter's base, which `model_digest` covers too, and
    `reference_digest` that of an implicit reward's reference model. `text` is how rows become token
    ids (`models.adapter.Prompt`). `probe_digest` is None where nothing is rendered (token ids, or
    no model at all).
    """
    parts = config.with_role("scores")
    if parts["precision"] is None:  # outputs that were begun before it was a setting go on
        del parts["precision"]
    parts |= {
        "model": model_digest,
        "reference": reference_digest,
        "adapter": adapter,
        "backend": backend,
        "attention": attention,
        "embedding": embedding and list(embedding),
        "dtype": dtype,
        "max_tokens": max_tokens,
        "text": dict(text),
        "template_probe": probe_digest,
        "scoring_version": SCORING_VERSION,
    }
    if base_digest is not None:
        parts["base"] = base_digest
    if judge_digest is not None:
        parts["judge"] = judge_digest
    return Fingerprint(parts)


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts, those of `text` and of each of the `models` and `rewards` under names of their
    own."""
    found: dict[str, Any] = {}
    for part, value in parts.items():
        inner = {"": value}
        if part == "text":
            inner = value
        elif part in _PARTS_BY_NAME:
            inner = {
                f"{name}.{key}": each
                for name, own in value.items()
                for key, each in _flat(own).items()
            }
        found |= {f"{part}.{name}" if name else part: each for name, each in inner.items()}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"
