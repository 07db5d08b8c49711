"""What is carried: rows on their way to scores, shards, and the receipts of shards.

Legend: R rows of a shard, S sequences (a row has one or more), T tokens, H hidden size,
O outputs of the model (1 for a scalar reward).
"""

from batch_scorer.records.receipts import (
    Commit,
    PairCounts,
    Receipt,
    Reused,
    Spent,
    Spread,
    Status,
    Stored,
)
from batch_scorer.records.rows import (
    SCALAR,
    Conversation,
    Effort,
    Embedding,
    Format,
    Layout,
    Message,
    Outputs,
    ParsedRows,
    PooledTokens,
    RowError,
    ScoredRows,
    Scores,
    SequenceInput,
    TextStyle,
    TokenizedRows,
    gather,
)
from batch_scorer.records.shards import LineRun, Lines, Shard, Source, layout_to_json

__all__ = [
    "SCALAR",
    "Commit",
    "Conversation",
    "Effort",
    "Embedding",
    "Format",
    "Layout",
    "LineRun",
    "Lines",
    "Message",
    "Outputs",
    "PairCounts",
    "ParsedRows",
    "PooledTokens",
    "Receipt",
    "Reused",
    "RowError",
    "ScoredRows",
    "Scores",
    "SequenceInput",
    "Shard",
    "Source",
    "Spent",
    "Spread",
    "Status",
    "Stored",
    "TextStyle",
    "TokenizedRows",
    "gather",
    "layout_to_json",
]
