"""Flags made from a recipe: one for every field, and `--recipe FILE`."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel

from batch_scorer.derived.recipes import load_recipe
from batch_scorer.errors import ConfigError

_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}

RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE", help="YAML file with such fields; flags go on top of it."
    ),
]


def with_recipe(
    kind: type[BaseModel],
    panels: Mapping[str, str],
    mappings: Mapping[str, tuple[str, str]] | None = None,
    lists: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give `command(recipe, **its own)` a flag for every field of this kind of recipe.

    `panels` are titles by the first field of each. `mappings` has flag and form of fields that are
    given an entry at a time, `lists` the form of those that are given all at once.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        def run(**values: Any) -> None:
            settings = {name: values[name] for name in kind.model_fields}
            for name, (flag, form) in (mappings or {}).items():
                settings[name] = entries(flag, form, settings[name])
            for name in lists or ():
                settings[name] = tuple(settings[name].split(",")) if settings[name] else None
            recipe = load_recipe(kind, values["recipe_file"], **settings)
            command(recipe, **{parameter.name: values[parameter.name] for parameter in own})

        parameters = [
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            _parameter("recipe_file", RecipeFile),
        ]
        panel = ""
        for name in kind.model_fields:
            panel = panels.get(name, panel)
            parameters.append(_flag(kind, name, panel, mappings or {}, lists or {}))
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        vars(run)["__signature__"] = inspect.Signature(parameters)  # Typer makes flags of it
        return run

    return decorate


def entries(flag: str, form: str, pairs: list[str] | None) -> dict[str, str] | None:
    """What a flag was given as KEY=VALUE, perhaps often; None without any."""
    if not pairs:
        return None
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ConfigError(f"{flag}: expected {form}, got {wrong[0]!r}")
    return dict(pair.rsplit("=", 1) for pair in pairs)


def _flag(
    recipe: type[BaseModel],
    name: str,
    panel: str,
    mappings: Mapping[str, tuple[str, str]],
    lists: Mapping[str, str],
) -> inspect.Parameter:
    annotation = recipe.model_fields[name].annotation
    kinds = [each for each in get_args(annotation) or (annotation,) if each]
    kind: Any = kinds[0]
    flag, metavar = f"--{name.replace('_', '-')}", _METAVARS.get(kind)
    if name in mappings:
        (flag, metavar), kind = mappings[name], list[str]
    elif name in lists:
        metavar, kind = lists[name], str
    elif hasattr(kind, "__members__"):
        metavar, kind = "NAME", str  # the recipe refuses other values, wherever they come from
    help_text = _help(recipe, name)
    option = typer.Option(flag, metavar=metavar, help=help_text, rich_help_panel=panel)
    return _parameter(name, Annotated[kind | None, option])


def _help(recipe: type[BaseModel], name: str) -> str:
    field = recipe.model_fields[name]
    text = " ".join((field.description or "").split())
    is_shown = isinstance(field.default, str | int | float) and field.default
    return f"{text} [default: {field.default}]" if is_shown else text


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)
