"""The models of a night, each with the settings that apply to it."""

from pathlib import Path

from batch_scorer.config import load_config
from batch_scorer.nightly.night import series_of
from tests.parity.tiny_models import build_model


def test_token_scores_are_asked_of_the_first_model_only(tiny_model: Path, tmp_path: Path) -> None:
    build_model("bert", tmp_path / "bert")  # which has none to give
    config = load_config(
        model=str(tiny_model),
        inputs="in",
        output="out",
        also={"b_": str(tmp_path / "bert")},
        token_scores=True,
    )
    asked = {
        series.config.column_prefix: series.config.token_scores for series in series_of(config)
    }
    assert asked == {"": True, "b_": False}
