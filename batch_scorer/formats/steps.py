"""Answers that come as a list of steps: plain lists, and PRM800K's own objects."""

from typing import Any

from batch_scorer.errors import RowReason
from batch_scorer.formats.messages import bad
from batch_scorer.records import RowError


def is_steps(value: Any) -> bool:
    """Whether a value is an answer in steps."""
    if isinstance(value, dict):
        steps = value.get("steps")
        return isinstance(steps, list) and any(
            isinstance(step, dict) and "completions" in step for step in steps
        )
    return isinstance(value, list) and any(isinstance(step, str) for step in value)


def problem_of(value: Any) -> str | None:
    """The text of PRM800K's question, or None for another value."""
    problem = value.get("problem") if isinstance(value, dict) else None
    return problem if isinstance(problem, str) else None


def steps_of(value: Any, label: str) -> tuple[str, ...] | RowError:
    """The steps, one text each, so many as the row has.

    Of PRM800K's raw rows it is the completion of each step that its labelers went on with: the
    chosen one, else the one that they wrote, else the first.
    """
    if value is None:
        return RowError(RowReason.NULL_VALUE, f"{label} is null")
    if isinstance(value, dict):
        value = value.get("steps")
        if isinstance(value, list):
            value = [_completion(step) for step in value]
    if not isinstance(value, list):
        return bad(f"{label} is no list of steps")
    if not value:
        return RowError(RowReason.NO_STEPS, f"{label} is an empty list")
    for number, step in enumerate(value):
        if step is None:
            return RowError(RowReason.NULL_VALUE, f"step {number} of {label} is null")
        if not isinstance(step, str):
            return bad(f"step {number} of {label} is no text")
        if not step.strip():
            return RowError(RowReason.EMPTY, f"step {number} of {label} is empty")
    return tuple(value)


def _completion(step: Any) -> Any:
    if not isinstance(step, dict):
        return step
    completions = step.get("completions") or []
    chosen = step.get("chosen_completion")
    if isinstance(chosen, int) and 0 <= chosen < len(completions):
        found = completions[chosen]
    else:
        found = step.get("human_completion") or (completions[0] if completions else None)
    return found.get("text") if isinstance(found, dict) else found
