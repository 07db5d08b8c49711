"""The command `select`. Its flags are made from the recipe: one for every field of `Selection`."""

from typing import Annotated

import typer

from batch_scorer import quarantine
from batch_scorer.cli.flags import AsJson, StoreOptions, mapping
from batch_scorer.cli.recipes import entries, with_recipe
from batch_scorer.cli.terminal import show
from batch_scorer.errors import ConfigError
from batch_scorer.selection.recipe import Selection


@with_recipe(
    Selection,
    panels={
        "where": "Which rows are kept, as flags or in the recipe, in this order",
        "pairs": "Pairs of responses",
        "sample": "How they are written",
    },
    mappings={
        "offsets": ("--offset", "VALUE=NUMBER"),
        "top_percent": ("--top-percent", "CATEGORY=PERCENT"),
        "splits": ("--split", "NAME=SHARE"),
    },
    lists={"quantiles": "LOW,HIGH", "group_by": "COLUMN,…"},
)
def select(
    selection: Selection,
    places: Annotated[
        list[str],
        typer.Argument(metavar="SCORED", help="Scored outputs, or folders of Parquet files."),
    ],
    output: Annotated[
        str | None, typer.Option(metavar="OUTPUT", help="Where the rows that are kept go.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX=OUTPUT",
            help="Another output of the same inputs, whose score columns come with the rows under "
            "this prefix, for --where to compare; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be kept. Writes nothing.")
    ] = False,
    store_option: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Keep the rows of scored outputs that a recipe asks for, in an output of their own.

    Run it again to finish what was interrupted. Rows in = rows kept + rows dropped, by reason.
    """
    quarantine.prepare()
    from batch_scorer.selection.select import preview
    from batch_scorer.selection.select import select as run

    options = mapping("store_options", store_option)
    others = entries("--beside", "PREFIX=OUTPUT", beside)
    if dry_run:
        show(preview(places, selection, options, others), as_json=as_json)
        return
    if output is None:
        raise ConfigError("--output is needed, or --dry-run")
    show(run(places, output, selection, options, others), as_json=as_json)
