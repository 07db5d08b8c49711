"""Models of a hub: which files are fetched, of which commit, and what is said where they are not.

A server on this machine stands in for the hub. Its client reads the environment as it is imported,
so one process that has not imported it yet is forked for every case.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from huggingface_hub import constants

from batch_scorer.config import load_config
from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.models.directory import find_model
from batch_scorer.models.hub import commit_of, on_this_node, repository_of
from batch_scorer.runs.derive import derive, look_at_models
from tests.helpers.hub import Hub, hub

TOKEN = "hf_AToKenThatStaysInItsPlace"
NAME = "org/reward"

PROGRAM = """
import json, os, resource, sys, traceback
from pathlib import Path
from batch_scorer.errors import BatchScorerError
from batch_scorer.models.directory import find_model
from batch_scorer.models.hub import on_this_node

assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    case = json.loads(line)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.environ |= case["env"]
        if case["room"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case["room"], case["room"]))
        try:
            if case["path"]:
                found = str(on_this_node(Path(case["path"]), weights=case["weights"]))
            else:
                found = str(find_model(case["name"], case["revision"], fetch=case["fetch"]))
        except BatchScorerError as error:
            found = f"{type(error).__name__}: {error}"
        except BaseException:
            found = traceback.format_exc()
        os.write(writer, found.encode())
        os._exit(0)
    os.close(writer)
    print(json.dumps(os.fdopen(reader).read()), flush=True)
    os.wait()
"""


@dataclass
class Case:
    """A model that is asked for, or a path of one on another node, and with what environment."""

    name: str = NAME
    revision: str | None = None
    fetch: bool = True
    path: str | None = None
    weights: bool = True
    room: int | None = None
    env: dict[str, str] = field(default_factory=dict)


class Asker:
    """The process that is forked for every case."""

    def __init__(self, log: Path) -> None:
        self._log = log
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=clean, text=True,
            )  # fmt: skip

    def __call__(self, server: Hub, home: Path, cases: Sequence[Case]) -> list[str]:
        """The folder, or the error, that each case ends in."""
        assert self._process.stdin and self._process.stdout
        found = []
        for case in cases:
            env = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), **case.env}
            print(json.dumps({**asdict(case), "env": env}), file=self._process.stdin, flush=True)
            found.append(json.loads(self._process.stdout.readline()))
        said = self._log.read_text()
        assert not said, said  # no bars and warnings of the client's own
        assert not any(TOKEN in answer for answer in found)
        return found

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait() == 0


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with closing(Asker(tmp_path_factory.mktemp("asker") / "log")) as asker:
        yield asker


READ = {
    name: name.encode()
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "adapter_config.json",
        "adapter_model.safetensors",
        "1_Pooling/config.json",
        "additional_chat_templates/tool.jinja",
    )
}
READ["model-00001-of-00002.safetensors"] *= 3000
NOT_READ = {
    name: name.encode()
    for name in (
        "README.md",
        "pytorch_model.bin",
        "reward.gguf",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/config.json",
        "checkpoint-500/model.safetensors",
        "adapters/adapter_model.safetensors",
        "modeling_reward.py",
    )
}


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub(NAME, kind="models") as running:
        yield running


def test_what_is_read_is_fetched_and_no_more_and_only_once(
    server: Hub, ask: Asker, tmp_path: Path
) -> None:
    old = server.commit({**READ, "config.json": b"old"}, branch="v1/final")
    new = server.commit({**READ, **NOT_READ})
    found = ask(
        server,
        tmp_path,
        [
            Case(fetch=False),
            Case(),
            Case(f"hf://{NAME}@main"),
            Case(f"{NAME}@v1/final"),
            Case(revision="v1/final"),
            Case(revision=old),
            Case(fetch=False),
            Case(env={"HF_HUB_OFFLINE": "1"}),
            Case(env={"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ],
    )
    assert "not fetched from a model hub yet" in found.pop(0)
    commits = [new, new, old, old, old, new, new, new]
    assert [commit_of(Path(folder)) for folder in found] == commits
    for folder in map(Path, found):
        files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        assert files == set(READ)
    fetched = [line for line in server.asked if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == len(READ) + 1  # the two commits differ in one file


def test_each_cause_has_its_line(server: Hub, ask: Asker, tmp_path: Path) -> None:
    commit = server.commit(READ)
    server.token, server.gated = TOKEN, True
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    private = Case("org/other")
    home = tmp_path / "other"
    cases = {
        "gated: its owner lets only some users have it, and no token was found": Case(),
        "gated, and the token found has no access to it": Case(env={"HF_TOKEN": "hf_wrong"}),
        "no such model on the hub; if it is private, set HF_TOKEN": private,
        "or it is private and the token found does not open it": Case(
            "org/other", env={"HF_TOKEN": TOKEN}
        ),
        "the hub has no revision gone of it": Case(f"{NAME}@gone"),
        f"revision main is not in {home}/hub, and HF_HUB_OFFLINE is set": Case(
            env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
        ),
        "and http://127.0.0.1:9 cannot be reached (Conn": Case(
            env={**nowhere, "HF_HOME": str(home)}
        ),
        f"no room for it on the disk of {home}/hub": Case(
            room=50_000, env={"HF_TOKEN": TOKEN, "HF_HOME": str(home)}
        ),
        "a part of revision main is in": Case(env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}),
        "no such folder, and no name that a hub could have": Case("org/re..ward"),
    }
    for (cause, case), said in zip(
        cases.items(), ask(server, tmp_path / "home", [*cases.values()]), strict=True
    ):
        kind, _, message = said.partition(": ")
        assert kind == "ModelError" and cause in message and "\n" not in message, said
        assert message.startswith(case.name) and "hf_wrong" not in message, said
    (opened,) = ask(server, tmp_path / "home", [Case(env={"HF_TOKEN": TOKEN})])
    assert commit_of(Path(opened)) == commit


def test_a_download_that_breaks_off_is_no_model_and_is_continued(
    server: Hub, ask: Asker, tmp_path: Path
) -> None:
    server.commit(READ)
    server.broken = {"model-00001-of-00002.safetensors"}
    broken, part = ask(server, tmp_path, [Case(), Case(env={"HF_HUB_OFFLINE": "1"})])
    assert f"{NAME}: not fetched whole from {server.url} (" in broken and "\n" not in broken
    assert "only a part of revision main is in" in part
    server.broken = set()
    (folder,) = ask(server, tmp_path, [Case()])
    assert (Path(folder) / "model-00001-of-00002.safetensors").read_bytes() == READ[
        "model-00001-of-00002.safetensors"
    ]


def test_a_node_without_the_folder_fetches_its_commit(
    server: Hub, ask: Asker, tmp_path: Path
) -> None:
    commit = server.commit(READ)
    server.commit({**READ, "config.json": b"newer"})
    path = str(tmp_path / "driver" / "hub" / "models--org--reward" / "snapshots" / commit)
    text, whole = ask(server, tmp_path, [Case(path=path, weights=False), Case(path=path)])
    assert text == whole == path.replace("/driver", "")
    assert (Path(whole) / "config.json").read_bytes() == b"config.json"
    before_weights = [line for line in server.asked if "/resolve/" in line]
    assert not any("model-0" in line for line in before_weights[: len(READ) - 3])


def test_a_folder_that_other_nodes_lack_is_named(tmp_path: Path, tiny_model: Path) -> None:
    assert on_this_node(tiny_model) == tiny_model
    with pytest.raises(ModelError, match="put it where all nodes of the cluster find it"):
        on_this_node(tmp_path / "elsewhere")
    (tmp_path / "text").mkdir()
    shutil.copy(tiny_model / "tokenizer.json", tmp_path / "text")
    assert on_this_node(tmp_path / "text", weights=False) == tmp_path / "text"
    with pytest.raises(ModelError, match="put it where"):
        on_this_node(tmp_path / "text")


def test_a_revision_is_named_once_and_of_a_hubs_model(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="names one already"):
        find_model("org/reward@v1", "v2")
    with pytest.raises(ConfigError, match="is a folder"):
        find_model(str(tiny_model), "v2")
    for name in ("./org/reward", "a/b/c", "/nowhere", "hf://datasets/org/pairs"):
        with pytest.raises(ModelError, match="no such model directory"):
            find_model(name)


@pytest.mark.parametrize("name", ["org/reward", "hf://org/reward", "org/reward@refs/pr/1"])
def test_families_know_a_model_by_its_name_alone(name: str) -> None:
    assert repository_of(name) == "org/reward"


def test_a_path_is_its_own_name() -> None:
    assert repository_of("/models/a@b") == "/models/a@b"
    assert commit_of(Path("/models/snapshots/a")) is None


def test_the_commit_is_recorded_and_the_revision_is_the_main_models(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "5" * 40
    kept = tmp_path / "models--org--reward"
    shutil.copytree(tiny_model, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = load_config(
        model={"a": {"model": "org/reward", "revision": "v1"}, "b": str(tiny_model)},
        inputs=("in",),
        output="out",
        backend="fake",
        use_ray=False,
    )
    members = look_at_models(config)
    recorded = [derive(m.config, m.model).provenance["revision"] for m in members.values()]
    assert recorded == [commit, None]
    a, b = members.values()
    assert a.model.digest == b.model.digest
    assert a.config.with_role("scores") == b.config.with_role("scores")
