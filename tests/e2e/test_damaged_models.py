"""Whatever a model folder holds: exit code 2, one line that names the folder, nothing written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.tiny import TEMPLATE, tiny_reward_model

pytestmark = pytest.mark.e2e

Damage = Callable[[Path], object]
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def data(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def entries(name: str = CONFIG, **changes: Any) -> Damage:
    """A JSON file with other entries; None takes one out."""

    def damage(folder: Path) -> None:
        file = folder / name
        found = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: v for key, v in found.items() if v is not None}))

    return damage


def cut(name: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return damage


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The weights under another header; their bytes stay."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        found = json.loads(content[8 : 8 + length])
        changed = change(found)
        new = changed if isinstance(changed, bytes) else json.dumps(found).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def a_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def a_pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def added_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    found["added_tokens"].append({**found["added_tokens"][0], "id": 9999, "content": "<far>"})
    file.write_text(json.dumps(found))


def twice(found: dict[str, Any]) -> bytes:
    name = next(name for name in found if name != "__metadata__")
    entry = json.dumps({name: found[name]})
    return f"{json.dumps(found)[:-1]}, {entry[1:]}".encode()


def entry(**changes: Any) -> Damage:
    return header(lambda found: found["model.norm.weight"].update(changes))


def number(name: str, value: float) -> Damage:
    return tensors(lambda found: found[name].view(-1)[3:4].fill_(value))


def turns(body: str) -> Damage:
    return text("chat_template.jinja", body + TEMPLATE)


DEEP = 100_000
NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "config missing": (gone(CONFIG), CONFIG),
    "config empty": (text(CONFIG, ""), CONFIG),
    "config cut": (cut(CONFIG, 0.5), CONFIG),
    "config binary": (data(CONFIG, bytes(range(256))), CONFIG),
    "config nested": (text(CONFIG, "[" * DEEP + "]" * DEEP), CONFIG),
    "config a list": (text(CONFIG, "[1, 2]"), CONFIG),
    "config a folder": (a_folder(CONFIG), CONFIG),
    "config a loop": (link(CONFIG, CONFIG), CONFIG),
    "config a broken link": (link(CONFIG, "nowhere"), CONFIG),
    "config a pipe": (a_pipe(CONFIG), "is a pipe"),
    "config a device": (link(CONFIG, "/dev/zero"), "is a device"),
    "no architectures": (entries(architectures=None), "head"),
    "architectures a number": (entries(architectures=7), "architectures"),
    "architectures of numbers": (entries(architectures=[7]), "architectures"),
    "unknown model_type": (entries(model_type="none_such"), "none_such"),
    "no model_type": (entries(model_type=None), "model_type"),
    "hidden_size huge": (entries(hidden_size=10**12), "hidden_size"),
    "other hidden_size": (entries(hidden_size=96), "hidden states"),
    "layers huge": (entries(num_hidden_layers=10**9), "num_hidden_layers"),
    "a layer more": (entries(num_hidden_layers=3), "layers.2"),
    "a layer less": (entries(num_hidden_layers=1), "model.layers.1"),
    "vocab_size 0": (entries(vocab_size=0), "vocab_size"),
    "vocab_size negative": (entries(vocab_size=-512), "vocab_size"),
    "heads that do not divide": (entries(num_attention_heads=5, head_dim=None), "hidden"),
    "NaN for a number": (entries(hidden_size=float("nan")), "hidden_size"),
    "text for a number": (entries(num_hidden_layers="two"), "num_hidden_layers"),
    "positions -1": (entries(max_position_embeddings=-1), "max_position_embeddings"),
    "text_config a list": (entries(text_config=[]), "text_config"),
    "rope of no kind": (entries(rope_parameters={"rope_type": "none_such"}), "none_such"),
    "an activation of no kind": (entries(hidden_act="none_such"), "none_such"),
    "quantised in no known way": (entries(quantization_config={"quant_method": "abc"}), "abc"),
    "quantization_config a text": (entries(quantization_config="fp8"), "quantization_config"),
    "own code, not allowed": (
        entries(model_type="own", auto_map={"AutoConfig": "own.Config"}, architectures=["Own"]),
        "own",
    ),
    "weights missing": (gone(WEIGHTS), "no safetensors weights"),
    "weights empty": (data(WEIGHTS, b""), WEIGHTS),
    "weights cut": (cut(WEIGHTS, 0.7), WEIGHTS),
    "weights cut in the header": (cut(WEIGHTS, 0.001), WEIGHTS),
    "weights a folder": (a_folder(WEIGHTS), WEIGHTS),
    "weights a broken link": (link(WEIGHTS, "../nowhere"), WEIGHTS),
    "weights a loop": (link(WEIGHTS, WEIGHTS), WEIGHTS),
    "weights a pipe": (a_pipe(WEIGHTS), "is a pipe"),
    "more weights, a pipe": (a_pipe("more.safetensors"), "is a pipe"),
    "weights pickled": (pickled, "pickled"),
    "a header's length absurd": (data(WEIGHTS, b"\xff" * 64), WEIGHTS),
    "a header that is no JSON": (header(lambda found: b"{" + b"a" * 63), WEIGHTS),
    "a header that is a list": (header(lambda found: b"[1, 2]"), WEIGHTS),
    "a header nested": (header(lambda found: b"[" * DEEP + b"]" * DEEP), WEIGHTS),
    "a header without entries": (header(lambda found: found.update({NORM: 7})), NORM),
    "a tensor twice": (header(twice), "twice"),
    "offsets over another tensor": (entry(data_offsets=[0, 256]), "over another tensor"),
    "offsets out of range": (entry(data_offsets=[1 << 40, (1 << 40) + 256]), "gap"),
    "offsets negative": (entry(data_offsets=[-256, 0]), NORM),
    "a dtype of no kind": (entry(dtype="F31"), "F31"),
    "a shape of other size": (entry(shape=[65]), NORM),
    "a shape negative": (entry(shape=[-1, -64]), NORM),
    "weights of TensorFlow": (header(lambda f: f.update(__metadata__={"format": "tf"})), "tf"),
    "a tensor missing": (tensors(lambda found: found.pop(NORM)), "norm.weight"),
    "a tensor too much": (tensors(lambda f: f.update(extra=f[NORM].clone())), "extra"),
    "a tensor of other shape": (
        tensors(lambda found: found.update({NORM: found[NORM][:60].clone()})),
        "norm.weight",
    ),
    "a head of other shape": (
        tensors(lambda found: found.update({"score.weight": torch.ones(1, 60)})),
        "score.weight",
    ),
    "no head": (tensors(lambda found: found.pop("score.weight")), "score"),
    "NaN in the body": (number("model.layers.1.mlp.up_proj.weight", float("nan")), "up_proj"),
    "infinity in the head": (number("score.weight", float("inf")), "score.weight"),
    "a head of zeros": (tensors(lambda found: found["score.weight"].zero_()), "all zeros"),
    "an index that is no JSON": (text(INDEX, "{"), INDEX),
    "an index that leads out": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder / "model-1.safetensors"),
            text(INDEX, json.dumps({"weight_map": {"a": "../x.safetensors"}}))(folder),
        ),
        "../x.safetensors",
    ),
    "an index of numbers": (
        lambda folder: (
            (folder / WEIGHTS).rename(folder / "model-1.safetensors"),
            text(INDEX, json.dumps({"weight_map": {"a": 7}}))(folder),
        ),
        INDEX,
    ),
    "an empty folder": (empty, CONFIG),
    "a file": (a_file, "file"),
    "tokenizer missing": (gone("tokenizer.json"), "tokenizer"),
    "tokenizer a pipe": (a_pipe("tokenizer.json"), "is a pipe"),
    "tokenizer a device": (link("tokenizer.json", "/dev/zero"), "is a device"),
    "vocabulary beside it a pipe": (a_pipe("vocab.json"), "is a pipe"),
    "template a pipe": (a_pipe("chat_template.jinja"), "is a pipe"),
    "tokenizer no JSON": (text("tokenizer.json", "{"), "tokenizer"),
    "tokenizer binary": (data("tokenizer.json", bytes(range(256))), "tokenizer"),
    "tokenizer a list": (text("tokenizer.json", "[]"), "tokenizer"),
    "tokenizer nested": (text("tokenizer.json", "[" * DEEP), "RecursionError"),
    "tokenizer_config a list": (text("tokenizer_config.json", "[]"), "tokenizer_config"),
    "tokenizer_config cut": (cut("tokenizer_config.json", 0.5), "tokenizer_config"),
    "vocabulary larger than the model": (
        lambda folder: (
            entries(vocab_size=300)(folder),
            tensors(
                lambda f: f.update(
                    {"model.embed_tokens.weight": f["model.embed_tokens.weight"][:300].clone()}
                )
            )(folder),
        ),
        "the tokenizer knows",
    ),
    "template that is none": (turns("{% for %}"), "template"),
    "template of unknown names": (turns("{{ none_such(1) }}"), "none_such"),
    "template that refuses all": (turns("{{ raise_exception('never') }}"), "never"),
    "template with a long range": (turns("{% for i in range(10**9) %}{% endfor %}"), "template"),
    "template without end": (
        turns(3 * "{% for i in range(99999) %}" + 3 * "{% endfor %}"),
        "without end",
    ),
    "template that writes much": (turns("{{ 'a' * 10**10 }}"), "without end"),
    "template of deep macros": (
        turns("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(1) }}"),
        "template",
    ),
    "template that looks inside": (turns("{{ messages.__class__.__mro__[1] }}"), "template"),
    "template that needs an argument": (turns("{{ house.rules[0] }}"), "house"),
    "template that is no text": (data("chat_template.jinja", b"\xff\xfe\x00{"), "utf-8"),
    "template that is empty": (text("chat_template.jinja", ""), "template"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("damaged")
    tiny_reward_model(place / "sound", max_tokens=512)
    (place / "in").mkdir()
    (place / "in" / "a.parquet").write_bytes(parquet(pairs(2)))
    return place


def test_there_are_enough_of_them() -> None:
    assert len(DAMAGES) >= 60


@pytest.mark.parametrize("name", DAMAGES)
def test_one_line_and_nothing_written(name: str, places: Path, tmp_path: Path) -> None:
    damage, expected = DAMAGES[name]
    folder, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(places / "sound", folder)
    damage(folder)
    ended = run_cli(
        "score", "--model", folder, places / "in", "--output", output, "--no-ray",
        "--backend", "hf", "--dtype", "float32",
    )  # fmt: skip
    assert ended.exit_code == 2, ended.out + ended.err
    (line,) = ended.error.splitlines()
    assert expected in line
    assert str(folder) in line
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja"])
def test_a_file_that_may_not_be_read(name: str, places: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(places / "sound", folder)
    (folder / name).chmod(0)
    ended = run_cli(
        "score", "--model", folder, places / "in", "--output", tmp_path / "out", "--no-ray"
    )
    assert ended.exit_code == 2
    assert len(ended.error.splitlines()) == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_odd_folders_that_are_sound_are_scored(places: Path, tmp_path: Path) -> None:
    """What harms no score is no reason to refuse a model."""
    folder = tmp_path / "model"
    shutil.copytree(places / "sound", folder)
    text("generation_config.json", "{")(folder)
    added_token(folder)
    ended = run_cli(
        "score", "--model", folder, places / "in", "--output", tmp_path / "out", "--no-ray",
        "--backend", "hf", "--dtype", "float32",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
