"""Rows that match evaluation sets are left out, all others are kept."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.decontamination.decontaminate import decontaminate
from batch_scorer.decontamination.recipe import (
    Decontamination,
    Match,
    Preset,
    Scope,
)
from batch_scorer.decontamination.result import Decontaminated
from batch_scorer.derived.recipes import load_recipe
from batch_scorer.errors import ConfigError

LONG = (
    "Write a short story about a lighthouse keeper who finds a bottle with a map of the island "
    "and follows it"
)


def write(folder: Path, *files: list[dict[str, Any]]) -> str:
    folder.mkdir()
    for number, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.parquet")
    return str(folder)


def prompts(*texts: str) -> list[dict[str, Any]]:
    return [{"prompt": text, "response": "yes", "source": "s"} for text in texts]


def run(tmp_path: Path, rows: list[dict[str, Any]], evals: list[str], **recipe: Any) -> list[str]:
    """The prompts that are left."""
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text("".join(json.dumps({"question": text}) + "\n" for text in evals))
    made = decontaminate(
        [write(tmp_path / "in", rows)],
        [str(evaluation)],
        str(tmp_path / "out"),
        Decontamination(**recipe),
    )
    left: list[str] = pq.read_table(tmp_path / "out/0.parquet")["prompt"].to_pylist()
    assert made.rows == len(left) + made.removed
    return left


def test_a_long_common_run_of_words_is_removed_and_shown(tmp_path: Path) -> None:
    rows = prompts(f"Please help! {LONG.upper()}, thanks", "Another thing entirely")
    assert run(tmp_path, rows, [LONG]) == ["Another thing entirely"]
    (line,) = (tmp_path / "out/_batch_scorer/removed.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["file"], found["row"], found["entry_row"]) == ("0.parquet", 0, 0)
    assert (found["text"], found["entry_text"]) == (LONG.upper(), LONG)


@pytest.mark.parametrize(
    "text",
    [
        "What is 2 + 2?",
        "请问中国的首都是哪里",
        "日本の首都はどこですか",
        "เมืองหลวงของประเทศไทยคืออะไร",
        "한국의 수도는 어디입니까",
    ],
)
def test_short_questions_and_unspaced_texts_are_found_whole(tmp_path: Path, text: str) -> None:
    assert run(tmp_path, prompts(text, "other"), [text]) == ["other"]


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        ("What is 2 + 2?", "What is 2 - 2?"),
        ("What is 17 times 3?", "What is 18 times 3?"),
        ("Qu'est-ce qu'un pêcheur", "Qu'est-ce qu'un pecheur"),
        ("ハハ", "ババ"),
        ("มา", "ม้า"),
    ],
)
def test_numbers_signs_and_marks_make_another_text(tmp_path: Path, row: str, entry: str) -> None:
    assert run(tmp_path, prompts(row), [entry]) == [row]


def test_unspaced_texts_overlap_by_characters(tmp_path: Path) -> None:
    entry = "请写一篇关于灯塔看守人的短篇故事并描述大海"
    assert run(tmp_path, prompts(f"你好{entry}谢谢", "请写一首诗"), [entry]) == ["请写一首诗"]


def brute_force(row: str, entry: str, size: int) -> bool:
    left, right = (re.findall(r"\w+", text.lower()) for text in (row, entry))
    if len(right) < size:
        return left == right
    grams = {tuple(right[i : i + size]) for i in range(len(right) - size + 1)}
    return any(tuple(left[i : i + size]) in grams for i in range(len(left) - size + 1))


@pytest.mark.parametrize("size", [1, 3, 8, 13])
def test_matches_are_those_of_a_plain_search(tmp_path: Path, size: int) -> None:
    words = LONG.split()
    texts = [" ".join(words[i : i + n] + words[:j]) for i in range(9) for n, j in ((2, 0), (9, 3))]
    evals = [" ".join(words[3:17]), " ".join(words[5:7]), " ".join(reversed(words))]
    expected = [row for row in texts if not any(brute_force(row, e, size) for e in evals)]
    assert run(tmp_path, prompts(*texts), evals, words=size) == expected


def test_a_preset_is_a_rule_in_use(tmp_path: Path) -> None:
    words = LONG.split()
    rows = prompts(*(" ".join(words[:count]) for count in (9, 10, 11)))
    entry = " ".join(words[:20])
    # More than half of the entry's 20 words.
    assert run(tmp_path, rows, [entry], preset="tulu3") == [row["prompt"] for row in rows[:2]]
    (tmp_path / "2").mkdir()
    rows = prompts(*(" ".join(words[:count]) for count in (12, 13)))
    assert run(tmp_path / "2", rows, [entry], preset="gpt3") == [rows[0]["prompt"]]


def test_what_is_given_beside_a_preset_counts() -> None:
    recipe = load_recipe(Decontamination, preset="tulu3", words=10)
    assert (recipe.preset, recipe.words, recipe.overlap) == (Preset.TULU3, 10, 0.5)
    with pytest.raises(ConfigError, match="preset"):
        load_recipe(Decontamination, preset="gpt5")


def test_near_texts_are_removed_and_others_kept(tmp_path: Path) -> None:
    rows = prompts(LONG.replace("short ", ""), "Write a short story about a dog")
    left = run(tmp_path, rows, [LONG], match=Match.NEAR, threshold=0.6)
    assert left == ["Write a short story about a dog"]


def test_the_answer_counts_only_in_conversations(tmp_path: Path) -> None:
    rows = [{"prompt": "Tell me", "response": LONG, "source": "s"}]
    assert run(tmp_path, rows, [LONG]) == ["Tell me"]
    (tmp_path / "2").mkdir()
    assert run(tmp_path / "2", rows, [LONG], scope=Scope.CONVERSATION) == []


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def card_story(tmp_path: Path) -> tuple[str, str]:
    """Pairs in two files, and a RewardBench file that the magpie-ultra prompts overlap with."""
    evals = [f"{LONG} in step {number}" for number in range(3)]
    pairs = [
        {
            "chosen": turns(prompt, "good"),
            "rejected": turns(prompt, "bad"),
            "source": source,
        }
        for source, prompt in [
            *(("magpie-ultra-v0.1", f"Hi. {text}!") for text in evals),
            ("magpie-ultra-v0.1", "Plan a garden"),
            *(("helpsteer2", f"Explain number {number}") for number in range(4)),
        ]
    ]
    bench = [
        {"prompt": text, "chosen": "a", "rejected": "b", "subset": "x", "id": number}
        for number, text in enumerate([*evals, " "])
    ]
    return write(tmp_path / "v0.1", pairs[:2], pairs[2:]), write(tmp_path / "bench", bench)


def story(scored: str, bench: str, out: Path) -> Decontaminated:
    return decontaminate([scored], [bench], str(out))


def test_from_version_0_1_to_0_2(tmp_path: Path) -> None:
    scored, bench = card_story(tmp_path)
    made = story(scored, bench, tmp_path / "v0.2")
    counts = {name: (each.rows, each.removed) for name, each in made.sources.items()}
    assert counts == {"helpsteer2": (4, 0), "magpie-ultra-v0.1": (4, 3)}
    assert (made.entries, made.entries_without_text) == (3, 1)
    assert made.totals is not None
    assert made.totals.dropped == {"contaminated": 3}
    assert made.totals.rows_written == made.rows - made.removed == 5
    shards = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "v0.2").rglob("*.parquet"))
    assert shards == ["v0.2/0.parquet", "v0.2/1.parquet"]


def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    scored, bench = card_story(tmp_path)

    def contents(folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    story(scored, bench, tmp_path / "out")
    before = contents(tmp_path / "out")
    for name in ("1.parquet", "_SUCCESS", "_batch_scorer/removed.jsonl"):
        (tmp_path / "out" / name).unlink()
    story(scored, bench, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_dry_run_counts_the_same_and_writes_nothing(tmp_path: Path) -> None:
    scored, bench = card_story(tmp_path)
    made = decontaminate([scored], [bench], str(tmp_path / "out"), dry_run=True)
    assert (made.removed, made.totals) == (3, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("match", [Match.EXACT, Match.NEAR])
def test_of_alike_rows_the_first_is_kept_wherever_shards_are_cut(
    tmp_path: Path, match: Match
) -> None:
    rows = prompts("One thing", "another", "one THING.", "", "another", "a third")
    left = []
    for number, files in enumerate(([rows], [rows[:1], rows[1:3], rows[3:]])):
        out = tmp_path / f"out{number}"
        scored = write(tmp_path / f"in{number}", *files)
        made = decontaminate([scored], ["self"], str(out), Decontamination(match=match))
        assert (made.removed, made.rows_without_text) == (2, 1)
        shards = sorted(out.glob("*.parquet"))
        left.append([p for shard in shards for p in pq.read_table(shard)["prompt"].to_pylist()])
    assert left[0] == left[1] == ["One thing", "another", "", "a third"]


def test_rows_have_no_ngrams_in_common_with_themselves(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exact, near or embedding"):
        decontaminate([write(tmp_path / "in", prompts("a"))], ["self"], str(tmp_path / "out"))
