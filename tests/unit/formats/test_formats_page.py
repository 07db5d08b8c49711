"""docs/formats.md names every field and every column that is read or looked at."""

import re
from pathlib import Path

from batch_scorer.formats.kinds import (
    BESIDE_NAMES,
    CONTEXT_NAMES,
    KINDS,
    KNOWN_NAMES,
    MEDIA_NAMES,
    WATCHED_NAMES,
    Part,
    mask_field,
    mask_names,
    role_alias,
)

PAGE = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()


def section(title: str) -> list[list[str]]:
    """The cells of the tables of a section, row by row."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


TABLE = section("Every field and column")


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_field_has_a_row_with_the_columns_that_it_is_read_from() -> None:
    masked = [
        field for kind in KINDS.values() if Part.TOKEN_IDS in kind.parts for field in kind.fields
    ]
    known = {field: {n for _, tier in tiers for n in tier} for field, tiers in KNOWN_NAMES.items()}
    known |= {field: set(columns) for field, columns in (CONTEXT_NAMES | BESIDE_NAMES).items()}
    known |= {mask_field(field): set(mask_names(field)) - {mask_field(field)} for field in masked}
    rows = {field: set(names(row[1])) for row in TABLE if len(row) == 3 for field in names(row[0])}
    assert rows.keys() == known.keys()
    for field, columns in known.items():
        assert columns <= rows[field], field


def test_columns_that_are_looked_at_have_a_row() -> None:
    first = [names(row[0]) for row in TABLE if len(row) == 2]
    assert set(WATCHED_NAMES) in map(set, first)
    assert sum(set(MEDIA_NAMES) <= set(row) for row in first) == 2  # of a row, and of a message


def test_aliases_of_roles_are_those_of_the_page() -> None:
    (row,) = [row for row in TABLE if row[0].startswith("`from`")]
    for said in row[1].split("; "):
        *aliases, role = names(said)
        if not said.startswith("become"):
            assert [role_alias(alias) for alias in aliases] == [role] * len(aliases), said
