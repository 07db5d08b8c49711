"""What a case of the corpus is: something odd beside two healthy files, and what becomes of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """`make` puts it into the folder of inputs. Of all but the healthy files: how many rows are
    `scored`, how many are `marked` by each reason, and which files `failed`, by key, with the
    reason.

    `says` is a part of the one line with which a run ends that does nothing (exit code 2).
    """

    name: str
    make: Make
    scored: int = 0
    marked: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[object, ...] = ()
    says: str | None = None

    @property
    def exit_code(self) -> int:
        if self.says is not None:
            return 2
        return 3 if self.failed else 0


def file_case(
    name: str,
    key: str,
    data: bytes | Callable[[], bytes],
    scored: int = 0,
    *,
    failed: str | None = None,
    marked: Mapping[str, int] | None = None,
    flags: tuple[object, ...] = (),
) -> Case:
    """A case of one file, of that key."""

    def make(folder: Path) -> None:
        place = folder / key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data if isinstance(data, bytes) else data())

    return Case(name, make, scored, marked or {}, {key: failed} if failed else {}, flags)


def asks(count: int, **more: Any) -> list[Row]:
    """Rows of a prompt and a response, both texts; all differ."""
    return [
        {"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}.", **more}
        for i in range(count)
    ]


def lines(rows: list[Any], end: str = "\n") -> bytes:
    """JSON Lines of these values."""
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()
