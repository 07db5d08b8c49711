"""Which adapter a model has.

The families import torch, which takes seconds and not every process needs; so they are imported
with the first look-up of an adapter.
"""

import json
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from batch_scorer.errors import ConfigError, ModelError, cause_of
from batch_scorer.models.adapter import OUTPUT_WEIGHTS, Adapter, ModelFiles

EMBEDDING = Adapter(
    name="embedding",
    summary="any transformers body, without a head: `--task embed`",
    architectures=("*",),
)

REMOTE_CODE = Adapter(
    name="remote_code",
    summary="scored by Python code that comes with the model: `--trust-remote-code`",
    architectures=("*",),
    engines=("hf",),
)

STOCK = "sequence_classifier"
"""The family that transformers' own AutoModelForSequenceClassification scores."""

NAMED = "named_outputs"
"""The family of heads whose outputs the user names."""

JUDGE = "judge"
"""The family of language models that are asked by a page."""

HEAD_FILES = ("gating_layer.pt", "regression_layer.pt", "value_head.bin")
"""The families' files beside the safetensors that may contain a head. To fetch them, no family has
to be asked, which takes torch."""

_PLACEHOLDER = re.compile(r"LABEL_\d+")
"""What transformers calls an output without a name."""
ENCODER_HEADS = ("classifier.", "classification_head.", "score.")
_OWN_SCORER = "AutoModelForSequenceClassification"
_HEADLESS = ("ForCausalLM", "LMHeadModel", "Model")


@cache
def adapters() -> tuple[Adapter, ...]:
    """All families; special ones come before general ones."""
    from batch_scorer.models.families import ADAPTERS

    return ADAPTERS


def adapter_named(name: str) -> Adapter:
    """Raises ConfigError for an unknown name."""
    for adapter in (*adapters(), EMBEDDING, REMOTE_CODE):
        if adapter.name == name:
            return adapter
    raise ConfigError(
        f"adapter: no `{name}`; known are {', '.join(adapter.name for adapter in adapters())}"
    )


def is_head_name(name: str) -> bool:
    """Whether a tensor of this name is part of some family's head."""
    return name.startswith(ENCODER_HEADS) or any(a.is_head_tensor(name) for a in adapters())


def choose_adapter(
    files: ModelFiles, asked: str | None = None, *, trust_remote_code: bool = False
) -> Adapter:
    """The first family that fits and whose head is in the weights, or the one asked for. Where none
    does, and only with `trust_remote_code`, the model's own code.

    Raises ModelError where there is none, with what is missing and what could be meant.
    """
    fitting = [adapter_named(asked)] if asked else [a for a in adapters() if a.fits(files)]
    if refused := next((a for a in fitting if a.refused), None):
        raise ModelError(f"{files.path}: {refused.refused}")
    _check_cross_encoder(fitting, files, asked)
    complete = [a for a in fitting if a.head and not a.missing_tensors(files)]
    if complete:
        # Two families may have tensors with the same names and different shapes. Where no shape
        # fits, the error is about the most general family.
        adapter = next((a for a in complete if _has_shapes(a, files)), complete[-1])
        check_shapes(adapter, files)
        _check_tokens(adapter, files)
        if adapter.name == NAMED:
            _check_names(adapter, files)
        return adapter
    encoder = next((a for a in fitting if not a.head), None)
    if encoder and any(name.startswith(ENCODER_HEADS) for name in files.shapes):
        _check_single_output(_configured_outputs(files.config), files)
        return encoder
    if not asked and _OWN_SCORER in (files.config.get("auto_map") or {}):
        if trust_remote_code:
            return REMOTE_CODE
        raise ModelError(
            f"{files.path}: no family known here scores {files.architecture} (docs/models.md); "
            "to run the Python code that comes with the model: --trust-remote-code"
        )
    if not asked and (not fitting or _is_headless(files.architecture)):
        raise ModelError(
            f"{files.path}: no score head: the config names {files.architecture}, and neither name "
            "nor weights are those of a known reward model (docs/models.md). If the reward is the "
            "logit of a token, as in Nemotron-Reward, add --adapter token_logit"
        )
    general = [a for a in fitting if a.head] or fitting
    missing = general[-1].missing_tensors(files)
    raise ModelError(
        f"{files.path}: the weights contain no score head "
        f"(no tensor {' or '.join(missing[:2]) or 'classifier.*'}); it would be random"
    )


def mismatch_of(files: ModelFiles, adapter: Adapter) -> tuple[str, ...]:
    """A line where the config names a model without the head that is in the weights."""
    if _is_headless(files.architecture) and adapter.name in (STOCK, NAMED):
        return (
            f"the config names {files.architecture}, and the weights hold "
            f"{', '.join(adapter.head)}: scored as {adapter.name}",
        )
    return ()


def are_names(names: Collection[str]) -> bool:
    """Whether several outputs have names that somebody gave them."""
    return len(names) > 1 and not any(_PLACEHOLDER.fullmatch(name) for name in names)


def _check_names(adapter: Adapter, files: ModelFiles) -> None:
    """Raise where the names do not fit the head, or the weights the names."""
    names, (outputs, _) = adapter.attributes(files.config), files.shapes["score.weight"]
    if outputs == 1:
        raise ConfigError(
            f"output_names, output_weights: the head of {files.path} has one output, which is the "
            "score; leave them out"
        )
    if not are_names(names):
        _check_single_output(outputs, files)
    if len(names) != outputs:
        raise ModelError(
            f"{files.path}: the head has {outputs} outputs, and there are {len(names)} names: "
            f"{', '.join(names)}"
        )
    if len(set(names)) < len(names):
        raise ModelError(f"{files.path}: two outputs have one name: {', '.join(names)}")
    if unknown := sorted(set(files.config.get(OUTPUT_WEIGHTS, {})) - set(names)):
        raise ConfigError(
            f"output_weights: no output is named {', '.join(unknown)}; there are {', '.join(names)}"
        )


def _is_headless(architecture: str) -> bool:
    return architecture.endswith(_HEADLESS) and "Reward" not in architecture


def _has_shapes(adapter: Adapter, files: ModelFiles) -> bool:
    return all(
        _is_shape(files.shapes[name], wanted)
        for name, wanted in adapter.head.items()
        if name in files.shapes
    )


def _is_shape(shape: list[int], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size is None or size == there for size, there in zip(wanted, shape, strict=True)
    )


def check_shapes(adapter: Adapter, files: ModelFiles) -> None:
    """Raise ModelError for a head tensor of another shape than the family's."""
    for name, wanted in adapter.head.items():
        if name not in files.shapes:
            continue  # in a separate file, or tied to the body's
        shape = files.shapes[name]
        if wanted and wanted[0] == 1 != shape[0]:
            _check_single_output(shape[0], files)
        if not _is_shape(shape, wanted):
            expected = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ModelError(
                f"{files.path}: {name} is {shape}, and {adapter.name} expects [{expected}]"
            )


def _check_cross_encoder(fitting: list[Adapter], files: ModelFiles, asked: str | None) -> None:
    """Raise if the model was saved as a CrossEncoder whose scores cannot be had here; where another
    family is asked for, that is no matter."""
    problem = files.cross_encoder and files.cross_encoder.problem
    if problem and (asked is None or fitting[0].is_cross_encoder):
        raise ModelError(
            f"{files.path}: saved as a CrossEncoder of sentence-transformers whose scores cannot "
            f"be had here: {problem}; to take the raw output: --adapter encoder for an encoder, "
            "sequence_classifier for a decoder"
        )


def _check_tokens(adapter: Adapter, files: ModelFiles) -> None:
    """Raise if the tokenizer gives other ids to the tokens that the adapter relies on.

    Tokenizers without a tokenizer.json are not checked.
    """
    model_type = adapter.body.model_type or str(files.config.get("model_type"))
    relied_on = adapter.tokens.get(model_type, {})
    path = files.tokenizer_path / "tokenizer.json"
    if not relied_on or not path.is_file():
        return
    ids = read_vocabulary(path)
    for token, wanted in relied_on.items():
        if ids.get(token) != wanted:
            raise ModelError(
                f"{path}: {token!r} is {ids.get(token, 'no token')}, and {adapter.name} was "
                f"written for a tokenizer where it is {wanted}"
            )


def read_vocabulary(path: Path) -> dict[str, int]:
    """The tokens in a tokenizer.json and their ids. Raises ModelError if it is damaged."""
    try:
        stored = json.loads(path.read_text())
        tokens = stored["model"]["vocab"]
        # Unigram models list [token, log probability] in the order of the ids.
        pieces = tokens if isinstance(tokens, dict) else {t: i for i, (t, _) in enumerate(tokens)}
        added = {token["content"]: token["id"] for token in stored.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not readable: {cause_of(error)}") from error
    return pieces | added


def _check_single_output(outputs: int, files: ModelFiles) -> None:
    if outputs != 1:
        raise ModelError(
            f"{files.path}: the head has {outputs} outputs, a scalar reward model has 1, and the "
            "config has no names for them: --output-names a,b,… names them, and --output-weights "
            "a=1,b=0.5 makes a score of them"
        )


def _configured_outputs(config: Any) -> int:
    labels = config.get("id2label")
    return len(labels) if labels else 2  # transformers writes id2label unless there are two
