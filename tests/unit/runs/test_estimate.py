import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from batch_scorer.config import load_config
from batch_scorer.errors import ModelError
from batch_scorer.records import TokenizedRows
from batch_scorer.runs import estimate
from batch_scorer.runs.estimate import RowWork, work_of
from batch_scorer.runs.preview import Outlook, look_ahead


def rows(*sequences: list[int]) -> TokenizedRows:
    offsets = np.cumsum([0, *map(len, sequences)])
    ids = np.array([i for sequence in sequences for i in sequence], dtype=np.int32)
    return TokenizedRows(ids, offsets, offsets, np.zeros(len(sequences), np.int32), {}, {})


def test_a_shared_prefix_is_computed_once_and_attended_to_as_often() -> None:
    pair = rows([1, 2, 3, 4], [1, 2, 9], [])
    # 1 2 3 4 attend to 1 + 2 + 3 + 4 tokens, 9 to three.
    assert work_of(pair, shares=True, is_causal=True) == RowWork(7, 5, 13)
    assert work_of(pair, shares=False, is_causal=True) == RowWork(7, 7, 10 + 6)
    assert work_of(pair, shares=False, is_causal=False) == RowWork(7, 7, 16 + 9)


def ahead(model: Path | str, inputs: Path, **settings: Any) -> Outlook:
    settings = {"output": "/nowhere/out", "text_style": "rendered", **settings}
    config = load_config(model=str(model), inputs=(str(inputs),), **settings)
    return look_ahead(config, with_model=True)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files of rows that are all alike, and one that cannot be read."""
    for name, num_rows in (("a", 10), ("b", 100), ("c", 30)):
        pq.write_table(
            pa.table({"text": ["The lazy dog."] * num_rows}), tmp_path / f"{name}.parquet"
        )
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    return tmp_path


def test_a_part_of_the_rows_stands_for_all(
    files: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ahead(tiny_model, files).estimate
    monkeypatch.setattr(estimate, "SAMPLE_ROWS", 24)
    part = ahead(tiny_model, files).estimate
    assert whole is not None and part is not None
    assert (whole.sampled_rows, part.sampled_rows) == (140, 24)
    assert part.row_tokens == whole.row_tokens
    length = whole.row_tokens // 140
    # Equal rows of a shard are computed once, those of another shard again.
    assert whole.computed_tokens == 3 * length
    assert whole.common == part.common == pytest.approx(2 / 3)
    pairs = 3 * length * (length + 1) // 2
    assert whole.flop == 196_608 * 3 * length + 1_024 * pairs


@pytest.mark.parametrize(
    "settings",
    [{"attention": "eager"}, {"backend": "auto", "attention": "eager"}, {"backend": "fake"}],
    ids=["padded", "auto padded", "fake"],
)
def test_without_packing_nothing_is_shared(
    files: Path, tiny_model: Path, settings: dict[str, str]
) -> None:
    found = ahead(tiny_model, files, **settings).estimate
    assert found is not None and found.computed_tokens == found.row_tokens
    assert found.common == 0
    assert (found.flop is None) == (settings == {"backend": "fake"})


def test_rows_of_a_prompt_that_lie_in_different_files_are_seen(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As two samplers write them, and side by side."""
    prompt = "Tell me all that you know about the history of the lazy dog. "
    answers = [[f"{prompt}{side} {number}" for number in range(4)] for side in ("First", "Second")]
    for name, files in (("apart", answers), ("together", [[*answers[0], *answers[1]]])):
        (tmp_path / name).mkdir()
        for number, texts in enumerate(files):
            table = pa.table({"text": texts})
            pq.write_table(table, tmp_path / name / f"{number}.parquet")
    apart, together = (
        ahead(tiny_model, tmp_path / name).estimate for name in ("apart", "together")
    )
    assert apart is not None and together is not None
    saved = apart.computed_tokens - together.computed_tokens
    assert saved > 0 and together.common == 0
    assert apart.common == pytest.approx(saved / apart.computed_tokens)


def test_a_plan_refuses_the_model_that_score_refuses(
    files: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["score.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="all zeros"):
        ahead(model, files / "a.parquet")


def test_a_plan_goes_without_what_it_cannot_estimate(files: Path, tiny_model: Path) -> None:
    found = ahead(files / "no-model", files)
    assert found.plan.num_rows == 140 and found.estimate is None
    assert "no such model directory" in str(found.unknown)
    too_long = ahead(tiny_model, files, max_tokens=1)
    assert too_long.estimate is None and "none of the sampled rows" in str(too_long.unknown)
