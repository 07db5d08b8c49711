"""Sentence-transformers' CrossEncoders: rerankers and classifiers of pairs, with one output.

A folder is one if its files say so (`models.cross_encoder`); without that a classifier stays raw.
"""

from dataclasses import replace

from batch_scorer.models.adapter import Adapter, LastToken, Prompt
from batch_scorer.models.families.heads import linear_head

_EITHER = Adapter(
    name="cross_encoder",
    summary="saved as sentence-transformers' CrossEncoder, with its activation",
    architectures=("*ForSequenceClassification",),
    is_cross_encoder=True,
    attributes=lambda config: ("raw_score",),
    prompt=Prompt(pair=True),
)

ADAPTERS = (
    replace(
        _EITHER,
        name="cross_encoder_decoder",
        summary=f"decoder {_EITHER.summary}",
        head={"score.weight": (1, None)},
        head_extra=("score.bias",),
        build_head=linear_head("score"),
        pooling=LastToken(skips_pad=True),
        reads="the last token that is not the config's pad id",
        models=(
            "Qwen3-Reranker-* as converted to sequence classifiers, and what is tuned of them",
        ),
        traps=(
            "activation, prompt and lengths as in cross_encoder",
            "a conversation goes through the chat template where there is one; versions 4 and 5 of "
            "sentence-transformers give the tokenizer the bare pair",
            "scored by the logits of yes and no (LogitScore), or by a template with the roles "
            "query and document: refused",
        ),
    ),
    replace(
        _EITHER,
        summary=f"encoder {_EITHER.summary}",
        reads="what the model's own head reads, mostly the first token",
        engines=("hf",),
        models=("cross-encoder/ms-marco-*, mxbai-rerank-*-v1; where asked for, bge-reranker-*",),
        traps=(
            "the score is that of CrossEncoder.predict: after the activation named in "
            "config_sentence_transformers.json (version 6), in config.json under "
            "`sentence_transformers` (4 and 5) or `sbert_ce_default_activation_function` (before), "
            "else after Sigmoid, its default for one output; the logit is kept beside it",
            "a folder with none of these entries is scored raw, as bge-reranker's are; --adapter "
            "cross_encoder applies the default, --adapter encoder takes the logit of any",
            "without a chat template the input is a pair, tokenizer(question, answer), the default "
            "prompt before the question; predict cuts what is too long, here its row is marked",
            "max_seq_length in sentence_bert_config.json wins over the tokenizer's "
            "model_max_length; predict does not read `max_length` in tokenizer_config.json either",
        ),
    ),
)
