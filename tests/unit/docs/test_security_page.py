"""The threat model names tests: they must be there."""

import re

import pytest

from tests.helpers.program import REPOSITORY

PAGE = (REPOSITORY / "docs" / "security.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_the_page_names_exists(file: str, test: str) -> None:
    assert f"def {test}(" in (REPOSITORY / file).read_text()


def test_the_page_names_tests_and_what_is_not_held() -> None:
    assert len(NAMED) > 10
    assert "**Not held:**" in PAGE and "**Not proved:**" in PAGE
    for folder in re.findall(r"`(cluster/[\w/]+)`", PAGE):
        assert (REPOSITORY / folder).is_dir(), folder
