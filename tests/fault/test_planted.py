"""The planted bugs fit the program as it is; `make planted` shows that they are found."""

from pathlib import Path

import pytest

import batch_scorer
from tests.fault.planted import BUGS, Bug, planted_in
from tests.fault.tries import ORACLES

pytestmark = pytest.mark.fault

PACKAGE = Path(batch_scorer.__file__).parent


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_changes_one_place_and_is_still_python(bug: Bug) -> None:
    before = (PACKAGE / bug.file).read_text()
    after = planted_in(before, bug)
    assert after != before
    compile(after, bug.file, "exec")
    assert bug.oracle in ORACLES


def test_a_bug_that_does_not_fit_any_more_is_refused() -> None:
    with pytest.raises(ValueError, match="is there 0 times"):
        planted_in("something else\n", BUGS[0])
