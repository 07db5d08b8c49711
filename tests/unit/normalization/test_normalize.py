"""`normalize`: each value computed again from all scores, whatever shards they are in."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer import Config, score
from batch_scorer.errors import ConfigError, InputError, OutputError
from batch_scorer.normalization.groups import SCORES, exact_parts, group_sums
from batch_scorer.normalization.normalize import SUMMARY_KEY, normalize
from batch_scorer.normalization.recipe import Normalization
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select
from tests.helpers.ensembles import MEMBERS, ensemble_output
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pair_rows
from tests.helpers.places import Place

Row = dict[str, Any]


def rows_of(folder: Path | str) -> list[Row]:
    return [row for file in sorted(Path(folder).glob("*.parquet")) for row in _rows(file)]


def _rows(file: Path) -> list[Row]:
    found: list[Row] = pq.ParquetFile(file).read().to_pylist()
    return found


def expected(
    rows: Sequence[Row], columns: Sequence[str], group: Callable[[Row], Any]
) -> list[dict[str, Any]]:
    """The normalised values of each row by column, by the textbook in rational numbers."""
    scores = defaultdict[Any, list[Fraction]](list)
    for row in rows:
        for column in columns:
            values = row[column] if isinstance(row[column], list) else [row[column]]
            scores[group(row)] += [Fraction(v) for v in values if v is not None]
    stats = {}
    for name, values in scores.items():
        mean = sum(values, Fraction()) / max(len(values), 1)
        variance = sum(((v - mean) ** 2 for v in values), Fraction()) / max(len(values), 1)
        stats[name] = (float(mean), math.sqrt(variance))

    def normalised(value: float | None, of: Any) -> float | None:
        mean, std = stats[of]
        return None if value is None or not std else float(np.float32((value - mean) / std))

    found = []
    for row in rows:
        line = {}
        for column in columns:
            value = row[column]
            if isinstance(value, list):
                line[column] = [normalised(v, group(row)) for v in value]
            else:
                line[column] = normalised(value, group(row))
        found.append(line)
    return found


def assert_close(found: Any, exact: Any) -> None:
    if isinstance(exact, list):
        assert len(found) == len(exact)
        for one, other in zip(found, exact, strict=True):
            assert_close(one, other)
    else:
        assert (found is None) == (exact is None)
        assert exact is None or found == pytest.approx(exact, rel=1e-6, abs=1e-7)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A scored output of pairs: four rows a prompt, in shards of five rows; one source has one row,
    one row has no score."""
    place = Place(str(tmp_path_factory.mktemp("pairs")))
    rows = []
    for number in range(40):
        row = pair_rows(1, number)[0]
        question = {"role": "user", "content": f"question {number % 10}"}
        for side in ("chosen", "rejected"):
            row[side] = [question, row[side][-1]]
        row["source"] = "alone" if number == 17 else f"s{number % 3}" if number % 7 else None
        rows.append(row)
    rows[4]["rejected"] = None
    (place / "in").write({"a.jsonl": jsonl(rows[:23]), "b.jsonl": jsonl(rows[23:])})
    score(
        Config(
            model=str(tiny_model),
            inputs=((place / "in").url,),
            output=(place / "out").url,
            backend="fake",
            shard_rows=5,
            use_ray=False,
        )
    )
    return Path((place / "out").url)


def prompt_of(row: Row) -> str | None:
    """What both sides begin with; nothing where one is not there."""
    return row["chosen"][0]["content"] if row["rejected"] else None


GROUPS: dict[tuple[str, ...], Callable[[Row], Any]] = {
    (): lambda row: "all",
    ("source",): lambda row: row["source"],
    ("prompt",): prompt_of,
    ("prompt", "source"): lambda row: (prompt_of(row), row["source"]),
}


@pytest.mark.parametrize("by", GROUPS, ids=lambda by: ",".join(by) or "all")
def test_every_value_is_that_of_its_group(by: tuple[str, ...], pairs: Path, tmp_path: Path) -> None:
    done = normalize([str(pairs)], str(tmp_path / "out"), Normalization(by=by))
    before, after = rows_of(pairs), rows_of(tmp_path / "out")
    sides = ("score_chosen", "score_rejected")
    exact = expected(before, sides, GROUPS[by])
    assert len(before) == len(after) == 40
    for row, found, line in zip(before, after, exact, strict=True):
        for side in sides:
            assert_close(found.pop(f"normalized_{side}"), line[side])
        assert found == row
    kept = [v for line in exact for v in line.values() if v is not None]
    counts = done.families[""]
    assert (counts.scores, counts.normalized) == (79, len(kept))
    names = {GROUPS[by](row) for row in before if row["score_chosen"] is not None}
    assert counts.groups == len(names)
    assert (done.totals.rows, done.totals.rows_written, done.totals.dropped) == (40, 40, {})


def test_a_group_of_equal_scores_or_of_one_has_no_value(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = {
        "source": ["one", "equal", "equal", "two", "two", "none"],
        "score": [0.1, 0.1, 0.1, 1.0, 2.0, None],
        "score_error": [None] * 5 + ["too_long"],
    }
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")
    done = normalize([str(tmp_path / "in")], str(tmp_path / "out"), Normalization(by=("source",)))
    found = [row["normalized_score"] for row in rows_of(tmp_path / "out")]
    assert found == [None, None, None, -1.0, 1.0, None]
    counts = done.families[""]
    assert (counts.scores, counts.normalized) == (5, 2)
    assert (counts.groups, counts.groups_without_spread) == (3, 2)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    place, rows = ensemble_output(Place(str(tmp_path_factory.mktemp("ensemble") / "scored")))
    return Path(place.url), rows


def test_members_are_normalised_each_by_itself_and_averaged(
    ensemble: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    scored, rows = ensemble
    normalize([str(scored)], str(tmp_path / "out"), Normalization(by=("source",)))
    after = rows_of(tmp_path / "out")
    columns = [f"{member}_scores" for member in MEMBERS]
    exact = {c: expected(rows, [c], lambda row: row["source"]) for c in columns}
    assert not [n for n in after[0] if n.startswith(("std_normalized", "mean_normalized_n"))]
    for place, found in enumerate(after):
        lines = [exact[column][place][column] for column in columns]
        for member, line in zip(MEMBERS, lines, strict=True):
            assert_close(found[f"{member}_normalized_scores"], line)
        mean = [
            None if None in values else float(np.mean(values))
            for values in zip(*lines, strict=True)
        ]
        assert_close(found["mean_normalized_scores"], mean)


def test_one_member_alone_by_its_prefix(ensemble: tuple[Path, list[Row]], tmp_path: Path) -> None:
    ended = run_cli(
        "normalize", ensemble[0], "--prefix", "safety_", "--by", "source", "--output",
        tmp_path / "out", "--json",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert list(json.loads(ended.out)["families"]) == ["safety_"]
    added = set(rows_of(tmp_path / "out")[0]) - set(ensemble[1][0])
    assert added == {"safety_normalized_scores"}
    refused = run_cli("normalize", ensemble[0], "--prefix", "b_", "--output", tmp_path / "b")
    assert refused.exit_code == 2
    assert "no scores with the prefix 'b_'; there are " in refused.error


def cut(rows: list[Row], folder: Path, sizes: Sequence[int]) -> Path:
    """The rows in files of these sizes, each a shard."""
    folder.mkdir()
    kinds = {"prompt": pa.string(), "score": pa.float32(), "score_error": pa.string()}
    for number, (first, stop) in enumerate(pairwise(np.cumsum([0, *sizes]).tolist())):
        table = pa.Table.from_pylist(rows[first:stop], pa.schema(kinds))
        pq.write_table(table, folder / f"{number:03}.parquet", row_group_size=7)
    return folder


@pytest.mark.parametrize("by", [(), ("prompt",)])
def test_the_bits_are_the_same_whatever_the_shards(by: tuple[str, ...], tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    rows = [
        {
            "prompt": f"question {random.integers(60)}",
            "score": float(np.float32(random.normal() * 10.0 ** random.integers(-6, 7))),
            "score_error": None,
        }
        for _ in range(400)
    ]
    order = random.permutation(len(rows)).tolist()
    one = cut(rows, tmp_path / "one", [400])
    many = cut([rows[k] for k in order], tmp_path / "many", [1, 99, 150, 30, 120])
    for folder in (one, many):
        normalize([str(folder)], str(tmp_path / f"{folder.name}-out"), Normalization(by=by))
    values = [row["normalized_score"] for row in rows_of(tmp_path / "one-out")]
    shuffled = [row["normalized_score"] for row in rows_of(tmp_path / "many-out")]
    assert shuffled == [values[k] for k in order]
    assert sum(value is not None for value in values) > 300


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.lists(FINITE, max_size=40))
def test_a_few_parts_have_exactly_the_sum(values: list[float]) -> None:
    parts = exact_parts(values)
    assert sum(map(Fraction, parts), Fraction()) == sum(map(Fraction, values), Fraction())
    assert len(parts) < 12


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), FINITE), max_size=40),
    st.integers(1, 7),
)
def test_sums_of_groups_are_rounded_once_however_batches_fall(
    values: list[tuple[int, int, float]], size: int
) -> None:
    values.sort(key=lambda each: each[:2])
    family, lo, value = ([each[k] for each in values] for k in range(3))
    table = pa.table([family, [7] * len(values), lo, value], schema=SCORES)
    found = {}
    for sums in group_sums(table.to_batches(max_chunksize=size)):
        for line in sums.to_pylist():
            found[line["family"], line["lo"]] = (line["n"], line["total"])
    groups = defaultdict[tuple[int, int], list[float]](list)
    for own, low, each in values:
        groups[own, low].append(each)
    assert found == {key: (len(own), math.fsum(own)) for key, own in groups.items()}


def test_it_is_finished_verified_and_left_alone(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ("normalize", pairs, "--by", "prompt", "--output", output, "--json")
    first = run_cli(*words)
    assert first.exit_code == 0, first.err
    verified = json.loads(run_cli("verify", output, "--json").out)
    assert (verified["ok"], verified["remade"], verified["shards"]) == (True, 9, 9)
    status = json.loads(run_cli("status", output, "--json").out)
    assert (status["complete"], status["kind"]) == (True, "normalization")
    assert run_cli(*words).out == first.out
    other = run_cli("normalize", pairs, "--by", "source", "--output", output)
    assert (other.exit_code, "by was ['prompt'], now ['source']" in other.err) == (2, True)
    summary = output / SUMMARY_KEY
    summary.write_text(summary.read_text().replace('"groups": 11', '"groups": 12'))
    assert run_cli("verify", output, "--json").exit_code == 4


def test_normalised_lists_are_chosen_by_select(
    ensemble: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    normalize([str(ensemble[0])], str(tmp_path / "out"), Normalization(by=("source",)))
    selection = Selection(by="mean_normalized_score", group_by=("prompt",), best=1)
    select([str(tmp_path / "out")], str(tmp_path / "best"), selection)
    best = {row["prompt"]: row["mean_normalized_score"] for row in rows_of(tmp_path / "best")}
    for row in rows_of(tmp_path / "out"):
        values = [v for v in row["mean_normalized_scores"] if v is not None]
        assert best.get(row["prompt"]) == (max(values) if values else None)


def test_what_cannot_be_normalised_is_named(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no column 'subset'"):
        normalize([str(pairs)], str(tmp_path / "a"), Normalization(by=("subset",)))
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in" / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: no scores; there are text"):
        normalize([str(tmp_path / "in")], str(tmp_path / "b"))
    with pytest.raises(OutputError, match="holds scores"):
        normalize([str(pairs)], str(pairs))
    with pytest.raises(ConfigError, match="name at least one"):
        normalize([], str(tmp_path / "c"))
    normalize([str(pairs)], str(tmp_path / "d"))
    with pytest.raises(InputError, match="there is a column 'normalized_score_chosen' already"):
        normalize([str(tmp_path / "d")], str(tmp_path / "e"))
