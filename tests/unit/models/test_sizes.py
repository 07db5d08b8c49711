"""An entry of a wrong kind is named, with its value, before anything is built by it."""

import json
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.errors import ModelError
from batch_scorer.models.lora import merge_lora
from batch_scorer.models.sizes import check_sizes

FILE = Path("m/config.json")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": 7}}, "quant_method is '7'"),
        ({"quantization_config": {"weight_block_size": [0, 128]}}, r"weight_block_size is '\[0, "),
        ({"quantization_config": {"weight_block_size": 128}}, "weight_block_size is '128'"),
        ({"quantization_config": {"bits": "four"}}, "bits is 'four'"),
        ({"text_config": {"compression_config": {"config_groups": []}}}, "config_groups is "),
        ({"text_config": {"quantization_config": 3}}, "quantization_config is '3'"),
        (
            {"quantization_config": {"config_groups": {"a": {"weights": {"block_structure": 0}}}}},
            "block_structure is '0'",
        ),
        ({"id2label": ["a"]}, "id2label is "),
    ],
)
def test_an_entry_of_a_config(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=rf"^m/config\.json: {named}.*should be "):
        check_sizes(FILE, config)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"rank_pattern": [8]}, r"rank_pattern is '\[8\]'"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern is "),
        ({"target_modules": 5}, "target_modules is '5'"),
        ({"modules_to_save": [1]}, "modules_to_save is "),
    ],
)
def test_an_entry_of_an_adapter(entry: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **entry}))
    with pytest.raises(ModelError, match=rf"adapter_config\.json: {named}.*should be "):
        merge_lora(None, tmp_path)  # type: ignore[arg-type]  # the base comes later


def test_what_is_right_or_absent_passes() -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "bits": None}
    check_sizes(FILE, {"quantization_config": quantised, "text_config": None})
