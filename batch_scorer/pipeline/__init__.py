"""Many shards: one after the other, or on Ray Data."""
