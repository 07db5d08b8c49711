"""Which adapter a model has."""

from typing import Any

from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles
from batch_scorer.models.families import ADAPTERS

EMBEDDING = Adapter(
    name="embedding",
    summary="any body of transformers, without a head: `--task embed`",
    architectures=("*",),
)

_ENCODER_HEADS = ("classifier.", "classification_head.", "score.")


def adapter_named(name: str) -> Adapter:
    """Raises ConfigError for a name that is none."""
    for adapter in (*ADAPTERS, EMBEDDING):
        if adapter.name == name:
            return adapter
    raise ConfigError(
        f"adapter: no `{name}`; known are {', '.join(adapter.name for adapter in ADAPTERS)}"
    )


def choose_adapter(files: ModelFiles, asked: str | None = None) -> Adapter:
    """The first family that fits and whose head is in the weights, or the one asked for.

    Raises ModelError where there is none: what is missing, and what could be meant.
    """
    fitting = [adapter_named(asked)] if asked else [a for a in ADAPTERS if a.fits(files)]
    if refused := next((a for a in fitting if a.refused), None):
        raise ModelError(f"{files.path}: {refused.refused}")
    complete = [a for a in fitting if a.head and not a.missing_tensors(files)]
    if complete:
        _check_shapes(complete[0], files)
        return complete[0]
    encoder = next((a for a in fitting if not a.head), None)
    if encoder and any(name.startswith(_ENCODER_HEADS) for name in files.shapes):
        _check_single_output(_configured_outputs(files.config), files)
        return encoder
    is_bare = files.architecture.endswith(("ForCausalLM", "LMHeadModel"))
    if not fitting or (is_bare and not asked):
        raise ModelError(
            f"{files.path}: no score head: the config says {files.architecture}, and neither name "
            "nor weights are those of a known reward model (docs/models.md). If the reward is the "
            "logit of a token, as in Nemotron-Reward, say so: --adapter token_logit"
        )
    missing = next((a for a in fitting if a.head), fitting[0]).missing_tensors(files)
    raise ModelError(
        f"{files.path}: the weights hold no score head "
        f"(no tensor {' or '.join(missing[:2]) or 'classifier.*'}); it would be random"
    )


def _check_shapes(adapter: Adapter, files: ModelFiles) -> None:
    for name, wanted in adapter.head.items():
        shape = files.shapes[name]
        if wanted and wanted[0] == 1 != shape[0]:
            _check_single_output(shape[0], files)
        if len(shape) != len(wanted) or any(
            size is not None and size != there for size, there in zip(wanted, shape, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ModelError(
                f"{files.path}: {name} is {shape}, and {adapter.name} expects [{expected}]"
            )


def _check_single_output(outputs: int, files: ModelFiles) -> None:
    if outputs != 1:
        raise ModelError(
            f"{files.path}: the head has {outputs} outputs, a scalar reward model has 1"
        )


def _configured_outputs(config: Any) -> int:
    labels = config.get("id2label")
    return len(labels) if labels else 2  # transformers writes id2label unless there are two
