"""What a reward function is given of each kind of row, whatever file it is in."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pytest

from batch_scorer import load_config, score
from batch_scorer.outputs.verify import verify
from tests.helpers.inputs import Row, jsonl, parquet
from tests.helpers.places import Place

SOURCE = '''
def length(responses):
    return [float(len(text)) for text in responses]


def before(prompts):
    """Characters of the messages before the response."""
    return [sum(len(message["content"]) for message in messages) for messages in prompts]


def tagged(responses, tag):
    return [None if value is None else float(len(str(value))) for value in tag]
'''


def talk(question: str, answer: Any) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def arrow(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_csv(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    csv.write_csv(table, sink)
    return sink.getvalue()


PARTS = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
FILES = {
    "talks.json": json.dumps([{"messages": talk("why", "so"), "tag": "xy"}] * 2).encode(),
    "parts.jsonl": jsonl([{"messages": talk("why", PARTS)}, {"messages": talk("why", "abcd")}]),
    "rollouts.csv": as_csv(
        pa.table({"prompt": ["why", "how"], "response": ["so", "by hand"], "tag": [1, 22]})
    ),
    "talks.arrow": arrow(pa.Table.from_pylist([{"messages": talk("why", "because")}])),
    "groups.parquet": parquet(
        pa.Table.from_pylist(
            [{"prompt": "why", "chosen": ["so", "thus"], "rejected": ["no"], "tag": {"a": 1}}]
        )
    ),
    "ids.parquet": parquet(pa.table({"input_ids": [[5, 6], [7]], "tag": ["x", None]})),
    "texts.jsonl": jsonl([{"text": "all of it"}]),
    "steps.jsonl": jsonl([{"prompt": "why", "steps": ["a", "bc"]}]),
    "twice.parquet": parquet(
        pa.Table.from_arrays(
            [pa.array(["why"]), pa.array(["so"]), pa.array(["x"]), pa.array(["y"])],
            names=["prompt", "response", "tag", "tag"],
        )
    ),
}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, list[Row]]:
    place = Place(str(tmp_path_factory.mktemp("kinds")))
    (place / "in").write(FILES)
    file = Path(f"{place.url}/own.py")
    file.write_text(SOURCE)
    rewards = {name: f"{file}:{name}" for name in ("length", "before", "tagged")}
    config = load_config(
        model=str(tiny_model), inputs=(place / "in").url, output=(place / "out").url,
        backend="fake", use_ray=False, rewards=rewards, drop_columns=["tag"],
    )  # fmt: skip
    summary = score(config)
    assert summary.is_complete
    assert verify(config.output).problems == []
    shards = (place / "out").shards()
    return {key.removesuffix(".parquet"): shard.table.to_pylist() for key, shard in shards.items()}


@pytest.mark.parametrize(
    ("file", "suffix", "length", "before", "tagged"),
    [
        ("talks.json", "", [2, 2], [3, 3], [2, 2]),
        ("parts.jsonl", "", [4, 4], [3, 3], [None, None]),
        ("rollouts.csv", "", [2, 7], [3, 3], [1, 2]),
        ("talks.arrow", "", [7], [3], [None]),
        ("groups", "s_chosen", [[2, 4]], [[3, 3]], [[8, 8]]),
        ("groups", "s_rejected", [[2]], [[3]], [[8]]),
        ("ids", "", [None, None], [None, None], [None, None]),
        ("texts.jsonl", "", [9], [0], [None]),
        ("steps.jsonl", "", [len("a\n\nbc")], [3], [None]),
        ("twice", "", [2], [3], [None]),
    ],
)
def test_a_function_is_given_the_response_and_what_stands_before_it(
    scored: dict[str, list[Row]], file: str, suffix: str, length: Any, before: Any, tagged: Any
) -> None:
    rows = scored[file]
    assert [row[f"length_score{suffix}"] for row in rows] == length
    assert [row[f"before_score{suffix}"] for row in rows] == before
    assert [row[f"tagged_score{suffix}"] for row in rows] == tagged
    assert not any("tag" in row for row in rows), "a column that is dropped is given all the same"


def test_token_ids_have_no_text(scored: dict[str, list[Row]]) -> None:
    assert [row["length_score_error"] for row in scored["ids"]] == ["bad_structure"] * 2
    assert [row["score_error"] for row in scored["ids"]] == [None, None]
