"""Command-line flags, made from the settings: one for every field of `Config`."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, combinations
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML file of settings; flags go on top of it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Output = Annotated[str, typer.Argument(help="Folder or URL of a scored output.")]
StoreOptions = Annotated[
    list[str] | None,
    typer.Option("--store-option", metavar="KEY=VALUE", help="Of the object store; repeatable."),
]


def with_settings(command: Callable[..., None], **assumed: str) -> Callable[..., None]:
    """Give `command(config, **its own)` one flag for every field of Config.

    `assumed` are values of needed settings that the command can do without; they count only where
    neither a flag nor the file has them.
    """
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "config"
    ]
    flags = [_flag(name) for name in Config.model_fields]

    def load(config_file: Path | None = None, **values: Any) -> Config:
        settings = {name: values[name] for name in Config.model_fields}
        for name in _MAPPINGS:
            settings[name] = mapping(name, settings[name])
        settings["inputs"] = tuple(settings["inputs"] or ()) or None
        return _load_assuming(assumed, config_file, settings)

    def run(**values: Any) -> None:
        command(load(**values), **{parameter.name: values[parameter.name] for parameter in own})

    file = inspect.Parameter(
        "config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile
    )
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    run.__signature__ = inspect.Signature([*flags, file, *keyword_only])  # type: ignore[attr-defined]
    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.load = load  # type: ignore[attr-defined]  # `submit` checks settings without running
    return run


def _load_assuming(assumed: dict[str, str], file: Path | None, values: dict[str, Any]) -> Config:
    """The config, with as few of the assumed values as it takes; raises for what else is wrong."""
    given = {name: value for name, value in values.items() if value is not None}
    sizes = range(len(assumed))
    for names in chain.from_iterable(combinations(assumed, size) for size in sizes):
        with suppress(ConfigError):
            return load_config(file, **{name: assumed[name] for name in names} | given)
    return load_config(file, **assumed | given)


def _flag(name: str) -> inspect.Parameter:
    field = Config.model_fields[name]
    text = " ".join((field.description or "").split())
    kind: Any = field.annotation
    if name == "inputs":
        annotation: Any = Annotated[
            list[str] | None, typer.Argument(metavar="INPUT...", help=text, show_default=False)
        ]
    elif name in _MAPPINGS:
        flag, metavar = _MAPPINGS[name]
        annotation = Annotated[list[str] | None, typer.Option(flag, metavar=metavar, help=text)]
    elif bool in (kind, _without_none(kind)):
        on = name.removeprefix("use_")
        annotation = Annotated[
            bool | None,
            typer.Option(f"--{on.replace('_', '-')}/--no-{on.replace('_', '-')}", help=text),
        ]
    else:
        default = "" if field.is_required() or field.default in (None, "") else field.default
        shown = f"{text} [dim]\\[default: {default}][/]" if default else text
        metavar_of = {"metavar": "|".join(_choices(kind))} if _choices(kind) else {}
        plain = str if _choices(kind) else _without_none(kind)
        option = typer.Option(f"--{name.replace('_', '-')}", help=shown, **metavar_of)  # type: ignore[arg-type]
        annotation = Annotated[plain | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


_MAPPINGS = {
    "also": ("--also", "PREFIX=MODEL"),
    "columns": ("--column", "FIELD=COLUMN"),
    "store_options": ("--store-option", "KEY=VALUE"),
}
"""Flag and what it takes, of settings that are given one entry at a time."""


def _without_none(kind: Any) -> Any:
    inner = [part for part in get_args(kind) if part is not type(None)]
    return inner[0] if inner else kind


def _choices(kind: Any) -> list[str]:
    kind = _without_none(kind) if get_origin(kind) is not Literal else kind
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [member.value for member in kind] if hasattr(kind, "__members__") else []


def mapping(name: str, pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise ConfigError(f"{name}: expected KEY=VALUE, got {wrong[0]!r}")
    return dict(pair.split("=", 1) for pair in pairs)
