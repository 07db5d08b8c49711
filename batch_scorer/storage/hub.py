"""Data sets of the Hugging Face hub, as a store to read from: `hf://datasets/ORG/NAME@REV/path`.

huggingface_hub does the asking, with its own cache, endpoint and token (`HF_HOME`, `HF_ENDPOINT`,
`HF_TOKEN`, or what `hf auth login` left); the token is never seen here. A revision is looked up
once (`pinned`): from then on the URL names the commit, so every worker reads the same files.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

from batch_scorer.errors import ConfigError, StorageError
from batch_scorer.storage.faults import AccessDenied, ObjectMissing, PlaceMissing, first_line
from batch_scorer.storage.store import HUB, Store
from batch_scorer.storage.versions import ObjectInfo, Version

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi

_URL = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?"
    r"(?:/(?P<path>.*))?"
)
_KIND = "dataset"
_NO_DATE = datetime.fromtimestamp(0, UTC)


def pinned(url: str) -> str:
    """The URL with the commit in place of the revision; any other URL or path as it is.

    Raises ConfigError for what is no data set's URL, PlaceMissing and AccessDenied.
    """
    return HubStore(url).pinned_root() if url.startswith(HUB) else url


class HubStore(Store):
    """The files of one commit of a data set, below a folder. Versions are those of their contents.

    A file that is read is first fetched whole, into the cache of huggingface_hub.
    """

    def __init__(self, root: str, *, create: bool = False) -> None:
        self.root = root.rstrip("/")
        if create:
            raise self._read_only()
        self._options = {}
        self._local = self._store = None
        self._repo, self._revision, self._path = _parts(self.root)
        self._folder = f"{self._path}/" if self._path else ""

    def pinned_root(self) -> str:
        """The root with the commit in place of the revision."""
        commit = self._asked("", self._describe).sha
        return f"{HUB}datasets/{self._repo}@{commit}/{self._path}".rstrip("/")

    def _describe(self) -> "DatasetInfo":
        return _api().dataset_info(self._repo, revision=self._revision)

    def _stored(self, prefix: str = "") -> Iterator[ObjectInfo]:
        path = f"{self._folder}{prefix}".strip("/")

        def tree() -> Sequence[Any]:
            entries = _api().list_repo_tree(
                self._repo, path or None, recursive=True, revision=self._revision, repo_type=_KIND
            )
            return [*entries]

        try:
            found = self._asked(prefix, tree)
        except PlaceMissing:
            raise
        except ObjectMissing:  # no such folder: in other stores' terms, nothing below this prefix
            return
        yield from self._infos(found)

    def head(self, key: str) -> ObjectInfo:
        def paths() -> Sequence[Any]:
            return _api().get_paths_info(
                self._repo, [self._folder + key], revision=self._revision, repo_type=_KIND
            )

        found = next(self._infos(self._asked(key, paths)), None)
        if found is None:
            raise ObjectMissing(f"{self.url(key)}: not there")
        return found

    def _infos(self, entries: Iterable[Any]) -> Iterator[ObjectInfo]:
        from huggingface_hub.hf_api import RepoFile

        for entry in entries:
            if isinstance(entry, RepoFile):
                version = Version(entry.lfs.sha256 if entry.lfs else entry.blob_id)
                key = entry.path.removeprefix(self._folder)
                yield ObjectInfo(key, entry.size, version, self._date)

    @cached_property
    def _date(self) -> datetime:
        """Of the commit: the hub says of no file at once when it was changed."""
        return self._asked("", self._describe).last_modified or _NO_DATE

    def _get(
        self, key: str, version: Version | None = None, part: tuple[int, int] | None = None
    ) -> tuple[bytes, ObjectInfo]:
        from huggingface_hub import hf_hub_download

        # A commit's files never change, so one that is in the cache is not asked for again.
        name = self._folder + key
        file = Path(hf_hub_download(self._repo, name, revision=self._revision, repo_type=_KIND))
        info = (
            self.head(key)
            if version is None
            else ObjectInfo(key, file.stat().st_size, version, _NO_DATE)
        )
        start, stop = part or (0, info.size_bytes)
        with file.open("rb") as opened:
            opened.seek(start)
            data = opened.read(stop - start)
        if len(data) != stop - start:
            raise StorageError(f"{self.url(key)}: {len(data)} bytes came of {stop - start}")
        return data, info

    def create(self, key: str, data: bytes) -> NoReturn:
        raise self._read_only()

    def replace(self, key: str, data: bytes, version: Version) -> NoReturn:
        raise self._read_only()

    def copy(self, key: str, to: str) -> NoReturn:
        raise self._read_only()

    def delete(self, key: str) -> NoReturn:
        raise self._read_only()

    def _read_only(self) -> ConfigError:
        return ConfigError(f"{self.root}: the hub can be read only; choose another output")

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        with _translated(self.url(key).rstrip("/")):
            yield


def _parts(url: str) -> tuple[str, str | None, str]:
    """(ORG/NAME, revision, path)."""
    found = _URL.fullmatch(url)
    if found is None:
        raise ConfigError(f"{url}: write hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REV/PATH")
    revision = found["revision"]
    return found["repo"], unquote(revision) if revision else None, found["path"] or ""


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """What huggingface_hub raises, as the stores' errors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise AccessDenied(f"{url}: no permission: ask for access to it on its page") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise PlaceMissing(
            f"{url}: no such data set or revision, or it is private and the token does not open it"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ObjectMissing(f"{url}: not there") from error
    except Exception as error:
        # The bases of its own error: the HTTP library's, as of a hub out of reach, and OSError.
        if not isinstance(error, (*errors.HfHubHTTPError.__bases__, errors.EntryNotFoundError)):
            raise
        raise _of_status(error, url) from error


def _of_status(error: Exception, url: str) -> StorageError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return AccessDenied(f"{url}: no permission ({status})")
    return StorageError(f"{url}: {first_line(error)}")
