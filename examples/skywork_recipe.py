"""How Skywork-Reward-Preference-80K was curated, as three kinds of commands on scored outputs.

    python examples/skywork_recipe.py PAIRS --model MODEL --against REWARDBENCH --output FOLDER

The data card (Skywork/Skywork-Reward-Preference-80K-v0.2 on the hub) tells it in words: of
WildGuard's pairs those are kept whose chosen answer a reward model scores higher; of each category
of Magpie's the top by the average of ArmoRM's scores, with 0.1 and 0.05 taken off for the subsets
Air and Pro; and, for version 0.2, nothing whose prompt overlaps with RewardBench's. How much of a
category is kept is no figure of the card: the shares below are this example's.

PAIRS has the card's columns (`chosen`, `rejected`, `source`), and for Magpie's rows
`task_category` and `armorm`, the average that its data comes with.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from batch_scorer import decontaminate, load_config, score, select
from batch_scorer.derived.output import Totals
from batch_scorer.selection.recipe import Selection

WILDGUARD = Selection(where='field("source") == "wildguard"', above_margin=0.0)
MAGPIE = Selection(
    where='starts_with(field("source"), "magpie")',
    by="armorm",
    offsets={"magpie-air": -0.1, "magpie-pro": -0.05},
    category="task_category",
    top_percent={"math": 30.0, "code": 30.0, "*": 10.0},
)


def main(arguments: Sequence[str] | None = None, **settings: Any) -> dict[str, Totals]:
    """The totals of each step by name. `settings` are further ones of the scoring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs")
    parser.add_argument("--model", required=True)
    parser.add_argument("--against", required=True)
    parser.add_argument("--output", required=True)
    asked = parser.parse_args(arguments)
    scored, folder = f"{asked.output}/scored", asked.output
    score(load_config(model=asked.model, inputs=(asked.pairs,), output=scored, **settings))
    steps = {
        "wildguard": select([scored], f"{folder}/wildguard", WILDGUARD).totals,
        "magpie": select([scored], f"{folder}/magpie", MAGPIE).totals,
    }
    chosen = [f"{folder}/{name}" for name in steps]
    clean = decontaminate(chosen, [asked.against], f"{folder}/clean").totals
    assert clean is not None  # it was no dry run
    return {**steps, "clean": clean}


if __name__ == "__main__":
    for name, totals in main().items():
        print(f"{name}: {totals.rows:,} rows, {totals.rows_kept:,} kept, dropped {totals.dropped}")
