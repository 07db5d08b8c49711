"""Score preference pairs and rollouts with a reward model: shards in, scored shards out."""

__version__ = "0.1.0"
