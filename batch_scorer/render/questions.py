"""Rows to questions: what a judge is asked about the answers of each row. Pure functions.

Legend: R rows, S responses, Q questions.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from batch_scorer.errors import ConfigError, RowReason
from batch_scorer.formats.kinds import role_alias
from batch_scorer.judges.page import Page
from batch_scorer.records import (
    Conversation,
    Message,
    ParsedRows,
    Questions,
    RowError,
    TokenizedRows,
)
from batch_scorer.render import messages
from batch_scorer.render.bounded import compiled, syntax_problem

IntArray = npt.NDArray[np.int64]

_LEAST_FENCE = 3
_BACKTICKS = re.compile("`+")
_CRITERION_KEYS = ("criterion", "description", "text", "title")
_WEIGHT_KEYS = ("weight", "points")


@dataclass(frozen=True, slots=True)
class Criterion:
    """One criterion of a rubric. A negative weight is for what an answer should not do."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Ask:
    """One question before it is worded: the answers that it shows, by their places in the row."""

    shown: tuple[int, ...]
    criterion: int = -1
    verdicts: int = 1


@dataclass(frozen=True, slots=True)
class _Row:
    """What the questions about one row are made of. `prompts` and `answers` are texts, `turns` the
    messages before an answer, all by the answer's place in the row; `errors` are of single answers
    that no question is asked about."""

    turns: dict[int, Conversation]
    prompts: dict[int, str]
    answers: dict[int, str]
    columns: dict[str, str]
    criteria: list[Criterion]
    errors: dict[int, RowError]

    @property
    def texts(self) -> Iterator[str]:
        """All that the row brings into a question."""
        yield from dict.fromkeys(self.prompts.values())  # mostly one
        yield from self.answers.values()
        yield from self.columns.values()
        yield from (criterion.text for criterion in self.criteria)


def ask(parsed: ParsedRows, page: Page, reasoning: str) -> tuple[ParsedRows, Questions]:
    """The questions of all rows as conversations to render, and what they are about.

    `parsed` has the responses as whole conversations, and `page.read_columns` among its fields;
    `reasoning` is the setting. An answer that cannot be read keeps its error, which is its score's,
    and so does one that no question can be asked about.
    """
    sequences: list[Any] = []
    offsets, shown, shown_offsets = [0], [], [0]
    criteria, verdicts = [], []
    errors: dict[int, RowError] = {}
    characters = np.zeros(len(parsed.sequences), np.int64)
    row_errors = dict(parsed.row_errors)
    weights: dict[int, tuple[float, ...]] = {}
    bounds = parsed.row_offsets.tolist()
    for row, (start, stop) in enumerate(pairwise(bounds)):
        if row not in row_errors:
            found = _row_of(
                parsed.sequences[start:stop],
                page,
                {name: values[row] for name, values in parsed.fields.items()},
                reasoning,
            )
            if isinstance(found, RowError):
                row_errors[row] = found
            else:
                errors |= {start + place: error for place, error in found.errors.items()}
                for place, answer in found.answers.items():
                    characters[start + place] = len(answer)
                weights[row] = tuple(criterion.weight for criterion in found.criteria)
                fence = _fence(found)
                for asked in _asks(found, page):
                    sequences.append(_worded(found, asked, page, fence))
                    shown += [start + place for place in asked.shown]
                    shown_offsets.append(len(shown))
                    criteria.append(asked.criterion)
                    verdicts.append(asked.verdicts)
        offsets.append(len(sequences))
    votes = page.votes
    questions = Questions(
        response_offsets=parsed.row_offsets,
        response_errors=errors,
        characters=characters,
        shown=np.array(shown, np.int64),
        shown_offsets=np.array(shown_offsets, np.int64),
        criteria=np.array(criteria, np.int64),
        votes=np.zeros(len(criteria), np.int64),
        verdicts=np.array(verdicts, np.int64),
        weights={row: found for row, found in weights.items() if found},
    )
    rows = ParsedRows(sequences, np.array(offsets, np.int64), dict(sorted(row_errors.items())))
    return (rows, questions) if votes == 1 else _repeated(rows, questions, votes)


def _repeated(asked: ParsedRows, questions: Questions, votes: int) -> tuple[ParsedRows, Questions]:
    """Every question as often as there are votes."""
    count = len(asked.sequences)
    again = np.repeat(np.arange(count), votes)
    sizes = np.diff(questions.shown_offsets)[again]
    starts = np.repeat(questions.shown_offsets[:-1][again], sizes)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return (
        ParsedRows(
            [asked.sequences[place] for place in again.tolist()],
            asked.row_offsets * votes,
            asked.row_errors,
        ),
        Questions(
            response_offsets=questions.response_offsets,
            response_errors=questions.response_errors,
            characters=questions.characters,
            shown=questions.shown[starts + within],
            shown_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            criteria=questions.criteria[again],
            votes=np.tile(np.arange(votes), count),
            verdicts=questions.verdicts[again],
            weights=questions.weights,
        ),
    )


def check_templates(page: Page) -> None:
    """Raise ConfigError for a message that is no template."""
    for number, message in enumerate(page.messages, start=1):
        if problem := syntax_problem(message.content):
            raise ConfigError(
                f"judge: {page.name}: message {number} is no Jinja template: {problem}"
            )


def seeds_of(rows: TokenizedRows, votes: IntArray, seed: int) -> IntArray:
    """int64[Q], at least 0: of each question's tokens and vote, so that its reply is the same
    wherever it is asked, and beside whatever other questions."""
    ids, size = rows.token_ids.tobytes(), rows.token_ids.itemsize
    bounds = (size * rows.sequence_offsets).tolist()
    return np.array(
        [
            xxhash.xxh3_64_intdigest(ids[start:stop], seed + vote) >> 2
            for (start, stop), vote in zip(pairwise(bounds), votes.tolist(), strict=True)
        ],
        np.int64,
    )


# What a row holds


def _row_of(
    sequences: Sequence[Any], page: Page, values: Mapping[str, Any], reasoning: str
) -> _Row | RowError:
    errors: dict[int, RowError] = {}
    talks: dict[int, Conversation] = {}
    for place, sequence in enumerate(sequences):
        if isinstance(sequence, RowError):
            errors[place] = sequence
        elif isinstance(sequence, list) and sequence and isinstance(sequence[0], dict):
            talks[place] = sequence
        else:
            return RowError(RowReason.BAD_STRUCTURE, "a judge reads conversations, not token ids")
    if page.mode in ("pairwise", "listwise"):
        first = next(iter(talks.values()), [])
        if any(talk[:-1] != first[:-1] for talk in talks.values()):
            return RowError(RowReason.NOT_A_PAIR, "the answers do not follow the same turns")
    if page.mode == "pairwise" and len(talks) == 1:
        # Where the other answers cannot be read, that is why this one has nothing to be compared
        # with: the row's reason is then the same as without a judge.
        alone = RowError(RowReason.NOT_A_PAIR, "there is no other answer to compare with")
        errors |= dict.fromkeys(talks, next(iter(errors.values()), alone))
        talks = {}
    columns: dict[str, str] = {}
    for name in page.columns:
        if values[name] is None:
            return RowError(RowReason.NULL_VALUE, f"{name} is null")
        columns[name] = _as_text(values[name])
    criteria: list[Criterion] | RowError = []
    if page.mode == "rubric":
        criteria = criteria_of(values[page.rubric], page.rubric)
    if isinstance(criteria, RowError):
        return criteria
    row = _Row(
        turns={place: talk[:-1] for place, talk in talks.items()},
        prompts={place: _prompt(talk[:-1]) for place, talk in talks.items()},
        answers={place: _answer(talk[-1], reasoning) for place, talk in talks.items()},
        columns=columns,
        criteria=criteria,
        errors=errors,
    )
    for text in row.texts if page.markers else ():
        if found := next((marker for marker in page.markers if marker in text), None):
            return RowError(RowReason.MARKER_IN_TEXT, f"a text of the row holds {found!r}")
    return row


def criteria_of(value: Any, name: str) -> list[Criterion] | RowError:
    """A rubric: a list of texts, or of objects with a text and perhaps a weight (also as JSON).

    BAD_RUBRIC where it is something else, holds nothing, or no weight is above zero.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return RowError(RowReason.BAD_RUBRIC, f"{name} is text, and no JSON")
    if not isinstance(value, list) or not value:
        return RowError(RowReason.BAD_RUBRIC, f"{name} is no list of criteria")
    found = [_criterion(item) for item in value]
    if any(criterion is None for criterion in found):
        return RowError(RowReason.BAD_RUBRIC, f"{name}: a criterion is no text with a weight")
    criteria = [criterion for criterion in found if criterion is not None]
    if not any(criterion.weight > 0 for criterion in criteria):
        return RowError(RowReason.BAD_RUBRIC, f"{name}: no criterion has a weight above 0")
    return criteria


def _criterion(item: Any) -> Criterion | None:
    if isinstance(item, str):
        return Criterion(item) if item.strip() else None
    if not isinstance(item, Mapping):
        return None
    texts = [item[key] for key in _CRITERION_KEYS if isinstance(item.get(key), str)]
    weight = next((item[key] for key in _WEIGHT_KEYS if item.get(key) is not None), 1.0)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (texts and texts[0].strip() and is_number and math.isfinite(weight)):
        return None
    return Criterion(texts[0], float(weight))


def _prompt(turns: Conversation) -> str:
    """The conversation before the answer: the user's text, or all turns with their roles."""
    if len(turns) == 1 and role_alias(turns[0]["role"]) == "user":
        return messages.joined_text(turns[0])
    return "\n\n".join(
        f"{role_alias(turn['role']).capitalize()}: {messages.joined_text(turn)}" for turn in turns
    )


def _answer(message: Message, reasoning: str) -> str:
    """The answer's text, with its reasoning as the setting says, and the calls that it makes."""
    if reasoning == "drop":
        message = messages.without_reasoning(message)
    text = (messages.whole_answer if reasoning == "keep" else messages.joined_text)(message)
    if calls := message.get("tool_calls"):
        text = f"{text}\n{json.dumps(calls, ensure_ascii=False)}".lstrip("\n")
    return text


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _fence(row: _Row) -> str:
    """Backticks, more of them than stand together anywhere in the row: no text of it can end what
    stands between two such lines."""
    runs = (len(run) for text in row.texts for run in _BACKTICKS.findall(text))
    return "`" * max(_LEAST_FENCE, 1 + max(runs, default=0))


# What is asked


def _asks(row: _Row, page: Page) -> Iterator[_Ask]:
    places = sorted(row.answers)
    if page.mode == "pairwise":
        for pair in combinations(places, 2):
            yield _Ask(pair)
            if page.orders == "both":
                yield _Ask(pair[::-1])
    elif page.mode == "listwise":
        if places:
            yield _Ask(tuple(places), verdicts=len(places))
    elif page.mode == "pointwise":
        yield from (_Ask((place,)) for place in places)
    elif page.criteria == "together":
        yield from (_Ask((place,), verdicts=len(row.criteria)) for place in places)
    else:
        for place in places:
            yield from (_Ask((place,), criterion) for criterion in range(len(row.criteria)))


def _worded(row: _Row, asked: _Ask, page: Page, fence: str) -> Conversation | RowError:
    """The question's messages. A text of the row goes in as it is, once: nothing in it is taken
    for a template."""
    first = asked.shown[0]
    shown = [row.answers[place] for place in asked.shown]
    given: dict[str, Any] = {
        **row.columns,
        "prompt": row.prompts[first],
        "turns": row.turns[first],
        "fence": fence,
    }
    match page.mode:
        case "pairwise":
            given |= {"response_a": shown[0], "response_b": shown[1]}
        case "listwise":
            given["responses"] = shown
        case _:
            given["response"] = shown[0]
    if page.mode == "rubric":
        texts = [criterion.text for criterion in row.criteria]
        together = asked.criterion < 0
        given |= {"criteria": texts} if together else {"criterion": texts[asked.criterion]}
    try:
        return [
            {"role": each.role, "content": compiled(each.content).render(given)}
            for each in page.messages
        ]
    except Exception as error:  # a template may raise anything
        return RowError(RowReason.TEMPLATE_ERROR, f"{type(error).__name__}: {error}"[:200])
