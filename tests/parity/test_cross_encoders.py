"""CrossEncoders from their files to Parquet, against what CrossEncoder.predict computes.

The formula is written out here as sentence-transformers 6.2 has it: the tokenizer's own call on
the pair, the model's logit in float32, the activation.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from batch_scorer.models.tokenizer import pair_separator
from tests.helpers.in_process import run_cli
from tests.helpers.tiny import tiny_tokenizer
from tests.parity.tiny_models import build_model, change_config, change_weights

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = ["what is it?", "is it a cat?", "how far is it?"]
ANSWERS = ["it is a dog.", "a cat it is.", "what?"]
LETTERS = sorted({*"".join(QUESTIONS + ANSWERS).replace(" ", ""), *"q:"})

HEAD = "classifier.weight"

Saved = tuple[Callable[[Tensor], Tensor], str]
"""The activation and the prompt that were written."""


def bert(directory: Path) -> None:
    """A tiny BERT whose tokenizer gives the answer of a pair another token type."""
    build_model("bert", directory)
    change_weights(directory, lambda old: old | {HEAD: 10 * old[HEAD]})
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{w}" for w in LETTERS)]
    make: Any = BertTokenizer
    tokenizer = make(vocab={word: i for i, word in enumerate(known)})
    tokenizer.model_max_length = 48
    tokenizer.save_pretrained(directory)


def qwen3(directory: Path) -> None:
    build_model("qwen3", directory, vocab_size=512)
    tiny_tokenizer(directory)


def write(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value))


def version_6(directory: Path) -> Saved:
    settings = {"activation_fn": "torch.nn.modules.activation.Tanh", "model_type": "CrossEncoder"}
    prompts = {"prompts": {"query": "Q: "}, "default_prompt_name": "query"}
    write(directory, "config_sentence_transformers.json", settings | prompts)
    write(directory, "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "x.Transformer"}])
    write(directory, "sentence_bert_config.json", {"transformer_task": "sequence-classification"})
    return torch.tanh, "Q: "


def version_4(directory: Path) -> Saved:
    marks = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.0.1"}
    change_config(directory, sentence_transformers=marks)
    return torch.nn.Identity(), ""


def unmarked(directory: Path) -> Saved:
    return torch.sigmoid, ""


@torch.inference_mode()
def predict(directory: Path, activation: Callable[[Tensor], Tensor], prompt: str) -> np.ndarray:
    """float32[S, 2]: what predict gives, and the logit."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    rows = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        pair = [[prompt + question, answer]]
        features = tokenizer(pair, padding=True, truncation="longest_first", return_tensors="pt")
        logit = model(**features).logits.float()
        rows.append(torch.cat([activation(logit), logit], dim=-1)[0].numpy())
    return np.stack(rows)


def run(directory: Path, tmp_path: Path, *flags: str) -> Any:
    rows = {"prompt": QUESTIONS, "response": ANSWERS}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    return run_cli(
        "score", "--model", directory, tmp_path / "rows.parquet", "--output", tmp_path / "out",
        "--no-ray", "--dtype", "float32", "--json", *flags,
    )  # fmt: skip


def score(directory: Path, tmp_path: Path, *flags: str) -> pa.Table:
    ended = run(directory, tmp_path, *flags)
    assert ended.exit_code == 0, ended.err
    assert ended.json["parity"]["agrees"]
    return pq.read_table(tmp_path / "out" / "rows.parquet")


@pytest.mark.parametrize(
    ("save", "flags"),
    [(version_6, ()), (version_4, ()), (unmarked, ("--adapter", "cross_encoder"))],
)
def test_the_score_is_what_predict_gives(
    save: Callable[[Path], Saved], flags: tuple[str, ...], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    bert(model)
    expected = predict(model, *save(model))
    assert expected[:, 1].std() > 0.1
    table = score(model, tmp_path, *flags)
    np.testing.assert_allclose(table["score"].to_numpy(), expected[:, 0], rtol=0, atol=1e-4)
    rewards = np.array(table["rewards"].to_pylist())
    np.testing.assert_allclose(rewards, expected[:, 1:], rtol=0, atol=1e-4)
    named = table.schema.field("rewards").metadata[b"batch_scorer.attributes"]
    assert json.loads(named) == ["raw_score"]


def test_a_decoder_without_a_template_is_given_the_pair(tmp_path: Path) -> None:
    model = tmp_path / "model"
    qwen3(model)
    (model / "chat_template.jinja").unlink()
    expected = predict(model, *version_6(model))
    table = score(model, tmp_path)
    np.testing.assert_allclose(table["score"].to_numpy(), expected[:, 0], rtol=0, atol=1e-4)


def test_a_prompt_before_a_pair_is_refused_where_a_template_writes_the_text(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    qwen3(model)
    version_6(model)
    ended = run(model, tmp_path)
    assert ended.exit_code == 2 and "default prompt stands before the question" in ended.err
    assert not (tmp_path / "out" / "rows.parquet").exists()


def test_the_second_text_has_a_type_where_the_tokenizer_gives_one(tmp_path: Path) -> None:
    """Configs of BERT do not name the separator: without its tokenizer all types would be 0."""
    bert(tmp_path / "bert")
    assert pair_separator(tmp_path / "bert", None) == 3
    assert pair_separator(tmp_path / "bert", 7) == 7
    (tmp_path / "byte").mkdir()
    tiny_tokenizer(tmp_path / "byte")
    assert pair_separator(tmp_path / "byte", None) is None
    assert pair_separator(tmp_path, None) is None
