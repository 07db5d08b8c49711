"""The expressions of `where`: what is understood, what is refused, and which rows they pick."""

from datetime import date, datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import ConfigError, ShardError, ShardReason
from batch_scorer.inputs.where import Where

BEYOND_SIGNED = 2**63 + 1
TABLE = pa.table(
    {
        "id": pa.array([BEYOND_SIGNED, 3, 2**53 + 1, None], pa.uint64()),
        "source": ["math", "code", None, "Math"],
        "large": pa.array(["a", "b", "a", None], pa.large_string()),
        "kind": pa.array(["x", "y", "x", None]).dictionary_encode(),
        "turns": [1, 2, 3, None],
        "share": [0.5, float("nan"), None, 1.0],
        "good": [True, False, None, True],
        "meta": [{"lang": "en"}, {"lang": "de"}, {"lang": None}, None],
        "messages": [["a"], ["a", "b"], [], None],
        "made": [datetime(2026, 11, day) for day in (1, 2, 3)] + [None],
        "zoned": pa.array([0, 86_400, 1, None], pa.timestamp("s", "Europe/Berlin")),
        "price": pa.array([1, 2, 3, None], pa.decimal128(10, 2)),
        "view": pa.array(["a", "b", "a", None], pa.string_view()),
        "half": pa.array([1, 2, 3, None], pa.float16()),
        "inner": pa.StructArray.from_arrays(
            [
                pa.array([BEYOND_SIGNED, 3, 4, None], pa.uint64()),
                pa.array(["a", "b", "a", None]).dictionary_encode(),
                pa.array(["a", "b", "a", None], pa.string_view()),
            ],
            ["id", "kind", "view"],
        ),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['"a"', "1", None, "[]"])),
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('field("source") == "math"', [0]),
        ('pc.field("source") != "math"', [1, 3]),
        ('ds.field("large") == "a"', [0, 2]),
        ('field("kind") == "x"', [0, 2]),
        ('(field("turns") > 1) & (field("source") == "code")', [1]),
        ('(field("turns") == 3) | (field("source") == "code")', [1, 2]),
        ('~(field("turns") == 3)', [0, 1]),
        ('field("turns").isin([])', []),
        ('field("zoned") == datetime(1970, 1, 2)', [1]),
        ('field("price") == 2', [1]),
        ('field("price").isin([1, 3])', [0, 2]),
        ('field("view") == "a"', [0, 2]),
        ('pc.match_like(field("view"), "a%")', [0, 2]),
        ('pc.match_substring(field("kind"), "x")', [0, 2]),
        ('field("half") > 2', [2]),
        ('field("inner", "id") > 3', [0, 2]),
        ('pc.starts_with(field("inner", "kind"), "b")', [1]),
        ('field("inner", "view") == "b"', [1]),
        ('2 <= field("turns")', [1, 2]),
        ('field("turns") * 2 - 1 >= 3', [1, 2]),
        ('field("turns") / 2 == 0', [0]),
        ('field("turns") > -1', [0, 1, 2]),
        ('field("turns").isin([1, 3])', [0, 2]),
        ('field("source").isin(["code", "Math"])', [1, 3]),
        ('field("source").is_null()', [2]),
        ('pc.is_valid(field("source"))', [0, 1, 3]),
        ('field("share").is_nan()', [1]),
        ('field("good")', [0, 3]),
        ('~field("good")', [1]),
        ('field("good") == True', [0, 3]),
        ('field("meta", "lang") == "de"', [1]),
        ('pc.match_substring(field("source"), "mat", ignore_case=True)', [0, 3]),
        ('pc.match_substring_regex(field("source"), "^[mM]")', [0, 3]),
        ('pc.match_like(field("source"), "co%")', [1]),
        ('pc.starts_with(field("source"), "ma")', [0]),
        ('pc.ends_with(field("source"), "de")', [1]),
        ('pc.utf8_length(field("source")) == 4', [0, 1, 3]),
        ('pc.utf8_lower(field("source")) == "math"', [0, 3]),
        ('pc.list_value_length(field("messages")) >= 1', [0, 1]),
        ('field("made") >= datetime(2026, 11, 2)', [1, 2]),
        ('field("made") < date(2026, 11, 2)', [0]),
        ('field("json").is_valid()', [0, 1, 3]),
        # Numbers that fit no signed integer, and those that no double holds.
        ('field("id") > 5', [0, 2]),
        (f'field("id") == {BEYOND_SIGNED}', [0]),
        (f'field("id").isin([3, {BEYOND_SIGNED}])', [0, 1]),
        (f'field("id") == {2**53}', []),
        (f'field("id") == {2**53 + 1}', [2]),
        ('\n  (field("turns") == 1)\n  | (field("turns") == 2)\n', [0, 1]),
    ],
)
def test_the_rows_for_which_it_is_true(text: str, rows: list[int]) -> None:
    where = Where(text)
    where.check(TABLE.schema)
    assert where.matches(TABLE).tolist() == rows


@given(st.lists(st.none() | st.integers(-9, 9), max_size=30), st.integers(-9, 9))
def test_null_is_neither_true_nor_false(values: list[int | None], bound: int) -> None:
    table = pa.table({"n": pa.array(values, pa.int64())})

    def rows(text: str) -> list[int]:
        return Where(text).matches(table).tolist()

    below = [row for row, n in enumerate(values) if n is not None and n < bound]
    nulls = [row for row, n in enumerate(values) if n is None]
    assert rows(f'field("n") < {bound}') == below
    assert rows(f'~(field("n") < {bound})') == [
        row for row in range(len(values)) if row not in {*below, *nulls}
    ]
    assert rows(f'(field("n") < {bound}) | field("n").is_null()') == sorted([*below, *nulls])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('field("a") == "x" & field("b") == 2', "at character 1, .* into parentheses"),
        ('1 < field("a") < 3', "each comparison into parentheses"),
        ('(field("a") == 1) and (field("b") == 2)', "write & in place of `and`"),
        ('(field("a") == 1) or (field("b") == 2)', "write | in place of `or`"),
        ('not field("a")', "write ~ in place of `not`"),
        ('field("a") in ["x"]', r"write field\(…\).isin"),
        ('field("a") is None', r"write field\(…\).is_null"),
        ('field("a") == None', r"at character 15, `None`: .*is_null"),
        ('field("a").isin(["x", None])', "None matches no row"),
        ('field("a").isin("x")', "the methods of a value"),
        ('field("a").cast("int8") == 1', "the methods of a value are is_null, .*isin"),
        ('__import__("os").system("true")', "the functions are field, date"),
        ('field("a") == open("x").read()', "at character 15, `open"),
        ("turns > 3", r'`turns`: write field\("turns"\) for a column'),
        ('[x for x in field("a")]', "not understood here"),
        ('field("a") == b"x"', "not understood"),
        ('field("ä") == other', "at character 15, `other`"),
        ('(field("a") == 1) &\n  (field("b") == other)', "at character 38, `other`"),
        ("field(1) == 1", r'write field\("NAME"\)'),
        ('pc.match_substring(field("a"), 3)', "write match_substring"),
        ('pc.match_substring(field("a"), "x", skip_nulls=True)', "write match_substring"),
        (f'field("a") == {2**64}', "too (large|big)"),
        ('field("a") >= date(2026, 13, 1)', "month must be"),
        ('"a" == "b"', "no column is named"),
        ('field("a"', "at character 6: "),
        (" ", "invalid syntax"),
        ("(" * 300 + "1" + ")" * 300, "too many nested"),
        ("~" * 9000 + 'field("a")', "cannot be read"),
    ],
)
def test_anything_else_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^where: .*{message}"):
        Where(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('field("nothing") == 1', "there is no column 'nothing'; there are id, source"),
        ('field("meta", "nothing") == 1', "No match for FieldRef.*nothing.*meta is struct"),
        ('field("source") > 1', r"'greater' has no kernel .*\(source is string\)"),
        ('field("turns").isin(["x"])', "turns is int64"),
        ('field("source")', "a value of type string, and no condition"),
        ('field("json") == "a"', "extension<arrow.json>"),
    ],
)
def test_columns_and_types_are_checked_before_a_row_is_read(text: str, message: str) -> None:
    with pytest.raises(ShardError, match=f"^where: .*{message}") as caught:
        Where(text).check(TABLE.schema)
    assert caught.value.reason is ShardReason.WRONG_SCHEMA


def test_a_value_that_does_not_fit_is_refused() -> None:
    where = Where('field("turns") / field("zero") > 1')
    with pytest.raises(ShardError, match="divide by zero"):
        where.matches(pa.table({"turns": [1], "zero": [0]}))


def test_a_column_may_have_any_name() -> None:
    table = pa.table({"\0row": [5, 6], "a.b": [1, 2], 'q"': [1, 2]})
    assert Where('field("a.b") == 2').matches(table).tolist() == [1]
    assert Where("field('q\"') == 2").matches(table).tolist() == [1]


def test_a_name_of_two_columns_is_refused() -> None:
    twice = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ShardError, match="two columns"):
        Where('field("a") == 1').check(twice.schema)


def test_date_is_a_day() -> None:
    table = pa.table({"day": [date(2026, 11, 1), date(2026, 11, 2)]})
    assert Where('field("day") > date(2026, 11, 1)').matches(table).tolist() == [1]


def test_a_large_table_is_asked_in_the_order_of_its_rows() -> None:
    rows = pa.table({"n": range(200_000)})
    assert Where('field("n") >= 100').matches(rows).tolist() == [*range(100, 200_000)]
