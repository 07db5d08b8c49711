"""Draw the demo's sample from the held-out prompts: batch_scorer/data.

    python examples/draw_demo_sample.py --pairs PAIRS_DIR... --rollouts ROLLOUT_FILES... --out DIR

Only prompts that `prompt_split` calls "test" are drawn, so the embedded head has seen none of
them. The draw orders rows by a digest of their content and takes the first ones that are short
enough, so it gives the same rows every time.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.models.embedded import prompt_split

PAIRS = {  # file and source: number of pairs
    "hh-helpful": {
        "hh-helpful-base": 80,
        "hh-helpful-online": 40,
        "hh-helpful-rejection-sampled": 80,
    },
    "mixed": {"gsm8k-solutions": 40, "mtbench-human": 9, "oasst1-en-val": 45},
}
ROLLOUT_PROMPTS = {
    "gsm8k-solutions-n4-labelled.parquet": 10,
    "oasst-1k-n11-00000.parquet": 8,
    "oasst-1k-n11-00001.parquet": 8,
    "oasst-many-models-n64-00000.parquet": 8,
    "oasst-many-models-n64-00001.parquet": 8,
}
ROLLOUT_COLUMNS = ("prompt_id", "prompt", "responses", "models", "source")
MAX_PAIR_CHARS = 2400  # prompt and both answers
MAX_PROMPT_CHARS = 600
MAX_RESPONSE_CHARS = 1000
MIN_RESPONSES, MAX_RESPONSES = 4, 8
NUM_ROW_GROUPS = 2
# The sample is shown in docs and terminals: leave out what some readers should not meet there.
UNWANTED = re.compile(
    r"\b(sex\w*|porn\w*|nude|naked|rap(e|ed|ist)|kill\w*|murder\w*|suicid\w*|bomb\w*|weapons?|guns?"
    r"|drugs?|cocaine|heroin|meth|marijuana|weed|racis\w*|nazi\w*|hitler|terroris\w*|fuck\w*|shit\w*"
    r"|bitch\w*|ass|asshole|damn|dick|penis|vagina\w*|stupid|idiot|abus\w*|hate|slave\w*|abortion"
    r"|trump|biden|obama|risque|gyps\w*|ATF|phone number|home address|@\w+\.\w+)\b",
    re.IGNORECASE,
)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def pair_is_usable(row: dict[str, Any]) -> bool:
    answers = [row["chosen"][-1]["content"], row["rejected"][-1]["content"]]
    text = "\n".join([*(message["content"] for message in row["chosen"][:-1]), *answers])
    return (
        prompt_split(row["chosen"]) == "test"
        and answers[0] != answers[1]
        and len(text) <= MAX_PAIR_CHARS
        and "<|" not in text
        and not UNWANTED.search(text)
    )


def draw_pairs(paths: Sequence[Path], out: Path) -> None:
    files = [file for path in paths for file in sorted(path.glob("*.parquet"))]
    table = pa.concat_tables([pq.read_table(file) for file in files])
    rows = table.to_pylist()
    order = sorted(
        (i for i, row in enumerate(rows) if pair_is_usable(row)), key=lambda i: digest(rows[i])
    )
    for name, wanted in PAIRS.items():
        left, drawn = Counter(wanted), []
        prompts: set[str] = set()
        for i in order:
            source, prompt = rows[i]["source"], digest(rows[i]["chosen"][:-1])
            if left[source] > 0 and prompt not in prompts:  # one pair a prompt: more variety
                left[source] -= 1
                prompts.add(prompt)
                drawn.append(i)
        write(table.take(drawn), out / "pairs" / f"{name}.parquet")


def draw_rollouts(files: Sequence[Path], out: Path) -> None:
    drawn = []
    for file in files:
        if file.name not in ROLLOUT_PROMPTS:
            continue
        table = pq.read_table(file, columns=list(ROLLOUT_COLUMNS))
        rows = [shorten(row) for row in table.to_pylist()]
        usable = [row for row in rows if row is not None]
        usable.sort(key=lambda row: digest(row["prompt_id"]))
        drawn += usable[: ROLLOUT_PROMPTS[file.name]]
    write(pa.Table.from_pylist(drawn, schema=table.schema), out / "rollouts" / "mixed.parquet")


def shorten(row: dict[str, Any]) -> dict[str, Any] | None:
    """The prompt with up to 8 of its shorter responses; None if fewer than 4 are left."""
    prompt = "\n".join(message["content"] for message in row["prompt"])
    if (
        prompt_split(row["prompt"]) != "test"
        or len(prompt) > MAX_PROMPT_CHARS
        or UNWANTED.search(prompt)
    ):
        return None
    pairs = sorted(zip(row["models"], row["responses"], strict=True), key=digest)
    pairs = [
        (model, response)
        for model, response in pairs
        if len(response) <= MAX_RESPONSE_CHARS
        and "<|" not in response
        and not UNWANTED.search(response)
    ][:MAX_RESPONSES]
    if len(pairs) < MIN_RESPONSES:
        return None
    return {**row, "models": [m for m, _ in pairs], "responses": [r for _, r in pairs]}


def write(table: pa.Table, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = -(-len(table) // NUM_ROW_GROUPS)
    pq.write_table(table, file, compression="zstd", compression_level=19, row_group_size=rows)
    print(f"{file}: {len(table)} rows, {file.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, nargs="+", required=True)
    parser.add_argument("--rollouts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw_pairs(arguments.pairs, arguments.out)
    draw_rollouts(arguments.rollouts, arguments.out)


if __name__ == "__main__":
    main()
