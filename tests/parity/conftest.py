from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import build_model


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Short operations wait for each other's threads: on a busy machine two are ten times slower
    than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, built once per session."""
    root = tmp_path_factory.mktemp("models")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            build_model(name, root / name)
        return root / name

    return directory
