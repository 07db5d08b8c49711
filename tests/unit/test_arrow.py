"""Arrow loads no pandas in this program's own processes; elsewhere it may."""

import importlib.util
import subprocess
import sys

import pytest

from batch_scorer.quarantine import Bounds, apart

WITHOUT = """
import sys
import pyarrow as pa
from batch_scorer.arrow import without_pandas
without_pandas()
assert pa.array(["a", None]).to_pylist() == ["a", None]
print("pandas" in sys.modules)
import pandas  # whoever asks for it gets it
print(len(pandas.DataFrame({"a": [1]})))
"""


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="there is no pandas here")
def test_lists_become_arrays_without_pandas() -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["False", "1"]


def makes_an_array() -> bool:
    import pyarrow as pa

    pa.array([1])
    return "pandas" in sys.modules


def test_a_reading_process_has_none() -> None:
    assert not apart(Bounds(60.0, 1 << 30), makes_an_array)
