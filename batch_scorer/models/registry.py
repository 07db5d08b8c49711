"""Which adapter a model has.

The families import torch, which takes seconds and not every process needs; so they are imported
with the first look-up of an adapter.
"""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles

log = logging.getLogger("batch_scorer")

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

_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")
_ENCODER_HEADS = ("classifier.", "classification_head.", "score.")
_OWN_SCORER = "AutoModelForSequenceClassification"
_HEADLESS = ("ForCausalLM", "LMHeadModel", "Model")


@cache
def adapters() -> tuple[Adapter, ...]:
    """All families; special ones come before general ones."""
    from batch_scorer.models.families import ADAPTERS

    return ADAPTERS


def head_files() -> tuple[str, ...]:
    """Files beside the safetensors that may contain a head."""
    return tuple(sorted({file for adapter in adapters() for file in adapter.head_files}))


def adapter_named(name: str) -> Adapter:
    """Raises ConfigError for an unknown name."""
    for adapter in (*adapters(), EMBEDDING, REMOTE_CODE):
        if adapter.name == name:
            return adapter
    raise ConfigError(
        f"adapter: no `{name}`; known are {', '.join(adapter.name for adapter in adapters())}"
    )


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
    complete = [a for a in fitting if a.head and not a.missing_tensors(files)]
    if complete:
        # Two families may have tensors with the same names and different shapes. Where no shape
        # fits, the error is about the most general family.
        adapter = next((a for a in complete if _has_shapes(a, files)), complete[-1])
        _check_shapes(adapter, files)
        _check_tokens(adapter, files)
        if _is_headless(files.architecture) and adapter.name == STOCK:
            log.warning(
                "%s: the config names %s, and the weights hold %s: scored as %s",
                *(files.path, files.architecture, ", ".join(adapter.head), adapter.name),
            )
        return adapter
    encoder = next((a for a in fitting if not a.head), None)
    if encoder and any(name.startswith(_ENCODER_HEADS) for name in files.shapes):
        _check_single_output(_configured_outputs(files.config), files)
        return encoder
    if not asked and _OWN_SCORER in (files.config.get("auto_map") or {}):
        if trust_remote_code:
            return REMOTE_CODE
        raise ModelError(
            f"{files.path}: no family known here scores {files.architecture} (docs/models.md); "
            "to run the Python code that comes with the model: --trust-remote-code"
        )
    if wrapped := _wrapped_head(files):
        raise ModelError(
            f"{files.path}: the score head is there as {wrapped}, saved from a wrapped model "
            "(torch.compile, DDP or FSDP): save the model inside the wrapper, or take the prefix "
            "off all tensors' names"
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


def refuse_quantised(files: ModelFiles) -> None:
    """Raise ModelError for a checkpoint whose weights are stored quantised."""
    method = (files.config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise ModelError(
            f"{files.path}: the weights are quantised ({method}), which is not supported; use the "
            "checkpoint that they were made from (under vLLM, --quantization can quantise it)"
        )


def _wrapped_head(files: ModelFiles) -> str | None:
    """A head's tensor under the prefix that a wrapper has put before all names."""
    heads = {name for adapter in adapters() for name in adapter.head}
    return next(
        (
            name
            for name in files.shapes
            for prefix in _WRAPPERS
            if name.startswith(prefix) and name.removeprefix(prefix) in heads
        ),
        None,
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


def _check_shapes(adapter: Adapter, files: ModelFiles) -> None:
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


def _check_tokens(adapter: Adapter, files: ModelFiles) -> None:
    """Raise if the tokenizer gives other ids to the tokens that the adapter relies on.

    Tokenizers without a tokenizer.json are not checked.
    """
    model_type = adapter.body.model_type or str(files.config.get("model_type"))
    relied_on = adapter.tokens.get(model_type, {})
    path = files.path / "tokenizer.json"
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
        raise ModelError(f"{path}: not readable: {error}") from error
    return pieces | added


def _check_single_output(outputs: int, files: ModelFiles) -> None:
    if outputs != 1:
        raise ModelError(
            f"{files.path}: the head has {outputs} outputs, a scalar reward model has 1; for "
            "outputs named as HelpSteer's attributes name the weights to mix them by: "
            "--adapter nemotron4_attributes or steerlm_attributes"
        )


def _configured_outputs(config: Any) -> int:
    labels = config.get("id2label")
    return len(labels) if labels else 2  # transformers writes id2label unless there are two
