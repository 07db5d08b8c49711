"""What lies in a local folder, entry by entry: one that cannot be used costs itself alone.

obstore's own listing ends at the first entry whose name it cannot hold, at a link that leads to
itself and at a loop of folders, and leaves out, without a word, what is neither file nor folder.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HIDDEN = re.compile("[^#]*#[0-9]+")
"""Names of obstore's own unfinished files; it shows them nowhere."""
_UNSPEAKABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_MOST_NAMES = 1000
"""Under so many names the files of one folder are listed: links that fork at each of some thirty
folders would name every file a billion times."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """An entry that is no file with a name that a store can hold, and why.

    `key` is its path below the root, escaped where it cannot be printed. `is_folder`: it is, or may
    be, a folder, and what it would hold is not known.
    """

    key: str
    problem: str
    is_folder: bool


def printable(text: str) -> str:
    """The text with backslash escapes for what would break a line or is no character."""
    escaped = (
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
    return "".join(escaped)


def is_speakable(text: str) -> bool:
    """Whether a path can be named in a store and in a line: no control characters, and UTF-8."""
    return not _UNSPEAKABLE.search(text)


def walk(root: Path, prefix: str) -> Iterator[tuple[str, os.stat_result] | Unusable]:
    """All files below the folder `prefix` of `root`, links followed, each with its key and what the
    system says of it; and what cannot be used. Nothing is opened. Raises OSError where the folder
    itself cannot be read."""
    names: Counter[tuple[int, int]] = Counter()
    top = root / prefix
    try:
        found = os.stat(top)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(found.st_mode):
        return
    start: tuple[tuple[int, int], ...] = ((found.st_dev, found.st_ino),)
    pending = [(f"{prefix.strip('/')}/".lstrip("/"), start)]
    while pending:
        folder, above = pending.pop()
        try:
            entries = list(os.scandir(root / folder))
        except OSError as error:
            if len(above) == 1:
                raise
            yield Unusable(folder.rstrip("/"), f"cannot be listed: {error.strerror}", True)
            continue
        for entry in entries:
            key = folder + entry.name
            if _HIDDEN.fullmatch(entry.name):
                continue
            try:
                about = entry.stat()
            except OSError as error:
                if entry.is_symlink() or not isinstance(error, FileNotFoundError):
                    problem = f"cannot be followed: {error.strerror}"
                    yield Unusable(printable(key), problem, True)
                continue
            if not is_speakable(entry.name):
                is_folder = stat.S_ISDIR(about.st_mode)
                yield Unusable(printable(key), "its name cannot be stored", is_folder)
                continue
            itself = (about.st_dev, about.st_ino)
            if stat.S_ISREG(about.st_mode):
                yield key, about
            elif not stat.S_ISDIR(about.st_mode):
                yield Unusable(printable(key), "is a device, a pipe or a socket", False)
            elif itself in above:
                yield Unusable(printable(key), "leads to a folder that it lies in", True)
            elif names[itself] >= _MOST_NAMES:
                problem = f"leads to a folder that has {_MOST_NAMES} other names here"
                yield Unusable(printable(key), problem, True)
            else:
                names[itself] += 1
                pending.append((f"{key}/", (*above, itself)))
