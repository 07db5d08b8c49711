"""A judge whose right verdict is known, in plain Hugging Face in float32 and as a job."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from batch_scorer import Config, score
from batch_scorer.config import Device
from batch_scorer.judges.page import load_page
from examples.tiny_judge import VERDICTS, Row, make_rows, question, token_ids
from tests.helpers.places import Place
from tests.helpers.tiny_judge import PAGE, ROWS_NAME, tiny_judge_directory

ENOUGH = 0.95


class PlainJudge:
    """The model and its tokenizer, asked one question at a time."""

    def __init__(self, directory: Path) -> None:
        tokenizers: Any = AutoTokenizer
        models: Any = AutoModelForCausalLM
        self.tokenizer = tokenizers.from_pretrained(directory)
        self.model = models.from_pretrained(directory, dtype="float32").eval()
        self.verdict_ids: list[int] = self.tokenizer.convert_tokens_to_ids(VERDICTS)
        self._page = load_page(str(PAGE))

    def questions(self, rows: Sequence[Row], *, chosen_first: bool) -> list[list[int]]:
        """Token ids of the questions about the rows' answers in one order."""
        asked = []
        for row in rows:
            answers = (row.chosen, row.rejected) if chosen_first else (row.rejected, row.chosen)
            asked.append(question(self._page, row.prompt, *answers))
        return token_ids(self.tokenizer, asked)

    @torch.inference_mode()
    def probabilities(self, questions: Sequence[list[int]]) -> Any:
        """float64[Q, 2], of A and B."""
        rows = [self.model(torch.tensor([ids])).logits[0, -1].softmax(0) for ids in questions]
        return torch.stack(rows)[:, self.verdict_ids].double().numpy()

    def accuracies(self, rows: Sequence[Row]) -> list[float]:
        """Of the verdicts with the chosen answer first, and with it second."""
        first = self.probabilities(self.questions(rows, chosen_first=True))
        second = self.probabilities(self.questions(rows, chosen_first=False))
        right = (first[:, 0] > first[:, 1], second[:, 1] > second[:, 0])
        return [float(one.mean()) for one in right]


@pytest.fixture(scope="module")
def judge() -> PlainJudge:
    return PlainJudge(tiny_judge_directory())


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [Row(**row) for row in pq.read_table(tiny_judge_directory() / ROWS_NAME).to_pylist()]


def test_no_row_was_trained_on(rows: list[Row]) -> None:
    assert len(rows) == 200
    assert not set(rows) & set(make_rows()[0])


def test_it_is_right_in_both_orders(judge: PlainJudge, rows: list[Row]) -> None:
    assert min(judge.accuracies(rows)) >= ENOUGH


def test_answers_that_are_swapped_under_it_show(judge: PlainJudge, rows: list[Row]) -> None:
    swapped = [replace(row, chosen=row.rejected, rejected=row.chosen) for row in rows]
    assert max(judge.accuracies(swapped)) <= 1 - ENOUGH
    half = [*rows[:100], *swapped[100:]]
    assert all(0.4 <= accuracy <= 0.6 for accuracy in judge.accuracies(half))


def test_other_prompts_show(judge: PlainJudge, rows: list[Row]) -> None:
    others = [*rows[1:], rows[0]]
    moved = [replace(a, prompt=b.prompt) for a, b in zip(rows, others, strict=True)]
    # Of 200 even guesses; in one order alone it may prefer a place.
    assert 0.35 <= np.mean(judge.accuracies(moved)) <= 0.65


def test_it_gives_its_verdicts_nearly_all_probability(judge: PlainJudge, rows: list[Row]) -> None:
    masses = judge.probabilities(judge.questions(rows, chosen_first=True)).sum(axis=1)
    assert masses.min() >= 0.9


def test_it_writes_the_verdict_that_is_likelier_and_ends(
    judge: PlainJudge, rows: list[Row]
) -> None:
    for chosen_first in (True, False):
        questions = judge.questions(rows[:50], chosen_first=chosen_first)
        likelier = judge.probabilities(questions).argmax(axis=1)
        for ids, verdict in zip(questions, likelier, strict=True):
            given = torch.tensor([ids])
            made = judge.model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=8
            )
            text = judge.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=False)
            assert text == VERDICTS[verdict] + "<|im_end|>"


def test_a_job_gives_its_verdicts(judge: PlainJudge, rows: list[Row], tmp_path: Path) -> None:
    score(
        Config(
            model=str(tiny_judge_directory()),
            inputs=(str(tiny_judge_directory() / ROWS_NAME),),
            output=str(tmp_path / "out"),
            task="judge",
            judge=str(PAGE),
            backend="hf",
            device=Device.CPU,
            dtype="float32",
            use_ray=False,
        )
    )
    (shard,) = Place(str(tmp_path / "out")).shards().values()
    chosen = np.array(shard.table["score_chosen"].to_pylist(), float)
    rejected = np.array(shard.table["score_rejected"].to_pylist(), float)
    assert np.mean(chosen > rejected) >= ENOUGH
    first = judge.probabilities(judge.questions(rows, chosen_first=True))
    second = judge.probabilities(judge.questions(rows, chosen_first=False))
    expected = (first[:, 0] / first.sum(axis=1) + second[:, 1] / second.sum(axis=1)) / 2
    np.testing.assert_allclose(chosen, expected, atol=1e-4)
