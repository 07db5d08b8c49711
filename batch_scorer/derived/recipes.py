"""A recipe is what a derived output is asked for: one object for flags, YAML and Python."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from batch_scorer.errors import ConfigError
from batch_scorer.yaml_file import read_yaml

R = TypeVar("R", bound=BaseModel)


def load_recipe(kind: type[R], file: Path | None = None, **settings: Any) -> R:
    """The recipe in a YAML file, and `settings` on top of it; None leaves the file's value.

    Raises ConfigError that names what is wrong.
    """
    values = {} if file is None else read_yaml(file)
    given = {name: value for name, value in settings.items() if value is not None}
    try:
        return kind(**{**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")  # pydantic's, before ours
        raise ConfigError(f"{name}: {message}" if name else message) from None
