"""What sentence-transformers' files say about a CrossEncoder: activation, lengths, prompt.

Which files count, and what holds where they say nothing, is as in sentence-transformers 6.2; older
versions wrote a part of them. Nothing is imported by a name that a file gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_scorer.models.files import read_json, read_json_objects

SETTINGS_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")

_ACTIVATIONS = ("Identity", "Sigmoid", "Tanh", "ReLU")
"""Modules of torch.nn, none of which turns the order of the logits round."""
_DEFAULT_ACTIVATION = "Sigmoid"
"""sentence-transformers' own for one output, from its first version on."""
_OLD_ACTIVATION = "sbert_ce_default_activation_function"
"""The entry of config.json before version 4."""
_TASK = "sequence-classification"
_WITHOUT_EFFECT = frozenset(
    # How it loads the model and names its outputs, and what is looked at below.
    {"module_output_name", "unpad_inputs", "model_args", "model_kwargs", "max_seq_length"}
    | {"modality_config", "transformer_task"}
)


@dataclass(frozen=True, slots=True)
class CrossEncoder:
    """How sentence-transformers scores a pair with a model of one output.

    `activation` is the module of torch.nn that is applied to the logit. `max_tokens` is the length
    that its own files set, None where they leave it to the tokenizer's. `prompt` stands before the
    question. `problem` says why the model cannot be scored like this here, None: it can.
    """

    activation: str = _DEFAULT_ACTIVATION
    max_tokens: int | None = None
    prompt: str = ""
    problem: str | None = None


def read_cross_encoder(path: Path, config: Mapping[str, Any]) -> CrossEncoder | None:
    """What the files of a directory say, `config` being its config.json; None for a model that was
    not saved as a CrossEncoder.

    Raises ModelError for a file that is no JSON of its kind.
    """
    modules, settings, transformer = (path / name for name in SETTINGS_FILES)
    # Without modules.json sentence-transformers does not read its settings either.
    saved = read_json(settings) if modules.is_file() and settings.is_file() else {}
    is_saved = saved.get("model_type") == "CrossEncoder"
    marks = config.get("sentence_transformers")
    if not is_saved and not isinstance(marks, Mapping) and _OLD_ACTIVATION not in config:
        return None
    marks = marks if isinstance(marks, Mapping) else {}
    if not is_saved:
        return _settled(marks.get("activation_fn") or config.get(_OLD_ACTIVATION))
    entries = read_json(transformer) if transformer.is_file() else {}
    prompts, prompt_name = saved.get("prompts") or {}, saved.get("default_prompt_name")
    prompt = prompts.get(str(prompt_name)) if isinstance(prompts, dict) else None
    problems = _problems(read_json_objects(modules), entries)
    if prompt_name is not None and prompt is None:
        problems.append(f"{settings.name} has no prompt {prompt_name}, its default")
    return _settled(
        saved.get("activation_fn") or marks.get("activation_fn") or config.get(_OLD_ACTIVATION),
        max_tokens=entries.get("max_seq_length"),
        prompt=str(prompt or ""),
        problems=problems,
    )


def _settled(
    activation: Any, max_tokens: Any = None, prompt: str = "", problems: Sequence[str] = ()
) -> CrossEncoder:
    """The same with what the files do not say, and what is wrong with what they do."""
    name = _last_part(activation or f"torch.nn.{_DEFAULT_ACTIVATION}")
    wrong = list(problems)
    if activation and not (str(activation).startswith("torch.nn.") and name in _ACTIVATIONS):
        known = ", ".join(_ACTIVATIONS)
        wrong.append(f"its activation is {activation}, and known are torch.nn's {known}")
    if max_tokens is not None and not (isinstance(max_tokens, int) and max_tokens > 0):
        wrong.append(f"max_seq_length is {max_tokens}")
        max_tokens = None
    return CrossEncoder(name, max_tokens, prompt, "; ".join(wrong) or None)


def _problems(modules: Sequence[Mapping[str, Any]], transformer: Mapping[str, Any]) -> list[str]:
    """What would change a score and is not done here."""
    problems = []
    types = [_last_part(module.get("type")) for module in modules]
    if types != ["Transformer"]:
        problems.append(f"modules.json lists {', '.join(types) or 'nothing'}")
    file = SETTINGS_FILES[2]
    if transformer.get("transformer_task", _TASK) != _TASK:
        problems.append(f"{file} names the task {transformer['transformer_task']}")
    if "message" in str(transformer.get("modality_config")):
        problems.append(f"{file} has a template render pairs, with the roles query and document")
    others = [key for key, value in transformer.items() if value and key not in _WITHOUT_EFFECT]
    return problems + [f"{file} sets {key}" for key in others]


def _last_part(name: Any) -> str:
    return str(name).rsplit(".", 1)[-1]
