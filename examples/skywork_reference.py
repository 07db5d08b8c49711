"""Score the Skywork model cards' own example, and print the published scores beside the result.

    python examples/skywork_reference.py                     every Skywork model, from the hub
    python examples/skywork_reference.py DIR_OR_ID...        these; `ID=DIR` takes DIR's weights

The example (a sum about twelve apples, a right and a wrong answer) is the input that the cards
publish scores for. Those were computed in bfloat16, and each is a bfloat16 number, so agreement
within one step of that format is all that can be asked: 0.125 for scores from 16 to 32, half of it
for every halving of the score, and 0.02 at least. Exit code 0 if all models agree.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import load_config, score
from batch_scorer.models.families import ADAPTERS

PROMPT = (
    "Jane has 12 apples. She gives 4 apples to her friend Mark, then buys 1 more apple, and "
    "finally splits all her apples equally among herself and her 2 siblings. How many apples does "
    "each person get?"
)
RIGHT = (
    "1. Jane starts with 12 apples and gives 4 to Mark. 12 - 4 = 8. Jane now has 8 apples.\n"
    "2. Jane buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n"
    "3. Jane splits the 9 apples equally among herself and her 2 siblings (3 people in total). "
    "9 ÷ 3 = 3 apples each. Each person gets 3 apples."
)
WRONG = (
    "1. Jane starts with 12 apples and gives 4 to Mark. 12 - 4 = 8. Jane now has 8 apples.\n"
    "2. Jane buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n"
    "3. Jane splits the 9 apples equally among her 2 siblings (2 people in total). "
    "9 ÷ 2 = 4.5 apples each. Each person gets 4 apples."
)


def published() -> dict[str, dict[str, float]]:
    """Scores by model and answer ("right", "wrong"), as the adapters record them."""
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for adapter in ADAPTERS:
        for reference in adapter.references:
            if reference.model.startswith("Skywork/") and "12 apples" in reference.case:
                answer = "right" if "right" in reference.case else "wrong"
                scores[reference.model][answer] = reference.score
    return dict(scores)


def tolerance(value: float) -> float:
    """One step of bfloat16 at this size, 0.02 at least."""
    step = 0.125
    size = 16.0
    while abs(value) < size and step > 0.02:
        step, size = step / 2, size / 2
    return max(step, 0.02)


def score_example(model: str, backend: str) -> dict[str, float]:
    """Scores of the two answers, through the same path that a job takes."""

    def conversation(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"chosen": conversation(RIGHT), "rejected": conversation(WRONG)}]
        pq.write_table(pa.Table.from_pylist(rows), Path(folder) / "apples.parquet")
        score(
            load_config(
                model=model,
                inputs=f"{folder}/apples.parquet",
                output=f"{folder}/scored",
                backend=backend,
                use_ray=False,
            )
        )
        (row,) = pq.read_table(f"{folder}/scored/apples.parquet").to_pylist()
    return {"right": row["score_chosen"], "wrong": row["score_rejected"]}


def main() -> int:
    """Print one line per model and answer; returns 1 if a score differs from the published one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", nargs="*", help="hub ids, directories, or ID=DIRECTORY")
    parser.add_argument("--backend", default="hf", choices=["hf", "vllm", "auto"])
    arguments = parser.parse_args()
    references = published()
    differ = 0
    print(f"{'model':45s} {'answer':7s} {'published':>10s} {'here':>10s}")
    for named in arguments.models or sorted(references):
        name, _, directory = named.partition("=")
        known = references.get(name, {})
        for answer, value in score_example(directory or name, arguments.backend).items():
            line = f"{name:45s} {answer:7s} {known.get(answer, float('nan')):10.4f} {value:10.4f}"
            if answer in known and abs(value - known[answer]) > tolerance(known[answer]):
                line += "  differs"
                differ += 1
            print(line, flush=True)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
