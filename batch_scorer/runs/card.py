"""A data set's card beside a scored output: what it holds and how it was made, from its records.

Its head tells the `datasets` library which files have the rows: the output loads by its name.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from batch_scorer.errors import IncompleteError, OutputError
from batch_scorer.outputs.claim import Claim, open_scored
from batch_scorer.outputs.manifest import CARD_KEY, total
from batch_scorer.outputs.puts import put
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import DISAGREEMENT, Commit, Receipt
from batch_scorer.storage import ObjectMissing

_MARK = (
    "<!-- Written by batch-scorer from the records of this output; written anew with each card. -->"
)
_HEAD = """---
configs:
- config_name: default
  data_files: "**/*.parquet"
---
"""
_MEANS = {
    "score_error": "why the row has no score; null where it has one",
    "score_notes": "what is worth knowing of the row; null where there is nothing",
    "scores": "raw scores of each response, null for one without",
    "score": "the raw score, float32: no sigmoid, no normalisation",
    "margin": "score_chosen - score_rejected",
    "rewards": "one value for each of the model's outputs",
    "step_scores": "one score for each step",
    "token_scores": "one score for each token",
    "embedding": "a vector",
    "num_tokens": "tokens of the scored sequence",
    "num_truncated_tokens": "tokens that were cut off it",
    "num_special_tokens": "how often the text spells a special token",
    DISAGREEMENT: "share of the pairs of answers that two models order differently",
}
"""By the beginning of a column's name, the longest first that fits."""
_OF_ALL = {
    "mean": "mean over the models",
    "min": "least over the models",
    "std": "standard deviation over the models",
    "z": "mean over the models, each normalised over the row",
}


def write_card(output: str, store_options: Mapping[str, str]) -> str:
    """Write README.md into a complete output; returns its URL.

    Raises IncompleteError, and OutputError where a README.md of others is there.
    """
    store, claim = open_scored(output, store_options)
    state = OutputState(store)
    if state.success is None:
        raise IncompleteError(f"{output} is not complete: a card would count too little")
    try:
        if _MARK not in store.read(CARD_KEY).decode(errors="replace"):
            raise OutputError(f"{store.url(CARD_KEY)} is there and is no card of this program")
    except ObjectMissing:
        pass
    put(store, CARD_KEY, card_of(claim, state.manifest).encode())
    return store.url(CARD_KEY)


def card_of(claim: Claim, receipts: Iterable[Receipt]) -> str:
    """The card of an output that is begun so and holds these."""
    receipts = list(receipts)
    commits = [receipt.commit for receipt in receipts if receipt.commit]
    made = claim.provenance
    names = [_name(own) for own in _by_model(claim).values()]
    totals = total(receipts)
    lines = [
        _HEAD + f"# Scores of {', '.join(names)}",
        _MARK,
        f"Scored by batch-scorer {made.get('batch_scorer')}: {totals['rows']:,} rows, "
        f"{totals['rows_scored']:,} scored, {totals['rows_marked']:,} marked, "
        f"{totals['rows_not_asked']:,} not asked for.",
        *(_model_table(name, own, claim) for name, own in _by_model(claim).items()),
        "## Columns that scoring added",
        _table(("column", "what it is"), _columns(commits)),
        "## Scores by source",
        _table(
            ("source", "rows", "scores", "mean", "pairs", "chosen higher"),
            _by_source(commits, totals["pairs"]),
        ),
    ]
    return "\n\n".join(lines) + "\n"


def _by_model(claim: Claim) -> dict[str, Mapping[str, Any]]:
    """What each model was made with, by its name; the name of a single one is ""."""
    found: dict[str, Mapping[str, Any]] = claim.provenance.get("models", {"": claim.provenance})
    return found


def _name(made: Mapping[str, Any]) -> str:
    return str(made.get("model", "")).rstrip("/").rpartition("/")[2]


def _model_table(name: str, made: Mapping[str, Any], claim: Claim) -> str:
    facts = claim.parts_by_model.get(name, {})
    return _table(
        (f"model {name}".strip(), "value"),
        [
            *([("name", _name(made))] if name else []),
            ("revision", made.get("revision")),
            ("digest of its files", facts.get("model")),
            ("read as", facts.get("adapter")),
            ("engine", facts.get("backend")),
            ("dtype", facts.get("dtype")),
            ("most tokens", facts.get("max_tokens")),
        ],
    )


def _columns(commits: Iterable[Commit]) -> Iterator[tuple[str, str]]:
    columns: dict[str, str] = {}
    for commit in commits:
        for name in commit.added_columns:
            columns.setdefault(name, _meaning(name, commit))
    for name, meaning in columns.items():
        yield f"`{name}`", meaning


def _meaning(name: str, commit: Commit) -> str:
    for reward in commit.rewards:
        if name.startswith(f"{commit.reward_prefix(reward)}score"):
            return f"of the reward function {reward}"
    prefixes = [commit.column_prefix, *commit.score_prefixes]
    prefix = max((each for each in prefixes if name.startswith(each)), key=len)
    plain = name.removeprefix(prefix)
    fitting = [known for known in _MEANS if plain.startswith(known)]
    meaning = _MEANS[max(fitting, key=len)] if fitting else ""
    family = prefix.removeprefix(commit.column_prefix).removesuffix("_")
    return f"{_OF_ALL.get(family, family)}: {meaning}" if family else meaning


def _by_source(
    commits: Iterable[Commit], pairs: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[object, ...]]:
    rows: dict[str, int] = defaultdict(int)
    scores: dict[str, int] = defaultdict(int)
    sums: dict[str, float] = defaultdict(float)
    for commit in commits:
        for source, spread in commit.spread.items():
            rows[source] += spread.rows
            scores[source] += spread.scores
            sums[source] += (spread.mean or 0.0) * spread.scores
    for source in sorted(rows):
        mean = f"{sums[source] / scores[source]:.4g}" if scores[source] else ""
        counts = pairs.get(source, {})
        higher = counts.get("chosen_higher", "")
        yield source, rows[source], scores[source], mean, counts.get("pairs", ""), higher


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    """Text of the data, which may hold anything, in one cell of a table."""
    text = "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
