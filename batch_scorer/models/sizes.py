"""Whether the entries of a model's JSON files are of the kinds that they should be, and their
numbers those of any model, before something is built by them.

transformers builds what a config asks for: a billion layers, though without memory, take a day.
Whether the numbers are this model's is seen when its tensors are fitted into it.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from batch_scorer.errors import ModelError

_LAYERS = 10_000
_WIDTH = 1 << 24
_TOKENS = 1 << 40
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "vocab_size"), _WIDTH),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _TOKENS),
}
"""Must be there for a model at all, so 0 is too small."""
_MOST_OF_SOME = {
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "head_dim"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), _WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "pad_token_id", "sliding_window"), _TOKENS),
}
"""May be 0 or, for an id or a window, -1: there is none."""


def check_sizes(file: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for an entry of a config.json, or of a part of it, that is no size."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for names, least in ((_MOST, 1), (_MOST_OF_SOME, -1)):
            for name in names.keys() & part.keys():
                values = part[name] if isinstance(part[name], list) else [part[name]]
                for value in values:
                    if value is not None and not _is_between(value, least, names[name]):
                        raise ModelError(
                            f"{file}: {name} is {str(value)[:40]!r}, and should be a whole number "
                            f"from {least} to {names[name]}"
                        )
    architectures = config.get("architectures")
    if not isinstance(architectures, list | None) or not all(
        isinstance(name, str) for name in architectures or ()
    ):
        raise ModelError(f"{file}: architectures is not a list of names")
    for part in (config, config.get("text_config") or {}):
        check_kinds(file, part, _OF_CONFIG)
        for name in ("quantization_config", "compression_config"):
            _check_quantisation(file, part.get(name) or {})


def check_kinds(file: Path, entries: Mapping[str, Any], kinds: Mapping[str, "Kind"]) -> None:
    """Raise ModelError for an entry, where it is there, that is not of its kind."""
    for name, (words, is_right) in kinds.items():
        value = entries.get(name)
        if value is not None and not is_right(value):
            raise ModelError(f"{file}: {name} is {str(value)[:40]!r}, and should be {words}")


def _check_quantisation(file: Path, stated: Mapping[str, Any]) -> None:
    check_kinds(file, stated, _OF_QUANTISATION)
    for group in (stated.get("config_groups") or {}).values():
        if isinstance(group, Mapping):
            check_kinds(file, group, _OF_GROUP)
            check_kinds(file, group.get("weights") or {}, {"block_structure": SIZES})


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _WIDTH


def _is_pattern(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(re.compile(text))
    except (re.error, RecursionError, OverflowError):
        return False


Kind = tuple[str, Callable[[Any], bool]]
"""What an entry should be, in words and as a test."""
OBJECT: Kind = ("a JSON object", lambda value: isinstance(value, Mapping))
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
TEXTS: Kind = (
    "a text or a list of texts",
    lambda value: all(isinstance(v, str) for v in (value if isinstance(value, list) else [value])),
)
SIZE: Kind = ("a whole number above 0", _is_size)
SIZES: Kind = (
    "a list of two whole numbers above 0",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_size, value)),
)
PATTERNS: Kind = (
    "a JSON object whose keys are regular expressions",
    lambda value: isinstance(value, Mapping) and all(map(_is_pattern, value)),
)
_OF_CONFIG = dict.fromkeys(
    (
        "auto_map",
        "quantization_config",
        "compression_config",
        "text_config",
        "id2label",
        "label2id",
    ),
    OBJECT,
)
_OF_QUANTISATION = {
    **dict.fromkeys(("quant_method", "quant_algo", "checkpoint_format", "version", "format"), TEXT),
    **dict.fromkeys(("bits", "w_bit"), SIZE),
    **dict.fromkeys(("config_groups", "sparsity_config"), OBJECT),
    "weight_block_size": SIZES,
}
_OF_GROUP = {"format": TEXT, "weights": OBJECT, "input_activations": OBJECT}


def _is_between(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
