"""Small outputs of `--task embed`."""

from pathlib import Path
from typing import Any

import numpy as np

from batch_scorer import Config, score
from tests.helpers.inputs import jsonl
from tests.helpers.places import Place

TEXTS = ["What is the capital of France?", "Name a tree.", "Say it in French.", "2 + 2", "Why?"]


def conversations(texts: list[str]) -> bytes:
    answer = {"role": "assistant", "content": "It is so."}
    return jsonl([{"messages": [{"role": "user", "content": t}, answer]} for t in texts])


def embed(place: Place, name: str, data: bytes, model: Path, **settings: Any) -> str:
    (place / f"{name}-in").write({"a.jsonl": data})
    output = place / name
    score(
        Config(
            model=str(model),
            inputs=((place / f"{name}-in").url,),
            output=output.url,
            task="embed",
            backend="hf",
            device="cpu",
            use_ray=False,
            **settings,
        )
    )
    return output.url


def vectors(output: str) -> list[Any]:
    (shard,) = Place(output).shards().values()
    return [None if v is None else np.array(v) for v in shard.table["embedding"].to_pylist()]
