"""Which folders are CrossEncoders of sentence-transformers, and what their files say."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from batch_scorer.errors import ModelError
from batch_scorer.models.cross_encoder import CrossEncoder, read_cross_encoder
from batch_scorer.models.directory import inspect_model, read_model_files
from batch_scorer.models.registry import choose_adapter
from tests.helpers.adapters import peft_adapter
from tests.parity.tiny_models import build_model, change_config

TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
# As sentence-transformers 6.2 writes them.
SAVED = {"model_type": "CrossEncoder", "activation_fn": IDENTITY, "prompts": {}}
MODULE = {"idx": 0, "name": "0", "path": "", "type": TRANSFORMER}
TEXT = {
    "transformer_task": "sequence-classification",
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "scores",
}


def write(path: Path, settings: Any = None, modules: Any = None, transformer: Any = None) -> None:
    for name, value in (
        ("config_sentence_transformers.json", settings),
        ("modules.json", modules),
        ("sentence_bert_config.json", transformer),
    ):
        if value is not None:
            (path / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({"sentence_transformers": {"activation_fn": TANH, "version": "4.0.1"}}, "Tanh"),
        ({"sentence_transformers": {"version": "4.0.1"}}, "Sigmoid"),
        ({"sbert_ce_default_activation_function": IDENTITY}, "Identity"),
        ({"sbert_ce_default_activation_function": None}, "Sigmoid"),
        (
            {
                "sentence_transformers": {"activation_fn": TANH},
                "sbert_ce_default_activation_function": IDENTITY,
            },
            "Tanh",
        ),
    ],
)
def test_older_versions_write_into_the_config(
    config: dict[str, Any], activation: str, tmp_path: Path
) -> None:
    assert read_cross_encoder(tmp_path, config) == CrossEncoder(activation)


def test_version_6_writes_files_of_its_own(tmp_path: Path) -> None:
    saved = {**SAVED, "prompts": {"q": "Query: ", "d": "x"}, "default_prompt_name": "q"}
    write(tmp_path, saved, [MODULE], {**TEXT, "max_seq_length": 384})
    assert read_cross_encoder(tmp_path, {}) == CrossEncoder("Identity", 384, "Query: ")
    write(tmp_path, SAVED | {"activation_fn": None, "prompts": {"q": "Query: "}})
    in_config = {"sentence_transformers": {"activation_fn": TANH}}
    assert read_cross_encoder(tmp_path, in_config) == CrossEncoder("Tanh", 384)


def test_other_models_are_none(tmp_path: Path) -> None:
    """Embedding models have the same files, and plain classifiers none."""
    config = {"architectures": ["BertForSequenceClassification"]}
    assert read_cross_encoder(tmp_path, config) is None
    write(tmp_path, {**SAVED, "model_type": "SentenceTransformer"}, [MODULE])
    assert read_cross_encoder(tmp_path, config) is None
    # Without modules.json sentence-transformers does not read its settings.
    (tmp_path / "modules.json").unlink()
    write(tmp_path, SAVED)
    assert read_cross_encoder(tmp_path, config) is None


@pytest.mark.parametrize(
    ("settings", "modules", "transformer", "problem"),
    [
        ({"activation_fn": "os.system"}, [MODULE], TEXT, "its activation is os.system"),
        ({"activation_fn": "torch.nn.GLU"}, [MODULE], TEXT, "its activation is torch.nn.GLU"),
        ({}, [MODULE, {"type": "a.b.LogitScore"}], TEXT, "lists Transformer, LogitScore"),
        ({}, [], TEXT, "modules.json lists nothing"),
        ({}, [MODULE], {"transformer_task": "text-generation"}, "names the task text-generation"),
        ({}, [MODULE], {"modality_config": {"message": {}}}, "the roles query and document"),
        ({}, [MODULE], {"do_lower_case": True}, "sets do_lower_case"),
        ({}, [MODULE], {"processing_kwargs": {"text": {"max_length": 9}}}, "processing_kwargs"),
        ({}, [MODULE], {"max_seq_length": "long"}, "max_seq_length is long"),
        ({"default_prompt_name": "q"}, [MODULE], TEXT, "has no prompt q"),
        ({"default_prompt_name": "q", "prompts": [1]}, [MODULE], TEXT, "has no prompt q"),
    ],
)
def test_what_is_not_done_here_is_a_problem(
    settings: Any, modules: Any, transformer: Any, problem: str, tmp_path: Path
) -> None:
    write(tmp_path, SAVED | settings, modules, transformer)
    found = read_cross_encoder(tmp_path, {})
    assert found is not None and found.problem is not None and problem in found.problem


@pytest.mark.parametrize("text", ["{}", "[1]", "["])
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path, SAVED, [MODULE])
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=r"modules.json: not "):
        read_cross_encoder(tmp_path, {})


def test_a_folder_is_a_cross_encoder_by_its_files_or_where_asked(tmp_path: Path) -> None:
    build_model("bert", tmp_path)
    assert choose_adapter(read_model_files(tmp_path)).name == "encoder"
    asked = inspect_model(tmp_path, adapter="cross_encoder")
    assert (asked.adapter, asked.attributes) == ("cross_encoder", ("raw_score",))
    write(tmp_path, SAVED, [MODULE], {**TEXT, "max_seq_length": 100})
    found = inspect_model(tmp_path)
    assert (found.adapter, found.max_tokens) == ("cross_encoder", 100)
    raw = inspect_model(tmp_path, adapter="encoder")
    assert (raw.adapter, raw.attributes, raw.max_tokens) == ("encoder", (), 256)


def test_another_activation_is_another_model(tmp_path: Path) -> None:
    build_model("bert", tmp_path)
    write(tmp_path, SAVED, [MODULE], TEXT)
    before = inspect_model(tmp_path).digest
    write(tmp_path, SAVED | {"activation_fn": TANH})
    assert inspect_model(tmp_path).digest != before


def test_an_adapters_files_say_how_it_was_trained(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    build_model("bert", base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    peft_adapter(model, lora, base=str(base), target_modules=["query"])
    assert inspect_model(lora, base=base).adapter == "encoder"
    write(lora, SAVED, [MODULE], TEXT)
    found = inspect_model(lora, base=base)
    assert (found.adapter, found.attributes) == ("cross_encoder", ("raw_score",))
    assert read_model_files(base, lora_dir=lora).cross_encoder == CrossEncoder("Identity")
    write(lora, SAVED | {"activation_fn": TANH})
    assert inspect_model(lora, base=base).digest != found.digest


def test_a_problem_stops_before_anything_is_scored(tmp_path: Path) -> None:
    build_model("bert", tmp_path)
    change_config(tmp_path, sentence_transformers={"activation_fn": "evil.Module"})
    with pytest.raises(ModelError, match=r"its activation is evil.Module.*--adapter encoder"):
        inspect_model(tmp_path)
    with pytest.raises(ModelError, match=r"evil.Module"):
        inspect_model(tmp_path, adapter="cross_encoder")
    assert inspect_model(tmp_path, adapter="encoder").adapter == "encoder"
    assert inspect_model(tmp_path, embeds=True).adapter == "embedding"
