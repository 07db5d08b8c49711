"""A small scored output with all that a page can show: pairs, rollouts, rows without a score."""

from pathlib import Path

import pyarrow as pa

from batch_scorer import Config, score
from tests.helpers.inputs import Row, jsonl, pair_rows, parquet, table_of
from tests.helpers.places import Place

CANARY = "<script>document.title='canary'</script><img src=x onerror=\"document.title='canary'\">"
"""Text that would change the page's title if a browser took it for more than text."""

BEFORE = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Green."},
]


def rollout_rows(count: int) -> list[Row]:
    """Prompts with one to six answers of different lengths, in two sources."""
    return [
        {
            "prompt": f"{number}. Name some trees.",
            "responses": [
                " ".join(["oak", "elm", "yew", "ash"][: 1 + (number + k) % 4] * (1 + k))
                for k in range(1 + number % 6)
            ],
            "source": f"<b>source {number % 2}</b>",
        }
        for number in range(count)
    ]


def bad_rows() -> list[Row]:
    """Pairs of which nothing can be scored, with markup in all of their texts."""
    answer = {"role": "assistant", "content": CANARY}
    question = {"role": "user", "content": CANARY}
    long = {"role": "assistant", "content": f"{CANARY} {'long ' * 3000}"}
    return [
        {"chosen": [question, answer], "rejected": [question, last], "source": CANARY}
        for last in (question, long, {"role": "assistant", "content": " "})
    ]


def scored_output(place: Place, model: Path, name: str = "scored") -> Place:
    """65 pairs, of which three are marked and two have equal sides, and 20 prompts, in shards of 16
    rows. Outputs of one place are of the same files."""
    inputs = place / "in"
    good = pair_rows(60)
    for row in good[::3]:
        for side in ("chosen", "rejected"):
            row[side] = [*BEFORE, *row[side]]
    equal = pair_rows(2, 60)
    for row in equal:
        row["rejected"] = row["chosen"]
    if not inputs.shard_keys():
        inputs.write(
            {
                "pairs.parquet": parquet(table_of(good)),
                "equal.jsonl": jsonl(equal),
                "bad.jsonl": jsonl([*bad_rows(), *pair_rows(1, 62)]),
                "rollouts.parquet": parquet(pa.Table.from_pylist(rollout_rows(20))),
            }
        )
    output = place / name
    score(
        Config(
            model=str(model),
            inputs=(inputs.url,),
            output=output.url,
            backend="hf",
            device="cpu",
            dtype="float32",
            max_tokens=2048,
            shard_rows=16,
            use_ray=False,
        )
    )
    return output
