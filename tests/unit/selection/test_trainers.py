"""Pairs as trainers' own code prepares them: from what `select` wrote to what is trained on."""

import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl.data_utils import is_conversational, maybe_extract_prompt

from batch_scorer.selection.recipe import Columns, Pairs, Selection
from batch_scorer.selection.select import select
from tests.helpers.program import REPOSITORY
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.trainers import prepared

Messages = list[dict[str, str]]
Pair = tuple[Messages, str, str]  # prompt, chosen, rejected

PROMPT = "Which colour has the sky?"
ANSWERS = {"Blue. ": 2.0, "Blue or so.": 1.0, "Green.": -1.0}
SHORT = [{"role": "user", "content": PROMPT}]
LONG = [
    {"role": "system", "content": "Be brief."},
    *SHORT,
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Always?"},
]
LONG_ANSWERS = {"No.\n\nRed in the evening.": 0.5, "Yes.": 0.0}
PAGE = REPOSITORY / "docs" / "training-layouts.md"

needs_openrlhf = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info >= (3, 13), reason="OpenRLHF has no other wheels"
)


def pairs_of(prompt: Messages, answers: dict[str, float]) -> list[Pair]:
    """All pairs of the answers, which stand from best to worst."""
    return [(prompt, chosen, rejected) for chosen, rejected in combinations(answers, 2)]


ONE_TURN = pairs_of(SHORT, ANSWERS)
ALL = ONE_TURN + pairs_of(LONG, LONG_ANSWERS)


def written(directory: Path, columns: Columns, *, texts: bool = False) -> Path:
    """A folder of pairs in a layout: of both prompts as messages, or of the short one as text."""
    rows = [(SHORT, *each) for each in ANSWERS.items()]
    rows += [(LONG, *each) for each in LONG_ANSWERS.items()]
    if texts:
        rows = [(PROMPT, *each) for each in ANSWERS.items()]
    prompts, responses, scores = zip(*rows, strict=True)
    table = pa.table({"prompt": list(prompts), "response": list(responses), "score": list(scores)})
    (directory / "in").mkdir(parents=True)
    pq.write_table(table, directory / "in" / "a.parquet")
    recipe = Selection(pairs=Pairs.ALL, columns=columns, splits={"train": 1.0})
    select([str(directory / "in")], str(directory / "pairs"), recipe)
    return directory / "pairs" / "train"


def chatml(messages: Messages) -> str:
    return "".join(
        f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages
    )


def answered(prompt: Messages, answer: str) -> str:
    return chatml([*prompt, {"role": "assistant", "content": answer}])


def loaded(directory: Path, columns: Columns, *, texts: bool = False) -> list[dict[str, Any]]:
    """The pairs in a layout as `load_dataset` gives them."""
    found = datasets.load_dataset(
        "parquet",
        data_files=str(written(directory, columns, texts=texts) / "*.parquet"),
        split="train",
        cache_dir=str(directory / "cache"),
    )
    rows: list[dict[str, Any]] = found.to_list()
    return rows


@pytest.mark.parametrize("columns", [Columns.TRL, Columns.SKYWORK])
def test_trl_finds_the_prompt_and_both_answers(columns: Columns, tmp_path: Path) -> None:
    rows = loaded(tmp_path, columns)
    found = []
    for row in rows:
        assert is_conversational(row) and "margin" not in row
        parts = maybe_extract_prompt(row)
        (chosen,), (rejected,) = parts["chosen"], parts["rejected"]
        assert (chosen["role"], rejected["role"]) == ("assistant", "assistant")
        found.append((parts["prompt"], chosen["content"], rejected["content"]))
        scores = ANSWERS | LONG_ANSWERS
        difference = scores[chosen["content"]] - scores[rejected["content"]]
        assert difference == row["score_margin"] > 0
    assert sorted(found, key=str) == sorted(ALL, key=str)


def test_texts_with_a_prompt_of_their_own_are_not_cut_by_trl(tmp_path: Path) -> None:
    rows = loaded(tmp_path, Columns.INPUT, texts=True)
    assert len(rows) == len(ONE_TURN)
    for row in rows:
        assert maybe_extract_prompt(row) == row
        assert row["prompt"] == PROMPT and {row["chosen"], row["rejected"]} <= ANSWERS.keys()


@needs_openrlhf
def test_openrlhf_reads_prompt_and_answer_of_both_sides(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "tokenizer")
    apart, whole = (
        {"path": str(written(tmp_path / columns, columns)), "prompt_key": key}
        for columns, key in ((Columns.OPENRLHF, "prompt"), (Columns.SKYWORK, None))
    )
    unnamed = {**apart, "prompt_key": None}
    kinds = [(apart, False), (whole, False), (apart, True), (whole, True), (unnamed, False)]
    tokenizer = str(tmp_path / "tokenizer")
    calls = ({**call, "is_dpo": is_dpo, "tokenizer": tokenizer} for call, is_dpo in kinds)
    *complete, without_prompt = prepared("openrlhf", tmp_path, *calls)

    # It takes newlines off the end and wants EOS there, which is the template's own here.
    expected = [
        (prompt, *(answered(prompt, side).rstrip("\n") for side in sides)) for prompt, *sides in ALL
    ]
    for rows in complete:
        assert sorted((row["chosen"], row["rejected"]) for row in rows) == sorted(
            (chosen, rejected) for _, chosen, rejected in expected
        )
    reward, dpo = complete[:2], complete[2:]
    for rows in reward:
        assert [row["margin"] for row in rows] == [0] * len(ALL)
    for rows in dpo:
        prompts = {chosen: chatml(prompt) for prompt, chosen, _ in expected}
        assert {row["chosen"]: row["prompt"] for row in rows} == prompts
    alone = {answered([], chosen).rstrip("\n") for _, chosen, _ in ALL}
    assert {row["chosen"] for row in without_prompt} == alone


def test_llama_factory_reads_what_our_page_tells_it(tmp_path: Path) -> None:
    """And turns that do not alternate are emptied, which is why the layout leaves them out."""
    [entry] = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)
    good, odd = tmp_path / "good", tmp_path / "odd"
    path = written(good, Columns.LLAMA_FACTORY)
    table = pq.read_table(path / "part-00000.parquet").slice(0, 2)
    column = table.column_names.index("conversations")
    twice_user, tool = SHORT * 2, [*SHORT, {"role": "tool", "content": "Blue"}, *SHORT]
    turns = pa.array([twice_user, tool], table.schema.field(column).type)
    (odd / "pairs" / "train").mkdir(parents=True)
    changed = table.set_column(column, "conversations", turns)
    pq.write_table(changed, odd / "pairs" / "train" / "a.parquet")
    for directory in (good, odd):
        (directory / "dataset_info.json").write_text(entry)
    calls = ({"dataset_dir": str(directory)} for directory in (good, odd))
    read, emptied = prepared("llama_factory", tmp_path, *calls)

    found = []
    for row in read:
        assert [answer["role"] for answer in row["_response"]] == ["assistant", "assistant"]
        system = [{"role": "system", "content": row["_system"]}] if row["_system"] else []
        found.append((system + row["_prompt"], *(each["content"] for each in row["_response"])))
    assert sorted(found, key=str) == sorted(ALL, key=str)
    assert [(row["_prompt"], row["_response"]) for row in emptied] == [([], []), ([], [])]


def test_verl_reads_prompts_of_one_turn(tmp_path: Path) -> None:
    files = [str(file) for file in written(tmp_path, Columns.VERL).glob("*.parquet")]
    starts = {"plain": "", "with_bos": "<s>"}
    for name, start in starts.items():
        tiny_tokenizer(tmp_path / name, bos=bool(start))
    given = {"files": files, "cache_dir": str(tmp_path / "verl")}
    calls = ({**given, "tokenizer": str(tmp_path / name)} for name in starts)
    for bos, rows in zip(starts.values(), prepared("verl", tmp_path, *calls), strict=True):
        # It applies no template: the texts one after the other, each with BOS, then EOS.
        assert sorted((row["chosen"], row["rejected"]) for row in rows) == sorted(
            tuple(f"{bos}{PROMPT}{bos}{side}<|im_end|>" for side in sides) for _, *sides in ONE_TURN
        )
