from collections.abc import Callable
from pathlib import Path

import pytest

from batch_scorer import shard
from batch_scorer.parity import sample
from tests.parity.tiny_models import build_model


@pytest.fixture(autouse=True)
def _in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and the gate's sample are read in this process, where tests put faults in."""
    for module in (sample, shard):
        monkeypatch.setattr(module, "read_apart", lambda config, size, read, *given: read(*given))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, built once per session."""
    root = tmp_path_factory.mktemp("models")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            build_model(name, root / name)
        return root / name

    return directory
