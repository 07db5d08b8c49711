"""Which shards there are, and their rows."""
