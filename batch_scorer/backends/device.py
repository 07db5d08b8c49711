"""What this machine can compute on."""

import ctypes
import logging
import sys
import time
from pathlib import Path

log = logging.getLogger("batch_scorer")

CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""For processes that score on CPU, set before torch is loaded. By default OpenMP's threads spin at
every barrier, and reading and writing shards beside them makes that up to three times slower
(docs/performance.md)."""

_MALLOPT = {-1: 2**31 - 1, -3: 2**25, -8: 1}
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of glibc: freed memory stays, allocations up
to the most it allows here (32 MiB) come from it, and all threads have one heap."""

_PEAK_S = 0.2
_PEAK_MATRICES = {"cpu": (1024, 1024, 2048), "cuda": (4096, 4096, 4096)}
"""Rows, columns and inner size. On two cores of an EPYC larger ones were no faster: float32 gave
92 GFLOP/s from here to 16 times the size."""
_PEAK_PRODUCTS = {"cpu": 1, "cuda": 20}
"""Between two readings of the clock, so that a GPU does not wait for the host."""


def cuda_is_available() -> bool:
    """Whether torch sees a CUDA device here."""
    import torch

    return torch.cuda.is_available()


def keep_freed_memory() -> None:
    """Have this process keep the memory of tensors for the next ones; without glibc, do nothing.

    By default glibc gives it back to the kernel, which fills it with zeros for the next layer, at
    a tenth of a forward pass (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def has_lost_device(error: BaseException) -> bool:
    """Whether this process cannot use its device any more: after an illegal access, every later
    CUDA call fails."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.AcceleratorError)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AVX-512 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def matmul_peak(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product on this device, the fastest of a fifth of a second.

    With this process's threads, on random numbers: a GPU takes zeros faster. 0 where it cannot be
    measured, because the engine has left no memory for it.
    """
    import torch

    rows, columns, inner = _PEAK_MATRICES[device]
    products = _PEAK_PRODUCTS[device]
    generator = torch.Generator(device).manual_seed(0)  # leaves the process's own alone

    def random(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, device=device, generator=generator)
        return numbers.to(getattr(torch, dtype))

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        left, right = random(rows, inner), random(columns, inner).T
        out = left @ right  # the first product also chooses and loads the kernel
        wait()
        fastest_s = float("inf")
        begun = time.perf_counter()
        while time.perf_counter() - begun < _PEAK_S:
            started = time.perf_counter()
            for _ in range(products):
                torch.matmul(left, right, out=out)
            wait()
            fastest_s = min(fastest_s, time.perf_counter() - started)
    except RuntimeError as error:  # out of memory, by the name of torch, CUDA or cuBLAS
        log.warning("the device's peak cannot be measured: %s", error)
        return 0.0
    return 2.0 * rows * columns * inner * products / fastest_s
