"""Encoders (DeBERTa, ModernBERT, BERT, RoBERTa), whose head is more than a layer on one token.

These are scored by transformers' own forward, on length-sorted rectangles.
"""

from batch_scorer.models.adapter import Adapter, Prompt

ADAPTERS = (
    Adapter(
        name="encoder",
        summary="encoder with its own classification head (pooler, dense layers), one output",
        architectures=("*ForSequenceClassification",),
        reads="what the model's own head reads, mostly the first token",
        prompt=Prompt(pair=True),
        engines=("hf",),
        models=("OpenAssistant reward-model-deberta-v3-base, -large, -large-v2", "ModernBERT RMs"),
        traps=(
            "without a chat template the input is a pair, tokenizer(question, answer)",
            "DeBERTa has eager attention only; 512 tokens are its limit",
        ),
    ),
)
