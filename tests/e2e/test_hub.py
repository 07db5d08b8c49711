"""Data sets of the hub: read by commit, through its client's cache, with a token that stays there.

A process of its own asks the server, because the hub's client reads its environment as it is
imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batch_scorer.outputs.state import OutputState
from batch_scorer.storage import open_store
from tests.helpers.hub import Hub, hub
from tests.helpers.inputs import pair_rows, pairs, parquet

TOKEN = "hf_AToKenThatStaysInItsPlace"
NAME = "org/pairs"
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in pair_rows(4, start=50))

PROGRAM = """
import json, sys
from batch_scorer import Config, make_plan, score, verify
from batch_scorer.errors import BatchScorerError
from batch_scorer.inputs.files import rows_of_shard

found = []
for each in json.load(sys.stdin):
    config = Config(model=sys.argv[1], parity_check="off", backend="fake", use_ray=False, **each)
    try:
        if config.output != "nowhere":
            score(config)
            verdict = verify(config.output)
            found.append([verdict.exit_code, verdict.inputs_compared])
        else:
            plan = make_plan(config)
            rows = [rows_of_shard(shard, {}, None)[0].num_rows for shard in plan.shards]
            found.append([[file.source.url for file in plan.files], rows, list(plan.skipped)])
    except BatchScorerError as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub(NAME, TOKEN) as running:
        yield running


def run(server: Hub, home: Path, model: Path, *jobs: dict[str, Any], **env: str) -> list[Any]:
    """What the program found for each of these settings."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        **env,
    }
    settings = json.dumps([{"output": "nowhere", **job} for job in jobs])
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)],
        input=settings, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr
    found: list[Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_folders_files_and_patterns_are_read_from_the_commit(server: Hub, tmp_path: Path) -> None:
    old = server.commit({"data/x.jsonl": LINES}, branch="old/one")
    new = server.commit(
        {"README.md": b"#", "data/a.parquet": parquet(pairs(3)), "data/x.jsonl": LINES}
    )
    at_old, at_new = f"hf://datasets/{NAME}@{old}", f"hf://datasets/{NAME}@{new}"
    both = [f"{at_new}/data/a.parquet", f"{at_new}/data/x.jsonl"]
    asked = {
        f"hf://datasets/{NAME}": [both, [3, 4], [f"{at_new}/README.md"]],
        f"hf://datasets/{NAME}@main/data": [both, [3, 4], []],
        f"hf://datasets/{NAME}/data/*.parquet": [both[:1], [3], []],
        f"hf://datasets/{NAME}@old%2Fone/data/x.jsonl": [[f"{at_old}/data/x.jsonl"], [4], []],
        at_old: [[f"{at_old}/data/x.jsonl"], [4], []],
    }
    found = run(server, tmp_path, tmp_path, *({"inputs": [url]} for url in asked))
    assert found == list(asked.values())
    fetched = [line for line in server.asked if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == 2  # each file once, though two commits hold one of them


def test_what_cannot_be_read_is_named(server: Hub, tmp_path: Path) -> None:
    server.commit({"data/x.jsonl": LINES})
    wrong = {
        f"hf://datasets/{NAME}@gone": ["InputError", "no such data set or revision"],
        "hf://datasets/org/other": ["InputError", "no such data set or revision"],
        f"hf://datasets/{NAME}/empty": ["InputError", "holds no .parquet"],
        f"hf://datasets/{NAME}/gone.jsonl": ["InputError", "holds no .parquet"],
        "hf://org/model": ["ConfigError", "write hf://datasets/ORG/NAME"],
    }
    found = run(server, tmp_path, tmp_path, *({"inputs": [url]} for url in wrong))
    for (url, (kind, cause)), (name, message) in zip(wrong.items(), found, strict=True):
        assert name == kind and url in message and cause in message
    ((name, message),) = run(
        server, tmp_path, tmp_path, {"inputs": [f"hf://datasets/{NAME}"]}, HF_TOKEN="hf_wrong"
    )
    assert name == "InputError" and "hf_wrong" not in message


def test_a_run_scores_and_verifies_and_records_the_commit(
    server: Hub, tmp_path: Path, tiny_model: Path
) -> None:
    commit = server.commit({"a.parquet": parquet(pairs(3)), "x.jsonl": LINES})
    job = {"inputs": [f"hf://datasets/{NAME}"], "output": str(tmp_path / "out")}
    there = {"inputs": [str(tmp_path)], "output": f"hf://datasets/{NAME}/scored"}
    pq.write_table(pairs(1), tmp_path / "b.parquet")
    done, refused = run(server, tmp_path / "home", tiny_model, job, there)
    assert done == [0, 2]
    assert refused[0] == "ConfigError" and "the hub can be read only" in refused[1]
    records = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in record for record in records)
    state = OutputState(open_store(str(tmp_path / "out"), {}))
    roots = {receipt.input_root for receipt in state.receipts.values()}
    assert roots == {f"hf://datasets/{NAME}@{commit}"}
