"""Scores from a Hugging Face model in this process.

Decoders run packed: sequences lie end to end without padding, attention keeps them apart, and
only the pooled tokens meet the score head, in float32. Everything else (encoders, and decoders
with another attention implementation) runs as length-sorted rectangles.

Legend: S sequences, T tokens of a packed batch, L longest of a padded one, H hidden, O outputs.
"""

import importlib.util
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from batch_scorer.backends.attention import (
    KERNELS,
    PACKED_ATTENTION,
    SUPPORTED_LAYER_TYPES,
    attention_bounds,
    choose_kernel,
    to_device,
)
from batch_scorer.backends.base import (
    PROBE_TOLERANCE,
    mark_non_finite,
    refuse_dtype,
    unscorable,
)
from batch_scorer.backends.readout import Readout, StepAggregation
from batch_scorer.errors import ConfigError, MissingExtraError, ModelError, RowReason
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.registry import choose_adapter
from batch_scorer.models.weights import body_config, converted_state
from batch_scorer.packing import Int64Array, PackedBatch, last_tokens, pack, pad, plan_batches
from batch_scorer.records import Embedding, PooledTokens, RowError, Scores, TokenizedRows

logger = logging.getLogger(__name__)

DEFAULT_TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
"""Tokens of one forward pass. On the CPU 1024 was a third slower than 4096, and 8192 hardly
faster; on CUDA it is a guess that fits an 8B model on 80 GB, not a measurement."""

_NOTHING_POOLED = PooledTokens(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))


class HFBackend:
    """A reward model in transformers; see `Backend` for what it does.

    `adapter` None chooses the model's family from its files. `step_aggregation` None takes the
    family's own; with `embedding` the model's head is left out. `token_budget` None takes
    `DEFAULT_TOKEN_BUDGET`. Raises ModelError where the directory cannot give true scores with
    these settings.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        attention: str,
        device: str,
        adapter: Adapter | None = None,
        step_aggregation: StepAggregation | None = None,
        embedding: Embedding | None = None,
        token_budget: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._device = torch.device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch finds no CUDA device; set device to cpu")
        self._token_budget = DEFAULT_TOKEN_BUDGET[device] if token_budget is None else token_budget

        adapter = adapter or choose_adapter(read_model_files(model_dir))
        loader = _Loader(model_dir, adapter, trust_remote_code, embeds=embedding is not None)
        implementation = loader.attention_implementation(attention)
        _refuse_unsound(loader.skeleton, adapter, dtype, implementation)
        model, unexpected = loader.load(dtype, implementation)
        self._model: PreTrainedModel = model.to(self._device)  # type: ignore[arg-type]  # decorated
        _check_rotary_dtype(self._model)

        config = self._model.config.get_text_config()
        self._vocabulary_size = len(cast(Tensor, self._model.get_input_embeddings().weight))
        self._max_length = max_sequence_length(self._model)
        # Any id of the vocabulary will do: the mask hides it, and pooling goes by the length.
        self._pad_id = (
            config.pad_token_id if config.pad_token_id in range(self._vocabulary_size) else 0
        )
        self._separator_id = getattr(config, "sep_token_id", None)
        self._readout: Readout | None = None
        self.num_outputs = 1
        if not loader.scores_itself:
            self._readout = Readout(
                model_dir,
                adapter,
                config,
                step_aggregation=step_aggregation,
                embedding=embedding,
            ).to(self._device)
            self.num_outputs = self._readout.num_outputs
        self._packed = implementation == PACKED_ATTENTION
        self.provenance: dict[str, Any] = {
            "backend": "hf",
            "adapter": adapter.name,
            "model_class": type(self._model).__name__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": _device_name(self._device),
            "dtype": dtype,
            "attention": self._model.config._attn_implementation,
            "token_budget": self._token_budget,
            "num_threads": torch.get_num_threads(),
            "unexpected_weights": unexpected,
            "trust_remote_code": trust_remote_code,
        }
        if self._packed:
            self._choose_kernel()
            self._check_isolation()
        logger.info("scoring with %s", self.provenance)

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order."""
        values = np.full((rows.num_sequences, self.num_outputs), np.nan, dtype=np.float32)
        unscored = unscorable(
            rows, max_tokens=self._max_length, vocabulary_size=self._vocabulary_size
        )
        scores = Scores(values, unscored)
        pooled = _NOTHING_POOLED
        if self._readout is not None:
            pooled, unpooled = self._readout.pooled_tokens(rows)
            scores.errors = unpooled | scores.errors
        lengths = rows.lengths.copy()
        lengths[list(scores.errors)] = 0  # the plan leaves them out
        pending = deque(plan_batches(lengths, self._token_budget, padded=not self._packed))
        scored: list[Int64Array] = []
        outputs: list[Tensor] = []
        while pending:
            sequences = pending.popleft()
            output = self._try_forward(rows, sequences, pooled)
            if output is not None:
                scored.append(sequences)
                outputs.append(output)
                scores.effort.num_batches += 1
                scores.effort.computed_tokens += self._batch_tokens(lengths[sequences])
            elif len(sequences) > 1:
                scores.effort.oom_splits += 1
                half = len(sequences) // 2
                pending.extendleft((sequences[half:], sequences[:half]))
            else:
                detail = f"{lengths[sequences[0]]} tokens do not fit the memory on their own"
                scores.errors[int(sequences[0])] = RowError(RowReason.OUT_OF_MEMORY, detail)
        if outputs:
            # One copy per shard: a copy per batch would make the host wait for the device.
            everything = torch.cat(outputs).cpu().numpy()
            if self._readout is None:
                values[np.concatenate(scored)] = everything
            else:
                self._readout.fill(scores, np.concatenate(scored), everything, pooled)
        mark_non_finite(scores, np.flatnonzero(lengths))
        return scores

    def close(self) -> None:
        """Free the device."""
        del self._model, self._readout
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch_tokens(self, lengths: Int64Array) -> int:
        return int(lengths.sum() if self._packed else lengths.max() * len(lengths))

    def _try_forward(
        self, rows: TokenizedRows, sequences: Int64Array, pooled: PooledTokens
    ) -> Tensor | None:
        """What `Readout.read` gives for one batch, or None where the memory does not suffice."""
        try:
            return self._forward(rows, sequences, pooled)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        # Only here is the traceback gone, and with it the batch's tensors.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    @torch.inference_mode()
    def _forward(self, rows: TokenizedRows, sequences: Int64Array, pooled: PooledTokens) -> Tensor:
        if self._packed:
            assert self._readout is not None, "only bodies run packed"
            hidden = self._packed_hidden(pack(rows, sequences, pooled))
            return self._readout.read(hidden, pooled.of(sequences))
        batch = pad(rows, sequences, self._pad_id)
        token_ids = to_device(torch.from_numpy(batch.token_ids), self._device).long()  # [S, L]
        lengths = to_device(torch.from_numpy(batch.lengths), self._device)  # [S]
        places = torch.arange(token_ids.shape[1], device=self._device)
        inputs = {"input_ids": token_ids, "attention_mask": (places < lengths[:, None]).long()}
        if self._readout is None:
            inputs |= self._token_types(token_ids)
            return cast(Tensor, self._model(**inputs).logits).float()  # [S, 1]
        hidden = self._body(**inputs, use_cache=False).last_hidden_state  # [S, L, H]
        chosen = pooled.of(sequences)
        owners = np.repeat(np.arange(len(sequences)), chosen.counts)
        index = [to_device(torch.from_numpy(a), self._device) for a in (owners, chosen.positions)]
        return self._readout.read(hidden[index[0], index[1]], chosen)

    def _token_types(self, token_ids: Tensor) -> dict[str, Tensor]:
        """Of a pair: 0 up to the first separator, 1 after it; nothing for models without types."""
        if self._separator_id is None or not getattr(self._model.config, "type_vocab_size", 0) > 1:
            return {}
        is_separator = token_ids == self._separator_id
        before = is_separator.cumsum(1) - is_separator.long()  # separators left of each token
        return {"token_type_ids": (before > 0).long()}

    def _packed_hidden(self, batch: PackedBatch) -> Tensor:
        """[P, H], the hidden states of the batch's pooled tokens."""
        token_ids = to_device(torch.from_numpy(batch.token_ids), self._device).long()  # [T]
        position_ids = to_device(torch.from_numpy(batch.position_ids), self._device).long()
        hidden = self._body(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            bounds=attention_bounds(batch, self._kernel, self._device),
        )
        pooled = to_device(torch.from_numpy(batch.pooled_index), self._device)  # [P]
        return cast(Tensor, hidden.last_hidden_state[0, pooled])

    @property
    def _body(self) -> nn.Module:
        return self._model.base_model

    def _choose_kernel(self) -> None:
        softcap = _softcap(self._model) is not None
        config = self._model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None)
        name = choose_kernel(
            self._device,
            self._model.dtype,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            softcap=softcap,
        )
        if softcap and self._device.type == "cuda" and name == "eager_blocks":
            logger.warning(
                "attn_logit_softcapping without flash-attn: attention runs as plain matrix "
                "products, right but slow; install flash-attn"
            )
        self._kernel = KERNELS[name]
        self.provenance["attention_kernel"] = name

    @torch.inference_mode()
    def _check_isolation(self) -> None:
        """Raise ModelError where a packed neighbour changes what a sequence gives.

        It would in a model that carries state along the row besides attention (recurrent or
        convolutional layers), or that finds positions elsewhere than in `position_ids`.
        """
        token_ids = (np.arange(12, dtype=np.int32) * 7 + 1) % self._vocabulary_size
        offsets, nothing = np.array([0, 8, 12]), np.zeros(0, dtype=np.int32)
        rows = TokenizedRows(token_ids, offsets, offsets, nothing, {}, {})
        last = last_tokens(rows)
        alone = self._packed_hidden(pack(rows, np.array([1]), last))[0].float()
        beside = self._packed_hidden(pack(rows, np.array([0, 1]), last))[1].float()
        moved = float((beside - alone).norm() / alone.norm())
        if not np.isfinite(moved):
            raise ModelError(f"hidden states are no numbers in {self.provenance['dtype']}")
        if moved > PROBE_TOLERANCE[self.provenance["dtype"]]:
            raise ModelError(
                f"{type(self._model).__name__} lets packed sequences see each other (a probe moved "
                f"by {moved:.1%}); set attention to sdpa or eager"
            )


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder: it has attention, and none that looks ahead."""
    causal = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return bool(causal) and all(causal)


def max_sequence_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for, None where the config names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        # RoBERTa counts positions from padding_idx + 1: 514 positions hold 512 tokens.
        table = getattr(module, "position_embeddings", None)
        if limit and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return int(limit) - table.padding_idx - 1
    return limit


class _Loader:
    """The model of a directory: its body, or for models that score themselves the whole."""

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
        """The name to load the model with; None leaves the choice to transformers."""
        if attention != "packed":
            return attention
        skeleton = self.skeleton
        if self.scores_itself or not is_causal(skeleton):
            logger.info("%s is no decoder's body: it runs padded", type(skeleton).__name__)
            return "eager" if _softcap(skeleton) is not None else None
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
        """The model on the host, and the checkpoint's weights that it has no place for."""
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours runs
        state = None if self.scores_itself else converted_state(self._model_dir, self._adapter)
        # dtype must be given here: a later .to(dtype) would round the rotary frequencies too.
        settings: dict[str, Any] = {
            "dtype": getattr(torch, dtype),
            "attn_implementation": implementation,
            "output_loading_info": True,
        }
        try:
            with _unexpected_weights_unsaid():
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
            # A pooling layer that checkpoints of pretrained encoders lack, and that is not read.
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
            logger.warning("weights without a place in the model: %s", ", ".join(unexpected))
        return model.eval(), unexpected


@contextmanager
def _unexpected_weights_unsaid() -> Iterator[None]:
    """transformers reports the head's tensors as unexpected in the body; we look at them all."""
    reporter = logging.getLogger("transformers")
    level = reporter.level
    reporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reporter.setLevel(level)


def _softcap(model: PreTrainedModel) -> float | None:
    softcap: float | None = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return softcap


def _refuse_unsound(
    skeleton: PreTrainedModel, adapter: Adapter, dtype: str, implementation: str | None
) -> None:
    """Raise for settings that cannot run, or that run but give other scores."""
    if implementation == "sdpa" and _softcap(skeleton) is not None:
        raise ModelError(
            "sdpa ignores this model's attn_logit_softcapping; set attention to packed or eager"
        )
    refuse_dtype(adapter, skeleton.config.get_text_config().model_type, dtype)
    if implementation == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None:
            # transformers would look for a kernel on its hub instead.
            raise MissingExtraError(
                "attention flash_attention_2 needs the flash-attn package: "
                "pip install 'batch-scorer[flash-attn]'"
            )
        if dtype == "float32":
            raise ModelError("flash_attention_2 has no float32; set dtype to bfloat16")


def _check_rotary_dtype(model: PreTrainedModel) -> None:
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and buffer.dtype != torch.float32:
            raise ModelError(f"{name} is {buffer.dtype}; rotary frequencies must stay float32")


def _is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator raises a bare RuntimeError: its text is all that tells it apart."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
