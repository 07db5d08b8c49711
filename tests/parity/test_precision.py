"""Whole models with linear layers of 8 bits: how far from float32, and what the gate says."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from batch_scorer.backends.device import cpu_has_int8
from batch_scorer.backends.hf import HFBackend
from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, OutputError, ParityError
from batch_scorer.parity.gate import IN_8_BITS_ALLOWED, LEAST_AGREEMENT, Reference, compare
from batch_scorer.records import Scores
from batch_scorer.runs.preview import check
from batch_scorer.runs.run import score
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.tiny import tiny_reward_model
from tests.parity.tiny_models import (
    ModelDir,
    engine_settings,
    load_reference,
    random_sequences,
    reference_scores,
    rms,
    tokenized,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not cpu_has_int8(), reason="needs a CPU with VNNI or AMX"),
]

MOST_ERROR = {"gemma2": 0.6}
"""rms, as a share of the scores' spread; 0.05 where none is named. Seen: 0.02, where bfloat16 alone
is at 0.01. The attention of this Gemma-2 is so peaked that bfloat16 alone is at 0.3: seen 0.4."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("precision") / "model")


def config_for(model: Path, folder: Path, **settings: Any) -> Config:
    (folder / "pairs.parquet").write_bytes(parquet(pairs(40)))
    return load_config(
        model=str(model),
        inputs=(str(folder / "pairs.parquet"),),
        output=str(folder / "out"),
        use_ray=False,
        **{"dtype": "bfloat16", "precision": "int8", **settings},
    )


# Scores


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "mixtral"])
def test_scores_are_near_those_of_float32(name: str, dtype: str, model_dir: ModelDir) -> None:
    sequences = random_sequences(64, seed=3)
    exact = reference_scores(load_reference(model_dir(name)), sequences)
    backend = HFBackend(engine_settings(model_dir(name), dtype=dtype, precision="int8"))
    scores = backend.score(tokenized(sequences))
    assert scores.errors == {}
    assert 0 < rms(scores.values - exact) < MOST_ERROR.get(name, 0.05) * exact.std()
    assert backend.provenance["precision"] == "int8"
    assert backend.provenance["linear_layers_in_8_bits"] >= 4 * 4


def test_order_and_budget_cost_less_than_8_bits_do(model_dir: ModelDir) -> None:
    """A last bit of bfloat16 may move a number to the next of the 255 steps, and no further."""
    sequences = random_sequences(64, seed=3)
    order = np.random.default_rng(1).permutation(len(sequences))
    exact = reference_scores(load_reference(model_dir("llama")), sequences)
    values = [
        HFBackend(
            engine_settings(
                model_dir("llama"), dtype="bfloat16", precision="int8", token_budget=budget
            )
        )
        .score(tokenized(given))
        .values
        for budget, given in ((None, sequences), (37, [sequences[place] for place in order]))
    ]
    assert rms(values[1] - values[0][order]) < rms(values[0] - exact)


@pytest.mark.slow
def test_compiled_layers_of_8_bits_give_the_same_scores(model_dir: ModelDir) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    sequences = random_sequences(64, seed=3)
    eager, compiled = (
        HFBackend(engine_settings(model_dir("llama"), precision="int8", compile=compile))
        .score(tokenized(sequences))
        .values
        for compile in (False, True)
    )
    exact = reference_scores(load_reference(model_dir("llama")), sequences)
    assert rms(compiled - eager) < rms(eager - exact)


def test_without_packing_it_is_refused(model_dir: ModelDir) -> None:
    for settings in ({"attention": "eager"}, {}):
        name = "llama" if settings else "bert"
        with pytest.raises(ConfigError, match="does not run packed; leave precision out"):
            HFBackend(engine_settings(model_dir(name), precision="int8", **settings))


# Jobs


def test_an_output_in_8_bits_is_another_one(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path)
    assert score(config).is_complete
    with pytest.raises(OutputError, match="precision: int8 there, None here"):
        score(config.model_copy(update={"precision": None}))


def test_fp8_on_a_cpu_is_refused_before_anything_is_begun(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path)
    ended = run_cli(
        *("score", "--model", model, *config.inputs, "--output", config.output, "--no-ray"),
        *("--precision", "fp8", "--device", "cpu"),
    )
    assert ended.exit_code == 2
    assert "precision: no CPU multiplies fp8; set int8, or device: cuda" in ended.err
    assert not list(Path(config.output).rglob("*.json"))


# The gate


def test_the_report_has_the_shift_beside_bfloat16s_own(model: Path, tmp_path: Path) -> None:
    summary = score(config_for(model, tmp_path))
    parity = summary.parity
    assert parity is not None and parity["agrees"], parity
    assert 0 < parity["mean"] < parity["worst"] < parity["allowed_worst"] == IN_8_BITS_ALLOWED[0]
    assert 0 < parity["rounding_mean"] < parity["rounding_worst"]
    sampled = len(parity["compared"])
    assert sampled * (sampled - 1) / 2 * 0.5 < parity["pairs"] <= sampled * (sampled - 1) / 2
    assert LEAST_AGREEMENT * parity["pairs"] <= parity["pairs_agree"]


def with_an_outlier(model: Path, folder: Path) -> Path:
    """The same function in real numbers, with one channel of what an MLP reads 4,096 times as large
    and its weights as much smaller: in bytes nothing is left of the other channels."""
    copied = shutil.copytree(model, folder / "outlier")
    weights = load_file(copied / "model.safetensors")
    layer = "model.layers.0."
    weights[f"{layer}post_attention_layernorm.weight"][3] *= 4096
    for name in ("gate_proj", "up_proj"):
        weights[f"{layer}mlp.{name}.weight"][:, 3] /= 4096
    # What that layer adds has to count.
    weights[f"{layer}mlp.down_proj.weight"] *= 50
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    return copied


def test_a_layer_that_8_bits_do_not_hold_is_refused(model: Path, tmp_path: Path) -> None:
    bad = with_an_outlier(model, tmp_path)
    assert check(config_for(bad, tmp_path, precision=None)).report.agrees
    config = config_for(bad, tmp_path)
    with pytest.raises(ParityError, match="of the spread"):
        score(config)
    assert list(Path(config.output).glob("*.parquet")) == []


@pytest.mark.parametrize("precision", [None, "int8"])
def test_ranks_may_not_change_where_the_scores_hardly_do(
    precision: str | None, model: Path, tmp_path: Path
) -> None:
    """Two sequences far from the others make the spread large, and the errors a small share of
    it; among the others every second pair changes places."""
    checked = check(config_for(model, tmp_path, precision=precision))
    job, sample = checked.job, checked.sample
    count = sample.rows.num_sequences
    exact = np.linspace(0, 0.05, count, dtype=np.float32)[:, None]
    exact[:2] = [[-5], [5]]
    turned = exact.copy()
    turned[2:] = turned[:1:-1]
    rounding = np.full(count, 1e-4, np.float32)
    report = compare(sample, Reference("float32", False, exact, rounding), Scores(turned), job)
    assert report.worst < 0.05
    if precision is None:
        assert report.agrees, "bfloat16 may move scores as far"
        return
    assert report.pairs_agree < LEAST_AGREEMENT * report.pairs
    assert report.problems == (
        f"{report.pairs - report.pairs_agree} of {report.pairs} pairs are ranked the other way "
        "round, 5% may be",
    )
