"""Whether a checkpoint's tensors are those that its model takes, the same rule for a header and for
a load; and whether its head is one.

transformers matches names and shapes: some families' tensors it renames or fuses on the way (the
experts of a mixture), and only it knows which. Tensors without memory, on torch's `meta` device,
go the same way in milliseconds, so that a model which does not fit is refused before anything is
begun.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles
from batch_scorer.models.directory import refuse_other_width
from batch_scorer.models.registry import ENCODER_HEADS, check_shapes
from batch_scorer.models.weights import (
    body_config,
    checkpoint_tensors,
    header_tensors,
    model_tensors,
    read_head,
)

_LEFT_OVER = (
    "*rotary_emb.inv_freq",  # buffers that older versions saved
    "*.attn.bias",
    "*.attn.masked_bias",
    "*.attention.bias",
    "*.attention.masked_bias",
    "*position_ids",
    "*pooler.*",  # of an encoder whose head does not read it
    "lm_head.*",  # the language model's head beside the score head, and its names elsewhere
    "*.lm_head.*",
    "embed_out.*",
    "cls.*",
    "v_head.*",  # of training with two heads, as GRM's
    "mtp.*",  # predicts tokens further ahead
)
"""Tensors that may be left over: no score depends on them."""
_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
"""The values of transformers' `config.layer_types` that packed attention supports."""
_LAYER_TYPES = ("layer_types", "layers_block_type", "block_types")
"""transformers' names for them; the last is RecurrentGemma's alone (transformers 5.19)."""
_NAMED = 5
"""Most names in a message."""


def check_fit(
    files: ModelFiles, adapter: Adapter, *, embeds: bool, trust_remote_code: bool
) -> str | None:
    """Raise ModelError where a parameter of the model is in no file, a tensor of the files is in no
    model, or a shape is another one. Gives `packing_problem`.

    Reads headers only. Models with code of their own that may run are left to the loading.
    """
    if trust_remote_code and files.config.get("auto_map"):
        return None
    own_head = adapter.build_head is None and not embeds
    skeleton = build_skeleton(files, adapter, own_head=own_head)
    config = skeleton.config.get_text_config()
    for name, stand_in in adapter.tied.items():
        if name not in files.shapes and not getattr(config, "tie_word_embeddings", False):
            raise ModelError(
                f"{files.path}: the weights lack {name}, and the config does not tie it to "
                f"{stand_in} (tie_word_embeddings): there are no logits to read"
            )
    state = dict(model_tensors(files, adapter, own_head=own_head, read=header_tensors))
    load(files, adapter, skeleton, state, own_head=own_head, device_map="meta")
    return None if own_head else packing_problem(skeleton)


def packing_problem(skeleton: PreTrainedModel) -> str | None:
    """Why a decoder cannot be packed; None: it can, or it is no decoder, and runs padded."""
    if not is_causal(skeleton):
        return None
    if foreign := foreign_layers(skeleton.config.get_text_config()):
        why = f"it has layers of type {', '.join(foreign)}"
    elif not skeleton._supports_attention_backend:
        why = "its attention is its own"
    else:
        return None
    return f"{type(skeleton).__name__} cannot be packed: {why}"


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder: it has attention, and none to later tokens."""
    causal = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return bool(causal) and all(causal)


def foreign_layers(config: PretrainedConfig) -> list[str]:
    """The types of the layers that are no attention over keys and values. Their state runs on from
    token to token, so in a packed batch or a shared prefix from one sequence into the next."""
    found = (getattr(config, name, None) for name in _LAYER_TYPES)
    types: list[str] = next((types for types in found if types), [])
    return sorted(set(types) - _PACKED_LAYERS)


def check_head(files: ModelFiles, adapter: Adapter) -> None:
    """Raise ModelError for a head that cannot be built, or that gives one score to every text.

    Reads the head, but not that of `log_probs` or `verdicts`: it is a whole vocabulary's, and never
    beside the safetensors, whose shapes and values are looked at elsewhere.
    """
    if adapter.log_probs or adapter.verdicts:
        return
    if adapter.build_head is None:
        tensors = dict(checkpoint_tensors(files, lambda name: name.startswith(ENCODER_HEADS)))
    else:
        tensors = read_head(files, adapter)
        shapes = {name: [*tensor.shape] for name, tensor in tensors.items()}
        with_head = replace(files, shapes={**shapes, **files.shapes})
        check_shapes(adapter, with_head)
        refuse_other_width(with_head, adapter)
        adapter.build_head(tensors, files.config)
    for name, tensor in tensors.items():
        place = files.sources[name].file if name in files.sources else files.path
        if not tensor.isfinite().all():
            raise ModelError(f"{place}: {name} of the head holds NaN or infinity")
        if tensor.ndim > 1 and not tensor.any():
            raise ModelError(
                f"{place}: {name} of the head is all zeros, as before training: every text would "
                "get the same score"
            )


def build_skeleton(
    files: ModelFiles,
    adapter: Adapter,
    *,
    own_head: bool,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """The model without its weights: its body, or with `own_head` the classifier that transformers
    makes of the config; `settings` are of `from_config`. Raises ModelError."""
    config = body_config(files, adapter, trust_remote_code=trust_remote_code)
    auto: Any = AutoModelForSequenceClassification if own_head else AutoModel
    if own_head and adapter.build_head is not None:
        config.num_labels = 1  # a config without labels means two
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = auto.from_config(
                config, trust_remote_code=trust_remote_code, **settings
            )
    except ValueError as error:
        raise ModelError(f"{files.path}: transformers cannot build it: {error}") from error
    if skeleton.config.is_encoder_decoder and not own_head:
        raise ModelError(f"{files.path}: encoder-decoder models have no single body to pool")
    return skeleton


def load(
    files: ModelFiles,
    adapter: Adapter,
    skeleton: PreTrainedModel,
    state: Mapping[str, Tensor],
    *,
    own_head: bool,
    **settings: Any,
) -> PreTrainedModel:
    """A model like the skeleton with these tensors; `settings` are of `from_pretrained`.

    Raises ModelError as `check_fit` does.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load_state: Any = type(skeleton).from_pretrained
    try:
        with _report_not_logged():
            model, report = load_state(
                None,
                config=skeleton.config,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **settings,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{files.path} cannot be loaded: {error}") from error
    kind = type(model).__name__
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(f"{files.path}: {name} is {[*stored]}, and {kind} expects {[*wanted]}")
    missing = sorted(report["missing_keys"])
    if not own_head:
        # A pooling layer that pretrained encoders' checkpoints lack, and that is not read.
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise ModelError(
            f"{files.path} lacks weights of {kind}, which would be random: {_listed(missing)}"
        )
    refuse_unused(files, adapter, sorted(report["unexpected_keys"]), model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def refuse_unused(
    files: ModelFiles, adapter: Adapter, names: list[str], model: PreTrainedModel | None = None
) -> None:
    """Raise ModelError for tensors that no model took, unless no score can depend on them.

    An adapter without a head reads a body, out of whatever it was trained in: only the tensors
    inside that `model` count.
    """
    unused = [n for n in names if not any(fnmatchcase(n, pattern) for pattern in _LEFT_OVER)]
    if model is not None and not adapter.head and adapter.name == "embedding":
        parts = {name for name, _ in model.named_children()}
        prefix = f"{model.base_model_prefix}."
        unused = [n for n in unused if n.removeprefix(prefix).split(".", 1)[0] in parts]
    if unused:
        raise ModelError(
            f"{files.path}: nothing in the model takes {_listed(unused)}: it would be scored "
            "without them"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


@contextmanager
def _report_not_logged() -> Iterator[None]:
    """transformers logs a table of what does not fit; `load` says it in a line."""
    reporter = logging.getLogger("transformers")
    level = reporter.level
    reporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reporter.setLevel(level)
