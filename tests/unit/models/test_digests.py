"""Digests of large files are remembered, and never wrong."""

import hashlib
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from batch_scorer.errors import ModelError
from batch_scorer.models import digests

HOURS_AGO = time.time() - 7200


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, each time; everything is large and has long settled."""
    read: list[Path] = []
    compute = digests._read

    def counting(file: Path) -> tuple[str, str | None]:
        read.append(file)
        return compute(file)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(digests, "_SETTLED_S", -1e9)
    monkeypatch.setattr(digests, "_read", counting)
    return read


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_that_nobody_touched_is_read_once(tmp_path: Path, computed: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert [digests.file_digest(file) for _ in range(3)] == [sha256(b"one")] * 3
    assert computed == [file]


def test_any_change_is_seen_even_with_size_and_time_set_back(
    tmp_path: Path, computed: list[Path]
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, (HOURS_AGO, HOURS_AGO))
    assert digests.file_digest(file) == sha256(b"one")
    file.write_bytes(b"two")
    os.utime(file, (HOURS_AGO, HOURS_AGO))
    assert digests.file_digest(file) == sha256(b"two")
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, (HOURS_AGO, HOURS_AGO))
    os.replace(other, file)
    assert digests.file_digest(file) == sha256(b"six")


def test_a_file_that_has_just_changed_is_not_remembered(
    tmp_path: Path, computed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_S", 10.0)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, (HOURS_AGO, HOURS_AGO))
    for _ in range(2):
        digests.file_digest(file)
    assert computed == [file, file]


def test_a_damaged_or_forbidden_cache_is_no_error(
    tmp_path: Path, computed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    digests.file_digest(file)
    (record,) = (tmp_path / "cache").rglob("*.json")
    for damaged in ("", "[]", "{}", '{"state": 1}'):
        record.write_text(damaged)
        assert digests.file_digest(file) == sha256(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file is no folder
    assert digests.file_digest(file) == sha256(b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert digests.file_digest(file) == sha256(b"one")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_found_and_remembered(
    tmp_path: Path, computed: list[Path], dtype: str, value: float
) -> None:
    file = tmp_path / "model.safetensors"
    largest = torch.finfo(getattr(torch, dtype)).max
    sound = torch.full((300, 500), largest, dtype=getattr(torch, dtype))
    broken = sound.clone()
    broken[299, 498] = value
    tensors = {"a": sound, "ids": torch.full((7, 2), -1), "z.mask": broken.clone()}
    save_file(tensors, file)
    assert digests.file_digest(file) == sha256(file.read_bytes())
    save_file({**tensors, "b": broken}, file)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"model.safetensors: b holds NaN or infinity"):
            digests.file_digest(file)
    assert computed == [file, file]
