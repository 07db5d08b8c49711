"""The page that compares two outputs of the same rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from batch_scorer.config import expanded
from batch_scorer.errors import IncompleteError, OutputError
from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Commit, Receipt, Status
from batch_scorer.reports.page.comparison import Comparison, compared_sections
from batch_scorer.reports.page.figures import Section
from batch_scorer.reports.page.page import (
    READERS,
    ShownRow,
    figures_json,
    of_shard,
    render,
    shown_rows,
)
from batch_scorer.reports.page.values import ShardValues, read_values
from batch_scorer.storage import Store, in_threads

_Place: TypeAlias = tuple[str, str, int, int, str | None]
"""Which rows a shard holds: the input and its version, the first row, how many, and `where`."""


@dataclass(frozen=True, slots=True)
class ComparedPage:
    """What the page shows of two outputs, A and B. `counts` are numbers by name."""

    outputs: tuple[str, str]
    models: tuple[str, str]
    counts: Mapping[str, int]
    sections: Sequence[Section]
    apart: Sequence[ShownRow]

    def to_html(self) -> str:
        return render("compare.html", page=self)

    def to_json(self) -> dict[str, Any]:
        return {
            "outputs": list(self.outputs),
            "counts": dict(self.counts),
            "figures": figures_json(self.sections),
            "apart": [asdict(row) for row in self.apart],
        }


@dataclass(frozen=True, slots=True)
class _Scored:
    """One of the outputs: its committed shards by the rows that they hold."""

    store: Store
    model: str
    shards: dict[_Place, Receipt]

    @property
    def rows(self) -> int:
        return sum(receipt.num_rows for receipt in self.shards.values())


def read_comparison(a: str, b: str, store_options: Mapping[str, str]) -> ComparedPage:
    """What two outputs say of the rows that both hold: shards of the same rows of the same version
    of a file, as outputs with the same layout settings have them.

    Raises as `read_page`, and OutputError where they have no such shard.
    """
    a, b = expanded(a), expanded(b)
    first, second = _open(a, store_options), _open(b, store_options)
    places = [place for place in first.shards if place in second.shards]
    if not places:
        raise OutputError(
            f"{a} and {b} have no shard of the same rows; outputs can be compared that are scored "
            "from the same files with the same shard_rows, shard_tokens and where"
        )
    found = Comparison.for_commits(
        *([_commit(scored.shards[place]) for place in places] for scored in (first, second))
    )

    def read(place: _Place) -> tuple[ShardValues, ShardValues]:
        values = (
            of_shard(scored.store, read_values, scored.shards[place]) for scored in (first, second)
        )
        one, other = values
        return one, other

    for place, (one, other) in zip(places, in_threads(read, places, READERS), strict=True):
        found.add(first.shards[place].output_key, one, other)
    rows = sum(first.shards[place].num_rows for place in places)
    shown = shown_rows(first.store, {r.output_key: r for r in first.shards.values()}, found.apart)
    return ComparedPage(
        outputs=(a, b),
        models=(first.model, second.model),
        counts={
            "rows in both": rows,
            "rows only in A": first.rows - rows,
            "rows only in B": second.rows - rows,
            "answers with both scores": found.answers["both"],
            "with A's only": found.answers["a"],
            "with B's only": found.answers["b"],
        },
        sections=list(compared_sections(found)),
        apart=[
            replace(shown[pick], margin=None, detail=f"{-pick.order:.4g} deviations apart")
            for pick in found.apart
        ],
    )


def _open(output: str, store_options: Mapping[str, str]) -> _Scored:
    store, claim = open_scored(output, store_options)
    committed = {}
    for receipt in OutputState(store).manifest:
        if receipt.status is Status.COMMITTED and receipt.num_rows:
            commit = _commit(receipt)
            place = (commit.input, commit.input_etag, commit.first_row, commit.num_rows)
            committed[(*place, commit.where)] = receipt
    if not committed:
        raise IncompleteError(
            f"{output}: no run has come to its end here; run the same `score` command again"
        )
    model = str(claim.provenance.get("model", "")).rstrip("/").rpartition("/")[2]
    return _Scored(store, model, committed)


def _commit(receipt: Receipt) -> Commit:
    assert receipt.commit is not None  # it is committed
    return receipt.commit
