"""The tokenizer of a model directory."""

from pathlib import Path
from typing import Any

from batch_scorer.errors import ModelError


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that is saved in the directory, whatever else is installed.

    Raises ModelError if there is no usable one.
    """
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
