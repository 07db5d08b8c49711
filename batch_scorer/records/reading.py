"""Records as they are read back: JSON that anybody may have damaged, into the types it stands for.

One reader for all of them, so that a record of any other shape is one error that says what is wrong
with it, and no dictionary is looked into before.
"""

import json
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from batch_scorer.storage import ObjectInfo, Store, printable

T = TypeVar("T")

_WHOLE_BITS = 63
_DIGITS = bytes.maketrans(b"123456789", b"000000000")
"""All digits as one, for `bytes.translate`."""
_MANY = b"0" * 19
"""As many digits as the smallest number of more bits has."""
_MOST_CHARACTERS = 100
"""Of a record's text that a message quotes."""


def parsed(data: str | bytes, shape: type[T]) -> T:
    """The value of this type that a JSON text holds: a dataclass, or a dict or list of such.

    Keys that the type does not have are passed over. Raises ValueError, in one line, for what is no
    JSON or of another shape, and for a whole number of more than 63 bits, which no count is.
    """
    try:
        if _has_many_digits(data):
            json.loads(data, parse_int=_whole)
        reader = _reader(shape)  # type: ignore[arg-type]  # a type can be a key
        value: T = reader.validate_json(data, strict=True)
        return value
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"{place}: {first['msg']}" if place else first["msg"]
        if first["type"] == "json_invalid":
            problem = f"no JSON: {first['ctx']['error']}"
    except RecursionError:
        problem = "lists and objects lie too deep in each other"
    except ValueError as error:
        problem = f"no JSON: {error}"
    raise ValueError(printable(problem)[:_MOST_CHARACTERS])


def read_record(store: Store, key: str, shape: type[T]) -> T:
    """A record of this type. Raises ObjectMissing and ObjectDamaged, which names the record."""
    return read_record_with_info(store, key, shape)[0]


def read_record_with_info(store: Store, key: str, shape: type[T]) -> tuple[T, ObjectInfo]:
    """The same, and the version that was read."""
    return store.read_parsed(key, lambda data: parsed(data, shape))


def read_lines(store: Store, key: str, shape: type[T]) -> list[T]:
    """A record with a value of this type in each line; raises as `read_record`."""
    return store.read_parsed(key, lambda data: [parsed(x, shape) for x in data.splitlines()])[0]


def _has_many_digits(data: str | bytes) -> bool:
    """Whether any number may be too large; few records have so many digits in a row anywhere."""
    text = data.encode(errors="replace") if isinstance(data, str) else data
    return _MANY in text.translate(_DIGITS)


def _whole(digits: str) -> int:
    number = int(digits)
    if number.bit_length() > _WHOLE_BITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return number


_reader = lru_cache(maxsize=64)(TypeAdapter[Any])
