"""Models that give more than one number: attributes and steps, from Parquet to Parquet."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.tiny import tiny_reward_model
from tests.parity.families import EXTRA_0, FAMILIES

pytestmark = pytest.mark.e2e


def score(model: Path, inputs: Path, output: Path, *flags: str) -> Any:
    ended = run_cli(
        "score", "--model", model, inputs, "--output", output, "--no-ray",
        "--dtype", "float32", "--json", *flags,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert run_cli("verify", output).exit_code == 0
    return ended.json


def word_tokenizer(directory: Path) -> None:
    """Words of one letter, and Qwen's ids for what the process reward model relies on."""
    words = {letter: 3 + place for place, letter in enumerate("abcdefghijklmnop.?")}
    core = Tokenizer(models.WordLevel({"<unk>": 1, **words, "<extra_0>": EXTRA_0}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_0>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '.' }}{% endfor %}"
    tokenizer.save_pretrained(directory)


def test_every_step_of_an_answer_gets_a_score(tmp_path: Path) -> None:
    """A process reward model: steps at blank lines, their scores in order, the least one counts."""
    model = tmp_path / "model"
    next(f for f in FAMILIES if f.id == "qwen2_math_prm").build(model)
    word_tokenizer(model)
    rows = {
        "prompt": ["abc?", "abc?", "d?"],
        "response": ["aa\n\nbb\n\ncc", "aa\n\nbb\n\nop", "p"],
    }
    pq.write_table(pa.table(rows), tmp_path / "rollouts.parquet")
    result = score(model, tmp_path / "rollouts.parquet", tmp_path / "out")
    assert result["parity"]["agrees"] and result["rows_scored"] == 3
    table = pq.read_table(tmp_path / "out" / "rollouts.parquet")
    steps = table["step_scores"].to_pylist()
    assert [len(values) for values in steps] == [3, 3, 1]
    # Causal: two answers that begin alike are judged alike until they part.
    np.testing.assert_allclose(steps[0][:2], steps[1][:2], rtol=1e-5)
    assert not np.isclose(steps[0][2], steps[1][2], rtol=0.01)
    assert table["score"].to_pylist() == [min(values) for values in steps]
    again = score(
        model, tmp_path / "rollouts.parquet", tmp_path / "mean", "--step-aggregation", "mean"
    )
    assert again["rows_scored"] == 3
    means = pq.read_table(tmp_path / "mean" / "rollouts.parquet")["score"].to_numpy()
    np.testing.assert_allclose(means, [np.mean(values) for values in steps], rtol=1e-5)


def test_attributes_come_by_name_beside_the_score(tmp_path: Path) -> None:
    names = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    model = tiny_reward_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    (model / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    weights = load_file(model / "model.safetensors") | {"score.weight": torch.randn(5, 64)}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "pairs.parquet").write_bytes(parquet(pairs(6)))
    result = score(
        model, tmp_path / "pairs.parquet", tmp_path / "out", "--adapter", "steerlm_attributes"
    )
    assert result["parity"]["agrees"]
    table = pq.read_table(tmp_path / "out" / "pairs.parquet")
    field = table.schema.field("rewards_chosen")
    assert json.loads(field.metadata[b"batch_scorer.attributes"]) == names
    # Llama3-70B-SteerLM's weights, by name.
    weights_of = np.array([0.65, 0.8, 0.45, 0.55, -0.4])
    for side in ("chosen", "rejected"):
        rewards = np.array(table[f"rewards_{side}"].to_pylist())
        assert rewards.shape == (6, 5)
        np.testing.assert_allclose(
            table[f"score_{side}"].to_numpy(), rewards @ weights_of, rtol=1e-4
        )


REMOTE = """
import torch
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class ShoutConfig(LlamaConfig):
    model_type = "shout"

class ShoutForReward(PreTrainedModel):
    config_class = ShoutConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.loudness = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
    def get_input_embeddings(self):
        return self.model.embed_tokens
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        pooled = hidden[torch.arange(len(last)), last]
        return SequenceClassifierOutput(logits=self.loudness(pooled).exp())
"""


def test_code_that_comes_with_a_model_runs_only_when_asked_for(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path / "model")
    (model / "shout.py").write_text(REMOTE)
    config = json.loads((model / "config.json").read_text())
    auto = {
        "AutoConfig": "shout.ShoutConfig",
        "AutoModelForSequenceClassification": "shout.ShoutForReward",
    }
    config |= {"model_type": "shout", "architectures": ["ShoutForReward"], "auto_map": auto}
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    head = weights.pop("score.weight") / 20
    save_file(weights | {"loudness.weight": head}, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "pairs.parquet").write_bytes(parquet(pairs(6)))
    refused = run_cli(
        "score",
        "--model",
        model,
        tmp_path / "pairs.parquet",
        "--output",
        tmp_path / "no",
        "--no-ray",
    )
    assert refused.exit_code == 2 and "--trust-remote-code" in refused.err
    result = score(model, tmp_path / "pairs.parquet", tmp_path / "out", "--trust-remote-code")
    assert result["rows_scored"] == 6 and result["parity"]["agrees"]
    table = pq.read_table(tmp_path / "out" / "pairs.parquet")
    assert min(table["score_chosen"].to_pylist()) > 0  # exp, as the code says
    record = json.loads((tmp_path / "out" / "_batch_scorer" / "run.json").read_text())
    assert record["provenance"]["trust_remote_code"] is True
    assert record["provenance"]["adapter"] == "remote_code"
