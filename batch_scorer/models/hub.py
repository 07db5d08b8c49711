"""Models of a Hugging Face hub: `ORG/NAME`, or `ORG/NAME@REVISION` for a branch, a tag or a commit.

huggingface_hub does the asking, with its own cache, endpoint and token (`HF_HOME`, `HF_HUB_CACHE`,
`HF_ENDPOINT`, `HF_TOKEN`, or what `hf auth login` left); the token is never seen here. What is
fetched lies in a folder named after its commit, which never changes, so every node of a cluster
that fetches that commit has the same model.
"""

import errno
import logging
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self
from urllib.parse import unquote

from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.models.checkpoint import HEADS, WEIGHTS, weight_files
from batch_scorer.models.lora import ADAPTER_WEIGHTS
from batch_scorer.models.registry import HEAD_FILES
from batch_scorer.storage.faults import first_line

_URL = "hf://"
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>.+))?")
_SNAPSHOT = re.compile(r"models--(?P<repository>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})")

_TEXT = ("*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt")
_CODE = "*.py"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A pattern's * also matches slashes. Of the folders only those are read that sentence-transformers
# numbers (1_Pooling) and that transformers keeps further templates in (additional_chat_templates);
# others hold the weights again (onnx, original, checkpoint-500).
_NOT_READ = ("[!0-9a]*/*", "[0-9][!_]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*.safetensors")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository of a hub, and the revision that is asked for; None: its main branch."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, name: str, revision: str | None = None) -> Self | None:
        """None for what can only be a path. Raises ConfigError where two revisions are named."""
        found = _NAME.fullmatch(name.removeprefix(_URL))
        if found is None or found["repository"].startswith("."):
            return None
        if revision is not None and found["revision"] is not None:
            raise ConfigError(f"revision: {name} names one already; leave one of them out")
        named = found["revision"]
        return cls(found["repository"], unquote(named) if named else revision)

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


class NotHereError(ModelError):
    """There is no such model, or it is not fetched yet and was not to be."""


def fetch(name: HubName, *, weights: bool = True, code: bool = False, ask: bool = True) -> Path:
    """The folder with the files of `name` that are read here, of one commit.

    What the cache lacks is fetched: without `weights` only what makes text into token ids, with
    `code` also Python files. Without `ask`, and where the hub cannot be reached, the cache has to
    have it all. Raises ModelError; NotHereError without `ask`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Of its warnings each names one try; the last becomes an error. Bars are for terminals.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    of_weights = (WEIGHTS, *HEAD_FILES, *ADAPTER_WEIGHTS, *HEADS)
    wanted = [*_TEXT, *(of_weights if weights else ()), *([_CODE] if code else ())]
    try:
        folder = snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=wanted,
            ignore_patterns=[*_NOT_READ],
            local_files_only=not ask,
        )
    except Exception as error:  # the client raises HTTP, OS and validation errors, and its own
        kind = ModelError if ask else NotHereError
        raise kind(f"{name}: {_cause(error, name, ask)}") from error
    return Path(folder)


def repository_of(name: str) -> str:
    """A hub's name without its revision; any other as it is."""
    found = HubName.parse(name)
    return found.repository if found else name


def commit_of(path: Path) -> str | None:
    """The commit that a folder of a hub's cache holds; None for any other folder."""
    found = _SNAPSHOT.fullmatch("/".join(path.parts[-3:]))
    return found["commit"] if found else None


@cache
def on_this_node(path: Path, *, weights: bool = True, code: bool = False) -> Path:
    """A model's folder as this node has it: the path itself, or for one in a hub's cache the same
    commit in this node's, fetched if need be.

    Raises ModelError.
    """
    if path.is_dir() and (not weights or _has_weights(path)):
        return path
    found = _SNAPSHOT.fullmatch("/".join(path.parts[-3:]))
    if found is None:
        raise ModelError(
            f"{path}: not on {socket.gethostname()}; put it where all nodes of the cluster find "
            "it, or name a model of a hub, which every node fetches itself"
        )
    repository = found["repository"].replace("--", "/", 1)
    return fetch(HubName(repository, found["commit"]), weights=weights, code=code)


def _has_weights(path: Path) -> bool:
    if any((path / name).is_file() for name in ADAPTER_WEIGHTS):
        return True
    try:
        return bool(weight_files(path))
    except ModelError:
        return False


def _cause(error: Exception, name: HubName, ask: bool) -> str:
    """Why there is no such model, and what to do; one line."""
    from huggingface_hub import constants, errors, get_token

    has_token = bool(get_token())
    revision = name.revision or constants.DEFAULT_REVISION
    causes = list(_chain(error))
    if any(isinstance(cause, OSError) and cause.errno in _NO_ROOM for cause in causes):
        return f"no room for it on the disk of {constants.HF_HUB_CACHE}; set HF_HOME to another"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{name.repository}"
        if not has_token:
            return (
                "gated: its owner lets only some users have it, and no token was found; ask for "
                f"access at {page}, then set HF_TOKEN"
            )
        return f"gated, and the token found has no access to it: ask for it at {page}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision} of it (a branch, a tag or a whole commit hash)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such model on the hub" + (
            ", or it is private and the token found does not open it"
            if has_token
            else "; if it is private, set HF_TOKEN"
        )
    # Before huggingface_hub 2, a cached part is returned, and refused when its headers are read.
    if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):
        what = f"only a part of revision {revision} is in {constants.HF_HUB_CACHE}"
    else:
        what = f"no such folder, and revision {revision} is not in {constants.HF_HUB_CACHE}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if not ask:
            return f"{what}: not fetched from a model hub yet"
        if constants.HF_HUB_OFFLINE:
            return f"{what}, and HF_HUB_OFFLINE is set"
        return f"{what}, and {constants.ENDPOINT} cannot be reached ({_kind(causes[-1])})"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        with_token = "the token found does not open it" if has_token else "set HF_TOKEN"
        return f"{constants.ENDPOINT} answers {status}: no permission; {with_token}"
    if isinstance(error, errors.HFValidationError):
        return "no such folder, and no name that a hub could have"
    return (
        f"not fetched whole from {constants.ENDPOINT} ({_kind(error)}: {first_line(error)}); "
        "run the same command again"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    yield error
    if (cause := error.__cause__ or error.__context__) is not None:
        yield from _chain(cause)


def _kind(error: BaseException) -> str:
    return type(error).__name__
