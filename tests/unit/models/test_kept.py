"""What was found out about a model is kept, and never used for another one."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from batch_scorer.models import kept as module
from batch_scorer.models.directory import ModelFacts, inspect_model
from batch_scorer.models.kept import code_digest, kept

HOURS_AGO = time.time() - 7200
LARGE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Found:
    """The bytes of all files of a folder, by name."""

    bytes_of: dict[str, str]
    where: Path


class Finder:
    """Finds that out, and counts how often it did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times = 0

    def ask(self, asked: object = "?") -> Found:
        return kept(Found, [self.folder], asked, self._find)

    def _find(self) -> Found:
        self.times += 1
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return Found({str(file): file.read_text() for file in files}, self.folder)


@pytest.fixture
def finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finder:
    """Of a folder with small files and a large one, all of which have long settled."""
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 20)
    monkeypatch.setattr("batch_scorer.models.digests._SETTLED_S", -1e9)
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "a.jinja").write_text("text")
    (folder / LARGE).write_text("large" * 20)
    return Finder(folder)


def test_a_question_is_answered_once(finder: Finder) -> None:
    first = finder.ask()
    assert [finder.ask() for _ in range(2)] == [first] * 2
    assert finder.times == 1
    assert finder.ask("another question") == first
    assert finder.times == 2


def written_over(file: Path) -> None:
    """With the same size and the same time."""
    before = file.stat()
    file.write_text("".join(reversed(file.read_text()))[:-1] + "!")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_text("x" * file.stat().st_size)
    os.replace(other, file)


CHANGES: dict[str, Callable[[Path], None]] = {
    "a small file": lambda folder: written_over(folder / "config.json"),
    "a large file": lambda folder: written_over(folder / LARGE),
    "another large file": lambda folder: replaced(folder / LARGE),
    "a file of a folder in it": lambda folder: written_over(folder / "more" / "a.jinja"),
    "a new file": lambda folder: (folder / "tokenizer.json").touch(),
    "a new name": lambda folder: (folder / "shards.nemo").touch(),
    "a file less": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_is_seen(finder: Finder, change: Callable[[Path], None]) -> None:
    before = finder.ask()
    change(finder.folder)
    after = finder.ask()
    assert finder.times == 2
    assert after != before
    assert finder.ask() == after and finder.times == 2


def test_other_code_asks_again(finder: Finder, monkeypatch: pytest.MonkeyPatch) -> None:
    finder.ask()
    monkeypatch.setattr(module, "code_digest", lambda: "of another version")
    finder.ask()
    assert finder.times == 2


def test_code_is_that_of_this_package_and_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    own = code_digest()
    assert own == code_digest() is not None
    code_digest.cache_clear()
    monkeypatch.setattr(module, "_LIBRARIES", module._LIBRARIES[:-1])
    assert code_digest() != own
    code_digest.cache_clear()
    monkeypatch.setattr(module, "_LIBRARIES", ("batch-scorer",))  # installed from a checkout
    assert code_digest() is None
    code_digest.cache_clear()


def test_nothing_is_kept_of_libraries_in_development(
    finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "code_digest", lambda: None)
    finder.ask()
    finder.ask()
    assert finder.times == 2


def test_nothing_is_kept_of_a_large_file_that_has_just_changed(
    finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_scorer.models.digests._SETTLED_S", 10.0)
    os.utime(finder.folder / LARGE, (HOURS_AGO, HOURS_AGO))
    finder.ask()
    finder.ask()
    assert finder.times == 2


def test_nothing_is_kept_of_files_that_change_meanwhile(finder: Finder) -> None:
    def find() -> Found:
        found = finder._find()
        (finder.folder / "config.json").write_text(f"{finder.times}")
        return found

    for times in (1, 2):
        kept(Found, [finder.folder], "?", find)
        assert finder.times == times
    assert finder.ask().bytes_of[str(finder.folder / "config.json")] == "2"


def test_an_answer_that_will_not_do_is_found_again(finder: Finder) -> None:
    finder.ask()
    kept(Found, [finder.folder], "?", finder._find, lambda found: False)
    assert finder.times == 2


def test_a_damaged_or_forbidden_cache_is_no_error(
    finder: Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(module, "user_cache", lambda: cache)
    found = finder.ask()
    (record,) = cache.rglob("*.json")
    key = record.read_text().splitlines()[0]
    for damaged in ("", key, f"{key}\n{{", f'{key}\n{{"bytes_of": 3}}', f"{key}\n[]"):
        record.write_text(damaged)
        assert finder.ask() == found
    monkeypatch.setattr(module, "user_cache", lambda: finder.folder / LARGE)  # a file is no folder
    assert finder.ask() == found
    monkeypatch.setattr(
        module, "user_cache", lambda: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    assert finder.ask() == found


def test_a_models_facts_come_back_as_they_were(tiny_model: Path) -> None:
    def facts() -> ModelFacts:
        return kept(ModelFacts, [tiny_model], "?", lambda: inspect_model(tiny_model, with_fit=True))

    found = facts()
    again = kept(ModelFacts, [tiny_model], "?", lambda: pytest.fail("asked again"))
    assert again == found
    assert type(again.prompt) is type(found.prompt) and isinstance(again.path, Path)
