"""Every family of `batch_scorer.models.families` as a tiny checkpoint, and what is true of it.

A builder saves random weights under the family's own tensor names and gives back a plain body of
transformers with the family's formula, written out here from what is published about it and not
taken from the package. Bodies are eager and run one sequence at a time.

Legend: n tokens of a sequence, H hidden, A attributes, K steps.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tests.parity.tiny_models import (
    QUERY_KEY_GAIN,
    Sequences,
    build_model,
    change_config,
    load_reference,
    random_sequences,
    reference_scores,
)

Formula = Callable[[Tensor, list[int]], Tensor]
"""float32[n, H] hidden states and their ids → float32[1 + A], or [K] of a process reward model."""

HIDDEN, VOCABULARY, PAD, EOS = 64, 320, 0, 2
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
GEMMA_2 = {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0, "sliding_window": 16}
NUM_SEQUENCES = 32


@dataclass(frozen=True)
class Trap:
    """A wrong way to score that somebody took; `body` where the mistake is there."""

    formula: Formula
    body: PreTrainedModel | None = None


@dataclass
class Checkpoint:
    """A saved model and the truth about it."""

    model_dir: Path
    body: PreTrainedModel
    formula: Formula
    sequences: Sequences
    traps: dict[str, Trap]

    @cached_property
    def reference(self) -> list[np.ndarray]:
        return run(self.body, self.formula, self.sequences)

    @cached_property
    def bfloat16_reference(self) -> list[np.ndarray]:
        """The same with the body in bfloat16; its rotary frequencies stay float32."""
        body = copy.deepcopy(self.body)
        for parameter in body.parameters():
            parameter.data = parameter.data.bfloat16()
        return run(body, self.formula, self.sequences)


@dataclass(frozen=True)
class Family:
    """A row of the matrix. `directory` is the model's name, where the family is chosen by it."""

    adapter: str
    build: Callable[[Path], Checkpoint]
    variant: str = ""
    directory: str = "model"
    has_steps: bool = False
    paths: tuple[str, ...] = ("packed", "padded", "vllm")

    @property
    def id(self) -> str:
        return f"{self.adapter}-{self.variant}" if self.variant else self.adapter

    @property
    def has_head(self) -> bool:
        """Whether body and head are apart, and the body can be packed."""
        return "packed" in self.paths


@torch.inference_mode()
def run(body: PreTrainedModel, formula: Formula, sequences: Sequences) -> list[np.ndarray]:
    results = []
    for ids in sequences:
        hidden = body(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        results.append(formula(hidden.float(), ids).float().numpy())
    return results


# Parts of checkpoints


def new_body(model_type: str, vocabulary: int = VOCABULARY, **entries: Any) -> PreTrainedModel:
    """A random body whose attention is peaked and whose norms and biases differ from each other."""
    torch.manual_seed(0)
    shape = SHAPE | entries
    if model_type == "qwen2":
        # Its heads have the size that its width and their number give, and vLLM goes by that; its
        # CPU kernels have none for heads of 16.
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **shape)
    body = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif any(part in name for part in ("q_proj", "k_proj", "query_key_value")):
                parameter.mul_(QUERY_KEY_GAIN.get(model_type, 8.0))
    return body


def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
    """A random matrix that keeps the size of what it is applied to, times `gain`."""
    return torch.randn(rows, columns) * gain / columns**0.5


def save(
    model_dir: Path,
    body: PreTrainedModel,
    architecture: str,
    head: Mapping[str, Tensor],
    *,
    prefix: str = "model.",
    state: Mapping[str, Tensor] | None = None,
    **entries: Any,
) -> None:
    """Body and head in one safetensors file; `entries` go into config.json."""
    model_dir.mkdir(parents=True)
    state = state or {prefix + name: tensor for name, tensor in body.state_dict().items()}
    tensors = {name: tensor.clone().contiguous() for name, tensor in {**state, **head}.items()}
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    config = json.loads(body.config.to_json_string(use_diff=False))
    config |= {"architectures": [architecture], **entries}
    (model_dir / "config.json").write_text(json.dumps(config))


def texts(num: int = NUM_SEQUENCES, longest: int = 60) -> Sequences:
    """Sequences of at least three tokens: the traps look at the tokens before the last."""
    return [[7, 8, *ids] for ids in random_sequences(num, longest=longest, seed=3)]


def last(score: Callable[[Tensor], Tensor]) -> Formula:
    """`score` of the last hidden state."""
    return lambda hidden, ids: score(hidden[-1])


def two_layers(head: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    inner = F.relu(head[f"{name}.0.weight"] @ x + head[f"{name}.0.bias"])
    return head[f"{name}.2.weight"] @ inner + head[f"{name}.2.bias"]


def common_traps(score: Callable[[Tensor], Tensor]) -> dict[str, Trap]:
    return {
        "the token before the last": Trap(lambda hidden, ids: score(hidden[-2])),
        "the first token": Trap(lambda hidden, ids: score(hidden[0])),
        "a sigmoid": Trap(lambda hidden, ids: torch.sigmoid(score(hidden[-1]))),
    }


# Stock classifiers, and linear heads under other names


def linear_head(
    model_type: str,
    architecture: str,
    name: str,
    *,
    prefix: str = "model.",
    bias: bool = False,
    lm_head: bool = False,
    sequences: Callable[[], Sequences] = texts,
    traps: Callable[[Callable[[Tensor], Tensor]], dict[str, Trap]] = lambda score: {},
    **entries: Any,
) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        body = new_body(model_type, **(GEMMA_2 if model_type == "gemma2" else {}))
        head = {f"{name}.weight": matrix(1, HIDDEN, 2)}
        if bias:
            head[f"{name}.bias"] = torch.tensor([0.75])
        others = {"lm_head.weight": matrix(VOCABULARY, HIDDEN)} if lm_head else {}
        save(model_dir, body, architecture, {**head, **others}, prefix=prefix, **entries)

        def score(x: Tensor) -> Tensor:
            return head[f"{name}.weight"] @ x + head.get(f"{name}.bias", torch.zeros(1))

        wrong = common_traps(score) | traps(score)
        if bias:
            wrong["no bias"] = Trap(last(lambda x: head[f"{name}.weight"] @ x))
        return Checkpoint(model_dir, body, last(score), sequences(), wrong)

    return build


def without_softcap(score: Callable[[Tensor], Tensor]) -> dict[str, Trap]:
    body = new_body("gemma2", **GEMMA_2)
    body.config.attn_logit_softcapping = None
    for layer in body.layers:
        layer.self_attn.attn_logit_softcapping = None
    return {"attention without its softcap": Trap(last(score), body)}


def ends_in_pad() -> Sequences:
    """Texts that hold the pad id and end in it."""
    return [[*ids[:2], PAD, *ids[2:], PAD] for ids in texts()]


def stock_pad(model_dir: Path) -> Checkpoint:
    checkpoint = linear_head("llama", "LlamaForSequenceClassification", "score")(model_dir)
    score = checkpoint.formula
    checkpoint.sequences = ends_in_pad()
    checkpoint.formula = lambda hidden, ids: score(hidden[:-1], ids)
    checkpoint.traps = {
        "the last token, a pad": Trap(score),
        "the token before the first pad": Trap(first_pad(score)),
    }
    return checkpoint


def first_pad(score: Formula, pad: int = PAD) -> Formula:
    """What ports with remote code do: the token before the first pad id, wherever it lies."""

    def formula(hidden: Tensor, ids: list[int]) -> Tensor:
        end = ids.index(pad) if pad in ids else len(ids)
        return score(hidden[:end], ids[:end])

    return formula


def starling(architecture: str) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        make = linear_head("llama", architecture, "v_head", prefix="transformer.")
        checkpoint = make(model_dir)
        checkpoint.sequences = [[*ids[:2], PAD, *ids[2:]] for ids in checkpoint.sequences]
        checkpoint.traps["the token before the first id 0"] = Trap(first_pad(checkpoint.formula))
        return checkpoint

    return build


# Value heads


def value_mlp(num_layers: int) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        body = new_body("llama")
        sizes = [HIDDEN, *[48] * num_layers, 1]
        head: dict[str, Tensor] = {}
        for i, (inside, outside) in enumerate(pairwise(sizes)):
            head[f"v_head.summary.{2 * i}.weight"] = matrix(outside, inside, 2)
            head[f"v_head.summary.{2 * i}.bias"] = torch.randn(outside)
        others = {"lm_head.weight": matrix(VOCABULARY, HIDDEN)}
        entries = {"vhead_layer_type": "mlp", "vhead_num_neurons": 48}
        architecture = "LlamaForCausalLM"
        save(
            model_dir,
            body,
            architecture,
            {**head, **others},
            vhead_num_layers=num_layers,
            **entries,
        )

        def score(x: Tensor, between: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
            for i in range(num_layers + 1):
                x = (
                    head[f"v_head.summary.{2 * i}.weight"] @ x
                    + head[f"v_head.summary.{2 * i}.bias"]
                )
                x = between(x) if i < num_layers else x
            return x

        traps = common_traps(score)
        traps["nothing between the layers"] = Trap(last(lambda x: score(x, lambda y: y)))
        traps["GELU between the layers"] = Trap(last(lambda x: score(x, F.gelu)))
        traps["dropout left on"] = Trap(last(lambda x: score(F.dropout(x, 0.1))))
        return Checkpoint(model_dir, body, last(score), texts(), traps)

    return build


def normalized(architecture: str, name: str) -> Callable[[Path], Checkpoint]:
    mean, std = 1.25, 2.5

    def build(model_dir: Path) -> Checkpoint:
        checkpoint = linear_head("qwen2", architecture, name, mean=mean, std=std)(model_dir)
        raw = checkpoint.formula
        checkpoint.formula = lambda hidden, ids: torch.cat(
            [(raw(hidden, ids) - mean) / std, raw(hidden, ids)]
        )
        checkpoint.traps["not normalised"] = Trap(raw)
        return checkpoint

    return build


# The logit of a token


def token_logit(model_dir: Path) -> Checkpoint:
    body = new_body("llama")
    lm_head = matrix(VOCABULARY, HIDDEN, 10)
    save(model_dir, body, "LlamaForCausalLM", {"lm_head.weight": lm_head})
    return Checkpoint(
        model_dir, body, last(lambda x: lm_head[:1] @ x), texts(), logit_traps(lm_head)
    )


def tied_token_logit(model_dir: Path) -> Checkpoint:
    # An embedding has no row for the pad id, which must not be the token that is read.
    body = new_body("qwen2", tie_word_embeddings=True, pad_token_id=5)
    embeddings = body.get_input_embeddings().weight.data
    embeddings.mul_(20)  # from 0.02, else all logits are nearly 0
    save(model_dir, body, "Qwen2ForCausalLM", {})
    return Checkpoint(
        model_dir, body, last(lambda x: embeddings[:1] @ x), texts(), logit_traps(embeddings)
    )


def logit_difference(first: int, second: int) -> Callable[[Path], Checkpoint]:
    """One token's logit minus another's."""

    def build(model_dir: Path) -> Checkpoint:
        vocabulary = max(VOCABULARY, first + 1)
        body = new_body("llama", vocabulary)
        lm_head = matrix(vocabulary, HIDDEN, 10)
        save(model_dir, body, "LlamaForCausalLM", {"lm_head.weight": lm_head})

        def score(x: Tensor) -> Tensor:
            return lm_head[first : first + 1] @ x - lm_head[second : second + 1] @ x

        traps = common_traps(score) | {
            "the first token's logit alone": Trap(last(lambda x: lm_head[first : first + 1] @ x)),
            "the other way round": Trap(last(lambda x: -score(x))),
        }
        return Checkpoint(model_dir, body, last(score), texts(), traps)

    return build


def logit_traps(lm_head: Tensor) -> dict[str, Trap]:
    traps = common_traps(lambda x: lm_head[:1] @ x)
    traps["a log probability"] = Trap(last(lambda x: (lm_head @ x).log_softmax(-1)[:1]))
    traps["a probability"] = Trap(last(lambda x: (lm_head @ x).softmax(-1)[:1]))
    traps["another token's logit"] = Trap(last(lambda x: lm_head[1:2] @ x))
    traps["a final softcap"] = Trap(last(lambda x: 3 * torch.tanh(lm_head[:1] @ x / 3)))
    return traps


# Two layers: `score.0`, `score.2`


def score_mlp(
    model_type: str, architecture: str, *, read_at_end_token: bool = False, pad: int = PAD
) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        body = new_body(model_type)
        head = {
            "score.0.weight": matrix(HIDDEN, HIDDEN, 2),
            "score.0.bias": torch.randn(HIDDEN),
            "score.2.weight": matrix(1, HIDDEN, 2),
            "score.2.bias": torch.randn(1),
        }
        save(model_dir, body, architecture, head)

        def score(x: Tensor) -> Tensor:
            return two_layers(head, "score", x)

        def flat(x: Tensor) -> Tensor:
            inner = head["score.0.weight"] @ x + head["score.0.bias"]
            return head["score.2.weight"] @ inner + head["score.2.bias"]

        traps = common_traps(score) | {"no ReLU": Trap(last(flat))}
        sequences = texts()
        if read_at_end_token:
            sequences = [[*ids, pad] for ids in sequences]
            traps["before the end token"] = Trap(first_pad(last(score), pad))
        else:
            sequences = [[*ids[:2], pad, *ids[2:]] for ids in sequences]
            traps["the token before the first pad"] = Trap(first_pad(last(score), pad))
        return Checkpoint(model_dir, body, last(score), sequences, traps)

    return build


# Process reward models

EXTRA_0, SHEPHERD_TAG, SHEPHERD_SIGNS = 151651, 12902, (648, 387)
PLUS, MINUS, EOT = 10, 12, 128009
ASSISTANT_HEADER = [128006, 78191, 128007, 271]
USER_HEADER = [128006, 882, 128007, 271]


def tagged_steps(tag: int) -> Sequences:
    """Answers of one to five steps, each followed by the tag; text goes on after the last."""
    random = np.random.default_rng(5)
    sequences = []
    for ids in texts(longest=30):
        steps = [random.integers(20, 300, random.integers(2, 12)).tolist() for _ in range(5)]
        kept = steps[: 1 + len(ids) % 5]
        sequences.append([*ids, *(token for step in kept for token in (*step, tag)), 9, 4])
    return sequences


def step_turns() -> Sequences:
    """Every step a user turn, answered by "+". The text itself holds "+" too."""
    sequences = []
    for number, ids in enumerate(texts(longest=20)):
        turns = [[*ids[:3], PLUS, *ids[3:], 20 + turn] for turn in range(1 + number % 4)]
        sequence = [1]
        for turn in turns:
            sequence += [*USER_HEADER, *turn, EOT, *ASSISTANT_HEADER, PLUS, EOT]
        sequences.append(sequence)
    return sequences


def at(ids: list[int], token: int, offset: int = 0) -> list[int]:
    return [place + offset for place, there in enumerate(ids) if there == token]


def qwen_prm(model_dir: Path) -> Checkpoint:
    body = new_body("qwen2", vocabulary=151936)
    head = {
        "score.0.weight": matrix(HIDDEN, HIDDEN, 2),
        "score.0.bias": torch.randn(HIDDEN),
        "score.2.weight": matrix(2, HIDDEN, 6),
        "score.2.bias": torch.randn(2),
    }
    save(model_dir, body, "Qwen2ForProcessRewardModel", head)

    def logits(hidden: Tensor, ids: list[int], offset: int = 0) -> Tensor:
        return torch.stack([two_layers(head, "score", hidden[p]) for p in at(ids, EXTRA_0, offset)])

    traps = {
        "class 0": Trap(lambda h, ids: logits(h, ids).softmax(-1)[:, 0]),
        "a sigmoid of class 1": Trap(lambda h, ids: logits(h, ids)[:, 1].sigmoid()),
        "the raw logit": Trap(lambda h, ids: logits(h, ids)[:, 1]),
        "the token before the tag": Trap(lambda h, ids: logits(h, ids, -1).softmax(-1)[:, 1]),
    }
    formula: Formula = lambda h, ids: logits(h, ids).softmax(-1)[:, 1]  # noqa: E731
    return Checkpoint(model_dir, body, formula, tagged_steps(EXTRA_0), traps)


def shepherd(model_dir: Path) -> Checkpoint:
    body = new_body("mistral", vocabulary=32000, sliding_window=None)
    lm_head = matrix(32000, HIDDEN, 6)
    save(model_dir, body, "MistralForCausalLM", {"lm_head.weight": lm_head})
    return Checkpoint(
        model_dir,
        body,
        lambda h, ids: sign_share(lm_head, SHEPHERD_SIGNS, h[at(ids, SHEPHERD_TAG)]),
        tagged_steps(SHEPHERD_TAG),
        sign_traps(lm_head, SHEPHERD_SIGNS, lambda ids: at(ids, SHEPHERD_TAG)),
    )


def rlhflow(model_dir: Path) -> Checkpoint:
    body = new_body("llama", vocabulary=128256)
    lm_head = matrix(128256, HIDDEN, 6)
    save(model_dir, body, "LlamaForCausalLM", {"lm_head.weight": lm_head})

    def formula(hidden: Tensor, ids: list[int]) -> Tensor:
        # As published: one forward for the text up to and with each reply, read 3 from its end.
        ends = [place + 2 for place in replies(ids)]
        places = [end - 3 for end in ends]
        return sign_share(lm_head, (PLUS, MINUS), hidden[places])

    def every_forward(hidden: Tensor, ids: list[int]) -> Tensor:
        shares = []
        for place in replies(ids):
            prefix = torch.tensor([ids[: place + 2]])
            there = body(input_ids=prefix, use_cache=False).last_hidden_state[0, -3]
            shares.append(sign_share(lm_head, (PLUS, MINUS), there[None]))
        return torch.cat(shares)

    traps = sign_traps(lm_head, (PLUS, MINUS), lambda ids: [p - 1 for p in replies(ids)])
    checkpoint = Checkpoint(model_dir, body, formula, step_turns(), traps)
    one_by_one = run(body, every_forward, checkpoint.sequences[:6])
    for single, stepwise in zip(checkpoint.reference[:6], one_by_one, strict=True):
        np.testing.assert_allclose(single, stepwise, rtol=0, atol=1e-5)
    return checkpoint


def replies(ids: list[int]) -> list[int]:
    """Places of the assistant's signs."""
    size = len(ASSISTANT_HEADER)
    return [p for p in at(ids, PLUS) if ids[p - size : p] == ASSISTANT_HEADER]


def sign_share(lm_head: Tensor, signs: tuple[int, int], hidden: Tensor) -> Tensor:
    return (hidden @ lm_head[list(signs)].T).softmax(-1)[:, 0]


def sign_traps(
    lm_head: Tensor, signs: tuple[int, int], places: Callable[[list[int]], list[int]]
) -> dict[str, Trap]:
    def moved(by: int) -> Formula:
        return lambda h, ids: sign_share(lm_head, signs, h[[p + by for p in places(ids)]])

    good, bad = signs
    return {
        "the share of -": Trap(lambda h, ids: sign_share(lm_head, (bad, good), h[places(ids)])),
        "one token late": Trap(moved(1)),
        "one token early": Trap(moved(-1)),
        "share of the whole vocabulary": Trap(
            lambda h, ids: (h[places(ids)] @ lm_head.T).softmax(-1)[:, good]
        ),
    }


# InternLM2


def internlm2(model_dir: Path, vocabulary: int = VOCABULARY, reward_id: int = 311) -> Checkpoint:
    shape = {"hidden_size": 128, "head_dim": 32}
    body = new_body("llama", vocabulary, **shape, rope_theta=50000.0)
    state = body.state_dict()
    weight = matrix(1, 128, 2)
    renamed = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "embed_tokens": "tok_embeddings",
    }
    stored = {}
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            # [kv heads, queries of the head + key + value, head size, H]
            groups = [part.view(2, -1, 32, 128) for part in parts]
            fused = torch.cat(groups, dim=1).reshape(-1, 128)
            stored["model." + name.replace("self_attn.q_proj", "attention.wqkv")] = fused
            continue
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        stored[f"model.{name}"] = tensor
    config = {
        "model_type": "internlm2",
        "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
        "bias": False,
        "rope_theta": 50000.0,
        "rope_parameters": None,
        "rope_scaling": None,
        "attn_implementation": "eager",
        "reward_token_id": reward_id,
    }
    architecture = "InternLM2ForRewardModel"
    save(model_dir, body, architecture, {"v_head.weight": weight}, state=stored, **config)
    for unknown_to_internlm2 in ("head_dim", "attention_bias", "mlp_bias", "rope_parameters"):
        file = model_dir / "config.json"
        left = json.loads(file.read_text())
        left.pop(unknown_to_internlm2, None)
        file.write_text(json.dumps(left))

    def score(x: Tensor) -> Tensor:
        return weight @ x

    blocks, swapped, other_base = (copy.deepcopy(body) for _ in range(3))
    with torch.no_grad():
        for i, layer in enumerate(blocks.layers):
            fused = stored[f"model.layers.{i}.attention.wqkv.weight"]
            projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            for projection, rows in zip(projections, fused.split([128, 64, 64]), strict=True):
                projection.weight.copy_(rows)
    for layer in swapped.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    base = other_base.rotary_emb.inv_freq
    other_base.rotary_emb.inv_freq = 1 / 10000 ** (torch.arange(0, 32, 2) / 32).to(base)
    # The reward token in the middle too: the last one counts.
    sequences = [[*ids[:2], reward_id, *ids[2:], reward_id] for ids in texts()]
    traps = common_traps(score) | {
        "no reward token": Trap(lambda hidden, ids: score(hidden[-2])),
        "the first reward token": Trap(lambda hidden, ids: score(hidden[2])),
        "q, k and v as three blocks": Trap(last(score), blocks),
        "w1 and w3 swapped": Trap(last(score), swapped),
        "rotary base lost": Trap(last(score), other_base),
    }
    return Checkpoint(model_dir, body, last(score), sequences, traps)


# PairRM


def pairrm(model_dir: Path, source: int = 320, first: int = 321, second: int = 322) -> Checkpoint:
    marks = {"source_prefix_id": source, "cand1_prefix_id": first, "cand2_prefix_id": second}
    # Distances are counted up to 32 tokens, in buckets; most sequences are longer.
    distances = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    shape = {"position_biased_input": False, "type_vocab_size": 0, "max_position_embeddings": 32}
    body = new_body("deberta-v2", 323, **distances, **shape)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if "query_proj.weight" in name or "key_proj.weight" in name:
                parameter.mul_(QUERY_KEY_GAIN["deberta-v2"])
            elif "value_proj.weight" in name or "attention.output.dense.weight" in name:
                parameter.mul_(8)  # else a mark's own embedding is nearly all there is
        body.encoder.rel_embeddings.weight.mul_(50)
    head = {
        "head_layer.1.weight": matrix(HIDDEN, 2 * HIDDEN, 2),
        "head_layer.1.bias": torch.randn(HIDDEN),
        "head_layer.4.weight": matrix(3, HIDDEN, 4),
        "head_layer.4.bias": torch.randn(3),
    }
    architecture, prefix = "DebertaV2PairRM", "pretrained_model."
    save(model_dir, body, architecture, head, prefix=prefix, n_tasks=3, drop_out=0.05, **marks)

    def answer(hidden: Tensor, ids: list[int], mark: str) -> Tensor:
        read = torch.cat([hidden[ids.index(marks[m])] for m in ("source_prefix_id", mark)])
        inner = torch.tanh(head["head_layer.1.weight"] @ read + head["head_layer.1.bias"])
        return head["head_layer.4.weight"] @ inner + head["head_layer.4.bias"]

    def formula(hidden: Tensor, ids: list[int]) -> Tensor:
        own, other = (answer(hidden, ids, f"cand{n}_prefix_id") for n in (1, 2))
        return (own - other).mean()[None]

    sequences = [
        [1, 320, *ids[: len(ids) // 3], 2, 1, 321, *ids[len(ids) // 3 : -2], 2, 1, 322, *ids[-2:]]
        for ids in texts()
    ]
    traps = {
        "the first answer alone": Trap(lambda h, ids: answer(h, ids, "cand1_prefix_id")[:1]),
        "the first task alone": Trap(
            lambda h, ids: (answer(h, ids, "cand1_prefix_id") - answer(h, ids, "cand2_prefix_id"))[
                :1
            ]
        ),
        "the other way round": Trap(lambda h, ids: -formula(h, ids)),
        "the second answer's end": Trap(lambda h, ids: formula(h[[*range(1, len(ids)), 0]], ids)),
    }
    wider = copy.deepcopy(body.config)
    wider.max_position_embeddings = 2048
    other = AutoModel.from_config(wider, attn_implementation="eager").eval()
    other.load_state_dict(
        {n: t for n, t in body.state_dict().items() if "rel_embeddings" not in n}, strict=False
    )
    other.encoder.rel_embeddings = body.encoder.rel_embeddings
    traps["distances counted up to the longest sequence"] = Trap(formula, other)
    return Checkpoint(model_dir, body, formula, sequences, traps)


# Beaver


def beaver(kind: str) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        body = new_body("llama")
        weight, bias = matrix(1, HIDDEN, 4), torch.tensor([0.5])
        mean, var = torch.tensor([1.5]), torch.tensor([4.0])
        head = {
            "score_head.weight": weight,
            "score_head.bias": bias,
            "normalizer.mean": mean,
            "normalizer.var": var,
            "normalizer.count": torch.tensor([7]),
        }
        entries = {"score_type": kind, "do_normalize": True, "score_dim": 1, "bias": True}
        save(model_dir, body, "LlamaForScore", head, **entries)

        def raw(x: Tensor) -> Tensor:
            return weight @ x + bias

        def affine(x: Tensor) -> Tensor:
            return (raw(x) - 1.5) / 2

        def scaled(x: Tensor) -> Tensor:
            return raw(x) / 2

        if kind == "reward":
            traps = common_traps(affine)
            traps |= {"not normalised": Trap(last(raw)), "scaled only": Trap(last(scaled))}
            return Checkpoint(model_dir, body, last(affine), texts(), traps)
        traps = common_traps(lambda x: -scaled(x))
        traps["the cost's own sign"] = Trap(last(scaled))
        traps["shifted by the mean"] = Trap(last(lambda x: -affine(x)))
        formula = last(lambda x: torch.cat([-scaled(x), scaled(x)]))
        return Checkpoint(model_dir, body, formula, texts(), traps)

    return build


# OpenAssistant's GPT-NeoX


def oasst(pooling: str) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        body = new_body("gpt_neox", hidden_size=128)
        weight, bias = matrix(1, 128, 2 if pooling == "last" else 6), torch.tensor([0.75])
        head = {"out_proj.weight": weight, "out_proj.bias": bias}
        entries = {"model_type": "gpt_neox_reward_model", "pooling": pooling}
        save(model_dir, body, "GPTNeoXRewardModel", head, prefix="gpt_neox.", **entries)
        formulas: dict[str, Formula] = {
            "last": last(lambda x: weight @ x + bias),
            "mean": lambda hidden, ids: weight @ hidden.mean(0) + bias,
        }
        right = formulas.pop(pooling)
        (wrong,) = formulas.values()
        traps = {
            "the other pooling": Trap(wrong),
            "no bias": Trap(lambda hidden, ids: right(hidden, ids) - bias),
            "without the last token": Trap(lambda hidden, ids: right(hidden[:-1], ids)),
        }
        return Checkpoint(model_dir, body, right, texts(), traps)

    return build


# Gated heads

LLAMA_MARK = [EOT, *ASSISTANT_HEADER]
GEMMA_MARK = [107, 108, 106, 2516, 108]


def conversations(mark: list[int], end: list[int]) -> Sequences:
    """One to three turns; the marks of the earlier turns and the end ids lie mid-text."""
    sequences = []
    for number, ids in enumerate(texts(longest=25)):
        turns = [[*ids, 20 + turn, *mark, *ids[:7], 30 + number, *end] for turn in range(3)]
        sequences.append([1, *(token for turn in turns[: 1 + number % 3] for token in turn)])
    return sequences


def mark_at(ids: list[int], mark: list[int], occurrence: int = -1) -> int:
    size = len(mark)
    return [p for p in range(len(ids) - size + 1) if ids[p : p + size] == mark][occurrence]


def armorm(model_type: str) -> Callable[[Path], Checkpoint]:
    llama = model_type == "llama"
    mark, end = (LLAMA_MARK, [EOT]) if llama else (GEMMA_MARK, [107, 108])
    architecture = f"{'Llama' if llama else 'Gemma2'}ForRewardModelWithGating"

    def build(model_dir: Path) -> Checkpoint:
        vocabulary, entries = (128256, {"pad_token_id": EOT}) if llama else (2560, GEMMA_2)
        body = new_body(model_type, vocabulary, **entries)
        sizes = [HIDDEN, 48, 48, 48, 19]
        gate = {
            f"gating.layers.{i}.{part}": value
            for i, (inside, outside) in enumerate(pairwise(sizes))
            for part, value in (
                ("weight", matrix(outside, inside, 4)),
                ("bias", torch.randn(outside)),
            )
        }
        transform = torch.eye(19)
        transform[4] -= 0.5 * torch.rand(19)  # the verbosity row, as in the original
        head = {
            "regression_layer.weight": matrix(19, HIDDEN, 3),
            "reward_transform_matrix": transform,
            "gating.logit_scale": torch.tensor([1.5]),
            **gate,
        }
        entries = {"num_objectives": 19, "gating_temperature": 10}
        save(model_dir, body, architecture, head, **entries)

        def output(
            x: Tensor, prompt: Tensor, *, temperature: float = 10.0, transposed: bool = False
        ) -> Tensor:
            g = prompt
            for i in range(4):
                g = gate[f"gating.layers.{i}.weight"] @ g + gate[f"gating.layers.{i}.bias"]
                g = F.relu(g) if i < 3 else g
            coefficients = (g / temperature).softmax(-1) * 1.5
            rewards = head["regression_layer.weight"] @ x
            moved = transform @ rewards if transposed else rewards @ transform
            return torch.cat([(coefficients * moved).sum()[None], rewards])

        def formula(hidden: Tensor, ids: list[int]) -> Tensor:
            return output(hidden[-1], hidden[mark_at(ids, mark)])

        def transformed(hidden: Tensor, ids: list[int]) -> Tensor:
            right = formula(hidden, ids)
            return torch.cat([right[:1], right[1:] @ transform])

        traps = {
            "transformed rewards": Trap(transformed),
            "the matrix transposed": Trap(
                lambda h, ids: output(h[-1], h[mark_at(ids, mark)], transposed=True)
            ),
            "the gate at the last token": Trap(lambda h, ids: output(h[-1], h[-1])),
            "the gate at the first turn": Trap(
                lambda h, ids: output(h[-1], h[mark_at(ids, mark, 0)])
            ),
            "the gate after the mark": Trap(
                lambda h, ids: output(h[-1], h[mark_at(ids, mark) + 4])
            ),
            "no temperature": Trap(
                lambda h, ids: output(h[-1], h[mark_at(ids, mark)], temperature=1.0)
            ),
        }
        if llama:
            traps["the token before the first pad"] = Trap(
                lambda h, ids: output(h[ids.index(EOT) - 1], h[mark_at(ids, mark)])
            )
        sequences = conversations(mark, end)
        return Checkpoint(model_dir, body, formula, sequences, traps)

    return build


def qrm(model_dir: Path) -> Checkpoint:
    body = new_body("llama", 128256, pad_token_id=EOT)
    quantiles, width = 5, 48
    head: dict[str, Tensor] = {
        "regression_layer.weight": matrix(19 * quantiles, HIDDEN, 6),
        "reward_transform_matrix": torch.eye(19) - 0.3 * torch.rand(19, 19),
        "gating.logit_scale": torch.tensor([1.5]),
        "gating.layers.9.weight": matrix(19, width, 10),
        "gating.layers.9.bias": torch.randn(19),
    }
    for layer, inside in ((0, HIDDEN), (3, width), (6, width)):
        norm = f"gating.layers.{layer + 2}"
        head |= {
            f"gating.layers.{layer}.weight": matrix(width, inside, 4),
            f"{norm}.weight": 1 + 0.3 * torch.randn(width),
            f"{norm}.bias": torch.randn(width),
            f"{norm}.running_mean": torch.rand(width),
            f"{norm}.running_var": 0.5 + torch.rand(width),
            f"{norm}.num_batches_tracked": torch.tensor(3),
        }
    entries = {"num_objectives": 19, "num_quantiles": quantiles, "gating_temperature": 10}
    save(model_dir, body, "LlamaForRewardModelWithGating", head, **entries)
    transform = head["reward_transform_matrix"]

    def gate(x: Tensor, norm_uses: str = "running", temperature: float = 10) -> Tensor:
        for layer in (0, 3, 6):
            x = F.relu(head[f"gating.layers.{layer}.weight"] @ x)
            norm = f"gating.layers.{layer + 2}"
            mean, var = head[f"{norm}.running_mean"], head[f"{norm}.running_var"]
            if norm_uses == "batch":  # of one row
                mean, var = x, torch.zeros(width)
            x = (x - mean) / (var + 1e-5).sqrt() * head[f"{norm}.weight"] + head[f"{norm}.bias"]
        x = head["gating.layers.9.weight"] @ x + head["gating.layers.9.bias"]
        return (x / temperature).softmax(-1) * 1.5

    def output(x: Tensor, coefficients: Tensor) -> Tensor:
        means = (head["regression_layer.weight"] @ x).view(19, quantiles).mean(1)
        rewards = means @ transform
        return torch.cat([(coefficients * rewards).sum()[None], rewards])

    def untransformed(h: Tensor, ids: list[int]) -> Tensor:
        means = (head["regression_layer.weight"] @ h[-1]).view(19, quantiles).mean(1)
        return torch.cat([formula(h, ids)[:1], means])

    def median(h: Tensor, ids: list[int]) -> Tensor:
        middle = (head["regression_layer.weight"] @ h[-1]).view(19, quantiles)[:, quantiles // 2]
        return (gate(h[mark_at(ids, LLAMA_MARK)]) * (middle @ transform)).sum()[None]

    def other_order(h: Tensor, ids: list[int]) -> Tensor:
        means = (head["regression_layer.weight"] @ h[-1]).view(quantiles, 19).mean(0)
        return (gate(h[mark_at(ids, LLAMA_MARK)]) * (means @ transform)).sum()[None]

    def formula(h: Tensor, ids: list[int]) -> Tensor:
        return output(h[-1], gate(h[mark_at(ids, LLAMA_MARK)]))

    traps = {
        "untransformed rewards": Trap(untransformed),
        "batch norm in training": Trap(
            lambda h, ids: output(h[-1], gate(h[mark_at(ids, LLAMA_MARK)], "batch"))
        ),
        "the median": Trap(median),
        "quantiles before attributes": Trap(other_order),
        "the gate at the last token": Trap(lambda h, ids: output(h[-1], gate(h[-1]))),
        "the gate at the first turn": Trap(
            lambda h, ids: output(h[-1], gate(h[mark_at(ids, LLAMA_MARK, 0)]))
        ),
        "the token before the first pad": Trap(
            lambda h, ids: output(h[ids.index(EOT) - 1], gate(h[mark_at(ids, LLAMA_MARK)]))
        ),
    }
    return Checkpoint(model_dir, body, formula, conversations(LLAMA_MARK, [EOT]), traps)


def urm(model_dir: Path) -> Checkpoint:
    body = new_body("llama")
    head = {"score.weight": matrix(10, HIDDEN, 2)}
    for layer, outside in ((0, HIDDEN), (2, HIDDEN), (4, 5)):
        head[f"weights.fc.{layer}.weight"] = matrix(outside, HIDDEN, 1.5)
        head[f"weights.fc.{layer}.bias"] = torch.randn(outside)
    labels = {str(i): f"LABEL_{i}" for i in range(10)}
    save(model_dir, body, "LlamaForSequenceClassification", head, id2label=labels)

    def output(x: Tensor, between: Callable[[Tensor], Tensor] = F.selu, first: int = 0) -> Tensor:
        y = x
        for layer in (0, 2, 4):
            y = head[f"weights.fc.{layer}.weight"] @ y + head[f"weights.fc.{layer}.bias"]
            y = between(y) if layer < 4 else y
        means = (head["score.weight"] @ x)[first::2]
        return torch.cat([(means * y).sum()[None], means])

    traps = {
        "the spreads": Trap(last(lambda x: output(x, first=1))),
        "ReLU for SELU": Trap(last(lambda x: output(x, F.relu))),
        "the plain mean": Trap(last(lambda x: (head["score.weight"] @ x)[0::2].mean()[None])),
        "the first five outputs": Trap(last(lambda x: (head["score.weight"] @ x)[:5].sum()[None])),
        "the token before the last": Trap(lambda h, ids: output(h[-2])),
    }
    return Checkpoint(model_dir, body, last(output), texts(), traps)


def ldl(*, softmax: bool) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        body = new_body("gemma2", **GEMMA_2)
        attributes, width = 22, 48
        regression: dict[str, Tensor] = {}
        gating: dict[str, Tensor] = {}
        for where, indices, out in (
            (regression, (0, 2, 4), attributes * 10),
            (gating, (0, 3, 6), attributes),
        ):
            sizes = [HIDDEN, width, width, out]
            for i, inside, outside in zip(indices, sizes, sizes[1:], strict=False):
                where[f"network.{i}.weight"] = matrix(outside, inside, 3)
                where[f"network.{i}.bias"] = torch.randn(outside)
        # The original saves the bare body; config.json then names that.
        entries = {"softmax": softmax, "temperature": 2.0, "num_objectives": 220}
        save(model_dir, body, "Gemma2Model", {}, prefix="", **entries)
        torch.save(regression, model_dir / "regression_layer.pt")
        torch.save(gating, model_dir / "gating_layer.pt")

        def mlp(layers: Mapping[str, Tensor], x: Tensor, slope: float = 0.01) -> Tensor:
            *inner, outer = sorted({int(name.split(".")[1]) for name in layers})
            for i in inner:
                x = layers[f"network.{i}.weight"] @ x + layers[f"network.{i}.bias"]
                x = torch.where(x > 0, x, slope * x)
            return layers[f"network.{outer}.weight"] @ x + layers[f"network.{outer}.bias"]

        def score(x: Tensor, *, gated: bool = softmax, slope: float = 0.01) -> Tensor:
            shares = mlp(regression, x, slope).view(22, 10).softmax(-1)
            weights = mlp(gating, x, slope)
            weights = (weights / 2.0).softmax(-1) if gated else weights
            return ((weights @ shares) * torch.linspace(0, 1, 10)).sum()[None]

        def unshared(x: Tensor) -> Tensor:
            bins = mlp(regression, x).view(22, 10)
            return ((mlp(gating, x)[:, None] * bins).sum(0) * torch.linspace(0, 1, 10)).sum()[None]

        traps = {
            "the token before the last": Trap(lambda h, ids: score(h[-2])),
            "softmax against the config": Trap(last(lambda x: score(x, gated=not softmax))),
            "ReLU for LeakyReLU": Trap(last(lambda x: score(x, slope=0.0))),
            "no softmax over the bins": Trap(last(unshared)),
            **without_softcap(score),
        }
        return Checkpoint(model_dir, body, last(score), texts(), traps)

    return build


# Attribute regression

HELPSTEER_WEIGHTS = {
    "nemotron4": {
        "helpfulness": 0.3,
        "correctness": 0.74,
        "coherence": 0.46,
        "complexity": 0.47,
        "verbosity": -0.33,
    },
    "steerlm": {
        "helpfulness": 0.65,
        "correctness": 0.8,
        "coherence": 0.45,
        "complexity": 0.55,
        "verbosity": -0.4,
    },
}


def named_outputs(model_dir: Path) -> Checkpoint:
    body = new_body("llama")
    score, bias = matrix(3, HIDDEN, 2), torch.tensor([0.5, -0.25, 2.0])
    head = {"score.weight": score, "score.bias": bias}
    labels = {"0": "kind", "1": "short", "2": "true"}
    save(model_dir, body, "LlamaForSequenceClassification", head, id2label=labels)

    def outputs(x: Tensor) -> Tensor:
        return score @ x + bias

    traps = common_traps(outputs) | {
        "no bias": Trap(last(lambda x: score @ x)),
        "a softmax": Trap(last(lambda x: outputs(x).softmax(-1))),
        "another order": Trap(last(lambda x: outputs(x).flip(0))),
    }
    return Checkpoint(model_dir, body, last(outputs), texts(), traps)


def token_classifier(model_dir: Path) -> Checkpoint:
    make = linear_head("qwen2", "Qwen2ForTokenClassification", "score", bias=True)
    checkpoint = make(model_dir)
    score = checkpoint.formula
    checkpoint.sequences = ends_in_pad()
    checkpoint.traps["the last token that is not the pad id"] = Trap(
        lambda hidden, ids: score(hidden[:-1], ids)
    )
    return checkpoint


def attributes(kind: str, names: list[str]) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        body = new_body("llama")
        score = matrix(len(names), HIDDEN, 2)
        labels = {str(i): name for i, name in enumerate(names)}
        architecture = "LlamaForSequenceClassification"
        save(model_dir, body, architecture, {"score.weight": score}, id2label=labels)
        weights = HELPSTEER_WEIGHTS[kind]

        def weighted(outputs: Tensor) -> Tensor:
            return sum(outputs[i] * weights.get(name, 0) for i, name in enumerate(names))[None]

        def formula(x: Tensor) -> Tensor:
            return torch.cat([weighted(score @ x), score @ x])

        by_place = torch.tensor([*[0] * (len(names) - 5), *weights.values()])
        traps = {
            "weights by position": Trap(last(lambda x: ((score @ x) @ by_place)[None])),
            "clamped": Trap(last(lambda x: weighted((score @ x).clamp(0, 4)))),
            "rounded": Trap(last(lambda x: weighted((score @ x).round()))),
            "the plain mean": Trap(last(lambda x: (score @ x).mean()[None])),
        }
        return Checkpoint(model_dir, body, last(formula), texts(), traps)

    return build


# Encoders: scored by their own forward


@dataclass
class EncoderCheckpoint(Checkpoint):
    @cached_property
    def reference(self) -> list[np.ndarray]:
        return list(reference_scores(load_reference(self.model_dir), self.sequences))

    @cached_property
    def bfloat16_reference(self) -> list[np.ndarray]:
        model = load_reference(self.model_dir, "bfloat16")
        return list(reference_scores(model, self.sequences))


def encoder(name: str) -> Callable[[Path], Checkpoint]:
    def build(model_dir: Path) -> Checkpoint:
        build_model(name, model_dir)
        model = load_reference(model_dir)
        traps = {
            "the head's last layer alone": Trap(lambda h, ids: model.classifier(h[:1])[0]),
            "a decoder's pooling": Trap(lambda h, ids: model.classifier(h[-1:])[0]),
        }
        sequences = random_sequences(NUM_SEQUENCES, longest=60, seed=3)
        formula = traps["a decoder's pooling"].formula  # not used: the model scores itself
        return EncoderCheckpoint(model_dir, model.base_model, formula, sequences, traps)

    return build


# Sentence-transformers' CrossEncoders: an activation, and the logit beside it


def activated(logit: np.ndarray, activation: str) -> np.ndarray:
    """float32[..., 2] of float32[..., 1]."""
    after = {"Sigmoid": 1 / (1 + np.exp(-logit)), "Tanh": np.tanh(logit)}[activation]
    return np.concatenate([after, logit], axis=-1)


@dataclass
class CrossEncoderCheckpoint(EncoderCheckpoint):
    @cached_property
    def reference(self) -> list[np.ndarray]:
        logits = reference_scores(load_reference(self.model_dir), self.sequences)
        return list(activated(logits, "Tanh"))

    @cached_property
    def bfloat16_reference(self) -> list[np.ndarray]:
        model = load_reference(self.model_dir, "bfloat16")
        return list(activated(reference_scores(model, self.sequences), "Tanh"))


def cross_encoder(model_dir: Path) -> Checkpoint:
    raw = encoder("bert")(model_dir)
    change_config(
        model_dir, sbert_ce_default_activation_function="torch.nn.modules.activation.Tanh"
    )
    traps = {**raw.traps, "no activation": Trap(lambda h, ids: raw.body.pooler(h[None])[0, :1])}
    return CrossEncoderCheckpoint(model_dir, raw.body, raw.formula, raw.sequences, traps)


def cross_encoder_decoder(model_dir: Path) -> Checkpoint:
    marks = {"activation_fn": "torch.nn.modules.activation.Sigmoid", "version": "5.1.0"}
    make = linear_head(
        "qwen3", "Qwen3ForSequenceClassification", "score", sentence_transformers=marks
    )
    checkpoint = make(model_dir)
    raw = checkpoint.formula
    checkpoint.formula = lambda hidden, ids: torch.cat(
        [torch.sigmoid(raw(hidden, ids)), raw(hidden, ids)]
    )
    checkpoint.traps = {
        "no activation": Trap(raw),
        "the token before the last": Trap(lambda h, ids: checkpoint.formula(h[:-1], ids[:-1])),
    }
    return checkpoint


LLAMA_CLASSIFIER = "LlamaForSequenceClassification"
NEMOTRON_ORDER = ["verbosity", "quality", "helpfulness", "toxicity", "humor"]
NEMOTRON_ORDER += ["complexity", "creativity", "coherence", "correctness"]
STEERLM_ORDER = ["complexity", "verbosity", "helpfulness", "coherence", "correctness"]
HF_ONLY = ("packed", "padded")
PADDED_ONLY = ("padded",)

FAMILIES = (
    Family("sequence_classifier", linear_head("llama", LLAMA_CLASSIFIER, "score")),
    Family("sequence_classifier", stock_pad, "pad"),
    Family(
        "sequence_classifier",
        linear_head("gemma2", "Gemma2ForSequenceClassification", "score", traps=without_softcap),
        "gemma2",
    ),
    Family(
        "sequence_classifier",
        linear_head("qwen3", "Qwen3ForSequenceClassification", "score", bias=True),
        "qwen3",
    ),
    Family("token_classifier", token_classifier, paths=HF_ONLY),
    Family("named_outputs", named_outputs),
    Family("token_logit", token_logit, directory="Llama-3.1-Nemotron-70B-Reward-HF"),
    Family("token_logit", tied_token_logit, "tied", directory="Qwen-3-Nemotron-tiny-Reward"),
    Family(
        "nemotron_principle",
        logit_difference(9642, 2822),
        directory="Llama-3.3-Nemotron-70B-Reward-Principle",
    ),
    Family(
        "pair_preference",
        logit_difference(32, 33),
        directory="pair-preference-model-LLaMA3-8B",
        paths=HF_ONLY,
    ),
    Family("pairrm", pairrm, paths=PADDED_ONLY),
    Family(
        "value_head",
        linear_head("llama", "LlamaForCausalLM", "v_head.summary", bias=True, lm_head=True),
    ),
    Family("value_head_mlp", value_mlp(1)),
    Family("value_head_mlp", value_mlp(2), "deep"),
    Family("openrlhf", normalized("RewardModel", "score")),
    Family("openrlhf_value_head", normalized("LLMForSequenceRegression", "value_head")),
    Family(
        "openrlhf_value_head",
        linear_head("qwen2", "LLMForSequenceRegression", "value_head"),
        "plain",
    ),
    Family("eurus", linear_head("mistral", "EurusRewardModel", "regression_head")),
    Family("ultrarm", linear_head("llama", "LlamaRewardModel", "regression_head")),
    Family("starling", starling("GPTRewardModel")),
    Family("starling_34b", starling(LLAMA_CLASSIFIER), directory="Starling-RM-34B"),
    Family("qwen2_math_rm", score_mlp("qwen2", "Qwen2ForRewardModel")),
    Family("inf_orm", score_mlp("llama", "INFORMForSequenceClassification")),
    Family(
        "worldpm",
        score_mlp("qwen2", "Qwen2ForRewardModel", read_at_end_token=True),
        directory="WorldPM-72B",
    ),
    Family("qwen2_math_prm", qwen_prm, has_steps=True),
    Family("rlhflow_prm", rlhflow, directory="RLHFlow-Llama3.1-8B-PRM", has_steps=True),
    Family("math_shepherd", shepherd, directory="math-shepherd-mistral-7b-prm", has_steps=True),
    Family("internlm2_reward", internlm2),
    Family("polar", internlm2, directory="POLAR-7B", paths=HF_ONLY),
    Family("beaver_reward", beaver("reward")),
    Family("beaver_cost", beaver("cost")),
    Family("oasst_pythia", oasst("mean"), "mean", paths=HF_ONLY),
    Family("oasst_pythia", oasst("last"), "last", paths=HF_ONLY),
    Family("armorm", armorm("llama")),
    Family("armorm", armorm("gemma2"), "gemma2"),
    Family("qrm", qrm),
    Family("urm", urm),
    Family("ldl", ldl(softmax=False)),
    Family("ldl", ldl(softmax=True), "softmax"),
    Family("nemotron4_attributes", attributes("nemotron4", NEMOTRON_ORDER)),
    Family(
        "steerlm_attributes",
        attributes("steerlm", STEERLM_ORDER),
        directory="llama3-70b-steerlm-rm",
    ),
    Family("cross_encoder", cross_encoder, paths=PADDED_ONLY),
    Family("cross_encoder_decoder", cross_encoder_decoder),
    Family("encoder", encoder("bert"), "bert", paths=PADDED_ONLY),
    Family("encoder", encoder("modernbert"), "modernbert", paths=PADDED_ONLY),
    Family("encoder", encoder("deberta-v2"), "deberta", paths=PADDED_ONLY),
)
