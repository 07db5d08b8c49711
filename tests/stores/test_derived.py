"""`select` and `decontaminate` of outputs on object stores: what is kept is what a plain look at
the scored rows keeps, and a killed run is seen and finished."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batch_scorer import Config, score
from batch_scorer.outputs.manifest import SUCCESS_KEY
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pair_rows, pairs, parquet, table_of
from tests.helpers.places import Place
from tests.helpers.program import REPOSITORY
from tests.helpers.stores import AnyStore

pytestmark = [
    pytest.mark.fault,
    pytest.mark.parametrize("any_store", ["s3", "s3-versioned"], indirect=True),
]

ROWS, SHARD_ROWS = 11, 3
MARKED, TAINTED = 4, (2, 7)


@pytest.fixture
def place(any_store: AnyStore, tiny_model: Path) -> Place:
    """A scored output of four shards with a marked row, and an evaluation set."""
    place = any_store.place
    rows = pair_rows(ROWS)
    rows[MARKED]["rejected"] = None
    (place / "in").write({"a.parquet": parquet(table_of(rows))})
    evals = [{"prompt": rows[row]["chosen"][0]["content"]} for row in TAINTED]
    (place / "evals").write({"bench.jsonl": jsonl(evals)})
    score(
        Config(
            model=str(tiny_model),
            inputs=((place / "in").url,),
            output=(place / "scored").url,
            store_options=dict(place.options),
            backend="fake",
            device="cpu",
            shard_rows=SHARD_ROWS,
            use_ray=False,
        )
    )
    return place


def select(place: Place, output: str, *words: str, of: str = "scored") -> list[str]:
    return ["select", (place / of).url, "--output", (place / output).url, *words, *place.flags]


def decontaminate(place: Place, output: str, of: str = "scored") -> list[str]:
    against = (place / "evals" / "bench.jsonl").url
    words = ["--against", against, "--output", (place / output).url, *place.flags]
    return ["decontaminate", (place / of).url, *words]


def answered(*words: str) -> dict[str, Any]:
    ended = run_cli(*words, "--json")
    assert ended.exit_code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def asked(place: Place, command: str, output: str) -> dict[str, Any]:
    """What `status` or `verify` answers."""
    return answered(command, (place / output).url, *place.flags)


def rows_of(place: Place, output: str) -> list[dict[str, Any]]:
    shards = (place / output).shards().values()
    return [row for shard in shards for row in shard.table.to_pylist()]


def chosen_texts(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    return Counter(row["chosen"][-1]["content"] for row in rows)


def contents(place: Place) -> dict[str, bytes]:
    return {info.key: place.store.read(info.key) for info in place.store.list()}


def test_rows_are_kept_and_found_again(place: Place) -> None:
    scored = rows_of(place, "scored")
    kept = [row for row in scored if row["margin"] is not None and row["margin"] > 0]
    found = answered(*select(place, "kept", "--above-margin", "0"))
    assert rows_of(place, "kept") == kept
    assert 0 < len(kept) == found["rows_kept"] < ROWS
    clean = answered(*decontaminate(place, "clean"))
    assert rows_of(place, "clean") == [r for n, r in enumerate(scored) if n not in TAINTED]
    assert clean["removed"] == len(TAINTED)
    answered(*select(place, "pairs", "--columns", "trl", "--shuffle", of="clean"))
    assert chosen_texts(rows_of(place, "pairs")) == chosen_texts(
        [row for n, row in enumerate(scored) if n not in (*TAINTED, MARKED)]
    )
    for output, number in (("kept", len(kept)), ("clean", ROWS - len(TAINTED))):
        verdict, status = asked(place, "verify", output), asked(place, "status", output)
        assert (verdict["ok"], verdict["rows_written"]) == (True, number)
        assert (status["complete"], status["shards_left"]) == (True, 0)


def test_of_a_nightly_root_each_row_is_read_once_in_its_newest_state(
    place: Place, tiny_model: Path
) -> None:
    """Over three nights: rows, more rows, and a rewritten file that is cut in another way."""
    place = place / "nightly"
    (place / "evals").write({"bench.jsonl": jsonl([{"prompt": "nothing of this kind"}])})
    nights = {
        "a.parquet": parquet(pairs(7)),
        "b.parquet": parquet(pairs(4, start=50)),
        "a.parquet ": parquet(pairs(5, start=100)),
    }
    for name, data in nights.items():
        (place / "in").write({name.strip(): data})
        ended = run_cli(
            "nightly", (place / "in").url, "--model", tiny_model, "--backend", "fake",
            "--output", (place / "nights").url, "--no-ray", "--shard-rows", "3", *place.flags,
        )  # fmt: skip
        assert ended.exit_code == 0, ended.err
    expected = chosen_texts([*pair_rows(5, start=100), *pair_rows(4, start=50)])
    for output, command in (
        ("kept", select(place, "kept", of="nights")),
        ("clean", decontaminate(place, "clean", of="nights")),
        ("pairs", select(place, "pairs", "--columns", "skywork", "--shuffle", of="nights")),
    ):
        assert answered(*command)["rows"] == expected.total()
        assert chosen_texts(rows_of(place, output)) == expected
        assert asked(place, "verify", output)["ok"]


KILLED = """
import sys
from batch_scorer import cli
from batch_scorer.failpoints import arm
arm(sys.argv.pop(1))
cli.main()
"""
SELECTIONS = {
    "rows": ("--above-margin", "-100"),
    "splits": ("--split", "train=0.6", "--split", "test=0.4"),
    "shuffled": ("--shuffle", "--shard-rows", "3", "--columns", "trl"),
}
SHARDS_BEFORE = {3: None, 4: 0, 6: 2}
"""After so many PUTs (two of a probe, the record of what it is, the plan), so many shards."""


def killed(command: Sequence[str], puts: int) -> None:
    words = [sys.executable, "-c", KILLED, f"put.applied:kill:{puts}", *command]
    ended = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize(
    ("name", "puts"), [*(("rows", puts) for puts in SHARDS_BEFORE), ("splits", 6), ("shuffled", 6)]
)
def test_a_killed_selection_is_seen_and_ends_in_the_same_bytes(
    name: str, puts: int, place: Place
) -> None:
    answered(*select(place, "whole", *SELECTIONS[name]))
    whole = contents(place / "whole")
    command = select(place, "killed", *SELECTIONS[name])
    killed(command, puts)
    status = asked(place, "status", "killed")
    shards = len((place / "whole").shard_keys())
    committed = SHARDS_BEFORE[puts]
    assert (status["complete"], status["shards"]) == (False, committed or 0)
    assert status["shards_left"] == (None if committed is None else shards - committed)
    assert run_cli("verify", (place / "killed").url, *place.flags).exit_code == 3
    answered(*command)
    assert contents(place / "killed") == whole
    assert asked(place, "status", "killed")["complete"]


def test_a_killed_decontamination_is_seen_and_ends_in_the_same_bytes(place: Place) -> None:
    answered(*decontaminate(place, "whole"))
    killed(decontaminate(place, "killed"), 9)
    status = asked(place, "status", "killed")
    assert not status["complete"] and 0 < status["shards_left"] < 4
    assert status["shards"] + status["shards_left"] == 4
    answered(*decontaminate(place, "killed"))
    found, whole = (contents(place / name) for name in ("killed", "whole"))
    summary = "_batch_scorer/decontamination.json"
    named = {**json.loads(whole.pop(summary)), "output": (place / "killed").url}
    assert json.loads(found.pop(summary)) == named
    assert found == whole and SUCCESS_KEY in whole
