"""Small tables, and what detection and parsing make of them."""

from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats import columns_judged, columns_needed, columns_of, detect, parse
from batch_scorer.records import Format, Layout, ParsedRows, RowError, TextStyle

SAMPLED = 32
"""How many rows a plan looks at."""


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def table_of(columns: dict[str, Any] | pa.Table) -> pa.Table:
    """A table of one row (values given), or the table itself."""
    if isinstance(columns, pa.Table):
        return columns
    return pa.table({name: pa.array([value]) for name, value in columns.items()})


def found(
    columns: dict[str, Any] | pa.Table,
    *,
    format: Format | None = None,
    named: dict[str, str] | None = None,
    style: TextStyle | None = None,
    ignore: tuple[str, ...] = (),
    beside: str | None = None,
) -> Layout:
    """The layout that the first rows give."""
    table = table_of(columns)
    return detect(
        table.schema,
        columns_of(table.slice(0, SAMPLED), columns_judged(table.schema, named or {}))[0],
        format=format,
        columns=named or {},
        text_style=style,
        ignore=ignore,
        beside=beside,
    )


def refused(columns: dict[str, Any] | pa.Table, **settings: Any) -> str:
    """Why a file of these rows is refused."""
    with pytest.raises(ShardError) as raised:
        found(columns, **settings)
    assert raised.value.reason == ShardReason.WRONG_SCHEMA
    return raised.value.detail


def parsed(columns: dict[str, Any] | pa.Table, **settings: Any) -> ParsedRows:
    """The rows, by the layout that the first ones give."""
    table = table_of(columns)
    layout = found(table, **settings)
    return parse(columns_of(table, columns_needed(layout))[0], layout)


def sequences(columns: dict[str, Any] | pa.Table, **settings: Any) -> list[Any]:
    """The sequences of rows that all can be read."""
    rows = parsed(columns, **settings)
    assert rows.row_errors == {}
    assert not [one for one in rows.sequences if isinstance(one, RowError)]
    return rows.sequences


def reasons(rows: ParsedRows) -> list[RowReason | None]:
    """Why each row is marked, or None."""
    ends = pairwise(rows.row_offsets.tolist())
    return [
        rows.row_errors[row].reason if row in rows.row_errors else None
        for row, _ in enumerate(ends)
    ]
