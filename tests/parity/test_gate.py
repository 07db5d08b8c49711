"""The gate catches what makes scores wrong: each trap is set for real, and must be named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from batch_scorer.backends import hf, kernels
from batch_scorer.backends.base import Backend, EngineSettings
from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.kernels import KERNELS
from batch_scorer.backends.packed import PackedBody
from batch_scorer.backends.packing import PackedBatch
from batch_scorer.backends.plain import Road
from batch_scorer.backends.readout import Readout
from batch_scorer.backends.registry import make_backend
from batch_scorer.config import Config, load_config
from batch_scorer.errors import ParityError
from batch_scorer.job import Job
from batch_scorer.models import kept
from batch_scorer.models.adapter import LastToken
from batch_scorer.parity import gate
from batch_scorer.records import PooledTokens, RowError, Scores, TokenizedRows
from batch_scorer.render.readers import PlainReader
from batch_scorer.runs.preview import check
from batch_scorer.runs.run import score
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.tiny import tiny_reward_model, tiny_tokenizer
from tests.parity import tiny_models

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer puts BOS first."""
    return tiny_reward_model(tmp_path_factory.mktemp("gate") / "model", bos=True)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    return config_for(model, tmp_path)


def config_for(model: Path, folder: Path, **settings: Any) -> Config:
    (folder / "pairs.parquet").write_bytes(parquet(pairs(40)))
    return load_config(
        model=str(model),
        inputs=(str(folder / "pairs.parquet"),),
        output=str(folder / "out"),
        use_ray=False,
        **{"dtype": "float32", **settings},
    )


def sabotage(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[HFBackend, Scores, TokenizedRows], Scores]
) -> None:
    """Let the engine's scores go through `change`."""

    def make(job: Job) -> Backend:
        backend = make_backend(job)
        assert isinstance(backend, HFBackend)
        score = backend.score
        monkeypatch.setattr(backend, "score", lambda rows: change(backend, score(rows), rows))
        return backend

    monkeypatch.setattr(gate, "make_backend", make)


def assert_caught(config: Config, match: str) -> None:
    report = check(config).report
    assert not report.agrees
    with pytest.raises(ParityError, match=match):
        report.require()
    with pytest.raises(ParityError, match=match):
        score(config)
    scored = [file for file in Path(config.output).glob("*.parquet")]
    assert scored == [], "a shard was scored by an engine that disagrees"


def test_a_sound_engine_agrees_and_the_report_is_kept(config: Config) -> None:
    summary = score(config)
    assert summary.parity is not None and summary.parity["agrees"]
    assert summary.parity["worst"] < 1e-4
    assert summary.parity["pairs_agree"] == summary.parity["pairs"] > 0
    lengths = [row["tokens"] for row in summary.parity["compared"]]
    assert len(lengths) >= 6 and max(lengths) > min(lengths)
    (engine,) = (Path(config.output) / "_batch_scorer" / "engines").glob("*.json")
    assert json.loads(engine.read_text())["parity"] == json.loads(json.dumps(summary.parity))


def test_bfloat16_may_round_as_much_as_plain_hugging_face(model: Path, tmp_path: Path) -> None:
    report = check(config_for(model, tmp_path, dtype="bfloat16")).report
    assert report.agrees, report.problems
    assert report.reference_dtype == "float32" and 0 < report.worst < report.allowed_worst


def test_an_activation_left_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def activate(backend: HFBackend, scores: Scores, rows: TokenizedRows) -> Scores:
        scores.values = 1 / (1 + np.exp(-scores.values))
        return scores

    sabotage(monkeypatch, activate)
    assert_caught(config, "of the spread")


def test_the_wrong_token_pooled(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_early(self: Readout, rows: TokenizedRows) -> tuple[PooledTokens, dict[int, RowError]]:
        assert (rows.lengths > 1).all()
        return PooledTokens(rows.lengths - 2, np.arange(rows.num_sequences + 1)), {}

    def make(job: Job) -> Backend:
        backend = make_backend(job)
        monkeypatch.setattr(Readout, "pooled_tokens", one_early)
        return backend

    monkeypatch.setattr(gate, "make_backend", make)
    report = check(config).report
    assert not report.agrees and "of the spread" in report.problems[0]


def test_sequences_that_see_each_other(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention over a batch as if it were one long text."""

    def everything(batch: PackedBatch, *arguments: Any) -> kernels.BlockPlan:
        one_text = replace(batch, position_ids=np.arange(batch.num_tokens, dtype=np.int32))
        return kernels.plan_blocks(one_text, *arguments)

    monkeypatch.setitem(KERNELS, "blocks", replace(KERNELS["blocks"], plan=everything))
    monkeypatch.setattr(PackedBody, "_check_isolation", lambda self: None)
    assert_caught(config, "of the spread")


def test_a_random_head(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(job: Job) -> Backend:
        backend = make_backend(job)
        assert isinstance(backend, HFBackend) and backend._readout is not None
        head = backend._readout._head
        assert head is not None
        torch.manual_seed(1)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter.data)
        return backend

    monkeypatch.setattr(gate, "make_backend", make)
    assert_caught(config, "of the spread")


def test_chosen_and_rejected_swapped(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(backend: HFBackend, scores: Scores, rows: TokenizedRows) -> Scores:
        scores.values = scores.values.reshape(-1, 2)[:, ::-1].reshape(-1, 1)
        return scores

    sabotage(monkeypatch, swap)
    assert_caught(config, "ranked the other way round")


def test_sdpa_on_gemma_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops the softcap without a word; the guard that refuses it is taken away here."""
    model = tmp_path / "gemma2"
    tiny_models.build_model("gemma2", model, vocab_size=512, max_position_embeddings=4096)
    tiny_tokenizer(model)
    with pytest.raises(Exception, match="attn_logit_softcapping"):
        check(config_for(model, tmp_path, attention="sdpa"))
    monkeypatch.setattr(hf, "refuse_unsound", lambda *_: None)
    assert_caught(config_for(model, tmp_path, attention="sdpa"), "of the spread")


@pytest.mark.parametrize(("keep", "trap"), [(True, "BOS twice"), (False, "BOS is lost")])
def test_bos_doubled_or_lost(
    keep: bool, trap: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer adds BOS; where the template writes it too, only one may stay."""
    if keep:
        copied = tmp_path / "with-bos"
        tiny_reward_model(copied, bos=True)
        template = (copied / "chat_template.jinja").read_text()
        (copied / "chat_template.jinja").write_text("{{ bos_token }}" + template)
        model = copied
        assert check(config_for(model, tmp_path)).seen.leading_bos == 1
    read = PlainReader.ids

    def wrong(self: PlainReader, texts: list[str], adds: list[bool]) -> Any:
        return read(self, texts, [keep] * len(adds))

    monkeypatch.setattr(PlainReader, "ids", wrong)
    with pytest.raises(ParityError, match=trap):
        check(config_for(model, tmp_path))
    with pytest.raises(ParityError, match=trap):
        score(config_for(model, tmp_path))


def overflowing(folder: Path) -> Path:
    """A model whose hidden states pass 65504 on the way, which float16 cannot hold.

    The packed path's own probe refuses it at load; the padded path leaves it to the gate.
    """
    model = tiny_reward_model(folder / "overflows")
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if "up_proj" in name or "down_proj" in name:
            tensor.mul_(3000)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def test_float16_that_overflows(tmp_path: Path) -> None:
    model = overflowing(tmp_path)
    assert check(config_for(model, tmp_path)).report.agrees
    assert_caught(
        config_for(model, tmp_path, dtype="float16", attention="eager"), "scored by one side only"
    )


def test_warn_goes_on_and_off_compares_nothing(model: Path, tmp_path: Path) -> None:
    bad = overflowing(tmp_path)
    warned = score(
        config_for(bad, tmp_path, dtype="float16", attention="eager", parity_check="warn")
    )
    assert warned.parity is not None and not warned.parity["agrees"]
    assert warned.totals["marked"] == {"non_finite_score": 40}
    (tmp_path / "sound").mkdir()
    unchecked = score(config_for(model, tmp_path / "sound", parity_check="off"))
    assert unchecked.parity is None and unchecked.totals["rows_scored"] == 40


def test_the_reference_is_computed_once_for_an_output(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(config)
    (shard,) = Path(config.output).glob("*.parquet")
    shard.unlink()
    monkeypatch.setattr(gate, "compute_scores", lambda *_: pytest.fail("computed again"))
    assert score(config).parity == first.parity


def test_another_output_needs_no_forward_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept are plain Hugging Face's scores of these token ids, by this model and this code."""
    model = tiny_reward_model(tmp_path / "model", bos=True)
    config = config_for(model, tmp_path)
    scored: list[str] = []
    compute = Road.scores

    def counting(road: Road, settings: EngineSettings, rows: TokenizedRows) -> Scores:
        scored.append(settings.dtype)
        return compute(road, settings, rows)

    monkeypatch.setattr(Road, "scores", counting)

    def forwards(**changed: Any) -> int:
        scored.clear()
        other = config.model_copy(update={"output": str(tmp_path / "other"), **changed})
        summary = score(other)
        assert summary.parity is not None and summary.parity["agrees"]
        shutil.rmtree(tmp_path / "other")
        return len(scored)

    assert forwards() == 1
    assert forwards() == 0
    assert forwards(max_tokens=200) == 1, "another fingerprint"
    assert forwards(dtype="bfloat16", parity_check="warn") == 2, "another dtype, and its rounding"
    assert forwards(limit=7) == 1, "other rows"
    with monkeypatch.context() as patch:
        patch.setattr(kept, "code_digest", lambda: "of another version")
        assert forwards() == 1
    with monkeypatch.context() as patch:
        patch.setattr(gate, "device_name", lambda device: "another CPU")
        assert forwards() == 1
    tensors = load_file(model / "model.safetensors")
    tensors["score.weight"] *= 1.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert forwards() == 1, "other weights under the same name"


def test_a_kept_reference_that_is_damaged_is_computed_anew(config: Config) -> None:
    score(config)
    (kept,) = Path(config.output).glob("_batch_scorer/parity/*.json")
    for damage in ("[]", '{"dtype": "float32", "values": "many"}', "{"):
        kept.write_text(damage)
        for file in Path(config.output).glob("*.parquet"):
            file.unlink()
        assert score(config).is_complete


def test_check_shows_what_the_model_sees(model: Path, tmp_path: Path) -> None:
    config = config_for(model, tmp_path)
    ended = run_cli("check", model, *config.inputs, "--no-ray", "--dtype", "float32")
    assert ended.exit_code == 0
    for shown in ("<s><|im_start|>user", "sequence_classifier", "gives the model's own scores"):
        assert shown in ended.out
    ended = run_cli("check", model, "--no-ray", "--json")  # on the sample in the package
    checked = json.loads(ended.out)
    assert checked["parity"]["agrees"] and checked["leading_bos"] == 1
    assert checked["pooled_tokens"] == ["\n"] and checked["rendered"].startswith("<s><|im_start|>")
    assert not (tmp_path / "out").exists()
    ended = run_cli("check", model, *config.inputs, "--no-ray", "--task", "embed", "--normalize")
    assert "an embedding of 64 dimensions" in ended.out and "last, scaled to length 1" in ended.out


def test_check_ends_with_an_error_where_engines_disagree(tmp_path: Path) -> None:
    model = overflowing(tmp_path)
    config = config_for(model, tmp_path)
    ended = run_cli(
        "check", model, *config.inputs, "--no-ray", "--dtype", "float16", "--attention", "eager"
    )
    assert ended.exit_code == 2
    assert "does not give the model's scores" in ended.err


def test_pooling_follows_transformers() -> None:
    """What the reference pools is what the adapter pools: the last token that is not padding."""
    config = {"pad_token_id": 7}
    for ids, place in (([1, 2, 7], 1), ([1, 7, 2], 2), ([7, 7], 1), ([5], 0)):
        positions = LastToken(skips_pad=True).positions(np.array(ids, dtype=np.int32), config)
        assert not isinstance(positions, Exception)
        np.testing.assert_array_equal(positions, [place])
