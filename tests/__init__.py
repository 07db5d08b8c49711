"""Tests, and their helpers: run from the repository's root, where `tests` can be imported."""
