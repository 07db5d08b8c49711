"""What docs/readers.md shows and says of each reader, on outputs with nulls, ties and folders."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batch_scorer import Config, load_config, score, verify
from batch_scorer.nightly.night import Night, run_night
from batch_scorer.outputs.reuse import keep
from batch_scorer.outputs.state import OutputState
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select
from batch_scorer.storage import Store
from tests.helpers.inputs import jsonl
from tests.stores.readers import rows_by_reader

PAGE = Path(__file__).parents[3] / "docs" / "readers.md"
QUESTIONS = {
    "best": "Which response to each prompt is best?",
    "top": "Which rows are the top tenth of each source?",
    "filter": "Which pairs have a margin above 1?",
    "accuracy": "How often is the chosen answer higher, by source?",
    "spread": "How are the scores spread?",
}
READERS = ("pandas", "polars", "duckdb", "datasets")
DAYS = ("dt=2026-11-01", "dt=2026-11-02")
SOURCES = ("web", "math", None)
ROLLOUTS, PAIRS = 120, 60

Row = dict[str, Any]
Answer = list[tuple[Any, ...]]


def rollout(number: int) -> Row:
    """Four of them share a prompt, and two of the four a response: equal scores. Every seventh has
    no response, and the first four have none."""
    text = f"answer {number // 2}" if number % 7 and number > 3 else None
    source = SOURCES[number % len(SOURCES)]
    return {"id": number, "source": source, "prompt": f"{number // 4}?", "response": text}


def pair(number: int) -> Row:
    """Every fifth has one answer on both sides, and every eleventh no rejected one."""
    rejected = f"yes {number}" if number % 5 == 0 else f"no {number}"
    return {
        "id": number,
        "source": SOURCES[number % len(SOURCES)],
        "prompt": f"{number}?",
        "chosen": f"yes {number}",
        "rejected": rejected if number % 11 else None,
    }


def config_of(place: Path, model: Path, name: str) -> Config:
    return load_config(
        model=str(model), inputs=str(place / "in" / name), output=str(place / name),
        backend="fake", use_ray=False, shard_rows=25,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Where `rollouts/` and `pairs/` are scored outputs, of two files in folders of days each."""
    place = tmp_path_factory.mktemp("readers")
    for name, row_of, rows in (("rollouts", rollout, ROLLOUTS), ("pairs", pair, PAIRS)):
        for day, numbers in enumerate((range(rows // 2), range(rows // 2, rows))):
            folder = place / "in" / name / DAYS[day]
            folder.mkdir(parents=True)
            (folder / "x.jsonl").write_bytes(jsonl([row_of(number) for number in numbers]))
        assert score(config_of(place, tiny_model, name)).is_complete
    return place


def scored_rows(output: Path) -> list[Row]:
    files = output.glob("dt=*/*.parquet")
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    return sorted(rows, key=lambda row: int(row["id"]))


# The five questions


def blocks(section: str) -> dict[str, str]:
    """The Python of a section of the page by the name in its first line."""
    text = PAGE.read_text().split(f"# {section}\n", 1)[1]
    text = re.split(r"\n##+ ", text, maxsplit=1)[0]
    found = re.findall(r"```python\n# ([^\n]*)\n(.*?)```", text, re.DOTALL)
    assert len(dict(found)) == len(found), f"{section}: two blocks of one reader"
    return dict(found)


def plain(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None  # pandas's null
    return value.item() if isinstance(value, np.generic) else value


def rows_of(answer: Any) -> Answer:
    """The rows of any reader's answer, in one order."""
    if isinstance(answer, pd.DataFrame):
        answer = answer.itertuples(index=False, name=None)
    elif isinstance(answer, pl.DataFrame):
        answer = answer.rows()
    elif isinstance(answer, duckdb.DuckDBPyRelation):
        answer = answer.fetchall()
    return in_order(tuple(plain(value) for value in row) for row in answer)


def in_order(rows: Iterator[tuple[Any, ...]]) -> Answer:
    return sorted(rows, key=lambda row: [(value is None, str(value)) for value in row])


def expected(place: Path) -> dict[str, Answer]:
    """The answers by plain Python."""
    rollouts = [row for row in scored_rows(place / "rollouts") if row["score"] is not None]
    pairs = [row for row in scored_rows(place / "pairs") if row["margin"] is not None]
    ordered = sorted(rollouts, key=lambda row: (-row["score"], row["id"]))
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    by_source: dict[str | None, list[Row]] = defaultdict(list)
    for row in ordered:
        by_prompt[row["prompt"]].append(row)
        by_source[row["source"]].append(row)
    higher: dict[str | None, list[bool]] = defaultdict(list)
    spread: dict[int, int] = defaultdict(int)
    for row in pairs:
        higher[row["source"]].append(row["score_chosen"] > row["score_rejected"])
    for row in rollouts:
        spread[math.floor(row["score"])] += 1
    answers: dict[str, Answer] = {
        "best": [(p, rows[0]["id"], rows[0]["score"]) for p, rows in by_prompt.items()],
        "top": [
            (source, row["id"])
            for source, rows in by_source.items()
            for row in rows[: math.ceil(len(rows) / 10)]
        ],
        "filter": [(row["id"],) for row in pairs if row["margin"] > 1],
        "accuracy": [(source, sum(wins) / len(wins)) for source, wins in higher.items()],
        "spread": list(spread.items()),
    }
    return {name: in_order(iter(answer)) for name, answer in answers.items()}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("best", Selection(group_by=("prompt",), best=1)),
        ("top", Selection(category="source", top_percent={"*": 10})),
        ("filter", Selection(above_margin=1)),
    ],
)
def test_select_answers_what_the_readers_do(
    name: str, recipe: Selection, place: Path, tmp_path: Path
) -> None:
    """Of equal scores it takes others, so scores stand for ids."""
    output = "pairs" if name == "filter" else "rollouts"
    select([str(place / output)], str(tmp_path / "out"), recipe)
    score_of = {row["id"]: row.get("score") for row in scored_rows(place / output)}

    def with_scores(rows: Iterable[tuple[Any, ...]]) -> Answer:
        if name == "best":
            return in_order((prompt, score) for prompt, _, score in rows)
        if name == "top":
            return in_order((source, score_of[number]) for source, number in rows)
        return in_order(iter(rows))

    keys = {"best": ("prompt", "id", "score"), "top": ("source", "id"), "filter": ("id",)}[name]
    found = scored_rows(tmp_path / "out")
    answer = with_scores(tuple(row[key] for key in keys) for row in found)
    assert answer == with_scores(expected(place)[name]) != []


def opened(reader: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's names mean once `reader` has opened both outputs."""
    if reader == "datasets":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(blocks("Opening an output")[reader], names)
    return names


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_the_same_answers(
    place: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = opened(reader, place, monkeypatch)
    right = expected(place)
    for question, heading in QUESTIONS.items():
        exec(blocks(heading)[reader], names)
        assert rows_of(names.pop("answer")) == right[question], heading


def test_the_questions_are_put_to_rows_that_could_go_wrong(place: Path) -> None:
    """Nulls, ties, rows without a source, and prompts and pairs on both sides of each rule."""
    rollouts, pairs = scored_rows(place / "rollouts"), scored_rows(place / "pairs")
    assert (len(rollouts), len(pairs)) == (ROLLOUTS, PAIRS)
    assert sum(row["score"] is None for row in rollouts) > 10
    assert sum(row["margin"] is None for row in pairs) > 3
    assert sum(row["margin"] == 0 for row in pairs) > 3
    right = expected(place)
    assert len(right["best"]) == ROLLOUTS // 4 - 1, "the first prompt has no scored response"
    winners = {number for _, number, _ in right["best"]}
    score_of = {row["id"]: row["score"] for row in rollouts}
    ties = [n for n in winners if n + 1 not in winners and score_of[n] == score_of.get(n + 1)]
    assert ties, "no tie for the best"
    assert {source for source, _ in right["accuracy"]} == set(SOURCES)
    assert all(0 < share < 1 for _, share in right["accuracy"])


def test_every_reader_is_asked_every_question() -> None:
    for heading in ("Opening an output", *QUESTIONS.values()):
        assert tuple(blocks(heading)) == READERS, heading


# Nulls


def test_marked_scores_are_null_and_never_nan_for_every_reader(place: Path) -> None:
    for name, column in (("rollouts", "score"), ("pairs", "margin")):
        pattern = f"{place / name}/**/*.parquet"
        table = ds.dataset(place / name, format="parquet").to_table()
        is_marked = pc.is_valid(table["score_error"])
        assert pc.is_null(table[column]).equals(is_marked)
        marked = pc.sum(is_marked).as_py()
        assert pc.sum(pc.is_null(table[column], nan_is_null=True)).as_py() == marked
        polars = pl.read_parquet(pattern)
        assert polars[column].null_count() == marked
        assert polars[column].drop_nulls().is_nan().sum() == 0
        query = f"SELECT count(*) - count({column}), count(*) FILTER (isnan({column})) FROM '{{}}'"
        assert duckdb.sql(query.format(pattern)).fetchall() == [(marked, 0)]
        assert pd.read_parquet(place / name)[column].isna().sum() == marked


SCORES = pa.array([1.0, None, 3.0, 2.0], pa.float32())
MARKED, BEST = 1, 2
"""Their places."""


def test_traps_of_numpy_and_pandas_are_as_the_page_says() -> None:
    array = SCORES.to_numpy(zero_copy_only=False)
    assert array.argmax() == array.argsort()[-1] == MARKED and np.nanargmax(array) == BEST
    assert math.isnan(array.max()) and math.isnan(np.quantile(array, 0.9))
    source = ["web", "web", None, "math"]
    frame = pd.DataFrame({"score": SCORES.to_pandas(), "row": range(4), "source": source})
    assert frame.sort_values("score").tail(1)["row"].item() == MARKED
    assert frame.nlargest(1, "score")["row"].item() == BEST
    assert (frame["score"] > 0).mean() == 0.75
    assert (~(frame["score"] > 1))[MARKED] and (frame["score"] != 1)[MARKED]
    assert len(frame.groupby("source")) == 2 and len(frame.groupby("source", dropna=False)) == 3
    lists = pa.table({"score": pa.array([[1.0, None, 3.0]]), "num_tokens": pa.array([None])})
    (scores,) = lists.to_pandas()["score"]
    assert np.argmax(scores) == MARKED


def test_the_nullable_types_of_pandas_keep_nulls(place: Path) -> None:
    plain = pd.read_parquet(place / "rollouts")
    kept = pd.read_parquet(place / "rollouts", dtype_backend="pyarrow")
    assert plain["num_tokens"].dtype == np.float64
    assert kept["num_tokens"].dtype == pd.ArrowDtype(pa.int32())
    assert kept["score"].isna().any() and (kept["score"] > 1).isna().any()


def test_traps_of_polars_and_duckdb_are_as_the_page_says() -> None:
    frame = pl.DataFrame({"score": pl.Series(SCORES), "row": range(4)})
    assert frame.sort("score", descending=True)["row"][0] == MARKED
    assert frame.sort("score", descending=True, nulls_last=True)["row"][0] == BEST
    assert frame.top_k(1, by="score")["row"].item() == BEST
    assert duckdb.sql("SELECT count(*), count(score) FROM frame").fetchall() == [(4, 3)]
    assert duckdb.sql("SELECT row FROM frame ORDER BY score DESC").fetchall()[0] == (BEST,)
    brought = pl.DataFrame({"score": SCORES.to_numpy(zero_copy_only=False), "row": range(4)})
    assert brought.filter(pl.col("score") > 5)["row"].to_list() == [MARKED]
    assert brought["score"].fill_nan(None).null_count() == 1
    assert duckdb.sql("SELECT row FROM brought WHERE score > 5").fetchall() == [(MARKED,)]
    ((highest,),) = duckdb.sql("SELECT max(score) FROM brought").fetchall()
    assert math.isnan(highest)
    assert duckdb.sql("SELECT row FROM brought ORDER BY score DESC").fetchall()[0] == (MARKED,)


def test_a_mean_over_models_leaves_a_missing_one_out() -> None:
    models = pl.DataFrame({"a": [1.0, None], "b": [3.0, 3.0]})
    assert models.select(pl.mean_horizontal("a", "b"))["a"].to_list() == [2, 3]
    assert models.select(pl.col("a") + pl.col("b"))["a"].to_list() == [4, None]
    assert models.to_pandas().mean(axis=1).tolist() == [2, 3]
    assert math.isnan((models.to_pandas()["a"] + models.to_pandas()["b"])[1])
    assert duckdb.sql("SELECT a + b FROM models").fetchall() == [(4,), (None,)]


# Which files are read


def test_a_plain_read_of_an_output_sees_its_rows_and_nothing_else(place: Path) -> None:
    for name, rows in (("rollouts", ROLLOUTS), ("pairs", PAIRS)):
        found = rows_by_reader(place / name)
        assert found == dict.fromkeys(found, rows)
        assert verify(str(place / name)).exit_code == 0


def test_copies_of_rows_that_are_scored_again_are_not_seen(place: Path, tmp_path: Path) -> None:
    """As a run leaves them that is killed meanwhile."""
    output = tmp_path / "rollouts"
    shutil.copytree(place / "rollouts", output)
    store = Store(str(output), {})
    assert keep(store, OutputState(store).receipts.values())
    found = rows_by_reader(output)
    assert found == dict.fromkeys(found, ROLLOUTS)


def test_polars_refuses_the_folder_and_reads_nothing_wrong(place: Path) -> None:
    with pytest.raises(pl.exceptions.InvalidOperationError, match="glob"):
        pl.read_parquet(place / "rollouts")


def test_the_folders_of_a_hive_layout_are_columns(place: Path) -> None:
    output = place / "rollouts"
    each = [ROLLOUTS // 2] * 2
    assert pd.read_parquet(output)["dt"].dtype == "category"
    assert pd.read_parquet(output)["dt"].value_counts().tolist() == each
    hive = ds.dataset(output, format="parquet", partitioning="hive")
    assert hive.schema.field("dt").type == pa.string()
    assert [hive.count_rows(filter=ds.field("dt") == day[3:]) for day in DAYS] == each
    assert "dt" not in ds.dataset(output, format="parquet").schema.names
    pattern = f"{output}/**/*.parquet"
    frame = pl.read_parquet(pattern, hive_partitioning=True)
    assert frame.schema["dt"] == pl.Date and frame["dt"].value_counts()["count"].to_list() == each
    assert "dt" not in pl.read_parquet(pattern).columns
    for where in (output, pattern):
        rows = f"FROM read_parquet('{where}')"
        query = f"SELECT any_value(typeof(dt)), count(*) {rows} GROUP BY dt"
        assert duckdb.sql(query).fetchall() == [("DATE", ROLLOUTS // 2)] * 2


def test_the_generation_that_latest_names_is_read(
    place: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a plain read of the root mixes generations, as the page warns."""
    (tmp_path / "in").mkdir()
    shutil.copytree(place / "in" / "pairs", tmp_path / "in" / "nightly")
    config = config_of(tmp_path, tiny_model, "nightly")
    for rescore in (False, True):
        assert run_night(config, Night(rescore=rescore)).is_complete
    monkeypatch.chdir(tmp_path)
    latest = json.loads(Path("nightly/latest.json").read_bytes())["path"]
    found = rows_by_reader(tmp_path / "nightly" / latest)
    assert found == dict.fromkeys(found, PAIRS)
    assert len(pl.read_parquet("nightly/**/*.parquet")) == 2 * PAIRS
    shown = blocks("A nightly root holds several generations")
    assert len(shown) == 2
    for code in shown.values():
        names: dict[str, Any] = {}
        exec(code, names)
        assert len(names["scores"]) == PAIRS


@pytest.mark.parametrize("reader", ["pandas", "polars"])
def test_training_data_has_no_margin(
    place: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = opened(reader, place, monkeypatch)
    exec(blocks("`margin` in TRL's loss")[reader], names)
    training = names["training"]
    scored = sum(row["margin"] is not None for row in scored_rows(place / "pairs"))
    assert "margin" not in training.columns and len(training) == scored < PAIRS
