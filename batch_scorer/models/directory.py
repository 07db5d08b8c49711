"""A model directory, read without loading the model: what it is, and a digest of its bytes."""

import hashlib
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles, Prompt
from batch_scorer.models.cost import HIDDEN_SIZES, ModelCost, model_cost
from batch_scorer.models.digests import file_digest
from batch_scorer.models.registry import EMBEDDING, choose_adapter, head_files, refuse_quantised

_WEIGHTS = "*.safetensors"
_CODE = "*.py"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates/*.jinja"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_UNLIMITED_TOKENS = 10**9


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's files show.

    `adapter` names the family (`models/families`), `attributes` its outputs beside the score;
    `prompt` is how it wants conversations rendered (kept here, because processes that read have no
    torch, which the families need). `has_steps`: it is a process reward model. `hidden_size` is
    None where the config does not name it, `cost` where config and weights do not determine it.
    `positions` are the tokens of the longest sequence that the model can read, `max_tokens` the
    same where the tokenizer's files set a lower limit. `digest` covers config, weights
    and tokenizer files: with any byte changed there it is another model.
    """

    path: Path
    architecture: str
    adapter: str
    attributes: tuple[str, ...]
    prompt: Prompt
    has_steps: bool
    hidden_size: int | None
    positions: int
    max_tokens: int
    vocab_size: int
    cost: ModelCost | None
    digest: str


def find_model(name: str, *, with_code: bool = False, fetch: bool = True) -> Path:
    """The local directory of `name`. A hub id is fetched where a hub can be reached, `with_code`
    including its Python files; without `fetch` it must be here already.

    Raises ModelError.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise ModelError(f"{name}: is a file; a model is a directory with config.json and weights")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such model directory")
    from huggingface_hub import snapshot_download

    try:
        files = [
            *([_CODE] if with_code else []),
            "*.json",
            _WEIGHTS,
            "*.model",
            "*.jinja",
            *head_files(),
        ]
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=not fetch))
    except Exception as error:  # the hub client raises HTTP, OS and validation errors of its own
        raise ModelError(
            f"{name}: no such directory, and not "
            + ("to be had from a model hub" if fetch else "fetched from a model hub yet")
            + f" ({type(error).__name__})"
        ) from error


def read_model_files(path: Path, name: str = "") -> ModelFiles:
    """Config and safetensors headers. Raises ModelError for what is damaged or incomplete."""
    config = read_json(path / "config.json")
    return ModelFiles(path, name or path.name, config, _tensor_shapes(path))


def inspect_model(
    path: Path,
    name: str = "",
    adapter: str | None = None,
    *,
    embeds: bool = False,
    trust_remote_code: bool = False,
    with_digest: bool = True,
) -> ModelFacts:
    """Choose the adapter, check that its head is there, digest all bytes.

    `name` is the user's name for the model; `adapter` overrides the choice; with `embeds` no
    head is needed; with `trust_remote_code` the model's own code may score; without `with_digest`
    the digest is empty and the weights are not read. Raises ModelError if no adapter fits, if the
    model has no safetensors weights, or if the head is not among them or of another shape: a head
    that is missing would be filled with random numbers by the loader.
    """
    files = read_model_files(path, name)
    refuse_quantised(files)
    _refuse_empty(files)
    chosen = EMBEDDING
    if not embeds:
        chosen = choose_adapter(files, adapter, trust_remote_code=trust_remote_code)
    positions = int(files.config.get("max_position_embeddings") or _UNLIMITED_TOKENS)
    return ModelFacts(
        path=path,
        architecture=files.architecture,
        adapter=chosen.name,
        attributes=chosen.attributes(files.config),
        prompt=chosen.prompt,
        has_steps=chosen.step_aggregation is not None,
        hidden_size=next((files.config[n] for n in HIDDEN_SIZES if n in files.config), None),
        positions=positions,
        max_tokens=min(positions, _tokenizer_limit(path) or positions),
        vocab_size=int(files.config.get("vocab_size") or _UNLIMITED_TOKENS),
        cost=model_cost(files, chosen),
        digest=_digest(path, chosen, trust_remote_code) if with_digest else "",
    )


def _refuse_empty(files: ModelFiles) -> None:
    empty = sorted(name for name, shape in files.shapes.items() if 0 in shape)
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ModelError(
            f"{files.path}: {empty[0]}{more} is there without values, as DeepSpeed ZeRO-3 leaves "
            "tensors that it did not gather before saving; save the model again with "
            "stage3_gather_16bit_weights_on_model_save, or convert its checkpoint (zero_to_fp32.py)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory. Raises ModelError if there is none, or it is damaged."""
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: not a model directory (no {path.name})") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable: {error}") from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{path}: not a JSON object")
    return loaded


def _tokenizer_limit(path: Path) -> int | None:
    file = path / "tokenizer_config.json"
    if not file.exists():
        return None
    limit = read_json(file).get("model_max_length")
    # Tokenizers without a limit write 1e30.
    return int(limit) if isinstance(limit, int | float) and limit < _UNLIMITED_TOKENS else None


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    files = sorted(path.glob(_WEIGHTS))
    if not files:
        pickled = [f.name for pattern in _PICKLED for f in path.glob(pattern)]
        hint = f" (only {pickled[0]}: pickled weights can run code)" if pickled else ""
        raise ModelError(f"{path}: no safetensors weights{hint}")
    index = path / _INDEX
    listed = set(read_json(index).get("weight_map", {}).values()) if index.exists() else set()
    if absent := sorted(listed - {file.name for file in files}):
        raise ModelError(f"{path}: incomplete download: {', '.join(absent)} not there")
    return {name: shape for file in files for name, shape in _safetensors_header(file).items()}


def _safetensors_header(file: Path) -> dict[str, list[int]]:
    """Tensor names and shapes. A file starts with 8 bytes, the length of the JSON that follows."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ModelError(f"{file}: damaged safetensors file (header is cut off)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file}: damaged safetensors header") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    needed = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if 8 + length + needed != size:
        raise ModelError(
            f"{file}: incomplete download: {size} bytes, its header promises {8 + length + needed}"
        )
    return {name: entry["shape"] for name, entry in tensors.items()}


def _digest(path: Path, adapter: Adapter, trust_remote_code: bool) -> str:
    files = [path / "config.json", *sorted(path.glob(_WEIGHTS))]
    files += sorted(path.glob(_CODE)) if trust_remote_code else []
    files += [path / name for name in adapter.head_files if (path / name).exists()]
    files += [path / name for name in _TOKENIZER_FILES if (path / name).exists()]
    files += sorted(path.glob(_TEMPLATES))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_digest, files))
    lines = [f"{file.name} {digest}" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
