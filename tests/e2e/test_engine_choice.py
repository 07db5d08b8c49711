"""`--backend auto`: by support, by what an output was begun with, and by a race."""

import json
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.config import Config, Device, load_config
from batch_scorer.errors import ModelError
from batch_scorer.inputs.plan import make_plan
from batch_scorer.models.directory import ModelFacts, inspect_model
from batch_scorer.models.registry import adapter_named
from batch_scorer.runs import derive, run
from batch_scorer.runs import engine_choice as trial
from tests.helpers.inputs import pairs, parquet

pytestmark = pytest.mark.e2e


def config_for(model: Path, folder: Path, **settings: Any) -> Config:
    (folder / "pairs.parquet").write_bytes(parquet(pairs(20)))
    return load_config(
        model=str(model),
        inputs=(str(folder / "pairs.parquet"),),
        output=str(folder / "out"),
        use_ray=False,
        **{"dtype": "float32", "backend": "auto", **settings},
    )


def facts(tiny_model: Path, adapter: str) -> ModelFacts:
    from dataclasses import replace

    return replace(
        inspect_model(tiny_model), adapter=adapter, engines=adapter_named(adapter).engines
    )


def test_only_engines_that_can_run_the_family_are_candidates(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = config_for(tiny_model, tmp_path)
    stock, encoder = (facts(tiny_model, name) for name in ("sequence_classifier", "encoder"))
    assert trial.supported_engines(auto, stock) == ["hf", "vllm"]
    assert trial.supported_engines(auto, encoder) == ["hf"]
    with pytest.raises(ModelError, match="encoder models do not run on vllm; set backend to hf"):
        trial.supported_engines(config_for(tiny_model, tmp_path, backend="vllm"), encoder)
    quantised = config_for(tiny_model, tmp_path, quantization="fp8")
    split = config_for(tiny_model, tmp_path, tensor_parallel=2)
    padded = config_for(tiny_model, tmp_path, attention="eager")
    assert trial.supported_engines(quantised, stock) == ["vllm"]
    assert trial.supported_engines(split, stock) == ["vllm"]
    assert trial.supported_engines(padded, stock) == ["hf"]
    with pytest.raises(ModelError, match="only the vllm backend takes quantization, and it is not"):
        trial.supported_engines(quantised, encoder)
    monkeypatch.setattr(trial.importlib.util, "find_spec", lambda name: None)
    assert trial.supported_engines(auto, stock) == ["hf"]


def test_a_race_is_run_where_it_pays() -> None:
    assert trial.is_raced(["hf", "vllm"], Device.CUDA, 10**9)
    assert trial.is_raced(["hf", "vllm"], Device.CPU, 10**9)
    assert not trial.is_raced(["hf", "vllm"], Device.CUDA, 10**6)
    assert not trial.is_raced(["hf", "vllm"], Device.CPU, 10**6)
    assert not trial.is_raced(["hf"], Device.CUDA, 10**9)


def test_the_race_is_recorded_and_its_winner_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both engines for real, on a job far too short to be raced."""
    monkeypatch.setitem(trial.WORTH_A_RACE, Device.CPU, 1)
    config = config_for(tiny_model, tmp_path)
    summary = run.score(config)
    records = tmp_path / "out" / "_batch_scorer"
    provenance = json.loads((records / "run.json").read_text())["provenance"]
    speeds = provenance["trial_tokens_per_s"]
    assert set(speeds) == {"hf", "vllm"} and min(speeds.values()) > 0
    winner = max(speeds, key=lambda name: speeds[name])
    assert provenance["backend"] == winner
    assert summary.parity is not None and summary.parity["backend"] == winner
    # The other way round the next time: the output keeps the engine it was begun with.
    monkeypatch.setattr(derive, "tokens_per_second", lambda *_: pytest.fail("raced again"))
    (shard,) = (tmp_path / "out").glob("*.parquet")
    before = shard.read_bytes()
    shard.unlink()
    run.score(config)
    assert shard.read_bytes() == before


def test_an_engine_that_does_not_come_up_loses(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(trial, "make_backend", broken)
    config = config_for(tiny_model, tmp_path)
    job = derive.derive(config, inspect_model(tiny_model)).on_engine("hf")
    rows = trial.trial_rows(job, make_plan(config).shards)
    assert rows is not None and rows.num_sequences == 40
    assert trial.tokens_per_second(job, rows) == 0
