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
from tests.helpers.inputs import pair_rows, pair_schema, pairs, parquet
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


def test_every_token_gets_a_score_where_it_is_asked_for(tmp_path: Path) -> None:
    """The same scores, and beside them as many values as tokens; what is too long has neither."""
    model = tiny_reward_model(tmp_path / "model")
    rows = pair_rows(6)
    rows[2]["rejected"][-1]["content"] = "far too long " * 40
    (tmp_path / "pairs.parquet").write_bytes(parquet(pa.Table.from_pylist(rows, pair_schema())))
    limit = ("--max-tokens", "120")
    without = score(model, tmp_path / "pairs.parquet", tmp_path / "without", *limit)
    result = score(model, tmp_path / "pairs.parquet", tmp_path / "out", *limit, "--token-scores")
    assert result["parity"]["agrees"] and result["rows_scored"] == without["rows_scored"] == 5
    table = pq.read_table(tmp_path / "out" / "pairs.parquet")
    plain = pq.read_table(tmp_path / "without" / "pairs.parquet")
    added = ["token_scores_chosen", "token_scores_rejected"]
    assert set(table.column_names) - set(plain.column_names) == set(added)
    for side in ("chosen", "rejected"):
        tokens = table[f"token_scores_{side}"]
        assert tokens.type == pa.list_(pa.field("element", pa.float32()))
        values = tokens.to_pylist()
        kept = [row for row in range(6) if (row, side) != (2, "rejected")]
        assert [row for row in range(6) if values[row] is not None] == kept
        counts = table[f"num_tokens_{side}"].to_pylist()
        assert [len(values[row]) for row in kept] == [counts[row] for row in kept]
        assert all(np.isfinite(values[row]).all() for row in kept)
        scores = [table[f"score_{side}"].to_pylist()[row] for row in kept]
        np.testing.assert_allclose([values[row][-1] for row in kept], scores, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            scores, [plain[f"score_{side}"].to_pylist()[row] for row in kept], rtol=1e-4, atol=1e-5
        )


def test_token_scores_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    next(f for f in FAMILIES if f.id == "qwen2_math_prm").build(model)
    word_tokenizer(model)
    (tmp_path / "pairs.parquet").write_bytes(parquet(pairs(2)))
    asked = ("score", "--model", model, tmp_path / "pairs.parquet", "--no-ray", "--token-scores")
    refused = run_cli(*asked, "--output", tmp_path / "out")
    assert refused.exit_code == 2
    assert "token_scores: qwen2_math_prm models give none" in refused.err
    refused = run_cli(*asked, "--output", tmp_path / "out", "--backend", "fake")
    assert refused.exit_code == 2 and "the fake backend does not take it" in refused.err
    assert not (tmp_path / "out").exists()


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


def several_outputs(directory: Path) -> tuple[Path, torch.Tensor]:
    """The tiny model with three outputs; returns it and the mix of them that its own head was."""
    model = tiny_reward_model(directory)
    weights = load_file(model / "model.safetensors")
    rows = weights["score.weight"] * torch.tensor([[1.0], [-2.0], [0.5]])
    save_file({**weights, "score.weight": rows}, model / "model.safetensors", {"format": "pt"})
    return model, torch.tensor([1.0, -2.0, 0.5])


def test_outputs_of_the_users_own_are_named_and_weighted(tmp_path: Path) -> None:
    model, factors = several_outputs(tmp_path / "model")
    (tmp_path / "pairs.parquet").write_bytes(parquet(pairs(6)))
    flags = ("--output-names", "kind,short,true")
    score(model, tmp_path / "pairs.parquet", tmp_path / "plain", *flags)
    plain = pq.read_table(tmp_path / "plain" / "pairs.parquet")
    assert not {"score_chosen", "score_rejected", "margin"} & set(plain.column_names)
    assert json.loads(plain.field("rewards_chosen").metadata[b"batch_scorer.attributes"]) == [
        "kind", "short", "true",
    ]  # fmt: skip
    rewards = np.array(plain["rewards_chosen"].to_pylist())
    np.testing.assert_allclose(rewards, rewards[:, :1] * factors.numpy(), rtol=1e-4, atol=1e-5)
    assert rewards.std(axis=0).min() > 0.1

    flags = (*flags, "--output-weights", "kind=0.5,true=2")
    score(model, tmp_path / "pairs.parquet", tmp_path / "mixed", *flags)
    mixed = pq.read_table(tmp_path / "mixed" / "pairs.parquet")
    assert mixed["rewards_chosen"].to_pylist() == plain["rewards_chosen"].to_pylist()
    wanted = rewards @ [0.5, 0.0, 2.0]
    np.testing.assert_allclose(mixed["score_chosen"].to_numpy(), wanted, rtol=1e-4, atol=1e-5)
    margin = mixed["score_chosen"].to_numpy() - mixed["score_rejected"].to_numpy()
    np.testing.assert_allclose(mixed["margin"].to_numpy(), margin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--output-names", "a,b"), "the head has 3 outputs, and there are 2 names: a, b"),
        (("--output-names", "a,b,a"), "every output needs a name of its own"),
        (("--output-weights", "a=1"), "--output-names a,b,… names them"),
        (
            ("--output-names", "a,b,c", "--output-weights", "a=1,d=1"),
            "output_weights: no output is named d; there are a, b, c",
        ),
        (("--output-names", "a,b,c", "--output-weights", "a=nan"), "a weight is a finite number"),
        (("--output-names", "a,b,c", "--output-weights", "a=0"), "every weight is 0"),
        (("--output-names", "a,b,c", "--output-weights", "a"), "expected NAME=WEIGHT"),
        (("--output-names", "a,b,c", "--adapter", "armorm"), "armorm models have outputs of"),
        (("--output-names", "a,b,c", "--task", "embed"), "output_names: only where task is score"),
        (("--output-names", "a,b,c", "--backend", "fake"), "fake gives one score"),
        (("--output-names", "a,b,c", "--token-scores"), "a, b, c; set output_weights"),
    ],
)
def test_names_and_weights_that_do_not_fit_are_refused(
    flags: tuple[str, ...], said: str, tmp_path: Path, several: Path
) -> None:
    ended = run_cli(
        "score", "--model", several, tmp_path / "in", "--output", tmp_path / "out", *flags
    )
    assert ended.exit_code == 2 and said in " ".join(ended.err.split()), ended.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return several_outputs(tmp_path_factory.mktemp("several") / "model")[0]
