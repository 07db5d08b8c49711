"""Several threads that compute in parallel, each with a share of the cores.

On a CPU, a forward pass on all cores waits after every operation for the slowest core, which
may be busy reading and writing. Separate passes on separate cores do not wait for each other
(docs/performance.md).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MOST_LANES = 8
"""Each lane has a separate batch in memory."""


class Lanes:
    """As many as there are threads on a CPU, at most MOST_LANES; one on a GPU.

    With `single` every lane on a CPU has one thread, so that no operation is cut by their number;
    there may be more lanes then.
    """

    def __init__(self, device: torch.device, *, single: bool = False) -> None:
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.count = threads if single else min(threads, MOST_LANES)
        self._threads, self._share = threads, threads // self.count
        self._pool = ThreadPoolExecutor(self.count, "lane") if self.count > 1 else None

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`work` on all items, in parallel; results in their order. Raises what `work` raises."""
        if self._pool is None:
            yield from map(work, items)
            return

        def on_share(item: T) -> R:
            # Before every piece: torch keeps a part of this for the process, which is reset below,
            # and with other threads a product has other last bits.
            torch.set_num_threads(self._share)
            return work(item)

        try:
            yield from self._pool.map(on_share, items)
        finally:
            torch.set_num_threads(self._threads)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
