"""The gate's reference for models larger than the memory: one decoder layer at a time.

Every sequence of the sample runs plain Hugging Face's forward in a thread of its own. Before each
layer the threads wait for each other, and the last to come replaces the weights of the layer before
by those of the next. So every layer is read once for all sequences, and no code of any model is
repeated here. Only one thread computes at a time.

Legend: S sequences, K pooled tokens, H hidden.
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from batch_scorer.backends.base import EngineSettings, mark_non_finite, unscorable
from batch_scorer.backends.device import free_matmul_buffers, give_back_freed_memory
from batch_scorer.backends.hf_loader import has_own_forward, max_sequence_length
from batch_scorer.backends.readout import Readout
from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles
from batch_scorer.models.fit import build_skeleton, is_causal
from batch_scorer.models.registry import choose_adapter
from batch_scorer.models.weights import checkpoint_tensors, model_tensors
from batch_scorer.records import Scores, TokenizedRows

Floats: TypeAlias = npt.NDArray[np.float32]
_NUMBER = re.compile(r"\.\d+(\.|$)")


class LazyModel:
    """A plain model, eager, whose weights are read when they are asked for; until then they take no
    memory.

    `whole` is True for transformers' own sequence classifier, False for the body alone. Raises
    ModelError for a model that transformers cannot build.
    """

    def __init__(
        self, files: ModelFiles, adapter: Adapter, settings: EngineSettings, *, whole: bool
    ) -> None:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._files, self._adapter, self._whole = files, adapter, whole
        self.device = torch.device(settings.own_device)
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        trust = settings.trust_remote_code
        self.model = build_skeleton(
            files,
            adapter,
            own_head=whole,
            trust_remote_code=trust,
            dtype=self._dtype,
            attn_implementation="eager",
        )
        self.model.eval()  # type: ignore[no-untyped-call]
        self._settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self._dtype,
            dtype_plan=self.model._get_dtype_plan(self._dtype),
            weight_mapping=cast(Any, get_model_conversion_mapping(self.model)),
        )

    def layers(self) -> tuple[str, nn.ModuleList] | None:
        """The decoder's layers and their place in the model; None where that is not certain."""
        count = getattr(self.model.config.get_text_config(), "num_hidden_layers", None)
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == count
            and not _NUMBER.search(name)
        ]
        return found[0] if len(found) == 1 and is_causal(self.model) else None

    def load(self, wanted: Callable[[str], bool], needed: Callable[[str], bool]) -> None:
        """Read the checkpoint's tensors for which `wanted(name)` is true.

        Raises ModelError where a weight for which `needed(name)` is true is not among them; the
        name is the model's own.
        """

        def read(files: ModelFiles, takes: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
            return checkpoint_tensors(files, lambda name: takes(name) and wanted(name))

        state = dict(model_tensors(self._files, self._adapter, own_head=self._whole, read=read))
        report, _ = convert_and_load_state_dict_in_model(
            model=self.model, state_dict=state, load_config=self._settings
        )
        missing = {name for name in report.missing_keys if needed(name)}
        if wrong := sorted(missing or {str(key) for key in report.mismatched_keys}):
            raise ModelError(
                f"{self._files.path} lacks weights of {type(self.model).__name__}: "
                f"{', '.join(wrong)}"
            )
        if report.conversion_errors:
            raise ModelError(f"{self._files.path}: {next(iter(report.conversion_errors.values()))}")

    def fill_buffers(self) -> None:
        """Compute what is in no checkpoint, such as rotary frequencies."""
        self.model._move_missing_keys_from_meta_to_device(
            cast(Any, set()), self._settings.device_map, None, None
        )
        self.model._initialize_missing_keys(False)


class LayerByLayer:
    """A `LazyModel` with everything but the layers in memory, and of these one at a time."""

    def __init__(self, lazy: LazyModel) -> None:
        found = lazy.layers()
        assert found is not None, "only models with layers are streamed"
        self._lazy = lazy
        self._place, self._layers = found
        # The checkpoint may put another prefix before the same name.
        leaf = self._place.rpartition(".")[2]
        self._number = re.compile(rf"(?:^|\.){re.escape(leaf)}\.(\d+)\.")
        self._held: nn.Module | None = None
        lazy.load(
            lambda name: self._layer_of(name) is None,
            lambda name: not name.startswith(f"{self._place}."),
        )
        lazy.fill_buffers()

    def _layer_of(self, name: str) -> int | None:
        found = self._number.search(name)
        return None if found is None else int(found[1])

    def hold(self, index: int) -> None:
        """Let go of the layer in memory, and read this one. Raises ModelError."""
        self.let_go()
        own = f"{self._place}.{index}."
        self._lazy.load(
            lambda name: self._layer_of(name) == index, lambda name: name.startswith(own)
        )
        self._held = self._layers[index]

    def let_go(self) -> None:
        """Let go of the layer in memory."""
        if self._held is not None:
            for module in self._held.modules():
                for name, weight in module._parameters.items():
                    if weight is not None:
                        empty = torch.empty_like(weight, device="meta")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            self._held = None

    def run(self, forward: Callable[[int], Floats], sequences: Sequence[int]) -> list[Floats]:
        """What `forward`, which runs the model once, returns for each of the sequences.

        Raises what the first one to fail raises, and ModelError as `hold`.
        """
        results: dict[int, Floats] = {}
        failures: list[BaseException] = []
        turn = threading.Lock()
        next_layer = 0

        def swap() -> None:
            self.hold(next_layer)

        barrier = threading.Barrier(len(sequences), action=swap)

        def before(index: int, *_: object) -> None:
            nonlocal next_layer
            next_layer = index
            turn.release()
            try:
                barrier.wait()
            finally:
                turn.acquire()

        def after(*_: object) -> None:
            free_matmul_buffers()  # the other threads wait, and would keep as much each

        def work(sequence: int) -> None:
            with turn:
                try:
                    with torch.inference_mode():
                        results[sequence] = forward(sequence)
                except threading.BrokenBarrierError:
                    pass  # another thread has failed
                except BaseException as error:  # raised again by the caller
                    failures.append(error)
                    barrier.abort()

        hooks = [
            layer.register_forward_pre_hook(partial(before, index))
            for index, layer in enumerate(self._layers)
        ] + [layer.register_forward_hook(after) for layer in self._layers]
        threads = [threading.Thread(target=work, args=(sequence,)) for sequence in sequences]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for hook in hooks:
                hook.remove()
            self.let_go()
        if failures:
            raise failures[0]
        return [results[sequence] for sequence in sequences]


def can_stream(settings: EngineSettings) -> bool:
    """Whether the model is a decoder whose layers are found, with a head that is read apart or is
    transformers' own."""
    files = settings.read_files()
    adapter = settings.adapter or choose_adapter(files)
    if adapter.log_probs or adapter.verdicts:
        return False
    if adapter.build_head is None and settings.embedding is None:
        return False
    whole = has_own_forward(files, adapter, settings)
    return LazyModel(files, adapter, settings, whole=whole).layers() is not None


@give_back_freed_memory()
def streamed_scores(settings: EngineSettings, rows: TokenizedRows) -> Scores:
    """What `plain.plain_scores` gives, with one layer in memory. Raises ModelError."""
    files = settings.read_files()
    adapter = settings.adapter or choose_adapter(files)
    whole = has_own_forward(files, adapter, settings)
    lazy = LazyModel(files, adapter, settings, whole=whole)
    streamed = LayerByLayer(lazy)
    model = cast(Any, lazy.model)

    def token_ids(sequence: int) -> Tensor:
        start, stop = rows.sequence_offsets[sequence : sequence + 2]
        return torch.from_numpy(rows.token_ids[start:stop]).long()[None].to(lazy.device)

    if whole:
        values = np.full((rows.num_sequences, 1), np.nan, dtype=np.float32)
        sequences = np.flatnonzero(rows.lengths)
        if not len(sequences):
            return Scores(values)

        def logits(sequence: int) -> Floats:
            found = model(input_ids=token_ids(sequence), use_cache=False).logits
            return cast(Floats, found.float().cpu().numpy())

        values[sequences] = np.concatenate(streamed.run(logits, sequences.tolist()))
        return Scores(values)
    readout = Readout(settings, files, adapter, model.config.get_text_config())
    values = np.full((rows.num_sequences, readout.num_outputs), np.nan, dtype=np.float32)
    pooled, unpooled = readout.pooled_tokens(rows)
    vocabulary = len(model.get_input_embeddings().weight)
    unscored = unscorable(rows, max_tokens=max_sequence_length(model), vocabulary_size=vocabulary)
    scores = Scores(values, unpooled | unscored)
    lengths = rows.lengths.copy()
    lengths[list(scores.errors)] = 0
    sequences = np.flatnonzero(lengths)

    def outputs(sequence: int) -> Floats:
        hidden = model(input_ids=token_ids(sequence), use_cache=False).last_hidden_state[0]
        chosen = pooled.of(np.array([sequence]))
        states = hidden[torch.from_numpy(chosen.positions).to(lazy.device)]
        return cast(Floats, readout.read(states.cpu(), chosen).numpy())

    if len(sequences):
        found = np.concatenate(streamed.run(outputs, sequences.tolist()))
        readout.fill(scores, sequences, found, pooled)
    mark_non_finite(scores, sequences)
    return scores
