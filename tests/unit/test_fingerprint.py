from datetime import datetime
from typing import Any

import pytest

from batch_scorer.config import Config, load_config
from batch_scorer.fingerprint import Fingerprint, score_fingerprint
from batch_scorer.models.adapter import Prompt

FACTS: dict[str, Any] = {
    "model_digest": "d",
    "base_digest": None,
    "reference_digest": None,
    "adapter": "sequence_classifier",
    "backend": "hf",
    "attention": "packed",
    "embedding": None,
    "dtype": "float32",
    "max_tokens": 100,
    "text": Prompt().to_json(),
    "probe_digest": "p",
}


def _config(**settings: Any) -> Config:
    return load_config(model="m", inputs=("in",), output="out", **settings)


def _fingerprint(config: Config | None = None, **facts: Any) -> Fingerprint:
    return score_fingerprint(config or _config(), **{**FACTS, **facts})


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "e"},
        {"base_digest": "b"},
        {"reference_digest": "r"},
        {"dtype": "bfloat16"},
        {"max_tokens": 99},
        {"probe_digest": "q"},
        {"text": Prompt(date=datetime(2026, 11, 28)).to_json()},
        {"text": Prompt(template="{{ messages }}").to_json()},
        {"text": Prompt(eos="openrlhf").to_json()},
        {"config": _config(over_length="truncate_left")},
        {"attention": "eager"},
        {"config": _config(step_aggregation="mean")},
        {"config": _config(token_scores=True)},
        {"config": _config(precision="int8")},
        {"config": _config(invariant=True)},
        {"backend": "vllm"},
        {"adapter": "value_head"},
        {"embedding": ("mean", True)},
    ],
)
def test_what_changes_scores_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert _fingerprint(**change).digest != _fingerprint().digest


@pytest.mark.parametrize(
    "settings",
    [{"workers": 4}, {"token_budget": 99}, {"use_ray": False}, {"attempts": 9}, {"lease_s": 1.0}],
)
def test_how_fast_and_where_does_not(settings: dict[str, Any]) -> None:
    assert _fingerprint(_config(**settings)).digest == _fingerprint().digest


def test_a_setting_that_came_later_leaves_the_digests_of_older_outputs() -> None:
    assert "precision" not in _fingerprint().parts


def test_differences_name_the_part_and_both_values() -> None:
    there = _fingerprint(dtype="bfloat16", text={**FACTS["text"], "bos": "never"})
    lines = _fingerprint(dtype="float32").differences(there)
    assert lines == ["dtype: bfloat16 there, float32 here", "text.bos: never there, auto here"]
