"""What hangs ends; what gives signs of life, or has ended, does not."""

import subprocess
import sys
import time

from batch_scorer.backends.watchdog import sign_of_life, watch

LIMIT_S = 0.4
LONG_LIMIT_S = 3.0
"""Where a sign of life that comes late would end this process."""


def test_native_code_that_hangs_is_ended_and_leaves_a_trace() -> None:
    code = (
        "import re\n"
        "from batch_scorer.backends.watchdog import watch\n"
        "def stuck():\n"
        "    re.match(r'(a+)+$', 'a' * 60 + 'b')\n"
        f"with watch({LIMIT_S}):\n"
        "    stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in stuck" in done.stderr


def test_signs_of_life_and_the_end_of_the_work_stop_the_clock() -> None:
    """This very process would be ended."""
    with watch(LONG_LIMIT_S):
        began = time.monotonic()
        while time.monotonic() < began + 1.1 * LONG_LIMIT_S:
            time.sleep(LONG_LIMIT_S / 20)
            sign_of_life()
    sign_of_life()
    time.sleep(1.1 * LONG_LIMIT_S)
