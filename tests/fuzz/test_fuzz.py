"""The fuzzer itself: mutants follow from their seed, differ, and what is wrong is seen."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from batch_scorer.inputs.plan import Plan, make_plan
from tests.fuzz import fuzz, trials
from tests.fuzz.mutants import FILES, MODELS

MUTANTS = 20
CONFIG = json.dumps({"sizes": [1, 2, 3], "of": {"a": {"b": 0.5, "c": "d"}, "e": None}}).encode()
SOUND = {
    "config": CONFIG,
    "tokenizer": CONFIG,
    "safetensors": len(CONFIG).to_bytes(8, "little") + CONFIG + bytes(64),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_mutant_follows_from_its_seed(kind: str) -> None:
    _, make = FILES[kind]
    found = [make(Random(number)) for number in range(MUTANTS)]
    assert found == [make(Random(number)) for number in range(MUTANTS)]
    assert len(set(found)) > MUTANTS // 2


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_s_mutant_follows_from_its_seed(kind: str) -> None:
    _, make = MODELS[kind]
    found = [make(SOUND[kind], Random(number)) for number in range(MUTANTS)]
    assert found == [make(SOUND[kind], Random(number)) for number in range(MUTANTS)]
    assert len({SOUND[kind], *found}) > MUTANTS // 2


def test_files_are_tried_and_none_is_wrong(tmp_path: Path) -> None:
    found = list(fuzz.try_all("jsonl", 1, range(MUTANTS), tmp_path))
    assert len(found) == MUTANTS
    assert [each for each in found if "wrong" in each] == []
    assert len({each["outcome"] for each in found}) > 1


def test_a_row_that_is_lost_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: the plan leaves out the last row."""

    def shorter(*args: Any) -> Plan:
        plan = make_plan(*args)
        changed = {
            place: replace(shard, num_rows=shard.num_rows - 1)
            for place, shard in enumerate(plan.shards)
            if shard.source.key != trials.HEALTHY
        }
        return replace(plan, shards=plan.shards.with_changed(changed))

    monkeypatch.setattr(trials, "make_plan", shorter)
    trial = trials.trial_of("jsonl", tmp_path, None)
    found = Counter[str]()
    for number in range(MUTANTS):
        try:
            found[trial(Random(number))] += 1
        except trials.Wrong as wrong:
            found[str(wrong)] += 1
    assert found["rows are lost or invented (fewer)"] > MUTANTS // 2, found


def test_the_report_has_numbers_and_kinds() -> None:
    tally = fuzz.Tally("jsonl", Counter({"read": 3, "no rows": 1}), {"KeyError in a.b": [7]}, 0.5)
    page = fuzz.report_of([tally], seed=5, count=5)
    assert "| jsonl | 5 | 10 |" in page
    assert "| read | 3 |" in page and "| **KeyError in a.b** | 1 |" in page
