"""Pairs of the responses to one prompt, chosen in SQL.

`candidates` has one line per response (selection's first pass writes it). `pair_up` makes the
table `pairs` of it. Which pairs there are depends on texts, values and the seed alone, never on
shards or their order: every tie is resolved by digests of texts. DuckDB spills what does not fit
into its bound on memory.
"""

from dataclasses import dataclass
from typing import Any

import duckdb

from batch_scorer.selection.recipe import NoPair, Pairs, Selection


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """`prompts` have a candidate; `without_pair` of them have no pair, by reason."""

    prompts: int
    without_pair: dict[NoPair, int]


_RANKED = """
CREATE OR REPLACE TEMP TABLE ranked AS
SELECT *, row_number() OVER (PARTITION BY grp ORDER BY value DESC, tie, text) AS rank FROM (
    SELECT * FROM candidates WHERE isfinite(value)
    QUALIFY row_number() OVER (
        PARTITION BY grp, text ORDER BY value DESC, tie, part, row, slot) = 1)
"""
"""Values that are null, NaN or infinite are none: DuckDB holds NaN to be above every number."""

_ALLOWED = """
CREATE OR REPLACE TEMP TABLE allowed AS
SELECT a.grp, a.value - b.value AS score_margin,
    a.part AS chosen_part, a.row AS chosen_row, a.slot AS chosen_slot,
    a.value AS score_chosen, a.tokens AS tokens_chosen, a.text AS chosen_text,
    b.part AS rejected_part, b.row AS rejected_row, b.slot AS rejected_slot,
    b.value AS score_rejected, b.tokens AS tokens_rejected, b.text AS rejected_text
FROM ranked a JOIN ranked b ON a.grp = b.grp AND {joined}
WHERE a.value - b.value > $min_margin
{picked}
"""

_JOINED = {
    Pairs.BEST_WORST: "a.rank = 1 AND b.rank > 1",
    Pairs.BEST_RANDOM: "a.rank = 1 AND b.rank > 1",
    Pairs.ADJACENT: "b.rank = a.rank + 1",
    Pairs.ALL: "b.rank > a.rank",
}
_PICKED = {
    Pairs.BEST_WORST: "QUALIFY row_number() OVER (PARTITION BY a.grp ORDER BY b.rank DESC) = 1",
    Pairs.BEST_RANDOM: "QUALIFY row_number() OVER (PARTITION BY a.grp ORDER BY"
    " md5(concat_ws(':', $seed, a.grp, b.text)), b.rank) = 1",
}
"""md5, since DuckDB's `hash` may change with its version."""

_PAIRS = """
CREATE OR REPLACE TABLE pairs AS
SELECT row_number() OVER (ORDER BY {order}) - 1 AS place,
    * EXCLUDE (first, chosen_text, rejected_text),
    chosen_text AS chosen, rejected_text AS rejected
FROM (
    SELECT allowed.*, first FROM allowed JOIN (
        SELECT grp, min((part, row)) AS first FROM ranked GROUP BY grp) USING (grp)
    WHERE {short}
    QUALIFY row_number() OVER (
        PARTITION BY grp ORDER BY score_margin DESC, chosen_text, rejected_text) <= $limit)
ORDER BY place
"""
_IN_ORDER = "first, score_margin DESC, chosen_text, rejected_text"
_SHUFFLED = "md5(concat_ws(':', $seed, grp, chosen_text, rejected_text)), grp"
_SHORT = "coalesce(greatest(tokens_chosen, tokens_rejected) <= $max_tokens"
_SHORT += " AND tokens_chosen IS NOT NULL AND tokens_rejected IS NOT NULL, false)"

_PROMPTS = """
SELECT CASE
    WHEN p.grp IS NOT NULL THEN NULL
    WHEN coalesce(r.responses, 0) < 2 THEN 'one_response'
    WHEN r.highest = r.lowest THEN 'equal'
    WHEN a.grp IS NULL THEN 'margin'
    ELSE 'too_long' END AS reason, count(*)
FROM (SELECT DISTINCT grp FROM candidates) c
LEFT JOIN (SELECT grp, count(*) AS responses, max(value) AS highest, min(value) AS lowest
    FROM ranked GROUP BY grp) r USING (grp)
LEFT JOIN (SELECT DISTINCT grp FROM allowed) a USING (grp)
LEFT JOIN (SELECT DISTINCT grp FROM pairs) p USING (grp)
GROUP BY reason
"""
"""How many prompts have no pair for each reason, and in the line without a reason have one."""


def pair_up(connection: duckdb.DuckDBPyConnection, selection: Selection) -> None:
    """Make the table `pairs` of the table `candidates`, one line per pair in the order of writing.

    Its columns: `place` (from 0), `grp`, `score_margin`, and for each side `part`,
    `row`, `slot`, `score`, `tokens` and the digest of its text. `selection.pairs` is set. A pair
    with a side of more than `max_tokens` tokens is left out after the rule chose it, so that length
    does not change which responses meet.
    """
    rule = selection.pairs
    assert rule is not None
    connection.execute(_RANKED)
    values: dict[str, Any] = {"min_margin": selection.min_margin}
    if rule is Pairs.BEST_RANDOM:
        values["seed"] = selection.seed
    connection.execute(_ALLOWED.format(joined=_JOINED[rule], picked=_PICKED.get(rule, "")), values)
    short, bound = _length_bound(selection)
    values = {"limit": selection.pairs_per_prompt or 1 << 62, **bound}
    if selection.shuffle:
        values["seed"] = selection.seed
    order = _SHUFFLED if selection.shuffle else _IN_ORDER
    connection.execute(_PAIRS.format(order=order, short=short), values)


def count_prompts(connection: duckdb.DuckDBPyConnection) -> PromptCounts:
    """What became of the prompts, once `pair_up` has made the tables."""
    found = dict(connection.execute(_PROMPTS).fetchall())
    prompts = sum(found.values())
    found.pop(None, None)
    return PromptCounts(prompts, {NoPair(reason): count for reason, count in found.items()})


def sample_pairs(connection: duckdb.DuckDBPyConnection, selection: Selection) -> int:
    """Leave `selection.sample` of the pairs, by the seed; how many prompts have none any more."""
    before = _prompts_with_pair(connection)
    order = "md5_number_lower(concat_ws(':', grp, chosen, rejected, $seed)), place"
    connection.execute(
        f"CREATE OR REPLACE TABLE pairs AS SELECT * FROM pairs ORDER BY {order} LIMIT $sample",
        {"seed": selection.seed, "sample": selection.sample},
    )
    return before - _prompts_with_pair(connection)


def _length_bound(selection: Selection) -> tuple[str, dict[str, Any]]:
    """SQL that is true for a pair that is short enough, and its values."""
    if selection.max_tokens is None:
        return "true", {}
    return _SHORT, {"max_tokens": selection.max_tokens}


def _prompts_with_pair(connection: duckdb.DuckDBPyConnection) -> int:
    row = connection.execute("SELECT count(DISTINCT grp) FROM pairs").fetchone()
    assert row is not None
    return int(row[0])
