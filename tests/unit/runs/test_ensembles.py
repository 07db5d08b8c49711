"""Several models in one job, with engines whose scores the test knows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.cli.commands import _checked_here
from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, ExitCode, OutputError, RowReason
from batch_scorer.evaluation import Benchmark
from batch_scorer.evaluation.evaluate import evaluate_output
from batch_scorer.job import Job
from batch_scorer.nightly.night import Night, run_night
from batch_scorer.outputs.verify import verify
from batch_scorer.runs.card import write_card
from batch_scorer.runs.marked import read_marked
from batch_scorer.runs.run import Summary, score
from batch_scorer.runs.status import read_status
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pair_rows, parquet, table_of
from tests.helpers.places import Place, digests, of_input
from tests.helpers.tiny import tiny_reward_model
from tests.helpers.weak import WEAK_ABOVE, WeakBackend

ROWS = 10
ADDED = {"a": 0.25, "b": 100.0}
"""What the test's engines add to the fake one's scores, which are in [-8, 8)."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` read the same tokens; `other` has another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, bos in (("a", False), ("b", False), ("other", True)):
        tiny_reward_model(folder / name, bos=bos)
    # Other weights, so that it is another model.
    config = folder / "b" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": "b"}))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    rows = pair_rows(ROWS)
    rows[3]["chosen"] = None
    (place / "in").write({"pairs.parquet": parquet(table_of(rows))})
    return place


def config_of(place: Place, model: Any, output: str = "out", **settings: Any) -> Config:
    return load_config(
        model=model, inputs=(place / "in").url, output=(place / output).url,
        use_ray=False, shard_rows=4, **{"backend": "fake", **settings},
    )  # fmt: skip


def both(models: Path) -> dict[str, str]:
    return {name: str(models / name) for name in ("a", "b")}


class Engines:
    """Makes an engine for each model, and keeps them by the model's folder."""

    def __init__(self, **reasons: RowReason) -> None:
        self._reasons = reasons
        self.made: dict[str, WeakBackend] = {}

    def __call__(self, job: Job) -> FakeBackend:
        name = Path(job.config.one_model).name
        made = WeakBackend(self._reasons.get(name), ADDED.get(name, 0.0))
        return self.made.setdefault(name, made)

    @property
    def asked(self) -> dict[str, int]:
        """Sequences that each engine got."""
        return {name: len(engine.asked) for name, engine in self.made.items()}


def scored(place: Place, output: str = "out") -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = of_input((place / output).shards(), "pairs.parquet").to_pydict()
    return columns


def test_one_pass_gives_each_models_columns_and_those_of_all(place: Place, models: Path) -> None:
    engines = Engines()
    summary = score(config_of(place, both(models)), make=engines)
    columns = scored(place)
    names = [name for name in columns if name not in ("chosen", "rejected", "source")]
    assert names[:11] == [
        "score_error", "mean_score_chosen", "mean_score_rejected", "mean_margin",
        "min_score_chosen", "min_score_rejected", "std_score_chosen", "std_score_rejected",
        "z_score_chosen", "z_score_rejected", "rank_disagreement",
    ]  # fmt: skip
    family = [
        "score_chosen", "score_rejected", "margin", "score_error", "num_tokens_chosen",
        "num_tokens_rejected", "score_notes", "num_special_tokens",
    ]  # fmt: skip
    assert names[11:] == [f"{model}_{name}" for model in ("a", "b") for name in family]

    # Both engines give the fake one's scores, and what the test adds.
    alone = score(config_of(place, str(models / "a"), "alone"), make=Engines())
    one = scored(place, "alone")
    assert alone.totals["rows_marked"] == 1
    for side in ("chosen", "rejected"):
        a, b = columns[f"a_score_{side}"], columns[f"b_score_{side}"]
        assert a == one[f"score_{side}"]
        for row in set(range(ROWS)) - {3}:
            assert b[row] == pytest.approx(a[row] + 99.75, abs=1e-4)
            values = [a[row], b[row]]
            assert columns[f"mean_score_{side}"][row] == pytest.approx(np.mean(values), rel=1e-6)
            assert columns[f"min_score_{side}"][row] == min(values)
            assert columns[f"std_score_{side}"][row] == pytest.approx(np.std(values), rel=1e-6)
        for kind in ("a", "b", "mean", "min", "std", "z"):
            # The answer that is there is scored, and alone in its row.
            is_lacking = side == "chosen" or kind == "z"
            assert (columns[f"{kind}_score_{side}"][3] is None) == is_lacking
    assert columns["rank_disagreement"] == [None if row == 3 else 0.0 for row in range(ROWS)]
    assert [row for row, reason in enumerate(columns["score_error"]) if reason] == [3]
    assert summary.totals["rows"] == summary.totals["rows_scored"] + 1 == ROWS
    assert summary.totals["models"]["b"]["marked"] == {"null_value": 1}
    # Each model scored every sequence, and counts.
    assert summary.totals["sequences"] == 2 * alone.totals["sequences"]
    assert engines.asked == {"a": 19, "b": 19}


def test_texts_are_tokenised_once_for_models_that_read_the_same_tokens(
    place: Place, models: Path
) -> None:
    def tokenised(output: str, **settings: Any) -> int:
        summary = score(config_of(place, output=output, **settings), make=Engines())
        return int(summary.metrics.tokenized_sequences)

    alone = tokenised("alone", model=str(models / "a"))
    assert alone == 2 * ROWS
    assert tokenised("same", model=both(models)) == alone
    assert tokenised("three", model=both(models) | {"c": str(models / "other")}) == 2 * alone
    own = {"model": str(models / "b"), "system_prompt": "Be brief."}
    assert tokenised("settings", model={"a": str(models / "a"), "b": own}) == 2 * alone
    own = {"model": str(models / "b"), "max_tokens": 5}
    assert tokenised("lengths", model={"a": str(models / "a"), "b": own}) == 2 * alone


def test_a_row_counts_as_scored_where_every_model_scored_it(place: Place, models: Path) -> None:
    engines = Engines(b=RowReason.OUT_OF_MEMORY)
    summary = score(config_of(place, both(models)), make=engines)
    columns = scored(place)
    lacking = {
        row
        for row in range(ROWS)
        if columns["a_score_chosen"][row] is None
        or max(columns[f"a_score_{side}"][row] - ADDED["a"] for side in ("chosen", "rejected"))
        > WEAK_ABOVE
    }
    assert len(lacking) > 1
    assert {row for row in range(ROWS) if columns["score_error"][row]} == lacking
    assert {row for row in range(ROWS) if columns["a_score_error"][row]} == {3}
    marked = {"null_value": 1, "out_of_memory": len(lacking) - 1}
    assert summary.totals["marked"] == summary.totals["models"]["b"]["marked"] == marked
    assert summary.totals["models"]["a"]["marked"] == {"null_value": 1}
    assert summary.totals["rows_scored"] == ROWS - len(lacking)
    listed = read_marked((place / "out").url).rows.to_pylist()
    assert {row["row"] for row in listed} == lacking
    assert {row["detail"] for row in listed if row["reason"] == "out_of_memory" and row["detail"]}
    verdict = verify((place / "out").url)
    assert (verdict.exit_code, verdict.rows_marked) == (ExitCode.DONE, len(lacking))
    assert read_status((place / "out").url).marked == marked

    again = Engines()
    settings = {"retry_marked": ["out_of_memory"]}
    retried = score(config_of(place, both(models), **settings), make=again)
    assert retried.totals["marked"] == {"null_value": 1}
    assert again.asked["a"] == 0 and again.asked["b"] > 0  # `a` keeps its scores
    assert verify((place / "out").url).exit_code == ExitCode.DONE


def test_a_rewritten_file_keeps_the_scores_of_its_old_rows(place: Place, models: Path) -> None:
    score(config_of(place, both(models)), make=Engines())
    rows = [*pair_rows(ROWS), *pair_rows(2, 50)]
    (place / "in").write({"pairs.parquet": parquet(table_of(rows))})
    engines = Engines()
    summary = score(config_of(place, both(models)), make=engines)
    # What was null is there now; the scores of the others are known.
    assert engines.asked == {"a": 5, "b": 5}
    assert summary.metrics.reused_rows == ROWS - 1
    assert summary.metrics.reused_sequences == 2 * (2 * ROWS - 1)
    assert verify((place / "out").url).exit_code == ExitCode.DONE


def test_the_same_bytes_whatever_the_order_in_which_models_are_named(
    place: Place, models: Path
) -> None:
    score(config_of(place, both(models)), make=Engines())
    backwards = dict(reversed(both(models).items()))
    score(config_of(place, backwards, "backwards"), make=Engines())
    assert digests((place / "out").shards()) == digests((place / "backwards").shards())


def test_an_output_is_for_the_models_that_it_was_begun_with(place: Place, models: Path) -> None:
    score(config_of(place, both(models)), make=Engines())
    changed = both(models) | {"b": str(models / "other")}
    with pytest.raises(OutputError, match=r"models\.b\.model: .* there, .* here"):
        score(config_of(place, changed), make=Engines())
    with pytest.raises(OutputError, match="belongs to another run"):
        score(config_of(place, str(models / "a")), make=Engines())


def nightly(place: Place, model: Any, make: Callable[[Job], FakeBackend]) -> Summary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batch_scorer.pipeline.worker.proven_backend", lambda job, *_: make(job))
        ended = run_night(config_of(place, model, "nights"), Night())
        assert ended.summary is not None
        return ended.summary


def test_a_night_scores_all_models_in_one_generation_and_keeps_those_that_did_not_change(
    place: Place, models: Path
) -> None:
    first = Engines()
    summary = nightly(place, both(models), first)
    assert summary.is_complete and first.asked == {"a": 19, "b": 19}
    latest = (place / "nights").read_json("latest.json")
    assert [line["line"] for line in latest["lines"]] == ["main"]
    before = of_input((place / "nights" / latest["path"]).shards(), "pairs.parquet")
    assert nightly(place, both(models), Engines()).metrics.scored_tokens == 0

    second = Engines()
    summary = nightly(place, both(models) | {"b": str(models / "other")}, second)
    assert summary.is_complete and second.asked == {"a": 0, "other": 19}
    now = (place / "nights").read_json("latest.json")
    assert now["path"] != latest["path"]
    after = of_input((place / "nights" / now["path"]).shards(), "pairs.parquet")
    for side in ("chosen", "rejected"):
        assert after[f"a_score_{side}"].equals(before[f"a_score_{side}"])
    assert verify((place / "nights" / now["path"]).url).exit_code == ExitCode.DONE
    drift = run_cli("drift", (place / "nights").url)
    assert drift.exit_code == 0, drift.err


def test_a_model_that_was_alone_keeps_its_scores_beside_others(place: Place, models: Path) -> None:
    nightly(place, str(models / "a"), Engines())
    engines = Engines()
    nightly(place, both(models), engines)
    assert engines.asked == {"a": 0, "b": 19}


def test_other_commands_read_the_mean_or_one_model(place: Place, models: Path) -> None:
    rows = pair_rows(ROWS)
    (place / "in").write({"pairs.parquet": parquet(table_of(rows))})
    output = (place / "out").url
    score(config_of(place, both(models)), make=Engines())
    columns = scored(place)

    def accuracy(prefix: str) -> float:
        sides = (columns[f"{prefix}score_{side}"] for side in ("chosen", "rejected"))
        return float(np.mean([a > b for a, b in zip(*sides, strict=True)]))

    for asked, prefix in ((None, "mean_"), ("b_", "b_"), ("min_", "min_")):
        result = evaluate_output(output, {}, Benchmark.PAIRS, False, asked)
        estimate = next(iter(result.columns.values()))
        assert estimate is not None and estimate.value == pytest.approx(accuracy(prefix))

    def kept_by(name: str, **rules: Any) -> list[float]:
        select([output], (place / name).url, Selection(**rules))
        shards = (place / name).shards().values()
        return sorted(row["b_margin"] for each in shards for row in each.table.to_pylist())

    margins = [columns[f"{prefix}_margin"] for prefix in ("mean", "b")]
    best: dict[str, float] = {}
    for source, margin in zip(columns["source"], margins[1], strict=True):
        best[source] = max(best.get(source, margin), margin)
    rules = {"best": 1, "group_by": ("source",), "by": "b_margin"}
    assert kept_by("best", **rules) == sorted(best.values())
    above = [b for mean, b in zip(*margins, strict=True) if mean > 0]
    assert kept_by("clear", above_margin=0) == sorted(above)  # of the mean of all models

    card = write_card(output, {})
    text = Path(card).read_text()
    assert "| model a | value |" in text and "| `z_score_chosen` |" in text
    page = run_cli("report", output, "--html", Path(place.url) / "page.html")
    assert page.exit_code == 0, page.err


def test_lists_of_scores_are_compared_within_their_row(place: Place, models: Path) -> None:
    lines = [
        {"prompt": f"What is {number}?", "responses": [f"{number} {word}" for word in words]}
        for number, words in enumerate((["one", "two", "three"], ["only"], [], ["x", "y"]))
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (place / "lists").write({"rollouts.jsonl": text.encode()})
    config = config_of(place, both(models)).model_copy(update={"inputs": ((place / "lists").url,)})
    score(config, make=Engines())
    table = of_input((place / "out").shards(), "rollouts.jsonl").to_pydict()
    assert [row and len(row) for row in table["mean_scores"]] == [3, 1, None, 2]
    assert [row and [each is None for each in row] for row in table["z_scores"]] == [
        [False] * 3, [True], None, [False] * 2,
    ]  # fmt: skip
    assert [value is None for value in table["rank_disagreement"]] == [False, True, True, False]
    assert verify((place / "out").url).exit_code == ExitCode.DONE


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ({"mean": "m"}, {}, "'mean' is the name of what all models have together"),
        ({"a-b": "m"}, {}, "'a-b' cannot be a model's name"),
        ({}, {}, "a model, or a mapping of names to models"),
        ({"a": {"dtype": "float32"}}, {}, "a: a model, or a mapping with a `model`"),
        ({"a": {"model": "m", "limit": 3}}, {}, "a: limit: not a setting of one model"),
        ({"a": {"model": "m", "dtype": "int8"}}, {}, "model: a: dtype:"),
        (
            {"a": "m", "b": "m"},
            {"task": "embed", "backend": "hf"},
            "a job with task embed takes one",
        ),
        ("m", {"model_workers": "own"}, "model_workers: only for several models"),
        ({"a": "m"}, {"model_workers": "own"}, "model_workers: without Ray"),
    ],
)
def test_what_does_not_go_together_is_refused(
    place: Place, model: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(place, model, **settings)
    assert said in str(raised.value)


def test_models_are_named_on_the_command_line(place: Place, models: Path) -> None:
    flags = [part for name in ("a", "b") for part in ("--model", f"{name}={models / name}")]
    places = [(place / "in").url, "--output", (place / "out").url, "--no-ray", "--backend", "fake"]
    ended = run_cli("score", *flags, *places, "--json")
    assert ended.exit_code == 0, ended.err
    assert sorted(ended.json["models"]) == ["a", "b"]
    shown = run_cli("score", *flags, *places)
    assert "Preference pairs, by the mean of the models" in shown.out and "by b" in shown.out
    assert run_cli("status", (place / "out").url).exit_code == 0
    planned = run_cli("plan", *flags, (place / "in").url, "--backend", "fake", "--json")
    alone = run_cli("plan", *flags[:2], (place / "in").url, "--backend", "fake", "--json")
    assert planned.json["estimate"]["row_tokens"] == 2 * alone.json["estimate"]["row_tokens"]
    ended = run_cli("score", *flags, "--model", models / "other", *places)
    assert ended.exit_code == ExitCode.CONFIG and "needs a name of its own" in ended.error
    assert _checked_here(["score", *map(str, flags), "in", "--output", "out"])[:2] == (None, None)
