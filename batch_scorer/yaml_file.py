"""A file of settings: YAML's lists, mappings and plain values."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from batch_scorer.errors import ConfigError, cause_of
from batch_scorer.storage import printable

_MOST_YAML_BYTES = 1 << 20
_MOST_ALIASES = 20
"""Of a config file. Each alias may stand for as much as all those before it together."""


class _Loader(yaml.SafeLoader):
    """YAML's lists, mappings and plain values, without what YAML has beyond them: no tags, so no
    value is read as something else than it looks like; no key twice, so none is lost; few aliases,
    and none inside of what it stands for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0
        self._open: list[str] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = ""
        if isinstance(event, yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > _MOST_ALIASES:
                problem = f"more than {_MOST_ALIASES} aliases"
            elif event.anchor in self._open:
                problem = f"*{event.anchor} stands inside of what it stands for"
        elif event.tag is not None:
            problem = f"tags are not read ({event.tag})"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._open.append(event.anchor)
        try:
            return super().compose_node(parent, index)
        finally:
            self._open.pop()

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if names and (most := names.most_common(1)[0])[1] > 1:
            raise yaml.MarkedYAMLError(
                problem=f"`{most[0]}` is there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; raises ConfigError, in one line."""
    name = printable(str(path))
    try:
        if not path.exists():
            raise ConfigError(f"no config file at {name}")
        if path.is_dir():
            raise ConfigError(f"{name}: a folder, not a file")
        with path.open("rb") as file:
            data = file.read(_MOST_YAML_BYTES + 1)
        if len(data) > _MOST_YAML_BYTES:
            raise ConfigError(f"{name}: a config file has at most {_MOST_YAML_BYTES:,} bytes")
        loader = _Loader(data.decode("utf-8-sig"))
        loaded = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1})" if mark else ""
        problem = printable(error.problem or error.context or "damaged")
        raise ConfigError(f"{name}: not readable as YAML: {problem}{place}") from None
    except RecursionError:
        raise ConfigError(f"{name}: not readable as YAML: lists lie too deep in lists") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = printable(" ".join(cause_of(error).split()))
        raise ConfigError(f"{name}: not readable as YAML: {problem}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{name}: expected `setting: value` lines, got {type(loaded).__name__}")
    if odd := [key for key in loaded if not isinstance(key, str)]:
        raise ConfigError(f"{name}: {odd[0]!r} is no setting's name")
    return loaded
