"""How a model's embeddings are read, by its sentence-transformers files."""

from pathlib import Path
from typing import Any, Literal

from batch_scorer.models.files import read_any_json
from batch_scorer.records import Embedding

_POOLING_FLAGS: tuple[tuple[str, Literal["last", "mean", "cls"]], ...] = (
    ("pooling_mode_lasttoken", "last"),
    ("pooling_mode_mean_tokens", "mean"),
    ("pooling_mode_cls_token", "cls"),
)


def embedding_of(
    model_dir: Path,
    pooling: Literal["last", "mean", "cls"] | None = None,
    normalize: bool | None = None,
    *,
    is_decoder: bool,
) -> Embedding:
    """How to read embeddings; what is None comes from `modules.json` and the pooling module's
    `config.json`.

    Without these files, decoders are read at their last token and encoders as the mean of all,
    neither normalised. Raises ModelError for files that are not JSON.
    """
    modules = _read(model_dir / "modules.json") or []
    types = {str(module.get("type", "")).rsplit(".", 1)[-1]: module for module in modules}
    if pooling is None and "Pooling" in types:
        flags = _read(model_dir / types["Pooling"].get("path", "") / "config.json") or {}
        pooling = next((name for flag, name in _POOLING_FLAGS if flags.get(flag)), None)
    if pooling is None:
        pooling = "last" if is_decoder else "mean"
    if normalize is None:
        normalize = "Normalize" in types
    return Embedding(pooling, normalize)


def is_decoder(model_dir: Path) -> bool:
    """Whether transformers knows the config's model type as one with a causal mask only."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    model_type = (_read(model_dir / "config.json") or {}).get("model_type")
    # Encoders such as BERT are listed as causal models too, for use with a causal mask.
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return is_causal and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _read(file: Path) -> Any:
    return read_any_json(file) if file.exists() else None
