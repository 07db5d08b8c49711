"""The tokenizer of a model directory."""

import sys
from pathlib import Path
from typing import Any

from batch_scorer.errors import ModelError
from batch_scorer.quarantine import is_child


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that is saved in the directory, whatever else is installed.

    Raises ModelError if there is no usable one.
    """
    if is_child() and not trust_remote_code and "transformers" not in sys.modules:
        # Of transformers only the tokenizers are used there, and they work without torch, which
        # takes 330 MB and seconds.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as the import system has it
    from transformers import AutoTokenizer  # takes seconds and imports torch

    load: Any = AutoTokenizer.from_pretrained
    try:
        return load(
            str(model_dir),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            # Otherwise mistral-common, which comes with vLLM, takes over where it finds
            # tekken.json, and refuses all conversations that end with the assistant
            # (findings/transformers-mistral-common-takes-over.sh).
            mistral_format=False,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(f"{model_dir}: no usable tokenizer: {first_line}") from error


def pair_separator(model_dir: Path, in_config: int | None) -> int | None:
    """The id behind the first text of a pair: the config's, or else the tokenizer's, where it gives
    the second text another token type. None where it does not, or where there is no tokenizer."""
    if in_config is not None or not (model_dir / "tokenizer_config.json").is_file():
        return in_config
    tokenizer = load_tokenizer(model_dir)
    if "token_type_ids" not in tokenizer.model_input_names:
        return None
    separator: int | None = tokenizer.sep_token_id
    return separator
