"""A reward function: what is known of it, and how a process loads it.

It is found once, where the run begins, in a process of its own; every worker then loads the same
one. Source that lies in a file of its own travels with the job, a module has to be importable on
each machine and is held to its digest.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, invalidate_caches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any

from batch_scorer.config import PARAMETERS, Config, RewardSettings, expanded
from batch_scorer.errors import ConfigError, cause_of
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records.digest import digest_of

SHIPPED = ("exact_match", "format", "length", "math", "repetition")

_FILE = ".py"


@dataclass(frozen=True, slots=True)
class Reward:
    """A function as it was found where the run began.

    `function` is `module:function`, or `file.py:function` without the file's folder; then `source`
    is what the file holds. `digest` covers the source and the versions that it names. `columns` are
    the parameters that are filled from the rows, by name, with the column of each; `asks_for` are
    those of `prompts` and `responses` that it takes.
    """

    name: str
    function: str
    digest: str
    source: bytes | None
    arguments: Mapping[str, Any]
    columns: Mapping[str, str]
    asks_for: tuple[str, ...]
    timeout_s: float
    attempts: int
    per_minute: float | None

    @property
    def identity(self) -> dict[str, Any]:
        """What its values depend on, but for the rows; for the fingerprint and the record."""
        return {
            "function": self.function,
            "source": self.digest,
            "arguments": dict(self.arguments),
            "columns": dict(self.columns),
        }

    @property
    def kind(self) -> str:
        """The kind of the processes that it is called in."""
        return f"reward {self.function} {self.digest}"


def find_rewards(config: Config) -> tuple[Reward, ...]:
    """The reward functions of the settings, in their order. Raises ConfigError."""
    bounds = Bounds(
        config.read_timeout_s, int(config.read_memory_gib * 2**30), "rewards", 1, is_kept=False
    )
    return tuple(_found(name, entry, bounds) for name, entry in config.rewards.items())


def file_of(entry: RewardSettings) -> Path | None:
    """The file that holds the function's source; None for a module."""
    place, _, _ = entry.function.rpartition(":")
    return Path(expanded(place)) if place.endswith(_FILE) else None


def columns_read(rewards: Sequence[Reward]) -> tuple[str, ...]:
    """The columns that the functions ask for, each once."""
    return tuple(dict.fromkeys(name for reward in rewards for name in reward.columns.values()))


def _found(name: str, entry: RewardSettings, bounds: Bounds) -> Reward:
    said = f"rewards: {name}: {entry.function}"
    function, file = entry.function, file_of(entry)
    source: bytes | None = None
    if ":" not in function:
        if function not in SHIPPED:
            raise ConfigError(
                f"{said}: give module:function, file.py:function, or one that is shipped: "
                f"{', '.join(SHIPPED)}"
            )
        function = f"{__package__}.{function}:reward"
    if file is not None:
        function = f"{file.name}:{function.rpartition(':')[2]}"
        try:
            source = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{said}: {file}: not readable: {cause_of(error)}") from None
    try:
        found = apart(bounds, _look, function, source)
    except Died as died:
        raise ConfigError(f"{said}: the process that loads it {died.how}") from None
    except MemoryError:
        most = bounds.memory_bytes / 2**30
        raise ConfigError(f"{said}: loading it takes more than {most:g} GiB") from None
    except ConfigError as error:
        raise ConfigError(f"{said}: {error}") from None
    for given in (*entry.arguments, *entry.columns):
        if given not in found.parameters and not (found.takes_any and given in entry.arguments):
            takes = ", ".join(found.parameters) or "none"
            raise ConfigError(f"{said}: takes no {given}; its parameters are {takes}")
    # A parameter with a default is filled from the rows only where the settings say so: a column
    # that happens to have its name is none of its business.
    own = [
        each
        for each, has_default in found.parameters.items()
        if (each in entry.columns or not has_default)
        and each not in (*PARAMETERS, *entry.arguments)
    ]
    return Reward(
        name=name,
        function=function,
        digest=found.digest,
        source=source,
        arguments=entry.arguments,
        columns={each: entry.columns.get(each, each) for each in own},
        asks_for=tuple(each for each in PARAMETERS if each in found.parameters),
        timeout_s=entry.timeout_s,
        attempts=entry.attempts,
        per_minute=entry.per_minute,
    )


# In a process that may die of it


@dataclass(frozen=True, slots=True)
class _Found:
    """`parameters` are those by name, with whether each has a default; `takes_any`: and any
    other."""

    digest: str
    parameters: dict[str, bool] = field(default_factory=dict)
    takes_any: bool = False


def _look(function: str, source: bytes | None) -> _Found:
    loaded, digest = _import(function, source)
    try:
        named = signature(loaded).parameters.values()
    except (TypeError, ValueError):
        raise ConfigError("its parameters are not known; write it in Python") from None
    for each in named:
        if each.kind is Parameter.POSITIONAL_ONLY:
            raise ConfigError(f"{each.name} can only be given by place; parameters go by name")
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    parameters = {
        each.name: each.default is not Parameter.empty for each in named if each.kind in by_name
    }
    return _Found(digest, parameters, any(each.kind is Parameter.VAR_KEYWORD for each in named))


_functions: dict[str, Callable[..., Any]] = {}
"""What this process has loaded, by `Reward.kind`."""


def load(reward: Reward) -> Callable[..., Any]:
    """The function in this process, loaded once. Raises ConfigError where it cannot be loaded here,
    or is another one than where the run began."""
    if reward.kind not in _functions:
        loaded, digest = _import(reward.function, reward.source)
        if digest != reward.digest:
            raise ConfigError(
                f"{reward.function} on this machine, or a version that it names, is another one "
                "than where the run began"
            )
        _functions[reward.kind] = loaded
    return _functions[reward.kind]


def _import(function: str, source: bytes | None) -> tuple[Callable[..., Any], str]:
    """A function and the digest of its source. Raises ConfigError."""
    place, _, name = function.rpartition(":")
    try:
        if source is None:
            invalidate_caches()
            contents = _contents(place)
            module = import_module(place)
        else:
            contents = [source]
            module = _module_of(place, source)
        found = getattr(module, name)
        versions = _versions(getattr(module, "VERSIONS_OF", ()))
    except ConfigError:
        raise
    except AttributeError:
        raise ConfigError(f"{place} has no {name!r}") from None
    except BaseException as error:  # the user's own code runs when it is loaded
        raise ConfigError(f"cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ConfigError(f"{name} is no function")
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    return found, digest_of([digests, versions])


def _contents(module: str) -> list[bytes]:
    """The bytes of a module's file; of a package those of all its Python files."""
    spec = find_spec(module)
    if spec is None:
        raise ConfigError(f"there is no module {module!r} here; install it, or name its file")
    if spec.origin is None or not Path(spec.origin).is_file():
        raise ConfigError(f"{module} has no file, so that nothing shows when it changes")
    if spec.submodule_search_locations is None:
        return [Path(spec.origin).read_bytes()]
    folder = Path(spec.origin).parent
    files = sorted(folder.rglob(f"*{_FILE}"))
    names = [file.relative_to(folder).as_posix() for file in files]
    return ["\n".join(names).encode(), *(file.read_bytes() for file in files)]


def _module_of(name: str, source: bytes) -> ModuleType:
    """What a file holds, as a module under a name that no other has."""
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"{name.removesuffix(_FILE)}_{digest[:12]}")
    module.__file__ = name
    sys.modules[module.__name__] = module  # dataclasses and pickle look there
    exec(compile(source, name, "exec"), vars(module))
    return module


def _versions(distributions: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
