"""What `decontaminate` is asked for: one recipe for flags, YAML and Python."""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

ITSELF = "self"
"""In place of evaluation files: the rows are compared with each other."""


class Preset(StrEnum):
    """A rule in use, by name; see `Decontamination.preset`."""

    GPT3 = "gpt3"
    TULU3 = "tulu3"


class Match(StrEnum):
    """When a row counts as one of an entry's; see `Decontamination.match`."""

    NGRAM = "ngram"
    EXACT = "exact"
    NEAR = "near"
    EMBEDDING = "embedding"


class Scope(StrEnum):
    """Which texts are compared; see `Decontamination.scope`."""

    PROMPT = "prompt"
    CONVERSATION = "conversation"


_PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    Preset.GPT3: {"match": Match.NGRAM, "words": 13, "overlap": 0.0},
    Preset.TULU3: {"match": Match.NGRAM, "words": 8, "overlap": 0.5},
}


class Decontamination(BaseModel):
    """Which rows are left out. A row is left out only where a match was found and checked word by
    word; rows and entries without text match nothing, and are counted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preset: Preset | None = None
    """What stands in `match`, `words` and `overlap` unless they are given. `gpt3`: one run of 13
    words; `tulu3`: runs of 8 words over more than half of an entry."""

    match: Match = Match.NGRAM
    """`ngram`: so many words in a row are the same (an entry that has fewer is compared whole);
    `exact`: all words are; `near`: the sets of three words in a row are alike, found by MinHash;
    `embedding`: embeddings of
    `score --task embed` are close by cosine, and the evaluation sets are such outputs too. Rows are
    compared with each other by all but `ngram`."""

    words: int = Field(13, ge=1)
    """The words in a row of `ngram`."""

    overlap: float = Field(0.0, ge=0.0, lt=1.0)
    """The n-grams that a row shares with an entry must cover more than this share of the entry's
    words; 0: one n-gram is enough."""

    threshold: float = Field(0.8, gt=0.0, le=1.0)
    """The least Jaccard similarity of `near`; MinHash may miss a pair that is close to it. The
    least cosine of `embedding`, which has to be given: what is close depends on the model."""

    scope: Scope = Scope.PROMPT
    """`prompt`: what users say before the answer; `conversation`: every message of a sequence."""

    prompt_column: str | None = None
    """The rows' column of prompts, text or messages. Default: found as for scoring."""

    against_column: str | None = None
    """The same of the evaluation files."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        name = values.get("preset")
        return values if name not in list(Preset) else {**_PRESETS[Preset(name)], **values}

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.match is Match.EMBEDDING and "threshold" not in self.model_fields_set:
            raise ValueError("threshold: needed with embedding; what is close depends on the model")
        return self

    def to_json(self) -> dict[str, Any]:
        """What the record of the output keeps: all fields."""
        found: dict[str, Any] = json.loads(self.model_dump_json())
        return found
