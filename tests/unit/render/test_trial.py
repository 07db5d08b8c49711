"""A tokenizer or template that ends or hangs its process costs the model, or the shard, only."""

import sys
from pathlib import Path

import numpy as np
import pytest

from batch_scorer.config import Config, load_config
from batch_scorer.errors import ModelError
from batch_scorer.models.directory import ModelFacts
from batch_scorer.models.tokenizer import load_tokenizer
from batch_scorer.quarantine import Bounds, apart
from batch_scorer.records import ParsedRows
from batch_scorer.render.rows import tokenized
from batch_scorer.runs.derive import look_at_model
from tests.helpers.tiny import tiny_reward_model

TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
ROWS = ParsedRows([TALK, "a text"], np.arange(3))
AMPLE = Bounds(60.0, 1 << 32)


def looked_at(model: Path, **settings: object) -> tuple[Config, ModelFacts]:
    config = load_config(model=str(model), inputs="in", output="out", backend="fake", **settings)
    return config, look_at_model(config, with_weights=False)


@pytest.fixture
def new_model(tmp_path: Path) -> Path:
    """Of a model that it has tried before, a reading process has everything at hand."""
    return tiny_reward_model(tmp_path / "new")


def test_a_trial_that_does_not_end_is_the_models_error(new_model: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be run: .*longer than 0\.001 s") as refused:
        looked_at(new_model, read_timeout_s=0.001)
    assert str(new_model) in str(refused.value)


def test_a_trial_that_fills_the_memory_is_the_models_error(new_model: Path) -> None:
    with pytest.raises(ModelError, match="cannot be run"):
        looked_at(new_model, read_memory_gib=1e-5)


def test_an_error_of_the_trial_is_the_one_that_loading_gives(tmp_path: Path) -> None:
    tiny_reward_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        looked_at(tmp_path)


def test_a_process_apart_gives_the_same_ids(tiny_model: Path) -> None:
    config, model = looked_at(tiny_model)
    here = tokenized(ROWS, config, model)
    there = apart(AMPLE, tokenized, ROWS, config, model)
    assert there.token_ids.tolist() == here.token_ids.tolist()


def test_it_has_no_torch(tiny_model: Path) -> None:
    assert not apart(AMPLE, loads_torch, tiny_model)


def loads_torch(model: Path) -> bool:
    load_tokenizer(model)
    return sys.modules["torch"] is not None
