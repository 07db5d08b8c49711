"""From scores to committed shards: columns, one PUT, receipts, manifest."""
