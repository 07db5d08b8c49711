"""What a benchmark ran on: stands in every result."""

import importlib.metadata
import os
import platform
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Processor, cores, memory and the versions that matter."""
    packages = ("torch", "transformers", "tokenizers", "ray", "pyarrow", "obstore")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    model = next((line for line in lines if line.startswith("model name")), ":unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    matrix = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model.split(':', 1)[1].strip()} ({', '.join(matrix) or 'no bfloat16'})"
