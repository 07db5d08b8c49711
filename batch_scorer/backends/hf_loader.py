"""A Hugging Face model from its directory: class, attention, weights, and what is refused."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from batch_scorer.backends.attention import PACKED_ATTENTION, SUPPORTED_LAYER_TYPES
from batch_scorer.backends.base import refuse_dtype
from batch_scorer.errors import MissingExtraError, ModelError
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.weights import body_config, converted_state

logger = logging.getLogger(__name__)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder: it has attention, and none to later tokens."""
    causal = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return bool(causal) and all(causal)


def max_sequence_length(model: PreTrainedModel) -> int | None:
    """The number of positions the model has; None where the config names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        # RoBERTa counts positions from padding_idx + 1: 514 positions hold 512 tokens.
        table = getattr(module, "position_embeddings", None)
        if limit and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(limit) - table.padding_idx - 1
    return limit


class Loader:
    """A directory's model: its body, or all of it where the model has its own scoring head."""

    def __init__(
        self, model_dir: Path, adapter: Adapter, trust_remote_code: bool, *, embeds: bool
    ) -> None:
        self._model_dir = model_dir
        self._adapter = adapter
        self._trust = trust_remote_code
        self.scores_itself = adapter.build_head is None and not embeds
        self._class = AutoModelForSequenceClassification if self.scores_itself else AutoModel
        self._config = body_config(model_dir, adapter, trust_remote_code=trust_remote_code)
        try:
            with torch.device("meta"):
                self.skeleton: PreTrainedModel = self._class.from_config(  # type: ignore[no-untyped-call]
                    self._config, trust_remote_code=trust_remote_code
                )
        except ValueError as error:
            raise ModelError(f"{model_dir}: transformers cannot build it: {error}") from error
        if self.skeleton.config.is_encoder_decoder and not self.scores_itself:
            raise ModelError(f"{model_dir}: encoder-decoder models have no single body to pool")

    def attention_implementation(self, attention: str) -> str | None:
        """transformers' name of the attention to load; None leaves the choice to transformers."""
        if attention != "packed":
            return attention
        skeleton = self.skeleton
        if self.scores_itself or not is_causal(skeleton):
            logger.info("%s is not a decoder's body: it runs padded", type(skeleton).__name__)
            return "eager" if softcap_of(skeleton) is not None else None
        layer_types = getattr(skeleton.config.get_text_config(), "layer_types", None) or []
        foreign = sorted(set(layer_types) - SUPPORTED_LAYER_TYPES)
        if foreign or not skeleton._supports_attention_backend:
            layers = f"it has layers of type {', '.join(foreign)}"
            why = layers if foreign else "its attention is its own"
            raise ModelError(
                f"{type(skeleton).__name__} cannot be packed: {why}; set attention to eager"
            )
        return PACKED_ATTENTION

    def load(self, dtype: str, implementation: str | None) -> tuple[PreTrainedModel, list[str]]:
        """The model on the host, and the checkpoint's weights that it does not use."""
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        state = None if self.scores_itself else converted_state(self._model_dir, self._adapter)
        # dtype must be given here: a later .to(dtype) would round the rotary frequencies too.
        settings: dict[str, Any] = {
            "dtype": getattr(torch, dtype),
            "attn_implementation": implementation,
            "output_loading_info": True,
        }
        try:
            with _unexpected_weights_not_logged():
                loaded: Any
                if state is not None:
                    loaded = type(self.skeleton).from_pretrained(
                        None, config=self._config, state_dict=state, **settings
                    )
                else:
                    loaded = self._class.from_pretrained(
                        self._model_dir,
                        config=self._config,
                        local_files_only=True,
                        use_safetensors=True,
                        trust_remote_code=self._trust,
                        **settings,
                    )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{self._model_dir} cannot be loaded: {error}") from error
        model, report = loaded
        missing = sorted(report["missing_keys"])
        if not self.scores_itself:
            # A pooling layer that pretrained encoders' checkpoints lack, and that is not read.
            missing = [name for name in missing if not name.startswith("pooler.")]
        if missing or report["mismatched_keys"]:
            wrong = missing or sorted(str(key) for key in report["mismatched_keys"])
            raise ModelError(
                f"{self._model_dir} lacks weights of {type(model).__name__}, which would be "
                f"random: {', '.join(wrong)}"
            )
        unexpected = sorted(
            name for name in report["unexpected_keys"] if self._adapter.is_body_tensor(name)
        )
        if unexpected:
            logger.warning("the model does not use these weights: %s", ", ".join(unexpected))
        return model.eval(), unexpected


@contextmanager
def _unexpected_weights_not_logged() -> Iterator[None]:
    """transformers logs the head's tensors as unexpected in the body; `load` checks them all."""
    reporter = logging.getLogger("transformers")
    level = reporter.level
    reporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reporter.setLevel(level)


def softcap_of(model: PreTrainedModel) -> float | None:
    """The model's attn_logit_softcapping."""
    softcap: float | None = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return softcap


def refuse_unsound(
    skeleton: PreTrainedModel, adapter: Adapter, dtype: str, implementation: str | None
) -> None:
    """Raise for settings that cannot run, or that give other scores."""
    if implementation == "sdpa" and softcap_of(skeleton) is not None:
        raise ModelError(
            "sdpa ignores this model's attn_logit_softcapping; set attention to packed or eager"
        )
    refuse_dtype(adapter, skeleton.config.get_text_config().model_type, dtype)
    if implementation == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            # transformers would search its hub for a kernel instead.
            raise MissingExtraError(
                "attention flash_attention_2 needs the flash-attn package: "
                "pip install 'batch-scorer[flash-attn]'"
            )
        if dtype == "float32":
            raise ModelError("flash_attention_2 has no float32; set dtype to bfloat16")


def check_rotary_dtype(model: PreTrainedModel) -> None:
    """Raise ModelError where the rotary frequencies were rounded with the weights."""
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and buffer.dtype != torch.float32:
            raise ModelError(f"{name} is {buffer.dtype}; rotary frequencies must stay float32")
