"""What a folder of inputs can hold beside files."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.corpus.case import Case, Make, asks, file_case, lines

ROWS = 2
DATA = lines(asks(ROWS))


def link(name: str, target: str) -> Make:
    return lambda folder: (folder / name).symlink_to(target)


def folder_of(name: str) -> Make:
    return lambda folder: (folder / name).mkdir(parents=True)


def loop(folder: Path) -> None:
    (folder / "m").mkdir()
    (folder / "m" / "rows.jsonl").write_bytes(DATA)
    (folder / "m" / "again").symlink_to(folder)


def two_loops(folder: Path) -> None:
    for one, other in (("m", "n"), ("n", "m")):
        (folder / one).mkdir()
        (folder / one / "again").symlink_to(folder / other)


def linked_folder(folder: Path) -> None:
    (folder.parent / "beside").mkdir()
    (folder.parent / "beside" / "rows.jsonl").write_bytes(DATA)
    (folder / "m").symlink_to(folder.parent / "beside")


def linked_file(folder: Path) -> None:
    (folder.parent / "rows.jsonl").write_bytes(DATA)
    (folder / "m.jsonl").symlink_to(folder.parent / "rows.jsonl")


def raw_name(name: bytes) -> Make:
    def make(folder: Path) -> None:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(DATA)

    return make


def pipe(name: str) -> Make:
    return lambda folder: os.mkfifo(folder / name)


def socket_file(name: str) -> Make:
    def make(folder: Path) -> None:
        before = os.getcwd()  # a socket's path may have 100 letters only
        os.chdir(folder)
        try:
            with socket.socket(socket.AF_UNIX) as found:
                found.bind(name)
        finally:
            os.chdir(before)

    return make


def many(folder: Path) -> None:
    for number in range(300):
        (folder / f"m{number}.txt").write_text("x")


def deep(folder: Path) -> None:
    place = folder.joinpath(*["d"] * 40)
    place.mkdir(parents=True)
    (place / "rows.jsonl").write_bytes(DATA)


def failing(name: str, make: Make, key: str, reason: str) -> Case:
    return Case(name, make, failed={key: reason})


NAMES: dict[str, str] = {
    "a blank": "m m.jsonl", "a percent sign": "m%20m.jsonl", "a plus": "m+m.jsonl",
    "a hash": "m#1.jsonl", "a question mark": "m?.jsonl", "an asterisk": "m*.jsonl",
    "brackets": "m[1].jsonl", "braces": "{m}.jsonl", "a quote": "m'\".jsonl",
    "a backslash": "m\\n.jsonl", "a colon": "m:1.jsonl", "an at sign": "m@1.jsonl",
    "letters of other scripts": "\u043f\u0440\u0438\u0432\u0435\u0442.jsonl",
    "an emoji": "m\U0001f600.jsonl", "an e and an accent": "me\u0301.jsonl",
    "right to left": "m\u202e.jsonl", "two dots": "m..jsonl", "a dash before": "-m.jsonl",
    "an equals sign": "day=2026-11-28/m.jsonl", "an ampersand": "m&n.jsonl", "a tilde": "~m.jsonl",
    "200 letters": "m" * 200 + ".jsonl", "a bar": "m|n.jsonl", "angles": "<m>.jsonl",
    "a tag of a terminal": "[red]m[/red].jsonl", "a comma": "m,n.jsonl", "a dollar": "$m.jsonl",
}  # fmt: skip

PASSED_OVER: dict[str, Make | Callable[[Path], object]] = {
    "an empty folder": folder_of("m"),
    "a folder called like a file": folder_of("m.jsonl"),
    "a hidden file": lambda f: (f / ".m.jsonl").write_bytes(b"{"),
    "a file that begins with a line": lambda f: (f / "_m.jsonl").write_bytes(b"{"),
    "a file of no kind": lambda f: (f / "m.exe").write_bytes(b"MZ"),
    "a file without a suffix": lambda f: (f / "m").write_bytes(b"x"),
    "a suffix alone": lambda f: (f / ".parquet").write_bytes(b"x"),
    "300 files of no kind": many,
    "a lock of Spark": lambda f: (f / "_SUCCESS").write_bytes(b""),
    "a pipe of no kind": pipe("m.pipe"),
    "a socket of no kind": socket_file("m.sock"),
}

CASES: list[Case] = [
    *(file_case(f"a name with {what}", name, DATA, ROWS) for what, name in NAMES.items()),
    *(Case(name, make) for name, make in PASSED_OVER.items()),
    Case("a link to a file", linked_file, ROWS),
    Case("a link to a folder", linked_folder, ROWS),
    Case("a folder 40 deep", deep, ROWS),
    Case("a loop of folders", loop, ROWS, failed={"m/again": "unreadable_file"}),
    Case("two folders in a loop", two_loops,
         failed={f"{name}/again/again": "unreadable_file" for name in "mn"}),
    failing("a broken link of no kind", link("m.lnk", "nowhere"), "m.lnk", "unreadable_file"),
    failing("a broken link", link("m.jsonl", "nowhere.jsonl"), "m.jsonl", "unreadable_file"),
    failing("a link to itself", link("m.jsonl", "m.jsonl"), "m.jsonl", "unreadable_file"),
    failing("a pipe", pipe("m.jsonl"), "m.jsonl", "unreadable_file"),
    failing("a socket", socket_file("m.jsonl"), "m.jsonl", "unreadable_file"),
    failing("a device", link("m.jsonl", "/dev/null"), "m.jsonl", "unreadable_file"),
    failing("a name with a line feed", raw_name(b"m\nn.jsonl"), "m\\nn.jsonl", "unreadable_file"),
    failing("a name with an escape", raw_name(b"m\x1b[31m.jsonl"), "m\\x1b[31m.jsonl",
            "unreadable_file"),
    failing("a name that is no text", raw_name(b"m\xff.jsonl"), "m\\udcff.jsonl",
            "unreadable_file"),
]  # fmt: skip
