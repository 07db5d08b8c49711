from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.tiny_models import build_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, built once per session."""
    root = tmp_path_factory.mktemp("models")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            build_model(name, root / name)
        return root / name

    return directory
