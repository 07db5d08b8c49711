"""Command-line flags, made from the settings: one for every field of `Config`."""

import inspect
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml

from batch_scorer.config import Config, load_config, load_partial_config
from batch_scorer.errors import ConfigError

NEEDED = ("model", "inputs", "output")
"""What scoring needs; all other settings have defaults."""

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file of settings; flags go on top of it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or URL of a scored output.")]
StoreOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--store-option",
        metavar="KEY=VALUE",
        help="For the object store, e.g. region=eu-central-1; repeatable.",
    ),
]

_MAIN_PANEL = "Main settings, as flags or in the config file"
_PANELS = {
    "scores": "Scores: what changes a score; other values cannot reuse earlier scores",
    "layout": "Layout: how shards and columns are cut; fixed once an output is begun",
    "runtime": "Runtime: how fast, and where; free to change when a run is resumed",
}
_MAPPINGS = {
    "columns": ("--column", "FIELD=COLUMN"),
    "output_weights": ("--output-weights", "NAME=WEIGHT,…"),
    "rewards": ("--reward", "NAME=FUNCTION"),
    "store_options": ("--store-option", "KEY=VALUE"),
    "token_prices": ("--token-prices", "KIND=PRICE,…"),
    "template_arguments": ("--template-argument", "NAME=VALUE"),
}
"""Flag and metavar of settings that are given as entries; those whose metavar ends in `,…` take
several at once."""
_LISTS = {
    "exclude": ("--exclude", "GLOB"),
    "ignore_columns": ("--ignore-column", "COLUMN"),
    "keep_columns": ("--keep-columns", "COLUMN,…"),
    "drop_columns": ("--drop-columns", "COLUMN,…"),
    "output_names": ("--output-names", "NAME,…"),
    "retry_marked": ("--retry-marked", "REASON,…"),
}
"""The same of settings that are lists."""

_NAMED_MODEL = re.compile("([A-Za-z0-9_]+)=(.+)", re.DOTALL)
"""A path that looks like it can be written as ./PATH."""

_IN_YAML = ("template_arguments", "rewards")
"""Settings whose entries are spelled as in YAML: numbers, truth values, mappings."""

_needs: dict[str, tuple[str, ...]] = {}
"""The needed settings of every command `with_settings`, by its name."""


def with_settings(
    *needs: str, arguments: str = "INPUT", explained: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give `command(config, **its own)` a flag for every setting, made from `Config`.

    With all of `NEEDED` as `needs` the command gets a Config, otherwise a PartialConfig. The
    arguments are the setting `inputs`; a command that takes others too has them `explained`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        name = command.__name__
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        _needs[name] = needs

        def run(**values: Any) -> None:
            config = load_settings(name, values)
            command(config, **{parameter.name: values[parameter.name] for parameter in own})

        texts = {field: _help(field, is_required=field in needs) for field in Config.model_fields}
        shown = texts["inputs"] if explained is None else explained
        inputs = typer.Argument(
            metavar=arguments, help=shown, show_default=False, rich_help_panel=_MAIN_PANEL
        )
        parameters = [
            _parameter("inputs", Annotated[list[str] | None, inputs]),
            *(_flag(field, texts[field]) for field in ("model", "output")),
            _parameter("config_file", ConfigFile),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            *(_flag(field, texts[field]) for field in _by_role()),
        ]
        run.__name__, run.__doc__ = name, command.__doc__
        vars(run)["__signature__"] = inspect.Signature(parameters)  # Typer makes flags of it
        return run

    return decorate


def load_settings(
    command: str, values: Mapping[str, Any], *, elsewhere: bool = False
) -> Config | None:
    """The settings that a command was called with; None for one that takes none.

    `elsewhere`: as in `load_partial_config`.

    Raises ConfigError where they are wrong or a needed one is missing.
    """
    if command not in _needs:
        return None
    settings = {name: values[name] for name in Config.model_fields}
    for name in _MAPPINGS:
        settings[name] = mapping(name, settings[name])
    for name, (_, metavar) in _LISTS.items():
        given = settings[name] or []
        parts = [each.split(",") if metavar.endswith(",…") else [each] for each in given]
        settings[name] = tuple(chain.from_iterable(parts)) or None
    settings["inputs"] = tuple(settings["inputs"] or ()) or None
    settings["model"] = _models(settings["model"])
    file = Path(values["config_file"]) if values["config_file"] else None
    needs = _needs[command]
    if set(needs) == set(NEEDED) and not elsewhere:
        return load_config(file, **settings)
    return load_partial_config(file, needs=needs, elsewhere=elsewhere, **settings)


def mapping(name: str, pairs: list[str] | None) -> dict[str, Any] | None:
    """The entries of a setting whose flag was given KEY=VALUE, perhaps often; None without any."""
    if not pairs:
        return None
    flag, form = _MAPPINGS[name]
    if form.endswith(",…"):
        pairs = [part for pair in pairs for part in pair.split(",")]
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        # What was meant for a store may be a secret.
        given = "something without a =" if name == "store_options" else repr(wrong[0])
        raise ConfigError(f"{flag}: expected {form}, got {given}")
    entries = dict(pair.split("=", 1) for pair in pairs)
    return entries if name not in _IN_YAML else {k: _yaml(flag, v) for k, v in entries.items()}


def _models(given: list[str] | None) -> str | dict[str, str] | None:
    """What `--model` was given, perhaps often: a model, or several by name. Raises ConfigError."""
    if not given:
        return None
    named = [_NAMED_MODEL.fullmatch(each) for each in given]
    if len(given) == 1 and named[0] is None:
        return given[0]
    models: dict[str, str] = {}
    for each, found in zip(given, named, strict=True):
        if found is None or found[1] in models:
            raise ConfigError(
                f"--model: of several models each needs a name of its own, NAME=MODEL; got {each!r}"
            )
        models[found[1]] = found[2]
    return models


def _yaml(flag: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag}: {text!r} is no YAML value") from error


def _by_role() -> list[str]:
    """The settings that have defaults, in the order of their panels."""
    roles = Config.roles()
    return [
        name for role in _PANELS for name in roles if roles[name] == role and name not in NEEDED
    ]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _flag(name: str, text: str) -> inspect.Parameter:
    if name == "model":
        models = typer.Option(
            "--model", metavar="MODEL|NAME=MODEL", help=text, rich_help_panel=_MAIN_PANEL
        )
        return _parameter(name, Annotated[list[str] | None, models])
    field = Config.model_fields[name]
    kind = _without_none(field.annotation)
    flag, metavar = f"--{name.replace('_', '-')}", _metavar(name, kind)
    if name in _MAPPINGS | _LISTS:
        (flag, metavar), kind = (_MAPPINGS | _LISTS)[name], list[str]
    elif kind is datetime:
        metavar, kind = "DATE", str
    elif name == "workers":
        metavar, kind = "N|N..N", str
    elif kind is bool:
        on = flag.replace("--use-", "--")
        flag = f"{on}/{on.replace('--', '--no-')}"
    elif _choices(kind):
        kind = str  # the config refuses other values, wherever they come from
    panel = _MAIN_PANEL if name in NEEDED else _PANELS[Config.roles()[name]]
    option = typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)
    return _parameter(name, Annotated[kind | None, option])


def _metavar(name: str, kind: Any) -> str | None:
    if _choices(kind):
        return "NAME"
    return {"int": "N", "float": "SECONDS", "str": "TEXT"}.get(kind.__name__)


def _help(name: str, *, is_required: bool) -> str:
    field = Config.model_fields[name]
    notes = []
    if choices := _choices(_without_none(field.annotation)):
        notes.append(f"one of {', '.join(choices)}")
    default = None if field.is_required() or isinstance(field.default, bool) else field.default
    if default:
        notes.append(f"default: {default}")
    if is_required:
        notes.append("required")
    text = " ".join((field.description or "").split())
    return f"{text} [{'; '.join(notes)}]" if notes else text


def _without_none(kind: Any) -> Any:
    inner = [part for part in get_args(kind) if part is not type(None)]
    return inner[0] if type(None) in get_args(kind) else kind


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [member.value for member in kind] if hasattr(kind, "__members__") else []
