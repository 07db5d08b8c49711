"""Receipts, commits and a shard, as runs make them."""

from dataclasses import replace

from batch_scorer.errors import ShardReason
from batch_scorer.models.cost import ModelCost
from batch_scorer.records import (
    Commit,
    Effort,
    Format,
    Judged,
    Layout,
    PairCounts,
    Receipt,
    Rewarded,
    Shard,
    Source,
    Spent,
    Spread,
    Status,
    Stored,
)
from batch_scorer.runs.metrics import Run
from batch_scorer.storage import Version

COMMIT = Commit(
    identity="i",
    fingerprint="f",
    epoch=1,
    input="a.parquet",
    input_etag="e",
    first_row=0,
    num_rows=10,
    rows_scored=9,
    rows_marked=1,
    marked={"too_long": 1},
    notes={},
    sequences=19,
    tokens=500,
    rows_digest="r",
    scores_digest="s",
    pairs={"web": PairCounts(9, 6, 1)},
    layout={},
    added_columns=["score", "score_error"],
    spread={"web": Spread(10, 9, 0.5, 1.0, (-1.0, -0.9, 0.0, 0.5, 1.0, 1.9, 2.0))},
)
JUDGED = Judged(
    questions=20,
    verdicts=17,
    lost={"cut_off": 1, "no_verdict": 2},
    prompt_tokens=4_000,
    generated_tokens=900,
    tries=23,
    comparisons=8,
    disagree=2,
    decisive=16,
    first_preferred=10,
    unequal=15,
    longer_preferred=9,
)
REWARDED = Rewarded(responses=20, values=18, rows_valued=9, marked={"reward_raised": 1})


def stored(commit: Commit, etag: str = "v") -> Stored:
    """A commit as the store holds it."""
    return Stored(commit, Version(etag), size_bytes=7, sha256="x")


DONE = Receipt(
    output_key="a.parquet",
    input="a.parquet",
    input_root="/data",
    num_rows=10,
    status=Status.COMMITTED,
    stored=stored(COMMIT),
    examples=[(3, "too_long", "9 tokens")],
)
FAILED = Receipt(
    output_key="b.parquet",
    input="b.parquet",
    input_root="/data",
    num_rows=4,
    status=Status.FAILED,
    reason=ShardReason.UNREADABLE_FILE,
    detail="torn",
)
SHARD = Shard(
    source=Source("/data", "a.parquet", 100, Version("e")),
    layout=Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"}),
    first_row=0,
    num_rows=10,
    row_groups=(0, 1),
    skip_rows=0,
    estimated_tokens=500,
    output_key="a.parquet",
)
ONE = replace(
    DONE,
    stored=stored(replace(COMMIT, tokens=1000)),
    estimated_tokens=800,
    spent=Spent(
        Effort(num_batches=2, computed_tokens=600, shared_tokens=350, attended_pairs=30_000),
        started_at=100.0,
        committed_at=104.0,
        peak_flops=1e6,
        read_s=0.25,
        tokenize_s=0.5,
        score_s=3.0,
        reward_s=0.25,
        write_s=0.75,
    ),
)
OTHER = replace(
    ONE,
    output_key="b.parquet",
    stored=stored(replace(COMMIT, tokens=500)),
    estimated_tokens=200,
    spent=replace(
        ONE.spent,
        effort=Effort(
            num_batches=1, computed_tokens=300, padding_tokens=100, attended_pairs=10_000
        ),
        started_at=103.5,
        committed_at=105.0,
        wait_s=1.0,
        score_s=1.0,
    ),
)
RUN = Run(
    epoch=2, shards=3, rows=30, estimated_tokens=1500, workers=1, devices=2,
    cost=ModelCost(flops_per_token=2000.0, flops_per_pair=5.0),
)  # fmt: skip
