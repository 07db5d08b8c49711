"""The columns that scoring adds to a row, by format and outputs."""

from batch_scorer.config import OverLength
from batch_scorer.records import SCALAR, Format, Outputs


def added_columns(
    format: Format, prefix: str, over_length: OverLength, outputs: Outputs = SCALAR
) -> list[str]:
    """Names of the columns that scoring adds to a row of this format, in order."""
    names, *others = value_columns(format, outputs)
    if format is Format.PREFERENCE_PAIR and outputs.embedding_size is None:
        names.append("margin")
    names += [name for names_by_side in others for name in names_by_side]
    names += ["score_error", *(f"num_tokens{side}" for side in _SIDES.get(format, ("",)))]
    if over_length is OverLength.TRUNCATE_LEFT:
        names.append("num_truncated_tokens")
    return [prefix + name for name in names]


def value_columns(format: Format, outputs: Outputs) -> list[list[str]]:
    """The columns of each kind of value that a sequence has, by side: its score or embedding
    first, then its attributes, then its steps."""
    kinds = ["score" if outputs.embedding_size is None else "embedding"]
    if format in GROUPS:
        kinds[0] += "s"
    if outputs.attributes:
        kinds.append("rewards")
    if outputs.steps:
        kinds.append("step_scores")
    return [[kind + side for side in _SIDES.get(format, ("",))] for kind in kinds]


GROUPS = (Format.BEST_OF_N, Format.ROLLOUT_GROUP)
"""Their columns hold a list for each row."""

_SIDES = {
    Format.PREFERENCE_PAIR: ("_chosen", "_rejected"),
    Format.BEST_OF_N: ("_chosen", "_rejected"),
}
