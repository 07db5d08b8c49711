"""The command `normalize`. Its flags are made from the recipe: one for every field."""

from typing import Annotated

import typer

from batch_scorer import quarantine
from batch_scorer.cli.flags import AsJson, StoreOptions, mapping
from batch_scorer.cli.recipes import with_recipe
from batch_scorer.cli.terminal import show
from batch_scorer.normalization.recipe import Normalization


@with_recipe(
    Normalization,
    panels={"by": "Recipe: what a group is, and which scores"},
    lists={"by": "COLUMN,…", "prefix": "PREFIX,…"},
)
def normalize(
    normalization: Normalization,
    places: Annotated[
        list[str],
        typer.Argument(metavar="SCORED", help="Scored outputs, or folders of Parquet files."),
    ],
    output: Annotated[str, typer.Option(metavar="OUTPUT", help="Where the rows go.")],
    store_option: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Add the scores less the mean of their group, over its standard deviation, in an output of
    their own.

    Groups are of one prompt, one source, or any column's value, across all shards. Run it again to
    finish what was interrupted.
    """
    quarantine.prepare()
    from batch_scorer.normalization.normalize import normalize as run

    options = mapping("store_options", store_option)
    show(run(places, output, normalization, options), as_json=as_json)
