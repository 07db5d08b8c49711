"""What a scoring process asks of its machine."""

import subprocess
import sys

import pytest

_ROUNDS = """
import ctypes, resource
from batch_scorer.backends.device import give_back_freed_memory, keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer = [b"x" * (20 << 20) for _ in range(6)]
    layer.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a huge page would be one fault of many
if {keeps}:
    keep_freed_memory()
print(*(page_faults() for _ in range(4)))
with give_back_freed_memory():
    print(page_faults())
print(*(page_faults() for _ in range(4)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does, with glibc")
def test_a_scoring_process_keeps_the_pages_it_has_but_while_it_gives_them_back() -> None:
    def faults_of_the_last_layer(*, keeps: bool) -> list[int]:
        """Before memory is given back, meanwhile, and afterwards."""
        command = [sys.executable, "-c", _ROUNDS.format(keeps=keeps)]
        counts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [int(line.split()[-1]) for line in counts.splitlines()]

    before, meanwhile, afterwards = faults_of_the_last_layer(keeps=True)
    by_default = faults_of_the_last_layer(keeps=False)[0]
    assert max(before, afterwards) < min(by_default, meanwhile) / 10
