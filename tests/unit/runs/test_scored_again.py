"""An output that is scored more than once."""

import json
import shutil
from pathlib import Path

import pytest

from batch_scorer import load_config, score, verify
from batch_scorer.config import Config
from batch_scorer.errors import ExitCode
from tests.helpers.inputs import pairs, parquet
from tests.stores.readers import rows_by_reader


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(pairs(5)))
    return load_config(
        model=str(tiny_model), inputs=str(tmp_path / "in"), output=str(tmp_path / "out"),
        backend="fake", use_ray=False,
    )  # fmt: skip


def test_an_output_that_was_deleted_is_scored_again_by_the_same_process(
    config: Config, tmp_path: Path
) -> None:
    """The process remembered that it had recorded its engine, in an output that was gone."""
    records = {}
    for attempt in (1, 2):
        assert score(config).is_complete
        assert verify(config.output).exit_code == ExitCode.DONE
        engines = (tmp_path / "out" / "_batch_scorer" / "engines").iterdir()
        records[attempt] = {file.name: file.read_bytes() for file in engines}
        shutil.rmtree(tmp_path / "out")
    assert len(records[1]) == 1
    assert records[1] == records[2]


def test_an_output_whose_manifest_has_its_old_name_is_verified_and_resumed(
    config: Config, tmp_path: Path
) -> None:
    """Manifests were named .parquet, and CURRENT names the whole key."""
    score(config)
    records = tmp_path / "out" / "_batch_scorer"
    (manifest,) = (records / "manifests").iterdir()
    manifest.rename(old := manifest.with_suffix(".parquet"))
    current = json.loads((records / "CURRENT").read_text())
    current["manifest"] = f"_batch_scorer/manifests/{old.name}"
    (records / "CURRENT").write_text(json.dumps(current))
    assert verify(config.output).exit_code == ExitCode.DONE

    (tmp_path / "in" / "b.parquet").write_bytes(parquet(pairs(3, 5)))
    summary = score(config)
    assert (summary.run.rows, summary.totals["rows"]) == (3, 8)
    verdict = verify(config.output)
    assert (verdict.exit_code, verdict.rows_scored) == (ExitCode.DONE, 8)


def test_a_plain_glob_finds_the_scored_rows_and_nothing_else(
    config: Config, tmp_path: Path
) -> None:
    score(config)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "sub" / "b.parquet").write_bytes(parquet(pairs(3, 5)))
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(pairs(6)))
    score(config)
    assert set(rows_by_reader(tmp_path / "out").values()) == {9}
