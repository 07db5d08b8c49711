"""Engines: token ids in, raw float32 scores out."""
