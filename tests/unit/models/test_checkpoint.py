"""Which tensors a folder holds: several files, an old index, wrappers' names, trainers' shards."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from batch_scorer.errors import ModelError
from batch_scorer.models.checkpoint import read_checkpoint
from batch_scorer.models.directory import inspect_model

Tensors = dict[str, torch.Tensor]
SINGLE = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    names = ("model.embed_tokens.weight", "model.norm.weight", "score.weight")
    return {name: torch.randn(3, 4) for name in names}


def save(folder: Path, weights: Tensors, name: str = SINGLE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / name)


def save_shards(folder: Path, weights: Tensors) -> None:
    names = sorted(weights)
    places = {name: SHARDS[name == "score.weight"] for name in names}
    for shard in SHARDS:
        save(folder, {n: weights[n] for n in names if places[n] == shard}, shard)
    index(folder, places)


def index(folder: Path, places: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_single_file_and_equal_shards_are_one_model(tmp_path: Path) -> None:
    """transformers would read the single file and vLLM the shards."""
    save(tmp_path, tensors())
    save_shards(tmp_path, tensors())
    found = read_checkpoint(tmp_path)
    assert sorted(found.shapes) == sorted(tensors())
    assert len(found.sources) == 3
    assert "3 of its tensors are in another file too" in " ".join(found.changes)


def test_two_models_in_one_folder_are_refused_by_file_and_tensor(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    other = tensors()
    other["score.weight"][2, 3] += 1e-3
    save_shards(tmp_path, other)
    wrong = re.escape(f"{SHARDS[1]} and {SINGLE} hold different values of score.weight")
    with pytest.raises(ModelError, match=wrong):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: t[:2]])
def test_another_dtype_or_shape_is_another_tensor(tmp_path: Path, change: object) -> None:
    save(tmp_path, tensors())
    save_shards(tmp_path, tensors() | {"score.weight": change(tensors()["score.weight"])})  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"different values of score\.weight"):
        read_checkpoint(tmp_path)


def test_an_old_index_beside_a_single_file_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    index(tmp_path, {"model.norm.weight": SHARDS[0], "lm_head.weight": SHARDS[1]})
    found = read_checkpoint(tmp_path)
    assert {source.file.name for source in found.sources.values()} == {SINGLE}
    assert found.changes == (
        f"model.safetensors.index.json was not followed: it names {SHARDS[0]} and 1 more, which is "
        "not there",
    )


def test_a_missing_shard_is_an_incomplete_download(tmp_path: Path) -> None:
    save_shards(tmp_path, tensors())
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(ModelError, match=re.escape(f"incomplete download: {SHARDS[1]} not")):
        read_checkpoint(tmp_path)


def test_files_that_hold_no_weights_are_left_alone(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    for name in ("adapter_model", "optimizer", "consolidated", "consolidated-00001-of-00002"):
        save(tmp_path, {"model.norm.weight": torch.zeros(9)}, f"{name}.safetensors")
    (tmp_path / "original").mkdir()
    save(tmp_path / "original", {"norm.weight": torch.zeros(9)})
    found = read_checkpoint(tmp_path)
    assert {source.file.name for source in found.sources.values()} == {SINGLE}
    assert found.changes == ()


def test_a_value_head_in_its_own_file_is_a_part_of_the_model(tmp_path: Path) -> None:
    save(tmp_path, tensors())
    save(tmp_path, {"v_head.summary.weight": torch.ones(1, 4)}, "value_head.safetensors")
    assert "v_head.summary.weight" in read_checkpoint(tmp_path).shapes


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module.score.weight", "score.weight"),
        ("_fsdp_wrapped_module.model.norm.weight", "model.norm.weight"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("base_model.model.score.weight", "score.weight"),
        ("module._orig_mod.model.layers.0.x.weight", "model.layers.0.x.weight"),
        ("model._orig_mod.layers.0.x.weight", "model.layers.0.x.weight"),
        ("module.base_model.model.model.layers.0._orig_mod.x.weight", "model.layers.0.x.weight"),
        (
            "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.x",
            "model.layers.0.x",
        ),
        ("pretrained_model.model.norm.weight", "model.norm.weight"),
    ],
)
def test_names_of_wrappers_are_taken_out_and_told(wrapped: str, plain: str, tmp_path: Path) -> None:
    save(tmp_path, {wrapped: torch.ones(2)})
    found = read_checkpoint(tmp_path)
    assert list(found.shapes) == [plain] and found.sources[plain].name == wrapped
    assert found.changes and all(
        "was taken out of the names of 1 tensors" in c for c in found.changes
    )


@pytest.mark.parametrize("second", ["model.norm.weight", "_orig_mod.model.norm.weight"])
def test_two_tensors_for_one_name_are_refused(second: str, tmp_path: Path) -> None:
    """Also where their values are equal: nothing says which one was meant."""
    save(tmp_path, {"module.model.norm.weight": torch.ones(2), second: torch.ones(2)})
    with pytest.raises(ModelError, match=r"are both model\.norm\.weight of the model"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("pytorch_model_fsdp_0/__0_0.distcp", "FSDP's shards.*accelerate merge-weights"),
        ("__0_0.distcp", "FSDP's shards.*accelerate merge-weights"),
        ("global_step100/mp_rank_00_model_states.pt", "DeepSpeed's shards.*zero_to_fp32"),
        ("mp_rank_00_model_states.pt", "DeepSpeed's shards.*zero_to_fp32"),
        ("model_world_size_8_rank_0.pt", "verl's shards.*verl.model_merger"),
        ("actor/model_world_size_8_rank_0.pt", "verl's shards.*verl.model_merger"),
        ("mp_rank_00/model_optim_rng.pt", "Megatron's shards.*Megatron Bridge"),
        ("iter_0000100/mp_rank_00/model_optim_rng.pt", "Megatron's shards.*Megatron Bridge"),
        ("reward.nemo", "a NeMo archive"),
        ("model_weights/metadata.json", "an unpacked NeMo archive"),
        ("weights/__0_0.distcp", "NeMo's shards"),
        ("policy/weights/__0_0.distcp", "NeMo's shards"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_trainers_shards_are_called_what_they_are(
    there: str, said: str, has_config: bool, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / there
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"shard")
    if has_config:
        shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(ModelError, match=f"{there.split('/')[0]}.* is {said}"):
        inspect_model(tmp_path)


def test_a_trainers_shards_beside_a_model_are_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "global_step100").mkdir()
    assert inspect_model(tmp_path).adapter == "sequence_classifier"


def test_what_was_read_is_what_the_digest_covers(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    before = inspect_model(tmp_path).digest
    save(tmp_path, {"step": torch.ones(1)}, "optimizer.safetensors")
    assert inspect_model(tmp_path).digest == before
    save(tmp_path, {"v_head.summary.weight": torch.ones(1, 64)}, "value_head.safetensors")
    assert inspect_model(tmp_path).digest != before
