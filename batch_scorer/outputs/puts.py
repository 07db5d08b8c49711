"""Records of ours in an output, stored so that no newer run's record is lost."""

from batch_scorer.errors import LeaseLostError
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, Version


def compare_and_swap(store: Store, key: str, data: bytes, found: Version | None) -> None:
    """Store a record in place of exactly what the run found there.

    Raises LeaseLostError where something else is there by now.
    """
    try:
        store.put(key, data, instead_of=found)
    except ObjectChanged:
        raise LeaseLostError(
            f"{store.root}: another run has finished here meanwhile; this one stops"
        ) from None


def put(store: Store, key: str, data: bytes) -> None:
    """Store a record of ours, whatever was there; only the holder of the lease writes these."""
    try:
        store.put(key, data, instead_of=None)
    except ObjectChanged:
        try:
            found = store.head(key).version
        except ObjectMissing:
            found = None
        compare_and_swap(store, key, data, found)
