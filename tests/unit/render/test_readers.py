"""fastokens reads as long as it gives what Hugging Face's tokenizer gives, so far as compared."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from batch_scorer.config import OverLength
from batch_scorer.records import ParsedRows
from batch_scorer.render import Renderer, readers
from batch_scorer.render.hard_strings import hard_strings
from batch_scorer.render.readers import FastReader, Ids, PlainReader, reader_of
from tests.helpers.program import REPOSITORY
from tests.helpers.templates import model_folder
from tests.helpers.tiny import tiny_tokenizer

READS, OTHERWISE, OF_THE_INPUT, CANNOT = (
    "fastokens reads from now on",
    "it reads this vocabulary otherwise",
    "it gives other ids for a text of the input",
    "it cannot read this vocabulary",
)
COMMON, RARE = "word", " which"
"""Words of Qwen's vocabulary; the hard strings have only the first."""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """fastokens is loaded for the first text, and reads alone after ten."""
    monkeypatch.setattr(readers, "_WORTH_LOADING", 0)
    monkeypatch.setattr(readers, "_PROOF_TEXTS", 10)
    caplog.set_level(logging.INFO, "batch_scorer")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder("qwen2.5", tmp_path_factory.mktemp("models") / "qwen2.5")


@pytest.fixture(scope="module")
def plain(qwen: Path) -> PlainReader:
    return PlainReader(AutoTokenizer.from_pretrained(qwen))


@pytest.fixture(scope="module")
def without_rare(qwen: Path) -> Any:
    return without_merge(qwen, RARE)


@pytest.fixture(scope="module")
def without_common(qwen: Path) -> Any:
    return without_merge(qwen, COMMON)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Answers of real pairs."""
    table = pq.read_table(REPOSITORY / "batch_scorer/data/pairs/mixed.parquet")
    talks = [*table["chosen"].to_pylist(), *table["rejected"].to_pylist()]
    return [message["content"] for talk in talks[::2] for message in talk]


def without_merge(folder: Path, word: str) -> Any:
    """The tokenizer of a folder that does not know this word as one token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    spelt = word.replace(" ", "Ġ")
    merges = [merge for merge in core["model"]["merges"] if "".join(merge) != spelt]
    assert len(merges) < len(core["model"]["merges"])
    core["model"] |= {"merges": merges, "ignore_merges": False}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))  # type: ignore[no-untyped-call]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the log, without what follows on a colon."""
    ours = (record for record in caplog.records if record.name == "batch_scorer")
    return [record.getMessage().rpartition(": ")[0] for record in ours]


def lists(ids: list[Ids]) -> list[list[int]]:
    return [each.tolist() for each in ids]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "name", ["llama-3.1", "qwen2.5", "deepseek-v3", "mistral-v3", "mistral-v7"]
)
def test_the_ids_are_hugging_faces(
    name: str, tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder(name, tmp_path / name))
    reader, plain = reader_of(tokenizer, fast=True), PlainReader(tokenizer)
    odd = hard_strings(map(str, tokenizer.all_special_tokens))
    for some in (texts[:100], texts, odd):
        for adds in (
            [True] * len(some),
            [False] * len(some),
            [i % 3 > 0 for i in range(len(some))],
        ):
            assert lists(reader.ids(some, adds)) == lists(plain.ids(some, adds))
    assert said(caplog) == [READS]


@pytest.mark.usefixtures("soon")
def test_rows_are_the_same_with_and_without_it(
    qwen: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pq.read_table(REPOSITORY / "batch_scorer/data/pairs/hh-helpful.parquet")
    talks = [*table["chosen"].to_pylist(), *table["rejected"].to_pylist(), "<|im_end|>a\x00", [7]]
    parsed = ParsedRows(talks, np.arange(len(talks) + 1))
    fast, plain = (
        Renderer(qwen, 300, OverLength.TRUNCATE_LEFT, fast=flag) for flag in (True, False)
    )
    for _ in range(2):  # proven in the first
        ours, theirs = fast.tokenize(parsed), plain.tokenize(parsed)
        for name in ("token_ids", "sequence_offsets", "truncated_tokens"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert READS in caplog.text


@pytest.mark.usefixtures("soon")
def test_a_common_merge_that_lacks_is_found_before_the_first_text(
    plain: PlainReader, without_common: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reader = FastReader(without_common, plain)
    assert lists(reader.ids(["a word"], [True])) == lists(plain.ids(["a word"], [True]))
    assert OTHERWISE in caplog.text


@pytest.mark.usefixtures("soon")
def test_a_rare_one_is_found_in_the_first_shard_and_it_is_read_anew(
    plain: PlainReader, without_rare: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reader = FastReader(without_rare, plain)
    shard = [f"{i}: that" for i in range(40)] + [f"that{RARE}", "the end"]
    assert lists(reader.ids(shard, [False] * 42)) == lists(plain.ids(shard, [False] * 42))
    assert OF_THE_INPUT in caplog.text and READS not in caplog.text


@pytest.mark.usefixtures("soon")
def test_a_later_shard_with_a_difference_is_read_anew_whole_and_so_are_all_after_it(
    plain: PlainReader, without_rare: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reader = FastReader(without_rare, plain)
    reader.ids(["that"] * 300, [True] * 300)
    assert READS in caplog.text and OF_THE_INPUT not in caplog.text
    one_is_seen = ["that", f"another{RARE}"] * 200  # the 252nd is compared
    unseen = ["that"] * 5 + [f"one{RARE}"]
    assert len(one_is_seen[251]) > len("that")
    for shard in (one_is_seen, unseen):
        adds = [True] * len(shard)
        assert lists(reader.ids(shard, adds)) == lists(plain.ids(shard, adds))
    assert caplog.text.count(OF_THE_INPUT) == 1


@pytest.mark.usefixtures("soon")
def test_a_text_at_which_it_raises_is_read_by_the_other_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A vocabulary without all bytes: Hugging Face leaves out what it lacks."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(["a word of it and of another"], trainers.BpeTrainer(vocab_size=60))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core)  # type: ignore[no-untyped-call]
    from fastokens import Tokenizer as Fast

    with pytest.raises(ValueError, match="byte"):
        Fast.from_json_str(core.to_str()).encode("Zz")
    plain, reader = PlainReader(tokenizer), reader_of(tokenizer, fast=True)
    for _ in range(3):
        shard = ["a word"] * 20 + ["Zz a word"] + ["of another"] * 70 + ["中"]
        assert lists(reader.ids(shard, [True] * 92)) == lists(plain.ids(shard, [True] * 92))
    assert said(caplog) == [READS]


@pytest.mark.usefixtures("soon")
def test_a_vocabulary_that_it_cannot_read_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core)  # type: ignore[no-untyped-call]
    reader = reader_of(tokenizer, fast=True)
    for _ in range(2):
        assert lists(reader.ids(["a b b"], [True])) == [[0, 1, 1]]
    assert caplog.text.count(CANNOT) == 1


def test_little_text_does_not_load_it(
    plain: PlainReader, without_common: Any, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It would find out that the vocabulary is another."""
    caplog.set_level(logging.INFO, "batch_scorer")
    reader = FastReader(without_common, plain)
    assert lists(reader.ids(texts, [True] * len(texts))) == lists(
        plain.ids(texts, [True] * len(texts))
    )
    assert said(caplog) == []


@pytest.mark.parametrize("fast", [True, False])
def test_a_slow_tokenizer_and_who_does_not_want_it_get_the_plain_one(
    fast: bool, tmp_path: Path
) -> None:
    tiny_tokenizer(tmp_path)
    made = reader_of(AutoTokenizer.from_pretrained(tmp_path), fast=fast)
    assert isinstance(made, FastReader if fast else PlainReader)
