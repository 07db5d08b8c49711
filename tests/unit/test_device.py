"""What a scoring process asks of its machine."""

import subprocess
import sys

import pytest

_ROUNDS = """
import resource
from batch_scorer.backends.device import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer = [b"x" * (20 << 20) for _ in range(6)]
    layer.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keeps}:
    keep_freed_memory()
print(*(page_faults() for _ in range(4)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does, with glibc")
def test_a_scoring_process_keeps_the_pages_it_has() -> None:
    def faults_of_the_last_layer(*, keeps: bool) -> int:
        command = [sys.executable, "-c", _ROUNDS.format(keeps=keeps)]
        counts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(counts.split()[-1])

    assert faults_of_the_last_layer(keeps=False) > 10_000, "120 MiB, given back every time"
    assert faults_of_the_last_layer(keeps=True) < 100
