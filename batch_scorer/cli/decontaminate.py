"""`decontaminate`: a flag for every field of its recipe."""

from typing import Annotated

import typer

from batch_scorer import quarantine
from batch_scorer.cli.flags import AsJson, StoreOptions, mapping
from batch_scorer.cli.recipes import with_recipe
from batch_scorer.cli.terminal import show
from batch_scorer.decontamination.recipe import Decontamination

Scored = Annotated[
    list[str],
    typer.Argument(
        metavar="SCORED", help="Scored outputs, nightly roots or folders of Parquet files."
    ),
]
Against = Annotated[
    list[str],
    typer.Option(
        "--against",
        metavar="EVAL",
        help="Parquet or JSON files of an evaluation set; of `--match embedding`, an output of "
        "`--task embed`; repeatable. `self`: compare the rows with each other, and keep the first "
        "of alike ones.",
    ),
]
Into = Annotated[str, typer.Option("--output", metavar="OUTPUT", help="Folder or URL to write.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count only. Writes nothing.")]


@with_recipe(
    Decontamination,
    panels={
        "preset": "Recipe: what counts as a match",
        "scope": "Recipe: which texts are compared",
    },
)
def decontaminate(
    recipe: Decontamination,
    scored: Scored,
    against: Against,
    output: Into,
    dry_run: DryRun = False,
    store_option: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Leave out rows that overlap with evaluation sets, or are like earlier rows.

    What was left out, and why, is in OUTPUT/_batch_scorer/removed.jsonl.
    """
    quarantine.prepare()
    from batch_scorer.decontamination.decontaminate import decontaminate as run

    options = mapping("store_options", store_option)
    found = run(scored, against, output, recipe, store_options=options, dry_run=dry_run)
    show(found, as_json=as_json)
