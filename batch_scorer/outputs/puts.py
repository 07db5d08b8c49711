"""Records of ours in an output, stored so that no newer run's record is lost."""

from contextlib import suppress

from batch_scorer.errors import LeaseLostError
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, Version


def compare_and_swap(store: Store, key: str, data: bytes, found: Version | None) -> None:
    """Store a record in place of exactly what the run found there."""
    try:
        if found is None:
            store.create(key, data)
        else:
            store.replace(key, data, found)
    except (ObjectChanged, ObjectMissing):
        with suppress(ObjectMissing):
            if store.read(key) == data:  # perhaps this very PUT, whose answer was lost
                return
        raise LeaseLostError(
            f"{store.root}: another run has finished here meanwhile; this one stops"
        ) from None


def put(store: Store, key: str, data: bytes) -> None:
    """Store a record of ours, whatever was there; only the holder of the lease writes these."""
    try:
        store.create(key, data)
    except ObjectChanged:
        there, info = store.read_with_info(key)
        if there != data:  # otherwise this very PUT, whose answer was lost
            compare_and_swap(store, key, data, info.version)
