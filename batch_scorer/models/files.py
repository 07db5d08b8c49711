"""Files of a model directory: which are opened at all, and the small ones read."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from batch_scorer.errors import BatchScorerError, ModelError, cause_of

_LONGEST_CAUSE = 400
"""Characters of others' messages, some of which print a whole config."""

READ = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt", ".py")
"""Ends of the names of files that this program or transformers opens."""
_MIB = 1 << 20
_MOST_BYTES = {
    **dict.fromkeys(("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"), 256 * _MIB),
    **dict.fromkeys(("tokenizer.model", "spiece.model"), 256 * _MIB),
    **dict.fromkeys(("config.json", "tokenizer_config.json", "added_tokens.json"), 16 * _MIB),
    **dict.fromkeys(("chat_template.jinja", "chat_template.json"), 16 * _MIB),
}
"""What others' code reads whole. Public tokenizers have at most 40 MiB."""
_MOST_JSON_BYTES = 64 * _MIB
"""Of any file that is read here: an index of 100,000 tensors has 10 MiB."""
_DEEPEST = 100
"""How deep lists and objects lie in each other in a JSON file of a model."""
_STRINGS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NESTING = re.compile(r"[^\[\]{}]+")

if TYPE_CHECKING:
    from torch import Tensor


def check_folder(path: Path) -> None:
    """Raise ModelError where a model directory holds what must not be opened: a pipe, a socket or
    a device, which may never end; a folder or a dead link in the place of a file; a file that is
    larger than any of its name. Opens nothing."""
    for entry in _entries(path):
        if (problem := _problem(Path(entry))) is not None:
            raise ModelError(f"{entry.path}: {problem}")


def _entries(path: Path) -> Iterator["os.DirEntry[str]"]:
    """What is in the folder, and of its folders what could be read."""
    try:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            yield entry
            if entry.is_dir() and not entry.name.startswith("."):
                yield from (e for e in os.scandir(entry) if e.name.endswith(READ))
    except OSError as error:
        raise ModelError(f"{path}: not readable: {cause_of(error)}") from error


def _problem(path: Path) -> str | None:
    is_read = path.name.endswith(READ)
    try:
        found = path.stat()
    except OSError as error:
        dead = path.is_symlink() and is_read
        return f"is a link that leads nowhere ({error.strerror})" if dead else None
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        return "is a folder, and should be a file" if is_read else None
    if kind != stat.S_IFREG:
        return f"is {_KINDS.get(kind, 'a special file')}, and should be a file"
    most = _MOST_BYTES.get(path.name)
    if most is not None and found.st_size > most:
        return f"has {found.st_size} bytes; no model has more than {most} there"
    return None


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory. Raises ModelError if there is none, or it is damaged."""
    loaded = read_any_json(path)
    if not isinstance(loaded, dict):
        raise ModelError(f"{path}: not a JSON object")
    return loaded


def read_json_objects(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects. Raises as `read_json`."""
    loaded = read_any_json(path)
    if not isinstance(loaded, list) or not all(isinstance(item, dict) for item in loaded):
        raise ModelError(f"{path}: not a JSON list of objects")
    return loaded


def read_any_json(path: Path) -> Any:
    """What a JSON file of a model directory holds. Raises as `read_json`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path}: not a file")
        with path.open(encoding="utf-8") as stream:
            text = stream.read(_MOST_JSON_BYTES + 1)
        if len(text) > _MOST_JSON_BYTES:
            raise ModelError(f"{path}: has more than {_MOST_JSON_BYTES} bytes")
        if _depth(text) > _DEEPEST:
            raise ModelError(f"{path}: its lists and objects lie too deep in each other")
        return json.loads(text)
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: not a model directory (no {path.name})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable: {cause_of(error)}") from error


def _depth(text: str) -> int:
    """How deep its lists and objects lie in each other, in linear time."""
    depth = deepest = 0
    for bracket in _NESTING.sub("", _STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


@contextmanager
def reading(model: Path | str) -> Iterator[None]:
    """Around all that reads a model directory: whatever others' code raises there, RecursionError
    and MemoryError included, becomes a ModelError of one line that names the model."""
    try:
        yield
    except ModelError as error:
        if "\n" not in str(error):
            raise
        raise type(error)(_one_line(str(error))) from error
    except BatchScorerError:
        raise
    except Exception as error:
        cause = _one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"{model}: cannot be used: {cause}") from error


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_CAUSE else f"{line[:_LONGEST_CAUSE]} […]"


def read_pickled(path: Path) -> "dict[str, Tensor]":
    """The tensors of a file that `torch.save` wrote. Raises ModelError if it holds anything else,
    which could run code, or is damaged."""
    import torch  # takes seconds, and few models have such a file

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # its message tells how to run the code
        raise ModelError(f"{path}: not a file of tensors: it is damaged or holds code") from error
    except (OSError, RuntimeError, EOFError) as error:
        cause = str(error).strip().split("\n")[0] or "it ends too early"
        raise ModelError(f"{path}: not a file of tensors: {cause}") from error
    if not isinstance(stored, dict) or not all(map(torch.is_tensor, stored.values())):
        raise ModelError(f"{path}: not a file of tensors")
    return stored
