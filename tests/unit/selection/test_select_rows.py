"""What a row's prompt and value are, in every layout that scoring reads."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer import Config, score
from batch_scorer.errors import InputError
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select

BEST = Selection(best=1, group_by=("prompt",))


def _user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _kept(place: Path, output: Path, selection: Selection) -> list[int]:
    select([str(place)], str(output), selection)
    return [n for p in sorted(output.glob("*.parquet")) for n in pq.read_table(p)["id"].to_pylist()]


def _folder(path: Path, *tables: pa.Table, row_group_rows: int | None = None) -> Path:
    path.mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, path / f"{number}.parquet", row_group_size=row_group_rows)
    return path


def test_rows_in_many_row_groups_keep_their_places(tmp_path: Path) -> None:
    rows = {"prompt": [f"{n % 5}" for n in range(23)], "score": [float(n) for n in range(23)]}
    table = pa.table({"id": range(23), **rows})
    folder = _folder(tmp_path / "in", table, row_group_rows=4)
    assert _kept(folder, tmp_path / "out", BEST) == [18, 19, 20, 21, 22]


def test_lists_in_many_row_groups_keep_their_places(tmp_path: Path) -> None:
    responses = [["a", "b"], [], None, ["c"], ["d", "e", "f"], ["g", "h"]]
    scores = [[1.0, 2.0], [], None, [3.0], [9.0, None, 8.0], [1.0]]  # the last: too few
    table = pa.table(
        {
            "id": range(6),
            "prompt": [f"{n}" for n in range(6)],
            "responses": pa.array(responses, pa.list_(pa.string())),
            "scores": pa.array(scores, pa.list_(pa.float32())),
        }
    )
    folder = _folder(tmp_path / "in", table, row_group_rows=2)
    totals = select([str(folder)], str(tmp_path / "out"), Selection(worst=1, group_by=("id",)))
    kept = pq.read_table(tmp_path / "out" / "0.parquet").to_pylist()
    assert [(r["id"], r["response"], r["score"]) for r in kept] == [
        (0, "a", 1.0),
        (3, "c", 3.0),
        (4, "f", 8.0),
    ]
    assert totals.totals.rows == 2 + 1 + 1 + 1 + 3 + 2
    assert totals.totals.dropped == {"marked": 5, "rank": 2}


def test_a_pair_has_the_prompt_that_both_sides_begin_with(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": range(3),
            "chosen": [[_user(q), _answer("yes")] for q in ("p", "p", "q")],
            "rejected": [[_user(q), _answer("no")] for q in ("p", "p", "q")],
            "margin": [1.0, 2.0, 0.5],
        }
    )
    plain = pa.table(
        {"id": [7], "prompt": ["q"], "chosen": ["a"], "rejected": ["b"], "margin": [3.0]}
    )
    folder = _folder(tmp_path / "in", table, plain)
    assert _kept(folder, tmp_path / "out", BEST) == [1, 7]


def test_a_null_key_is_an_absent_one(tmp_path: Path) -> None:
    one = pa.table({"id": [0], "prompt": [[_user("p", name=None)]], "score": [1.0]})
    other = pa.table({"id": [1], "prompt": [[_user("p", name="Ada")]], "score": [1.0]})
    text = pa.table({"id": [2], "prompt": ["p"], "score": [2.0]})
    schema = pa.schema(
        {
            "id": pa.int64(),
            "prompt": pa.list_(
                pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()})
            ),
            "score": pa.float64(),
        }
    )
    folder = _folder(tmp_path / "in", one.cast(schema), other.cast(schema), text)
    assert _kept(folder, tmp_path / "out", BEST) == [1, 2]


def test_dialogues_with_turn_marks_have_the_prompt_before_the_last_answer(
    tmp_path: Path, tiny_model: Path
) -> None:
    turns = [("p", "x"), ("p", "longer"), ("q", "x")]
    sides = {
        side: [f"\n\nHuman: {q}\n\nAssistant: {a}{side}" for q, a in turns]
        for side in ("chosen", "rejected")
    }
    folder = _folder(tmp_path / "in", pa.table({"id": range(3), **sides}))
    scored = tmp_path / "scored"
    score(
        Config(
            model=str(tiny_model),
            inputs=(str(folder),),
            output=str(scored),
            backend="fake",
            use_ray=False,
        )
    )
    kept = _kept(scored, tmp_path / "out", BEST)
    margins = pq.read_table(next(scored.glob("*.parquet")))["margin"].to_pylist()
    assert kept == [max((0, 1), key=lambda n: margins[n]), 2]


def test_text_without_a_prompt_is_not_one_group(tmp_path: Path) -> None:
    table = pa.table({"id": [0], "chosen": ["a"], "rejected": ["b"], "margin": [1.0]})
    folder = _folder(tmp_path / "in", table)
    with pytest.raises(InputError, match="no column holds the prompt"):
        select([str(folder)], str(tmp_path / "out"), BEST)
    assert _kept(folder, tmp_path / "other", Selection(above_margin=0)) == [0]


@pytest.mark.parametrize("fixed", [True, False])
def test_attributes_rank_by_name_or_by_their_mean(tmp_path: Path, fixed: bool) -> None:
    vectors = [[1.0, 5.0], None, [2.0, 1.0], [0.0, 7.0]]
    kind = pa.list_(pa.float32(), 2) if fixed else pa.list_(pa.float32())
    names = {"batch_scorer.attributes": json.dumps(["helpful", "honest"])}
    schema = pa.schema(
        [
            pa.field("id", pa.int64()),
            pa.field("kind", pa.string()),
            pa.field("rewards", kind, metadata=names),
        ]
    )
    rows = pa.table([range(4), ["k"] * 4, pa.array(vectors, kind)], schema=schema)
    folder = _folder(tmp_path / "in", rows)
    for by, best in (("rewards.helpful", 2), ("rewards.honest", 3), ("mean(rewards)", 3)):
        selection = Selection(by=by, best=1, group_by=("kind",))
        assert _kept(folder, tmp_path / by.strip(")"), selection) == [best]
    with pytest.raises(InputError, match="no 'verbose'; there are helpful, honest"):
        select([str(folder)], str(tmp_path / "x"), Selection(by="rewards.verbose"))
