"""Log probabilities of answers, and of a judge's choices, by transformers' own language models, one
sequence at a time: the reference for implicit rewards and judges. Written apart from what it
checks."""

import copy
import gc
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from batch_scorer.backends.base import EngineSettings
from batch_scorer.errors import ModelError
from batch_scorer.models.weights import body_config, checkpoint_tensors
from batch_scorer.records import Scores, TokenizedRows


def plain_answers(settings: EngineSettings, rows: TokenizedRows) -> Scores:
    """The scores that `settings.implicit` asks for, or the log probabilities alone without it; one
    model in memory after the other."""
    policy = _log_probs(settings, rows)
    asked = settings.implicit
    if asked is None:
        return Scores(policy[:, None].astype(np.float32))
    found = [policy]
    if asked.reference is not None:
        reference = replace(asked.reference, dtype=settings.dtype, adapter=settings.adapter)
        found.append(_log_probs(reference, rows))
    score = asked.beta * (policy - sum(found[1:]))
    if asked.length_normalize:
        assert rows.answer_starts is not None
        score = score / np.maximum(rows.lengths - rows.answer_starts, 1)
    return Scores(np.stack([score, *found], axis=1).astype(np.float32))


@torch.inference_mode()
def _log_probs(settings: EngineSettings, rows: TokenizedRows) -> npt.NDArray[np.float64]:
    """float64[S], of the answer of each sequence; NaN for one without tokens."""
    assert rows.answer_starts is not None
    model = _language_model(settings)
    sums = np.full(rows.num_sequences, np.nan)
    for sequence, (start, stop) in enumerate(pairwise(rows.sequence_offsets.tolist())):
        if stop == start:
            continue
        ids = torch.from_numpy(rows.token_ids[start:stop]).long().to(settings.device)
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
        of_next = torch.log_softmax(logits[:-1], dim=-1)  # of token t + 1 at t
        chosen = of_next.gather(1, ids[1:, None])[:, 0]
        sums[sequence] = chosen[int(rows.answer_starts[sequence]) - 1 :].double().sum().item()
    del model
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return sums


@torch.inference_mode()
def plain_verdicts(settings: EngineSettings, rows: TokenizedRows) -> Scores:
    """float32[S, choices], how probable each of a judge's choices is as the next token."""
    model = _language_model(settings)
    choices = list(settings.verdict_ids)
    values = np.full((rows.num_sequences, len(choices)), np.nan, np.float32)
    for sequence, (start, stop) in enumerate(pairwise(rows.sequence_offsets.tolist())):
        if stop == start:
            continue
        ids = torch.from_numpy(rows.token_ids[start:stop]).long().to(settings.device)
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, -1].double()
        values[sequence] = torch.softmax(logits, dim=-1)[choices].float().cpu().numpy()
    del model
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return Scores(values)


def _language_model(settings: EngineSettings) -> Any:
    """The whole model with eager attention; its last layer takes and gives float32 whatever the
    dtype is, as the head of every family does. Raises ModelError for weights that it lacks."""
    assert settings.adapter is not None
    files = settings.read_files()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = body_config(files, settings.adapter, trust_remote_code=settings.trust_remote_code)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        kind = type(build(config, trust_remote_code=settings.trust_remote_code))
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(checkpoint_tensors(files, lambda name: True)),
        dtype=getattr(torch, settings.dtype),
        attn_implementation="eager",
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ModelError(f"{files.path}: plain Hugging Face lacks weights: {missing}")
    # A copy, because it may share its weights with the embedding.
    head: nn.Module = copy.deepcopy(model.get_output_embeddings()).float()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    model.set_output_embeddings(head)
    return model.eval().to(settings.device)
