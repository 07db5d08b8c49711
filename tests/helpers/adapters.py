"""LoRA adapters of tiny models, trained by nobody and saved by PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def peft_adapter(
    model: PreTrainedModel,
    lora_dir: Path,
    *,
    base: str,
    **config: Any,
) -> PeftModel:
    """Wrap the model, give all that is trained random values, and save the adapter.

    `base` is what adapter_config.json names. Returns the wrapped model, in evaluation mode.
    """
    config = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8} | config
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(lora_dir)
    return wrapped.eval()
