"""What this machine can compute on."""

from pathlib import Path

CPU_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""For processes that score on CPU, set before torch is loaded. By default OpenMP's threads spin at
every barrier, and reading and writing shards beside them makes that up to three times slower
(docs/performance.md)."""


def cuda_is_available() -> bool:
    """Whether torch sees a CUDA device here."""
    import torch

    return torch.cuda.is_available()


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AVX-512 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
