"""Settings from a YAML file and arguments, and what is said of those that are wrong."""

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from batch_scorer.config.settings import PLACES, Config, PartialConfig, credentials_in
from batch_scorer.errors import ConfigError
from batch_scorer.yaml_file import read_yaml

_ON_DISK = tuple(name for name in PLACES if name not in ("ray_address", "endpoint"))
"""The settings that may be paths."""
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}")

C = TypeVar("C", bound=Config)


def expanded(path: str | Path) -> str:
    """A path or URL as it is used and recorded: `~` is the home folder, `${NAME}` a variable of the
    environment, `$${` the two characters `${`.

    Raises ConfigError for a variable that is not set.
    """

    def value(found: re.Match[str]) -> str:
        if (name := found[1]) is None:
            return "${"
        if name not in os.environ:
            raise ConfigError(
                f"{path}: the environment has no variable {name!r}; write $${{ for the characters "
                "themselves"
            )
        return os.environ[name]

    text = _VARIABLE.sub(value, str(path))
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def load_config(path: str | Path | None = None, **settings: Any) -> Config:
    """A config from a YAML file, with `settings` on top; `None` settings count as not given.

    Paths may be `Path` or text, with `~` and `${NAME}` (`expanded`).
    Raises ConfigError with one line per wrong field; an unknown key gets a suggestion.
    """
    return _load(Config, _settings(path, settings, elsewhere=False), ())


def load_partial_config(
    path: str | Path | None = None,
    *,
    needs: Collection[str] = (),
    elsewhere: bool = False,
    **settings: Any,
) -> PartialConfig:
    """The same, where only `needs` have to be given of model, inputs and output.

    With `elsewhere` the settings are another machine's, whose home folder and variables are not
    known here: paths are left as they are.
    """
    return _load(PartialConfig, _settings(path, settings, elsewhere=elsewhere), needs)


def completed(config: PartialConfig) -> Config:
    """The same with all that scoring needs; raises ConfigError naming what is missing."""
    return _load(Config, config.model_dump(exclude_unset=True), ())


_MOST_QUOTED = 200


def _settings(
    path: str | Path | None, settings: Mapping[str, Any], *, elsewhere: bool
) -> dict[str, Any]:
    values = {}
    if path is not None:
        values = read_yaml(Path(expanded(path)))
        # Also what a flag replaces: the whole file may be sent to a cluster.
        if lines := credentials_in(values):
            raise ConfigError("\n".join(f"{path}: {line}" for line in lines))
    values.update({name: value for name, value in settings.items() if value is not None})
    wrong = []
    for name in () if elsewhere else values.keys() & set(_ON_DISK):
        try:
            expand = _expanded_models if name == "model" else _expanded_all
            values[name] = expand(values[name])
        except ConfigError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise ConfigError("\n".join(sorted(wrong)))
    if isinstance(values.get("inputs"), str):
        values["inputs"] = (values["inputs"],)
    # YAML 1.1 reads a bare `off` as false.
    if values.get("parity_check") is False:
        values["parity_check"] = "off"
    return values


def _expanded_models(value: Any) -> Any:
    """The same of `model`: of several, what is a path among the settings of each."""
    if not isinstance(value, Mapping):
        return _expanded_all(value)
    return {
        name: {k: _expanded_all(v) if k in _ON_DISK else v for k, v in own.items()}
        if isinstance(own, Mapping)
        else _expanded_all(own)
        for name, own in value.items()
    }


def _expanded_all(value: Any) -> Any:
    """Every path in a setting `expanded`; what is none is left for the model to refuse."""
    if isinstance(value, Mapping):
        return {name: _expanded_all(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_expanded_all, value))
    return expanded(value) if isinstance(value, str | Path) else value


def _load(kind: type[C], values: dict[str, Any], needs: Collection[str]) -> C:
    lines = [_missing(name) for name in needs if not values.get(name)]
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(lines + _explain(error))) from None
    if lines:
        raise ConfigError("\n".join(lines))
    return config


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}…"


def _missing(name: str) -> str:
    return f"`{name}` is needed"


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        # Of a list without its place: the value is shown, and flags have no places.
        name = ".".join(part for part in problem["loc"] if isinstance(part, str))
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, Config.model_fields, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            lines.append(f"unknown setting `{name}`{hint}")
        elif problem["type"] == "missing":
            lines.append(_missing(name))
        else:
            # What stands wrongly among a store's options may be a secret.
            is_shown = name and not name.startswith("store_options")
            given = f" (got {_quoted(problem['input'])})" if is_shown else ""
            message = problem["msg"].removeprefix("Value error, ")  # pydantic's, before ours
            lines.append(f"{name + ': ' if name else ''}{message}{given}")
    return lines
