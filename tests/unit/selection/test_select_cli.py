"""`select` at the command line: flags, a recipe file, counts, `verify` and `status`."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer import Config, score
from batch_scorer.derived.recipes import load_recipe
from batch_scorer.errors import ConfigError
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for shard in range(2):
        rows = {
            "prompt": [f"question {number % 4}" for number in range(10)],
            "response": [f"answer {shard}-{number}" for number in range(10)],
            "score": [None, *(float(number * 3 % 7) for number in range(9))],
        }
        pq.write_table(pa.table(rows), folder / f"{shard}.parquet")
    return folder


def test_flags_go_on_top_of_the_recipe(rollouts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("group_by: [prompt]\nbest: 2\nsplits: {train: 0.5, test: 0.5}\n")
    words = ["select", rollouts, "--recipe", recipe, "--best", "1", "--split", "all=1", "--json"]
    ahead = run_cli(*words, "--dry-run")
    assert ahead.exit_code == 0, ahead.err
    counted = json.loads(ahead.out)
    assert counted["output"] is None
    assert not (tmp_path / "out").exists()
    done = run_cli(*words, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.err
    found = json.loads(done.out)
    assert found["recipe"] == {"group_by": ["prompt"], "best": 1, "splits": {"all": 1.0}}
    assert (found["rows"], found["rows_kept"], found["rows_written"]) == (20, 4, 4)
    assert found["dropped"] == {"marked": 2, "rank": 14}
    assert {**found, "output": None} == counted
    assert sum(pq.read_metadata(p).num_rows for p in (tmp_path / "out/all").iterdir()) == 4


def test_verify_and_status_know_a_selection(rollouts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    select([str(rollouts)], str(output), Selection(where='field("score") > 2.0'))
    status = json.loads(run_cli("status", output, "--json").out)
    assert (status["complete"], status["kind"], status["shards"]) == (True, "select", 2)
    verified = run_cli("verify", output, "--json")
    found = json.loads(verified.out)
    assert (verified.exit_code, found["ok"], found["remade"]) == (0, True, 2)
    assert found["rows_written"] == status["totals"]["rows_written"]
    shard = output / "1.parquet"
    shard.write_bytes(shard.read_bytes()[:-9] + b"damaged!!")
    assert run_cli("verify", output, "--json").exit_code == 4


def test_why_prompts_have_no_pair_is_shown_and_counted_again(
    rollouts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ["select", rollouts, "--pairs", "best_worst", "--min-margin", "4.5"]
    counted = json.loads(run_cli(*words, "--dry-run", "--json").out)
    assert (counted["prompts"], counted["rows_written"]) == (4, 1)
    assert counted["prompts_without_pair"] == {"margin": 3}
    shown = run_cli(*words, "--output", output)
    for ended in (shown, run_cli("status", output), run_cli("verify", output)):
        lines = [line.split() for line in ended.out.splitlines()]
        assert ["-", "margin", "too", "small", "3"] in lines
        assert ["with", "a", "pair", "1"] in lines
    found = json.loads(run_cli("verify", output, "--json").out)
    assert (found["ok"], found["counts"]["prompts_without_pair"]) == (True, {"margin": 3})
    success = output / "_SUCCESS"
    success.write_text(success.read_text().replace('"margin": 3', '"margin": 2'))
    ended = run_cli("verify", output)
    assert ended.exit_code == 4 and "_SUCCESS has other counts" in ended.out


def test_verify_does_not_choose_again_of_what_has_changed(rollouts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    select([str(rollouts)], str(output), Selection(sample=3))
    (rollouts / "0.parquet").unlink()
    verified = run_cli("verify", output, "--json")
    assert (verified.exit_code, json.loads(verified.out)["remade"]) == (0, None)


def test_models_agree_where_both_prefer_the_chosen_answer(tmp_path: Path, tiny_model: Path) -> None:
    given = tmp_path / "pairs.parquet"
    pq.write_table(pairs(30), given)
    for name, rows in (("a", 8), ("b", 8), ("c", 7)):
        score(
            Config(
                model=str(tiny_model),
                inputs=(str(given),),
                output=str(tmp_path / name),
                backend="fake",
                use_ray=False,
                shard_rows=rows,
            )
        )
    a, b, c = (str(tmp_path / name) for name in "abc")
    selection = Selection(where='(field("margin") > 0) & (field("b_margin") > 0)')
    selected = select([a], str(tmp_path / "out"), selection, beside={"b_": b})
    kept = [
        row for p in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(p).to_pylist()
    ]
    assert len(kept) == selected.totals.rows_kept > 0
    assert all(row["margin"] == row["b_margin"] > 0 for row in kept)
    with pytest.raises(ConfigError, match="same shard_rows"):
        select([a], str(tmp_path / "other"), selection, beside={"b_": c})


def test_an_entry_without_a_value_is_refused(rollouts: Path) -> None:
    ended = run_cli("select", rollouts, "--dry-run", "--top-percent", "math")
    assert (ended.exit_code, "CATEGORY=PERCENT" in ended.err) == (2, True)


def test_what_does_not_fit_together_is_said_in_our_words() -> None:
    with pytest.raises(ConfigError, match=r"^best and worst are of a group"):
        load_recipe(Selection, best=1)
