"""From a scored output to its page: the shards are read one at a time, and added up."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import pyarrow as pa

from batch_scorer.config import PartialConfig, expanded
from batch_scorer.errors import (
    IncompleteError,
    IntegrityError,
    ShardError,
)
from batch_scorer.inputs.files import read_apart
from batch_scorer.nightly.status import latest_output, nightly_root
from batch_scorer.outputs.claim import Claim, open_scored
from batch_scorer.outputs.manifest import total
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Judged, PairCounts, Receipt, Source, Status
from batch_scorer.reports.figures import figure_rows, verdict_rows
from batch_scorer.reports.page.figures import Cell, Section, sections_of
from batch_scorer.reports.page.nights import night_sections, read_nights
from batch_scorer.reports.page.svg import svg_of
from batch_scorer.reports.page.tally import EXAMPLES, Pick, Tally
from batch_scorer.reports.page.values import read_texts, read_values
from batch_scorer.reports.results import FailedShard, failed_shard
from batch_scorer.runs.metrics import newest_run
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, in_threads

T = TypeVar("T")

READERS = 4


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as an example. `row` counts from 0 in the input `file`; None where that is not known,
    as of rows that `where` has picked. `texts` are by field, cut; `detail` is "" where no record
    has it, `margin` None where the row is not shown for it."""

    file: str
    row: int | None
    texts: Mapping[str, str]
    detail: str = ""
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class ScoredPage:
    """All that the page of a scored output shows; of a nightly root that of its newest generation,
    whose path below it is `generation` ("" elsewhere).

    `totals` as in `_SUCCESS`; `examples` are marked rows by reason, `lowest` the pairs with the
    lowest margins, `apart` the rows whose answers members order most differently. `cost` and
    `judged` are names and values, in words. `probe` are conversations that stand for the chat
    template, rendered. `facts` are the parts of the fingerprint, the layout and what the output was
    begun with, by heading.
    """

    output: str
    generation: str
    model: str
    totals: Mapping[str, Any]
    sections: Sequence[Section]
    examples: Mapping[str, Sequence[ShownRow]]
    lowest: Sequence[ShownRow]
    apart: Sequence[ShownRow]
    failed: Sequence[FailedShard]
    judged: Sequence[tuple[str, str]]
    cost: Sequence[tuple[str, str]]
    probe: Sequence[str]
    facts: Mapping[str, Sequence[tuple[str, str]]]

    def to_html(self) -> str:
        """The page, which asks for nothing outside of itself and runs no script."""
        return render("page.html", page=self, most_examples=EXAMPLES)

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "generation": self.generation,
            "totals": dict(self.totals),
            "figures": figures_json(self.sections),
            "examples": {
                reason: [asdict(row) for row in rows] for reason, rows in self.examples.items()
            },
            "lowest": [asdict(row) for row in self.lowest],
            "apart": [asdict(row) for row in self.apart],
        }


def render(template: str, **values: Any) -> str:
    """A page of this folder's templates, all text from outside escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "svg": svg_of}
    text = environment.get_template(template).render(**values)
    # Half a surrogate pair, which the text of a row may hold, is no UTF-8.
    return text.encode(errors="replace").decode()


def figures_json(sections: Sequence[Section]) -> dict[str, Any]:
    return {
        figure.key: {"columns": list(figure.columns), "rows": [list(row) for row in figure.rows]}
        for section in sections
        for figure in section.figures
    }


def read_page(output: str, store_options: Mapping[str, str]) -> ScoredPage:
    """What the page shows of an output whose last run came to its end, with or without failures; of
    a nightly root, of the newest generation that is complete, and of the nights.

    Raises OutputError where there is no output, IncompleteError before any run has ended or any
    generation is complete, and IntegrityError where a shard is not the one that was committed.
    """
    output = expanded(output)
    if (root := nightly_root(output, store_options)) is None:
        return _read_output(output, store_options)
    latest = latest_output(root)
    page = _read_output(latest, store_options)
    nights = night_sections(read_nights(root))
    return replace(
        page,
        output=output,
        generation=latest.removeprefix(root.url("")),
        sections=[*page.sections, *nights],
    )


def _read_output(output: str, store_options: Mapping[str, str]) -> ScoredPage:
    store, claim = open_scored(output, store_options)
    state = OutputState(store)
    receipts = [r for r in state.manifest if r.status is not Status.INPUT_GONE]
    if not receipts:
        raise IncompleteError(
            f"{output}: no run has come to its end here; run the same `score` command again"
        )
    shards = {r.output_key: r for r in receipts if r.commit is not None and r.num_rows}
    made = claim.provenance
    commits = [r.commit for r in shards.values() if r.commit is not None]
    tally = Tally.for_commits(commits, made.get("judge"))
    read = partial(of_shard, store, read_values)
    values = in_threads(read, shards.values(), READERS)
    for receipt, found in zip(shards.values(), values, strict=True):
        tally.add(receipt.output_key, found)
    totals = total(receipts)
    committed = sum((PairCounts(**each) for each in totals["pairs"].values()), PairCounts())
    for name, counted, there in (
        ("the marked rows", tally.marked, totals["marked"]),
        ("the pairs", sum(tally.pairs.values(), PairCounts()), committed),
    ):
        if counted != there:
            raise IntegrityError(
                f"{output}: {name} are {counted} in the data, and {there} are committed; for "
                "details run `batch-scorer verify`"
            )
    picks = [pick for found in tally.examples.values() for pick in sorted(found)[:EXAMPLES]]
    apart = [] if tally.members is None else tally.members.apart
    shown = shown_rows(store, shards, [*picks, *tally.lowest, *(pick for pick, _ in apart)])
    judged = totals.get("judged")
    newest = newest_run(store)
    return ScoredPage(
        output=output,
        generation="",
        model=str(made.get("model", "")).rstrip("/").rpartition("/")[2],
        totals=totals,
        sections=list(sections_of(tally)),
        examples={
            reason: [shown[pick] for pick in sorted(found)[:EXAMPLES]]
            for reason, found in sorted(tally.examples.items())
        },
        lowest=[shown[pick] for pick in tally.lowest],
        apart=[
            replace(
                shown[pick],
                margin=None,
                detail=f"rank disagreement {-pick.order:.4g}; {scores}",
            )
            for pick, scores in apart
        ],
        failed=[failed_shard(r) for r in receipts if r.status is Status.FAILED],
        judged=verdict_rows(None if judged is None else Judged(**judged)),
        cost=[] if newest is None or newest[1] is None else _cost(newest[1]),
        probe=[str(text) for text in made.get("rendered_probe") or ()],
        facts=_facts(claim),
    )


def of_shard(store: Store, read: Callable[..., T], receipt: Receipt, *arguments: object) -> T:
    """What `read` gives of a committed shard; raises IntegrityError if it is not as committed."""
    stored = receipt.stored
    assert stored is not None  # it is committed
    source = Source(store.root, receipt.output_key, stored.size_bytes, stored.version)
    try:
        return read_apart(
            PartialConfig(), stored.size_bytes, read, store, source, stored.commit,
            *arguments,
        )  # fmt: skip
    except (ObjectMissing, ObjectChanged, ShardError, pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{source.url} is not the shard that was committed ({error}); for details run "
            "`batch-scorer verify`"
        ) from error


def shown_rows(
    store: Store, shards: Mapping[str, Receipt], picks: Sequence[Pick]
) -> dict[Pick, ShownRow]:
    """The picked rows with their texts: each of their shards is read once more."""
    shown = {}
    for key in dict.fromkeys(pick.key for pick in picks):
        receipt, ours = shards[key], [pick for pick in picks if pick.key == key]
        commit = receipt.commit
        assert commit is not None  # `shards` are the committed ones
        texts = of_shard(store, read_texts, receipt, [pick.place for pick in ours])
        details = {row: detail for row, _, detail in receipt.examples}
        for pick, found in zip(ours, texts, strict=True):
            row = None if commit.where is not None else commit.first_row + pick.place
            shown[pick] = ShownRow(
                file=receipt.input,
                row=row,
                texts=found,
                detail="" if row is None else details.get(row, ""),
                margin=pick.order if pick.order < 0 else None,
            )
    return shown


def _cost(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of the newest run in words, then as docs/metrics.md names them."""
    named = [(name, cell(value)) for name, value in metrics.items() if value is not None]
    return [*figure_rows(metrics), *named]


def _facts(claim: Claim) -> dict[str, list[tuple[str, str]]]:
    parts = {
        "What the scores depend on (the fingerprint)": claim.fingerprint,
        "How shards and columns are cut": claim.layout,
        "Begun with": {k: v for k, v in claim.provenance.items() if k != "rendered_probe"},
    }
    return {
        heading: [(name, text) for name, value in sorted(part.items()) if (text := _words(value))]
        for heading, part in parts.items()
    }


def _words(value: Any) -> str:
    """A setting's value; "" for what is not set."""
    if value in (None, "", [], {}):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cell(value: Cell) -> str:
    """A value in a table: whole numbers in full, others in six digits."""
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
