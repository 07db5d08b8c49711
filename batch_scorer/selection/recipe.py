"""What `select` is asked for: one recipe for flags, YAML and Python."""

import json
import re
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PROMPT = "prompt"
"""The group of all rows with one prompt, wherever it stands in a row."""
EVERY_OTHER = "*"
"""In `top_percent` and `offsets`: the values that are not named."""


class Pairs(StrEnum):
    """Which pairs are made of the responses to one prompt; see `Selection.pairs`."""

    BEST_WORST = "best_worst"
    BEST_RANDOM = "best_random"
    ADJACENT = "adjacent"
    ALL = "all"


class Columns(StrEnum):
    """In which columns rows are written; see `Selection.columns`."""

    INPUT = "input"
    SKYWORK = "skywork"
    TRL = "trl"
    OPENRLHF = "openrlhf"
    LLAMA_FACTORY = "llama_factory"
    VERL = "verl"


class Reason(StrEnum):
    """Why a row that was read is not kept; the first that is so counts."""

    MARKED = "marked"
    WHERE = "where"
    MARGIN = "margin"
    SAME_TEXT = "same_text"
    COLUMNS = "columns"
    QUANTILE = "quantile"
    RANK = "rank"
    NO_PAIR = "no_pair"
    SAMPLE = "sample"


class NoPair(StrEnum):
    """Why no pair is made of a prompt; the first that is so counts."""

    ONE_RESPONSE = "one_response"
    """Fewer than two different responses have a value."""
    EQUAL = "equal"
    """All values are the same."""
    MARGIN = "margin"
    """No pair that the rule allows differs by more than `min_margin`."""
    TOO_LONG = "too_long"
    """Every such pair has a side of more than `max_tokens` tokens, or of unknown length."""
    SAMPLE = "sample"
    """There are pairs, and none of them was drawn."""


class Selection(BaseModel):
    """Which rows are kept, in the order of these fields: a later one sees what earlier ones left.

    Rows without a value (marked ones) are never kept. Equal values are ordered by the digest of the
    row's text, which does not depend on shards, files or their order; rows that are alike in text
    too, by their place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    where: str | None = None
    """Only rows for which this is true; as for `score`, over all columns, those of scores too."""

    above_margin: float | None = Field(default=None, allow_inf_nan=False)
    """Only pairs with a larger margin. 0: those whose chosen answer has the higher score."""

    by: str | None = None
    """What ranks: a column of numbers, `rewards.NAME` for an attribute, `mean(rewards)` for their
    mean (of pairs `rewards_chosen`, and so on). Default: `margin` of pairs, `score` of others."""

    offsets: dict[str, float] = Field(default_factory=dict)
    """Added to what ranks, by the row's value of `offset_by`, before anything is compared."""

    offset_by: str = "source"
    """The column that `offsets` names values of."""

    quantiles: tuple[float, float] | None = None
    """Only rows whose value is from this quantile to that one of all rows: 0.1 to 1 leaves out the
    lowest tenth. Quantile q is the value at rank ceil(q * rows), and the lowest for 0."""

    group_by: tuple[str, ...] = ()
    """The columns whose values name a group; `prompt`: rows with one prompt, in whichever shard,
    file or list of responses they are."""

    best: int | None = Field(default=None, ge=1)
    """So many rows of each group, highest first."""

    worst: int | None = Field(default=None, ge=1)
    """So many rows of each group, lowest first; with `best` both."""

    category: str = "source"
    """The column that `top_percent` names values of."""

    top_percent: dict[str, float] = Field(default_factory=dict)
    """Of each category the rows with the highest values: so many percent, rounded up. `*` stands
    for categories that are not named; without it these are kept whole."""

    pairs: Pairs | None = None
    """Pairs of the responses to one prompt, chosen the higher one: `best_worst` and `best_random`
    give one pair a prompt, `adjacent` the neighbours in rank, `all` every two. Only of different
    texts with different values."""

    min_margin: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Only pairs whose values differ by more than this."""

    pairs_per_prompt: int | None = Field(default=None, ge=1)
    """At most so many pairs of a prompt, those with the largest margin."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Only pairs without a side of more tokens: trainers cut longer ones, some of them at the end,
    where the two sides differ."""

    sample: int | None = Field(default=None, ge=1)
    """So many of the rows or pairs that are left, or all if there are fewer; which, `seed` says."""

    seed: int = 0
    """Decides what is random: other seeds choose other rows, the same seed the same."""

    splits: dict[str, float] = Field(default_factory=dict)
    """Shares of the rows by name, `train: 0.95`, `test: 0.05`, each in a folder of its name. All
    rows with one prompt are in one split."""

    shuffle: bool = False
    """Write the rows in an order that `seed` says, not in that of the inputs."""

    columns: Columns = Columns.INPUT
    """Which columns pairs are written in, those that `pairs` makes or rows that are pairs already:
    as they are stored, or what a trainer loads. What its layout has no form for is left out."""

    shard_rows: int = Field(default=100_000, ge=1)
    """Most rows in a shard, where rows are put into a new order or made into pairs."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.where is not None:
            # Arrow's parts for it take as long to import as all of `--help`.
            from batch_scorer.inputs.where import where_of

            where_of(self.where)
        if (self.best or self.worst) and not self.group_by:
            raise ValueError("best and worst are of a group: name it with group_by")
        if self.quantiles and not 0 <= self.quantiles[0] <= self.quantiles[1] <= 1:
            raise ValueError("quantiles: two shares from 0 to 1, the lower first")
        if any(not 0 < percent <= 100 for percent in self.top_percent.values()):
            raise ValueError("top_percent: more than 0 and at most 100")
        if self.pairs and (self.best or self.worst or self.top_percent):
            raise ValueError("pairs are chosen by their own rule: leave out best and top_percent")
        if self.pairs and self.group_by and PROMPT not in self.group_by:
            raise ValueError("pairs are of one prompt: name it in group_by too, or leave that out")
        for name in ("max_tokens", "pairs_per_prompt"):
            if name in self.model_fields_set and not self.pairs:
                raise ValueError(f"{name} is of pairs that are made: name their rule with pairs")
        for name in self.splits:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
                raise ValueError(f"splits: {name!r} is no name of a folder")
        if any(share <= 0 for share in self.splits.values()):
            raise ValueError("splits: shares are more than 0")
        if self.splits and abs(sum(self.splits.values()) - 1) > 1e-9:
            raise ValueError("splits: the shares add up to 1")
        return self

    @property
    def lays_out(self) -> bool:
        """Whether rows that are pairs are written in a trainer's columns."""
        return self.pairs is None and self.columns is not Columns.INPUT

    @property
    def needs_value(self) -> bool:
        """Whether some step compares the rows' values."""
        steps = (self.quantiles, self.best, self.worst, self.top_percent)
        return any(steps) or self.by is not None or self.above_margin is not None

    @property
    def reorders(self) -> bool:
        """Whether rows are written elsewhere than beside their neighbours in the inputs."""
        return self.shuffle or self.pairs is not None

    def to_json(self) -> dict[str, Any]:
        """What the record of the output keeps: the fields that are not left at their defaults."""
        found: dict[str, Any] = json.loads(self.model_dump_json(exclude_defaults=True))
        return found
