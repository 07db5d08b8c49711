"""Which rows cover what a job's rows hold. Pure: what is in a row, and which rows to take."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from batch_scorer.parity.raw_sequences import RawSequence

_USUAL = frozenset({"role", "content"})
_MANY_TURNS = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that could be compared: its part of the input and number there, its tokens, and what
    is in it (`traits_of`)."""

    part: int
    row: int
    tokens: int
    traits: frozenset[str]


def traits_of(sequences: Iterable[RawSequence | None]) -> frozenset[str]:
    """What a row has that another may not: fields of its messages, roles, the template's arguments,
    and how its text is written."""
    traits: set[str] = set()
    for sequence in sequences:
        if sequence is not None:
            traits |= _traits(sequence)
    return frozenset(traits)


def _traits(sequence: RawSequence) -> set[str]:
    content = sequence.content
    traits = set(sequence.arguments)
    traits |= {"attention mask"} if sequence.unmasked is not None else set()
    traits |= {"steps"} if sequence.steps is not None else set()
    if isinstance(content, str):
        return traits if content.isascii() else traits | {"non-ASCII text"}
    for message in content:
        if not isinstance(message, dict):
            return traits
        traits |= message.keys() - _USUAL
        traits.add(f"role {message.get('role')}")
        text = message.get("content")
        if not text:
            traits.add("empty turns")
        elif isinstance(text, list):
            traits.add("parts")
        elif not isinstance(text, str):
            traits.add("values as content")  # of a tool
        else:
            traits |= {"non-ASCII text"} if not text.isascii() else set()
            traits |= {"reasoning in text"} if "<think>" in text else set()
    if len(content) >= _MANY_TURNS:
        traits.add("several turns")
    return traits


def choose(candidates: Sequence[Candidate], count: int, max_tokens: int) -> list[Candidate]:
    """Some of the rows, shortest first: shortest, median and longest of all, then one for each
    trait, the rarest first, then the lengths between; all while they fit `max_tokens`, but for
    the first three.
    """
    ordered = sorted(candidates, key=lambda each: (each.tokens, each.part, each.row))
    if not ordered:
        return []
    last = len(ordered) - 1
    chosen = {place: ordered[place] for place in (0, last, last // 2)}
    rarity = Counter(trait for each in ordered for trait in each.traits)
    covered = frozenset[str]().union(*(each.traits for each in chosen.values()))
    wanted: list[int] = []
    for trait, _ in sorted(rarity.items(), key=lambda item: (item[1], item[0])):
        if trait not in covered:
            place = next(i for i, each in enumerate(ordered) if trait in each.traits)
            wanted.append(place)
            covered |= ordered[place].traits
    wanted += np.linspace(0, last, count).astype(int).tolist()
    spent = 0
    for place in dict.fromkeys(wanted):
        tokens = ordered[place].tokens
        if place not in chosen and len(chosen) < count and spent + tokens <= max_tokens:
            chosen[place] = ordered[place]
            spent += tokens
    return [chosen[place] for place in sorted(chosen)]
