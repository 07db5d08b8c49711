"""Are a row's token ids those of the model's own code, taken from the raw row? And if not: why.

Two roads lead from a row to ids: the product's (`inputs`, `formats`, `render`) and the gate's
(`raw_rows`, `raw_sequences`, `backends.plain_tokenizer`). They have to meet, or a recorded setting
has to be the reason.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from batch_scorer.errors import ParityError, RowNote
from batch_scorer.parity.raw_sequences import RawSequence
from batch_scorer.records import Conversation, Message, RowError, SequenceInput

if TYPE_CHECKING:
    from batch_scorer.backends.plain_tokenizer import PlainIds, PlainTokenizer

_TOKENS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One row from both roads: as its file has it, and as the product read it.

    `name` is its file and number. `raw`, `parsed`, `ids` and `truncated` have one item for each of
    its sequences; `ids` is empty, and nothing is compared, for one that is marked. `answer_starts`
    are the tokens before the answer, where the model asks for that.
    """

    name: str
    raw: Sequence[RawSequence | None]
    parsed: Sequence[SequenceInput | RowError]
    arguments: Mapping[str, Any]
    ids: Sequence[list[int]]
    truncated: Sequence[int]
    notes: Collection[RowNote]
    answer_starts: Sequence[int] | None = None


def compare_rows(plain: "PlainTokenizer", rows: Iterable[ComparedRow]) -> dict[str, int]:
    """How many sequences differ from transformers' own call, by the setting that is why.

    Raises ParityError where no setting is: it names the row and what differs.
    """
    used: Counter[str] = Counter()
    for row in rows:
        if len(row.raw) != len(row.parsed):
            raise ParityError(
                f"{row.name}: {len(row.parsed)} sequences are scored, the row has {len(row.raw)}"
            )
        for place, ids in enumerate(row.ids):
            if ids:
                used.update(_settings_of(plain, row, place))
    return dict(used)


def _settings_of(plain: "PlainTokenizer", row: ComparedRow, place: int) -> tuple[str, ...]:
    """The settings by which one sequence's ids differ from transformers' call."""
    raw, ids = row.raw[place], row.ids[place]
    if raw is None:
        raise ParityError(f"{row.name}: sequence {place + 1} is scored, but the row has none there")
    wanted: list[int] | None = None
    refused = ""
    # A note is the row's: of two sides one may be renamed or joined, and the other not.
    for notes in ([], row.notes) if row.notes else ([],):
        try:
            there = _token_ids(plain, row, place, notes)
        except Exception as error:  # a template may raise anything
            refused = refused or str(error)
            continue
        if same_ids(ids, there.ids, row.truncated[place]):
            if row.answer_starts is not None and not row.truncated[place]:
                _check_answer(plain, row, place, notes)
            return there.settings
        wanted = there.ids
    if wanted is None:
        raise ParityError(
            f"{row.name}: the chat template refuses the row as its file has it: {refused}"
        )
    raise ParityError(
        f"{row.name}: token ids are not those of the tokenizer's own call on the row: "
        + _difference(plain, row, place, wanted)
    )


def _token_ids(
    plain: "PlainTokenizer", row: ComparedRow, place: int, notes: Collection[RowNote]
) -> "PlainIds":
    """The ids that transformers' call gives for one sequence."""
    raw = row.raw[place]
    assert raw is not None
    beside = _beside(plain, row, place)
    return plain.token_ids(raw.content, raw.arguments, raw.steps, notes, beside)


def _beside(plain: "PlainTokenizer", row: ComparedRow, place: int) -> str | Message | None:
    """What the model reads beside one sequence: of the row, or the row's other answer."""
    raw = row.raw[place]
    assert raw is not None
    if not (plain.compares and _is_conversation(raw.content)):
        return raw.beside
    if len(row.raw) != 2 or (other := row.raw[1 - place]) is None:
        raise ParityError(f"{row.name}: two answers are compared, and the row has another number")
    return cast(Conversation, other.content)[-1]


def _check_answer(
    plain: "PlainTokenizer", row: ComparedRow, place: int, notes: Collection[RowNote]
) -> None:
    """Raise ParityError where the answer's tokens are not those of the row's answer."""
    raw, ids = row.raw[place], row.ids[place]
    assert raw is not None and row.answer_starts is not None
    start = row.answer_starts[place]
    problem = plain.answer_problem(
        raw.content, raw.prompt, raw.arguments, raw.steps, notes, ids, start
    )
    if problem:
        around = [plain.visible(part) for part in (ids[max(0, start - 3) : start], ids[start:])]
        raise ParityError(
            f"{row.name}: the answer is taken to begin behind {around[0]!r}, with "
            f"{around[1][:40]!r}: {problem}"
        )


def same_ids(ids: list[int], wanted: list[int], truncated: int) -> bool:
    """Whether the ids are the wanted ones, `truncated` of them cut out in one place."""
    if not truncated:
        return ids == wanted
    same = 0
    while same < len(ids) and ids[same] == wanted[same]:
        same += 1
    return len(wanted) - len(ids) == truncated and ids[same:] == wanted[same + truncated :]


# What differs, in words


def _difference(plain: "PlainTokenizer", row: ComparedRow, place: int, wanted: list[int]) -> str:
    raw, parsed, ids = row.raw[place], row.parsed[place], row.ids[place]
    assert raw is not None
    return (
        _of_sides(plain, row, place)
        or _of_content(raw, parsed, row.arguments)
        or _of_ends("BOS", plain.bos_id, ids, wanted)
        or _of_ends("EOS", plain.eos_id, ids[::-1], wanted[::-1])
        or _of_date(plain, row, place)
        or _first_token(plain, ids, wanted)
    )


def _of_content(
    raw: RawSequence, parsed: SequenceInput | RowError, arguments: Mapping[str, Any]
) -> str | None:
    """What the product's reading of the row lacks or has changed."""
    if raw.unmasked is not None and parsed == raw.unmasked:
        return "the attention mask is ignored"
    if not (_is_conversation(raw.content) and _is_conversation(parsed)):
        return None
    own, theirs = cast(Conversation, raw.content), cast(Conversation, parsed)
    if own[0]["role"] == "system" and theirs[0]["role"] != "system":
        return "the system turn is lost"
    if theirs[0]["role"] == "system" and own[0]["role"] != "system":
        return "a system turn is added"
    if len(own) != len(theirs):
        return f"the conversation has {len(theirs)} turns, {len(own)} in the row"
    for number, (message, read) in enumerate(zip(own, theirs, strict=True), start=1):
        if problem := _of_message(message, read):
            return f"message {number} {problem}"
    for name in {**raw.arguments, **arguments}:
        if name not in arguments:
            return f"it lacks the row's {name}"
        if name not in raw.arguments:
            return f"it has {name}, which the row has not"
        if raw.arguments[name] != arguments[name]:
            return f"it has another {name} than the row"
    return None


def _of_message(message: Message, read: Message) -> str | None:
    if message.get("role") != read.get("role"):
        return f"has the role {read.get('role')!r}, in the row it is {message.get('role')!r}"
    for name in message:
        if name not in read:
            return f"lacks {name}"
        if message[name] != read[name]:
            both = isinstance(message[name], list) and isinstance(read[name], list)
            lost = both and len(read[name]) < len(message[name])
            return f"lacks a part of {name}" if lost else f"has another {name}"
    return next(
        (f"has {name}, which the row has not" for name in read if name not in message), None
    )


def _of_sides(plain: "PlainTokenizer", row: ComparedRow, place: int) -> str | None:
    for other, raw in enumerate(row.raw):
        if raw is not None and other != place:
            there = _token_ids(plain, row, other, row.notes)
            if there.ids == row.ids[place]:
                return (
                    f"sequence {place + 1} of the row holds its sequence {other + 1}: swapped sides"
                )
    return None


def _of_ends(name: str, token: int | None, ids: list[int], wanted: list[int]) -> str | None:
    """`ids` and `wanted` begin at the end where the token is expected."""
    here, there = _run(ids, token), _run(wanted, token)
    if here == there or ids[here:] != wanted[there:]:
        return None
    if here > there:
        return f"{name} twice" if here > 1 else f"{name} is added"
    return f"{name} is lost"


def _run(ids: list[int], token: int | None) -> int:
    """How many ids at the start are this one."""
    return next((place for place, found in enumerate(ids) if found != token), len(ids))


def _of_date(plain: "PlainTokenizer", row: ComparedRow, place: int) -> str | None:
    raw, beside = row.raw[place], _beside(plain, row, place)
    if raw is None or not _is_conversation(raw.content):
        return None
    content = cast(Conversation, raw.content)
    is_elsewhere = plain.date_is_elsewhere(content, raw.arguments, row.ids[place], beside)
    return "the template's date is another than the recorded one" if is_elsewhere else None


def _first_token(plain: "PlainTokenizer", ids: list[int], wanted: list[int]) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b),
        min(len(ids), len(wanted)),
    )
    here, there = (
        plain.visible(part[max(0, place - 3) : place + _TOKENS_SHOWN]) for part in (ids, wanted)
    )
    return f"from token {place} on it is {here!r} here, {there!r} there"


def _is_conversation(content: object) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)
