"""The card of an output: `datasets` loads by it, and it says what the records say."""

from pathlib import Path

import datasets
import pytest
import yaml

from batch_scorer import load_config, score, verify
from batch_scorer.config import Config
from batch_scorer.errors import OutputError
from batch_scorer.runs.card import write_card
from tests.helpers.inputs import pair_rows, parquet, table_of


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    (tmp_path / "in").mkdir()
    rows = pair_rows(6)
    rows[1]["source"] = "a|b\n<script>"
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(table_of(rows)))
    return load_config(
        model=str(tiny_model), inputs=str(tmp_path / "in"), output=str(tmp_path / "out"),
        backend="fake", use_ray=False, shard_rows=4,
    )  # fmt: skip


def test_an_output_with_a_card_is_loaded_by_its_name(config: Config, tmp_path: Path) -> None:
    score(config)
    write_card(config.output, {})
    loaded = datasets.load_dataset(config.output, cache_dir=str(tmp_path / "cache"), split="train")
    assert len(loaded) == 6
    assert {"score_chosen", "margin", "score_error"} <= set(loaded.column_names)


def test_a_card_says_what_the_records_say_and_is_no_shard(config: Config) -> None:
    score(config)
    write_card(config.output, {})
    text = (Path(config.output) / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["configs"][0]["data_files"] == "**/*.parquet"
    assert "6 rows, 6 scored, 0 marked" in body
    assert "<script>" not in body and "a\\|b &lt;script>" in body
    assert verify(config.output).exit_code == 0
    assert score(config).totals["rows"] == 6
    write_card(config.output, {})
    assert (Path(config.output) / "README.md").read_text() == text


def test_a_readme_of_others_stays(config: Config) -> None:
    score(config)
    (Path(config.output) / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="no card of this program"):
        write_card(config.output, {})
    assert (Path(config.output) / "README.md").read_text() == "mine"
