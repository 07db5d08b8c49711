"""Which files of a model folder are opened, and how much of them."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from batch_scorer.errors import ModelError
from batch_scorer.models import files
from batch_scorer.models.directory import find_model
from batch_scorer.models.files import check_folder, read_any_json, read_json


def a_socket(path: Path) -> None:
    os.chdir(path.parent)  # the whole path may be longer than a socket's may be
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


ODD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "pipe": ("tokenizer.json", os.mkfifo, "is a pipe"),
    "pipe of another name": ("qwen.tiktoken", os.mkfifo, "is a pipe"),
    "socket": ("config.json", a_socket, "is a socket"),
    "device": ("merges.txt", lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "folder": ("chat_template.jinja", Path.mkdir, "is a folder"),
    "dead link": ("a.safetensors", lambda path: path.symlink_to("gone"), "leads nowhere"),
    "loop": ("config.json", lambda path: path.symlink_to(path.name), "leads nowhere"),
    "pipe in a folder": ("more/a.jinja", os.mkfifo, "is a pipe"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_refused_before_it_is_opened(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, make, expected = ODD[kind]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(ModelError, match=expected) as refused:
        find_model(str(tmp_path))
    assert str(tmp_path / name) in str(refused.value)


def test_what_nobody_opens_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("gone")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / ".git").mkdir()
    os.mkfifo(tmp_path / ".git" / "a.json")
    check_folder(tmp_path)


def test_a_file_larger_than_any_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate((256 << 20) + 1)
    with pytest.raises(ModelError, match=r"tokenizer\.json: has 268435457 bytes"):
        check_folder(tmp_path)
    monkeypatch.setattr(files, "_MOST_JSON_BYTES", 10)
    (tmp_path / "index.json").write_text('{"a": "long"}')
    with pytest.raises(ModelError, match="more than 10 bytes"):
        read_json(tmp_path / "index.json")


def test_json_that_is_too_deep_is_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(101 * "[" + 101 * "]")
    with pytest.raises(ModelError, match="too deep"):
        read_any_json(file)
    file.write_text("[" * 101)
    with pytest.raises(ModelError, match="too deep"):
        read_any_json(file)
    file.write_text('"' + 5000 * '\\"')
    with pytest.raises(ModelError, match="not readable"):
        read_any_json(file)
    value = {"a": 500 * "[{\"'", "b\\": [[{}], ['\\"[']]}
    file.write_text(json.dumps(value))
    assert read_any_json(file) == value
