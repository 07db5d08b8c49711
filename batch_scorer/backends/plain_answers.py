"""Log probabilities of answers, probabilities of a judge's choices, and what a judge writes, by
transformers' own language models, one sequence at a time: the reference for implicit rewards and
judges. Written apart from what it checks."""

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

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
    _free(settings.device)
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
    _free(settings.device)
    return Scores(values)


@dataclass(frozen=True, slots=True)
class Greedy:
    """The N most probable tokens behind each of S prompts, one after the other.

    `ids` is int64[S, N], `rivals` int64[S, N] the second best token of each place, and `gaps`
    float32[S, N] how far its logit lies below the best one. `spread` is the standard deviation of
    the logits over the vocabulary, the mean of all places.
    """

    ids: npt.NDArray[np.int64]
    rivals: npt.NDArray[np.int64]
    gaps: npt.NDArray[np.float32]
    spread: float


@torch.inference_mode()
def plain_greedy(settings: EngineSettings, rows: TokenizedRows, max_tokens: int) -> Greedy:
    """What transformers' `generate` writes behind the sequences without an end token."""
    settings = replace(settings, device=settings.own_device)
    model = _language_model(settings, float32_head=False)
    # A model's own settings may sample, punish repetitions, or name an end.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    ids, rivals, gaps, spreads = [], [], [], []
    for prompt in _prompts(rows, settings.device):
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(made.logits).float()  # [N, V]
        best = logits.topk(2)
        ids.append(made.sequences[0, prompt.shape[1] :].cpu().numpy())
        rivals.append(best.indices[:, 1].cpu().numpy())
        gaps.append((best.values[:, 0] - best.values[:, 1]).cpu().numpy())
        spreads += [float(place[place.isfinite()].std()) for place in logits]
    del model
    _free(settings.device)
    return Greedy(np.stack(ids), np.stack(rivals), np.stack(gaps), float(np.mean(spreads)))


@torch.inference_mode()
def plain_gaps(
    settings: EngineSettings, rows: TokenizedRows, greedy: Greedy
) -> npt.NDArray[np.float32]:
    """float32[S, N]: the gaps between the same tokens, behind the same ones, in the settings'
    dtype. Below zero, the second best token has become the better one."""
    settings = replace(settings, device=settings.own_device)
    model = _language_model(settings, float32_head=False)
    count = greedy.ids.shape[1]
    keeps = {"logits_to_keep": count} if model._supports_logits_to_keep() else {}
    gaps = np.empty_like(greedy.gaps)
    for place, prompt in enumerate(_prompts(rows, settings.device)):
        ids, rivals = (
            torch.from_numpy(tokens[place]).to(settings.device)
            for tokens in (greedy.ids, greedy.rivals)
        )
        whole = torch.cat([prompt, ids[None, :-1]], dim=1)
        logits: Tensor = model(input_ids=whole, use_cache=False, **keeps).logits[0, -count:]
        gap = logits.gather(1, ids[:, None]).float() - logits.gather(1, rivals[:, None]).float()
        gaps[place] = gap[:, 0].cpu().numpy()
    del model
    _free(settings.device)
    return gaps


def _prompts(rows: TokenizedRows, device: str) -> Iterator[Tensor]:
    """int64[1, tokens] of each sequence."""
    for ids in np.split(rows.token_ids, rows.sequence_offsets[1:-1]):
        yield torch.from_numpy(ids).long()[None].to(device)


def _free(device: str) -> None:
    """Give back the memory of a model that nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _language_model(settings: EngineSettings, *, float32_head: bool = True) -> Any:
    """The whole model with eager attention. With `float32_head` its last layer takes and gives
    float32 whatever the dtype is, as the head of every family does; an engine that writes has it in
    the model's dtype. Raises ModelError for weights that it lacks."""
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
    if float32_head:
        # A copy, because it may share its weights with the embedding.
        head: nn.Module = copy.deepcopy(model.get_output_embeddings()).float()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
        model.set_output_embeddings(head)
    return model.eval().to(settings.device)
