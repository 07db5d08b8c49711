"""The settings of one reward function."""

import json
from typing import Annotated, Any, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

PARAMETERS = ("prompts", "responses")
"""What a function can ask for beside columns of the rows."""


class RewardSettings(BaseModel):
    """A function and how it is called. Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    function: str = Field(min_length=1)
    """`module:function`, `path/to/file.py:function`, or the name of one that is shipped."""

    arguments: dict[str, Any] = {}
    """Arguments of the function by name."""

    columns: dict[str, str] = {}
    """Parameters of the function by name → the column of the rows that each is filled from, where
    that has another name."""

    timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds that a call may take."""

    attempts: int = Field(default=1, gt=0)
    """How often a batch is tried before it is halved; more than 1 for a function that asks a
    service."""

    per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most responses in a minute, of the whole job. Default: no limit."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        try:
            json.dumps(self.arguments, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"arguments: not JSON values: {error}") from None
        for name in (*self.arguments, *self.columns):
            if name in PARAMETERS:
                raise ValueError(f"{name}: is what the function is asked about, so leave it out")
        if both := self.arguments.keys() & self.columns.keys():
            raise ValueError(f"{', '.join(sorted(both))}: an argument and a column")
        return self


def _from_text(given: Any) -> Any:
    return {"function": given} if isinstance(given, str) else given


RewardEntry: TypeAlias = Annotated[
    RewardSettings,
    BeforeValidator(_from_text),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1}, RewardSettings.model_json_schema()]}
    ),
]
"""A reward function as settings name it: its function alone, or with what else is set."""
