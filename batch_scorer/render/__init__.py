"""Parsed rows → token ids.

messages   what is done to a conversation before the template sees it: pure functions
template   the chat template: conversation → text
special    text in a message that spells a special token
readers    text → token ids, by Hugging Face's tokenizer or a faster one that gives the same
tokens     the ids with BOS and EOS, and the length policy
probe      what this template does to a conversation, found with marker words
renderer   all of it, for the rows of a shard
"""

from batch_scorer.render.probe import PROBES, Probe, TemplateFacts
from batch_scorer.render.renderer import (
    OWN_TEMPLATE,
    Renderer,
    Rendering,
    max_tokens_of,
    renderer_of,
    rendering_of,
)

__all__ = [
    "OWN_TEMPLATE",
    "PROBES",
    "Probe",
    "Renderer",
    "Rendering",
    "TemplateFacts",
    "max_tokens_of",
    "renderer_of",
    "rendering_of",
]
