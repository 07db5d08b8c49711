"""An entry of a folder that cannot be used costs itself alone, and is said."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from batch_scorer.config import load_partial_config
from batch_scorer.errors import InputError
from batch_scorer.inputs.plan import make_plan
from batch_scorer.inputs.sources import list_inputs
from batch_scorer.storage import Store
from tests.helpers.inputs import jsonl, pair_rows


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "odd.jsonl")


def _socket(folder: Path) -> None:
    # Its path may be short only.
    here = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/odd.jsonl")
    os.close(here)


def _loop(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("..")


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "control character": (lambda d: (d / "a\x07b.jsonl").touch(), r"a\x07b.jsonl"),
    "line feed": (lambda d: (d / "a\nb.jsonl").touch(), r"a\nb.jsonl"),
    "not UTF-8": (lambda d: (d / "\udcff.jsonl").touch(), r"\udcff.jsonl"),
    "folder's name": (lambda d: (d / "a\x01b").mkdir(), r"a\x01b"),
    "link to itself": (lambda d: (d / "odd").symlink_to("odd"), "odd"),
    "dangling link": (lambda d: (d / "odd.jsonl").symlink_to("nowhere"), "odd.jsonl"),
    "loop": (_loop, "sub/up"),
    "pipe": (_pipe, "odd.jsonl"),
    "socket": (_socket, "odd.jsonl"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    (made / "good.jsonl").write_bytes(jsonl(pair_rows(2)))
    return made


@pytest.mark.parametrize("odd", ODD)
def test_an_entry_that_cannot_be_used_fails_alone(folder: Path, odd: str) -> None:
    make, name = ODD[odd]
    make(folder)
    plan = make_plan(load_partial_config(inputs=(str(folder),)))
    assert [shard.source.key for shard in plan.shards] == ["good.jsonl"]
    assert [receipt.input for receipt in plan.failed] == [name]
    assert plan.failed[0].detail
    keys = [info.key for info in Store(str(folder), {}).list()]
    assert keys == ["good.jsonl"]  # an output with such an entry is read, too


@pytest.mark.parametrize(
    ("inputs", "exclude", "failed"),
    [
        ("", (), ["deep/lost", "lost"]),
        ("*.jsonl", (), []),
        ("*/*.jsonl", (), ["lost"]),
        ("**/*.jsonl", (), ["deep/lost", "lost"]),
        ("deep*/**", (), ["deep/lost"]),
        ("", ("lost",), ["deep/lost"]),
    ],
)
def test_what_is_not_asked_for_does_not_fail(
    folder: Path, inputs: str, exclude: tuple[str, ...], failed: list[str]
) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "more.jsonl").write_bytes(jsonl(pair_rows(1)))
    for name in ("lost", "deep/lost", ".hidden"):
        (folder / name).symlink_to("nowhere")
    os.mkfifo(folder / "notes.txt")
    listing = list_inputs(load_partial_config(inputs=(f"{folder}/{inputs}",), exclude=exclude))
    roots = {source.root for source, _ in listing.unusable}
    assert [f"{s.root}/{s.key}".removeprefix(f"{folder}/") for s, _ in listing.unusable] == failed
    assert len(roots) <= 1
    assert [Path(url).name for url in listing.skipped] in ([], ["notes.txt"])


def test_links_are_followed_and_a_folder_may_have_several_names(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "b.jsonl").write_bytes(jsonl(pair_rows(1)))
    (folder / "link.jsonl").symlink_to("good.jsonl")
    (folder / "other").symlink_to("sub")
    (folder / ".unfinished#1").touch()
    infos = {info.key: info for info in Store(str(folder), {}).list()}
    assert sorted(infos) == ["good.jsonl", "link.jsonl", "other/b.jsonl", "sub/b.jsonl"]
    assert infos["link.jsonl"].version == Store(str(folder), {}).head("link.jsonl").version
    assert sorted(i.key for i in Store(str(folder), {}).list("sub")) == ["sub/b.jsonl"]
    assert list(Store(str(folder), {}).list("nothing")) == []


@pytest.mark.parametrize("name", ["odd.jsonl", "odd"])
def test_a_pipe_that_is_named_is_refused_and_not_opened(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="is a device, a pipe or a socket"):
        list_inputs(load_partial_config(inputs=(f"{folder}/{name}",)))


def test_a_folder_with_nothing_else_says_why(folder: Path) -> None:
    (folder / "good.jsonl").unlink()
    (folder / "odd").symlink_to("odd")
    with pytest.raises(InputError, match="odd: cannot be followed: Too many levels"):
        list_inputs(load_partial_config(inputs=(str(folder),)))


@pytest.mark.parametrize(
    "pattern", ["[", "a[", "[]", "[!]", "**", "**/", "a**b", "[z-a]", "[[&&]]"]
)
def test_a_broken_glob_is_one_line(folder: Path, pattern: str) -> None:
    config = load_partial_config(inputs=(f"{folder}/{pattern}x",))
    with pytest.raises(Exception, match=r"\A[^\n]+\Z") as refused:
        list_inputs(config)
    assert type(refused.value).__name__ in ("InputError", "ConfigError")


def test_a_file_that_would_lie_at_the_top_is_said_not_to_be_there() -> None:
    """It has no folder before its name but the root."""
    with pytest.raises(InputError, match=r"/nowhere\.parquet: no such file"):
        list_inputs(load_partial_config(inputs=("/nowhere.parquet",)))
