"""What this machine can compute on."""

import ctypes
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("batch_scorer")

CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""For processes that score on CPU, set before torch is loaded. By default OpenMP's threads spin at
every barrier, and reading and writing shards beside them makes that up to three times slower
(docs/performance.md)."""

_M_MMAP_THRESHOLD = -3
_MALLOPT = {-1: 2**31 - 1, _M_MMAP_THRESHOLD: 2**25, -8: 1}
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of glibc: freed memory stays, allocations up
to the most it allows here (32 MiB) come from it, and all threads have one heap."""

_GIVEN_BACK_BYTES = 2**17
"""Allocations of this size, which is glibc's first M_MMAP_THRESHOLD, or larger are given back."""

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


def device_name(device: str) -> str:
    """The GPU's name, or which instructions torch uses of the CPU's."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def keep_freed_memory() -> None:
    """Have this process keep the memory of tensors for the next ones; without glibc, do nothing.

    By default glibc gives it back to the kernel, which fills it with zeros for the next layer, at
    a tenth of a forward pass (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


@contextmanager
def give_back_freed_memory() -> Iterator[None]:
    """Have this process give back the memory that it keeps, and while the context lasts that of
    tensors as soon as they are freed. Without glibc, do nothing.

    By default glibc soon takes even large tensors out of heaps, one for each thread, and keeps what
    is freed at their ends. Afterwards it does, as after `keep_freed_memory`: that has the largest
    threshold to which glibc would have come by itself.
    """
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is None or trim is None:
        yield
        return
    trim(0)
    mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK_BYTES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MALLOPT[_M_MMAP_THRESHOLD])


def free_matmul_buffers() -> None:
    """Give back what MKL keeps for the next matrix products of every thread; without MKL, do
    nothing. No other thread may be computing.

    It was 8 MB a thread that calls, with two cores.
    """
    import torch

    free = getattr(ctypes.CDLL(torch._C.__file__), "mkl_serv_free_buffers", None)
    if free is not None:
        free()


def has_lost_device(error: BaseException) -> bool:
    """Whether this process cannot use its device any more: after an illegal access, every later
    CUDA call fails."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.AcceleratorError)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AVX-512 or AMX)."""
    return _cpu_has("avx512_bf16", "amx_bf16")


def cpu_has_int8() -> bool:
    """Whether the CPU adds up products of 8-bit integers in 32 bits (VNNI or AMX).

    Where it does not, oneDNN 3.13, which vLLM calls, adds pairs of them in 16 bits, which overflow:
    wrong products were seen on an EPYC with AVX2 (docs/quantised.md).
    """
    return _cpu_has("avx512_vnni", "avx_vnni", "amx_int8")


def cpu_has_amx() -> bool:
    """Whether the CPU has tiles for matrix products. vLLM 0.32 then multiplies int8 weights by
    16-bit activations only, and fails on those of 32 bits."""
    return _cpu_has("amx_tile")


def _cpu_has(*flags: str) -> bool:
    """Whether Linux names one of these among the CPU's instructions."""
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in known for flag in flags)


def matmul_peak(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product on this device, the fastest of a fifth of a second.

    With this process's threads, on random numbers: a GPU takes zeros faster. 0 where it cannot be
    measured, because the engine has left no memory for it, or this process has no device.
    """
    import torch

    rows, columns, inner = _PEAK_MATRICES[device]
    products = _PEAK_PRODUCTS[device]

    def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, device=device, generator=generator)
        return numbers.to(getattr(torch, dtype))

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        generator = torch.Generator(device).manual_seed(0)  # leaves the process's own alone
        left, right = random(generator, rows, inner), random(generator, columns, inner).T
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
    except RuntimeError as error:  # no device or memory, by the name of torch, CUDA or cuBLAS
        log.warning("the device's peak cannot be measured: %s", error)
        return 0.0
    return 2.0 * rows * columns * inner * products / fastest_s
