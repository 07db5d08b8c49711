"""A judge's page: what a language model is asked about the answers of a row, and what its verdict
is worth.

A page is a YAML file. Those of `judges/pages` are known by their names, others by their paths.
"""

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batch_scorer.errors import ConfigError
from batch_scorer.judges.pattern import pattern_problem
from batch_scorer.records.digest import digest_of
from batch_scorer.yaml_file import read_yaml

Mode = Literal["pointwise", "pairwise", "listwise", "rubric"]

_PAGES = files("batch_scorer.judges") / "pages"
_SUFFIX = ".yaml"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PageMessage(_Part):
    """One message of the question, its content a Jinja template (`render.questions`)."""

    role: Literal["system", "user", "assistant", "response_1", "response_2"]
    """`response_1` and `response_2` are roles of the chat templates of Nemotron's judges."""

    content: str = Field(min_length=1)


class VerdictRule(_Part):
    """How a verdict is read, and what it is worth.

    A grade is a number. In a pairwise question it is that of the answer that stands first: 1 where
    the verdict is for it, 0 where it is for the other one, 0.5 for a tie.
    """

    by: Literal["probability", "pattern", "json"]
    """`probability`: of the tokens that could come next, without generating any. `pattern`: a
    regular expression finds it in the reply. `json`: the reply is a JSON object."""

    choices: dict[str, float] = Field(default={})
    """What the judge may write → its worth: `{"Yes": 1, "No": 0}`, in quotes, for YAML reads Yes
    as true and 1 as a number."""

    low: float | None = None
    """The lowest grade that the judge may give as a number."""

    high: float | None = None
    """The highest one."""

    least_mass: float = Field(default=0.5, ge=0, lt=1)
    """Of `probability`: how probable the choices have to be together. Below it the model would have
    written something else, and there is no verdict."""

    pattern: str | None = None
    """Of `pattern`: the regular expression, in RE2's syntax. Its last match counts, and of that its
    first group. For several verdicts the group holds a list: commas, blanks, line feeds or `>`
    stand between them."""

    key: str = "verdict"
    """Of `json`: the object's key that holds the verdict, or the list or object of verdicts."""

    ranks: bool = False
    """The verdicts are places, 1 for the best answer; their worth is 1 for the first place and 0
    for the last. For listwise questions, without choices and range. `3, 1, 2` are the places of the
    answers in the order that they were shown, found by a pattern or held by a JSON list: the second
    answer is the best. `3 > 1 > 2`, which only a pattern can find, are the answers' numbers from
    the best one to the worst: the third answer is the best."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        has_range = self.low is not None and self.high is not None
        if (self.low is None) != (self.high is None) or (
            self.low is not None and self.high is not None and not self.low < self.high
        ):
            raise ValueError("low and high go together, and low is the lower one")
        if self.by == "probability" and (len(self.choices) < 2 or has_range or self.ranks):
            raise ValueError(
                "by probability needs two choices or more, and neither range nor ranks"
            )
        worth = [*self.choices.values(), self.low, self.high]
        if not all(value is None or math.isfinite(value) for value in worth):
            raise ValueError("what verdicts are worth has to be finite")
        if not (self.choices or has_range or self.ranks):
            raise ValueError("needs choices, or low and high, or ranks")
        if self.ranks and (self.choices or has_range):
            raise ValueError("ranks have neither choices nor a range")
        if (self.by == "pattern") != (self.pattern is not None):
            raise ValueError("pattern belongs to `by: pattern`")
        if self.pattern is not None and (problem := pattern_problem(self.pattern)):
            raise ValueError(f"pattern: {problem}")
        return self


class Generation(_Part):
    """How a judge that writes its verdict is sampled."""

    max_tokens: int = Field(default=1024, gt=0)
    """Most tokens of the answer."""

    thinking_tokens: int = Field(default=0, ge=0)
    """Most tokens of a think block before the answer, beyond `max_tokens`; 0: there is none."""

    closing: str = ""
    """Put behind the critique, after which the judge writes its verdict in `verdict_tokens`: so a
    long critique leaves room for it. What stands before it is not searched for a verdict."""

    verdict_tokens: int = Field(default=16, gt=0)
    """Most tokens behind `closing`."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""

    retries: int = Field(default=2, ge=0, le=20)
    """How often a judge that samples is asked again, with another seed, for lack of a verdict."""

    @property
    def most_tokens(self) -> int:
        """Most tokens that a reply may have."""
        closing = self.verdict_tokens if self.closing else 0
        return self.thinking_tokens + self.max_tokens + closing


class Page(_Part):
    """All of a page. Field by field it enters the fingerprint (`digest`)."""

    name: str = ""
    """The file's name."""

    about: str = Field(min_length=1)
    """What it is for, in a sentence."""

    source: str = ""
    """Where its roles and its reply's form are published."""

    mode: Mode
    """`pointwise`: a question about each answer. `pairwise`: about two. `listwise`: about all of a
    row. `rubric`: about each answer by the row's criteria."""

    criteria: Literal["each", "together"] = "each"
    """Of a rubric: a question for each criterion, or one with all of them."""

    messages: tuple[PageMessage, ...] = Field(min_length=1)
    """The question. Templates may use `prompt` (the conversation before the answer), `turns` (the
    same as a list), `response`, or `response_a` and `response_b`, or `responses`; `criterion` or
    `criteria`; `fence`; and the `columns` by their names."""

    begins: str = ""
    """What the judge's reply begins with, written for it."""

    columns: tuple[str, ...] = ()
    """More columns of the row that the messages use."""

    rubric: str = "rubric"
    """The column with a row's criteria."""

    markers: tuple[str, ...] = ()
    """Texts that tell the parts of the question apart, where `fence` does not. An answer that holds
    one could speak as the judge's instructions: its row is marked."""

    verdict: VerdictRule
    generation: Generation = Generation()

    orders: Literal["both", "one"] = "both"
    """Pairwise: whether each answer stands first once."""

    inconsistent: Literal["mean", "tie", "null"] = "mean"
    """Pairwise: what becomes of two orders that prefer different answers. `mean`: the mean of both
    grades. `tie`: both answers get 0.5. `null`: no score."""

    votes: int = Field(default=1, gt=0, le=64)
    """How often each question is asked."""

    combine: Literal["mean", "majority"] = "mean"
    """What becomes of several votes."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.messages[-1].role in ("system", "assistant"):
            raise ValueError("the last message is the user's")
        by_probability = self.verdict.by == "probability"
        if by_probability and self.votes > 1:
            raise ValueError("votes: a probability is the same every time; leave votes out")
        if self.votes > 1 and not self.generation.temperature:
            raise ValueError("votes: without a temperature all of them are the same")
        if by_probability and self.asks_for_several:
            raise ValueError("by probability a question has one verdict; ask about one at a time")
        if self.verdict.ranks and self.mode != "listwise":
            raise ValueError("ranks: only of listwise questions")
        if self.mode == "pairwise":
            worth = [*self.verdict.choices.values(), self.verdict.low, self.verdict.high]
            if not all(value is None or 0 <= value <= 1 for value in worth):
                raise ValueError("a pairwise verdict is worth 0 to 1, for the answer shown first")
        if set(self.columns) & RESERVED:
            raise ValueError(f"columns: {', '.join(sorted(RESERVED))} are taken")
        return self

    @property
    def asks_for_several(self) -> bool:
        """Whether one reply holds several verdicts."""
        return self.mode == "listwise" or (self.mode == "rubric" and self.criteria == "together")

    @property
    def generates(self) -> bool:
        """Whether the judge writes a reply."""
        return self.verdict.by != "probability"

    @property
    def samples(self) -> bool:
        """Whether the judge's reply depends on a seed."""
        return self.generates and self.generation.temperature > 0

    @property
    def read_columns(self) -> tuple[str, ...]:
        """The columns of a row that the questions read beside the conversation."""
        return (*self.columns, *([self.rubric] if self.mode == "rubric" else ()))

    @property
    def digest(self) -> str:
        """Of all that can change a verdict."""
        return digest_of(self.model_dump(mode="json", exclude={"name", "about", "source"}))


JUDGEMENTS = "judgements"
"""The column that has what became of each question of a row."""
CONSISTENCY = "consistency"
"""The column that says whether the orders of a row's comparisons agree."""


def judge_columns(page: Page) -> tuple[str, ...]:
    """The columns that a judge adds beside the scores."""
    return (JUDGEMENTS, CONSISTENCY) if page.mode == "pairwise" else (JUDGEMENTS,)


RESERVED = frozenset(
    {
        *("prompt", "turns", "response", "responses", "response_a", "response_b"),
        *("criterion", "criteria", "fence"),
    }
)
"""The names that a page's templates have beside its columns."""


def shipped_pages() -> list[str]:
    """The names of the pages that come with this package."""
    names = (entry.name for entry in _PAGES.iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def load_page(name: str) -> Page:
    """The page of this name, or in the file of this path. Raises ConfigError."""
    if name in shipped_pages():
        path = Path(str(_PAGES / f"{name}{_SUFFIX}"))
    elif name.endswith((_SUFFIX, ".yml")) or "/" in name:
        path = Path(name)
    else:
        raise ConfigError(
            f"judge: no page {name!r}; shipped are {', '.join(shipped_pages())}, another one is "
            "named by its path"
        )
    values = read_yaml(path)
    try:
        return Page(**{**values, "name": path.stem})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {place + ': ' if place else ''}{message}") from None


def may_guide(page: Page) -> bool:
    """Whether a reply can be held to a schema: it is JSON, and what the page puts before it leaves
    the whole object to the judge."""
    return page.verdict.by == "json" and "{" not in (page.generation.closing or page.begins)


def reply_schema(page: Page, count: int) -> str:
    """The JSON schema of a reply that holds `count` verdicts, as text, for engines that hold a
    reply to one. Their support of ranges differs, so what is read is checked again."""
    rule = page.verdict
    one: dict[str, Any] = {"type": "number"}
    if rule.choices:
        one = {"enum": list(rule.choices)}
    elif rule.ranks:
        one = {"type": "integer", "enum": list(range(1, count + 1))}
    elif rule.low is not None and rule.high is not None and _are_whole(rule.low, rule.high):
        one = {"type": "integer", "enum": list(range(int(rule.low), int(rule.high) + 1))}
    held: dict[str, Any] = one
    if page.mode == "listwise":
        held = {"type": "array", "items": one, "minItems": count, "maxItems": count}
    elif page.asks_for_several:
        names = [str(number) for number in range(1, count + 1)]
        held = {
            "type": "object",
            "properties": dict.fromkeys(names, one),
            "required": names,
            "additionalProperties": False,
        }
    schema = {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}, rule.key: held},
        "required": ["reasoning", rule.key],
        "additionalProperties": False,
    }
    return json.dumps(schema)


def _are_whole(*numbers: float) -> bool:
    return all(number == int(number) for number in numbers) and abs(numbers[1] - numbers[0]) < 1000
