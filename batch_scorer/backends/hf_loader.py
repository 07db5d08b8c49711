"""A Hugging Face model from its directory: class, attention, weights, and what is refused."""

import importlib.util
import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from batch_scorer.backends.attention import PACKED_ATTENTION
from batch_scorer.backends.base import EngineSettings, refuse_dtype
from batch_scorer.errors import MissingExtraError, ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles
from batch_scorer.models.cost import EXPERTS
from batch_scorer.models.fit import build_skeleton, is_causal, load, packing_problem
from batch_scorer.models.registry import STOCK
from batch_scorer.models.weights import model_tensors

logger = logging.getLogger(__name__)


def max_sequence_length(model: PreTrainedModel) -> int | None:
    """The number of positions the model has; None where the config names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        # RoBERTa counts positions from padding_idx + 1: 514 positions hold 512 tokens.
        table = getattr(module, "position_embeddings", None)
        if limit and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(limit) - table.padding_idx - 1
    return limit


def has_own_forward(files: ModelFiles, adapter: Adapter, settings: EngineSettings) -> bool:
    """Whether transformers' own classifier gives all that is asked for, head and pooling included.
    It has no bias, so a head that was trained with one is read by ours, and so are all tokens."""
    is_plain = settings.embedding is None and not settings.token_scores
    return adapter.name == STOCK and is_plain and "score.bias" not in files.shapes


class Loader:
    """A directory's model: its body, or all of it where the model has its own scoring head.

    With `own_head` it is transformers' own classifier, also where this package has the head.
    """

    def __init__(
        self,
        files: ModelFiles,
        adapter: Adapter,
        trust_remote_code: bool,
        *,
        embeds: bool,
        own_head: bool = False,
    ) -> None:
        self._files = files
        self._adapter = adapter
        self.scores_itself = own_head or (adapter.build_head is None and not embeds)
        self.skeleton = build_skeleton(
            files, adapter, own_head=self.scores_itself, trust_remote_code=trust_remote_code
        )

    def attention_implementation(self, attention: str) -> str | None:
        """transformers' name of the attention to load; None leaves the choice to transformers."""
        if attention != "packed":
            return attention
        skeleton = self.skeleton
        if self.scores_itself or not is_causal(skeleton):
            logger.info("%s is not a decoder's body: it runs padded", type(skeleton).__name__)
            return "eager" if softcap_of(skeleton) is not None else None
        if why := packing_problem(skeleton):
            raise ModelError(f"{self._files.path}: {why}; set attention to eager")
        return PACKED_ATTENTION

    def load(self, dtype: str, implementation: str | None) -> PreTrainedModel:
        """The model on the host. Raises ModelError where the tensors are not the model's."""
        own_head = self.scores_itself
        # Merged and dequantised weights come in float32: together they would take twice the memory.
        rounded = getattr(torch, dtype) if self._files.deltas or self._files.scales else None
        state = {
            name: tensor.to(rounded) if rounded and tensor.ndim > 1 else tensor
            for name, tensor in model_tensors(self._files, self._adapter, own_head=own_head)
        }
        # dtype must be given here: a later .to(dtype) would round the rotary frequencies too.
        return load(
            self._files,
            self._adapter,
            self.skeleton,
            state,
            own_head=own_head,
            dtype=getattr(torch, dtype),
            attn_implementation=implementation,
        )


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


def refuse_company(model: PreTrainedModel, *, packed: bool) -> None:
    """Raise ModelError for a body whose scores depend, by its definition, on what else is in a
    batch; `packed`, or one sequence at a time."""
    config = model.config.get_text_config()
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)  # of all layers, or by the type of a layer
        kinds.update(kind.values() if isinstance(kind, dict) else [kind] if kind else [])
    if "dynamic" in kinds:
        raise ModelError(
            "invariant: rotary frequencies of type dynamic depend on earlier sequences; leave it "
            "out"
        )
    cure = "set attention to eager, which runs one sequence at a time"
    if packed and "longrope" in kinds:
        raise ModelError(
            "invariant: rotary frequencies of type longrope depend on a batch's longest sequence; "
            + cure
        )
    if packed and any(getattr(config, name, None) for name in EXPERTS):
        raise ModelError(
            "invariant: an expert's products have as many rows as a batch sends it tokens; " + cure
        )


def check_rotary_dtype(model: PreTrainedModel) -> None:
    """Raise ModelError where the rotary frequencies were rounded with the weights."""
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and buffer.dtype != torch.float32:
            raise ModelError(f"{name} is {buffer.dtype}; rotary frequencies must stay float32")
