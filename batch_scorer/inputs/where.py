"""The expression of the setting `where`: pyarrow's syntax, read by a parser of its own.

    (field("source") == "math") & (field("turns") < 3)

The text is never run as Python. What it may consist of stands in the tables below; anything else
is refused with its place in the text.
"""

import ast
import io
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_scorer.errors import ConfigError, ShardError, ShardReason

IntArray: TypeAlias = npt.NDArray[np.int64]

_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], pc.Expression]] = {
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
_TESTS: Mapping[str, Callable[[pc.Expression], pc.Expression]] = {
    "is_null": lambda value: value.is_null(),
    "is_valid": lambda value: value.is_valid(),
    "is_nan": lambda value: value.is_nan(),
}
"""Methods of a value, and functions of it too."""
_FUNCTIONS: Mapping[str, Callable[[Any], pc.Expression]] = {
    **_TESTS,
    "list_value_length": pc.list_value_length,
    "utf8_length": pc.utf8_length,
    "utf8_lower": pc.utf8_lower,
    "utf8_upper": pc.utf8_upper,
}
_MATCHES: Mapping[str, Callable[..., pc.Expression]] = {
    "ends_with": pc.ends_with,
    "match_like": pc.match_like,
    "match_substring": pc.match_substring,
    "match_substring_regex": pc.match_substring_regex,
    "starts_with": pc.starts_with,
}
"""Functions of a value and a text; they take `ignore_case=True`."""
_TIMES: Mapping[str, Callable[..., date]] = {"date": date, "datetime": datetime}
_MODULES = ("pc", "ds")
_WORDS = {
    ast.And: "write & in place of `and`",
    ast.Or: "write | in place of `or`",
    ast.Not: "write ~ in place of `not`",
    ast.In: "write field(…).isin([…])",
    ast.NotIn: "write ~field(…).isin([…])",
    ast.Is: "write field(…).is_null()",
    ast.IsNot: "write field(…).is_valid()",
}
"""What people write who think of Python."""


@lru_cache(maxsize=16)
def where_of(text: str) -> "Where":
    """The expression; raises ConfigError, with the place in the text, for what is none."""
    return Where(text)


class Where:
    """A parsed expression. `columns` are the columns that it reads, each once."""

    def __init__(self, text: str) -> None:
        # In one line, as YAML may fold it: Python would end the expression at a line's end.
        self._text = text.strip().replace("\n", " ")
        try:
            self._body = ast.parse(self._text, mode="eval").body
            builder = _Builder(self._text, None)
            builder.value(self._body)
        except SyntaxError as error:
            raise ConfigError(f"where: at character {error.offset}: {error.msg}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"where: cannot be read: {error}") from None
        self.columns = list(dict.fromkeys(builder.columns))
        if not self.columns:
            raise ConfigError('where: no column is named; write field("NAME")')

    def check(self, schema: pa.Schema) -> None:
        """Raise ShardError where a column is missing, or its type does not fit."""
        for name in self.columns:
            if (number := schema.names.count(name)) != 1:
                found = "there are two columns" if number else "there is no column"
                raise _wrong_schema(f"{found} {name!r}; there are {', '.join(schema.names)}")
        self.matches(pa.Table.from_batches([], schema))

    def matches(self, rows: pa.Table | pa.RecordBatch) -> IntArray:
        """int64[n]: the rows for which the expression is true, in order. Null is not true.

        Raises ShardError where a type or a value does not fit, e.g. a division by zero.
        """
        import pyarrow.acero as acero  # loads pandas, where that is installed

        fields = [rows.schema.field(name) for name in self.columns]
        table = pa.table([rows[name] for name in self.columns], schema=pa.schema(fields))
        try:
            # No filter: of some types Arrow has none, and the expression reads a part of them.
            source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
            truth = acero.ProjectNodeOptions([self._bound(table.schema)], [""])
            project = acero.Declaration("project", truth, [source])
            found = project.to_table(use_threads=False).column(0)
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except pa.ArrowException as error:
            types = ", ".join(f"{field.name} is {field.type}" for field in fields)
            raise _wrong_schema(f"{str(error).splitlines()[0]} ({types})") from error
        if not pa.types.is_boolean(found.type):
            raise _wrong_schema(f"it is a value of type {found.type}, and no condition")
        return np.flatnonzero(pc.fill_null(found, fill_value=False).to_numpy())

    def row_groups(self, metadata: pq.FileMetaData, groups: Sequence[int]) -> list[int]:
        """Those of the row groups that may hold a row that matches, by their statistics.

        Works on the footer alone; no store is asked.
        """
        import pyarrow.dataset as ds  # loads pandas, where that is installed

        footer = io.BytesIO()
        metadata.write_metadata_file(footer)
        fragment = ds.ParquetFileFormat().make_fragment(pa.BufferReader(footer.getvalue()))
        try:
            subset = fragment.subset(self._bound(metadata.schema.to_arrow_schema()))
        except pa.ArrowException:  # of some types no statistics are understood
            return list(groups)
        kept = {group.id for group in subset.row_groups}
        return [group for group in groups if group in kept]

    def _bound(self, schema: pa.Schema) -> pc.Expression:
        return _Builder(self._text, schema).value(self._body)


class _Builder:
    """Makes an expression of the parts of a text. `schema` has the columns' types, None before they
    are known; `columns` collects the names that were met."""

    def __init__(self, text: str, schema: pa.Schema | None) -> None:
        self._text = text
        self._schema = schema
        self.columns: list[str] = []

    def value(self, node: ast.AST, beside: pa.DataType | None = None) -> pc.Expression:
        """`beside` is the type of what the value is compared with, where that is a column."""
        match node:
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return self._pair(node, type(op), left, right)
            case ast.Compare(left, [op], [right]) if type(op) in _OPERATORS:
                return self._pair(node, type(op), left, right)
            case ast.Compare(_, [op], _) if type(op) in _WORDS:
                raise self._refused(node, _WORDS[type(op)])
            case ast.Compare():
                raise self._refused(node, "put each comparison into parentheses: (…) & (…)")
            case ast.BoolOp(op):
                raise self._refused(node, _WORDS[type(op)])
            case ast.UnaryOp(ast.Not()):
                raise self._refused(node, _WORDS[ast.Not])
            case ast.UnaryOp(ast.Invert(), operand):
                return ~self.value(operand)
            case ast.Call(ast.Attribute(of, method), arguments, []) if not _is_module(of):
                return self._method(node, self.value(of), self._type(of), method, arguments)
            case ast.Call(function, arguments, keywords):
                return self._call(node, _name(function), arguments, keywords, beside)
            case _:
                return self._scalar(node, beside)

    def _pair(
        self, node: ast.AST, op: type[ast.AST], left: ast.AST, right: ast.AST
    ) -> pc.Expression:
        return _OPERATORS[op](
            self.value(left, self._type(right)), self.value(right, self._type(left))
        )

    def _method(
        self,
        node: ast.AST,
        of: pc.Expression,
        dtype: pa.DataType | None,
        method: str,
        arguments: list[ast.expr],
    ) -> pc.Expression:
        match method, arguments:
            case "isin", [ast.List(items) | ast.Tuple(items)]:
                literals = [self._literal(item) for item in items]
                if None in literals:
                    raise self._refused(node, "None matches no row; write field(…).is_null()")
                try:
                    return of.isin(pa.array(literals, _literal_type(literals, dtype)))
                except (pa.ArrowException, OverflowError) as error:
                    raise self._refused(node, str(error)) from None
            case name, [] if name in _TESTS:
                return _TESTS[name](of)
        known = ", ".join([*_TESTS, "isin([…])"])
        raise self._refused(node, f"the methods of a value are {known}")

    def _call(
        self,
        node: ast.AST,
        name: str,
        arguments: list[ast.expr],
        keywords: list[ast.keyword],
        beside: pa.DataType | None,
    ) -> pc.Expression:
        match name, arguments, keywords:
            case "field", [_, *_], []:
                names = self._field(node, arguments)
                self.columns.append(names[0])
                dtype = self._type(node)
                plain = None if dtype is None else _comparable(dtype)
                return pc.field(*names) if plain is None else pc.field(*names).cast(plain)
            case "scalar", [of], []:
                return self._scalar(of, beside)
            case known, [of], [] if known in _FUNCTIONS:
                return _FUNCTIONS[known](self.value(of))
            case known, [of, text], _ if known in _MATCHES:
                options = {each.arg: self._literal(each.value) for each in keywords}
                pattern, ignore_case = self._literal(text), options.pop("ignore_case", False)
                if isinstance(pattern, str) and isinstance(ignore_case, bool) and not options:
                    return _MATCHES[known](self.value(of), pattern, ignore_case=ignore_case)
                raise self._refused(node, f'write {known}(field(…), "text", ignore_case=True)')
            case known, _, [] if known in _TIMES:
                return self._scalar(node, beside)
        known = ", ".join(["field", *sorted([*_FUNCTIONS, *_MATCHES, *_TIMES])])
        raise self._refused(node, f"the functions are {known}")

    def _field(self, node: ast.AST, arguments: list[ast.expr]) -> list[str]:
        names = [self._literal(each) for each in arguments]
        if not all(isinstance(name, str) for name in names):
            raise self._refused(node, 'write field("NAME"), or field("OUTER", "INNER")')
        return names

    def _type(self, node: ast.AST) -> pa.DataType | None:
        """The type of a column; None for what is none, and before the columns are known."""
        match node:
            case ast.Call(function, arguments, []) if _name(function) == "field":
                return _type_at(self._schema, self._field(node, arguments))
        return None

    def _scalar(self, node: ast.AST, beside: pa.DataType | None) -> pc.Expression:
        literal = self._literal(node)
        if literal is None:
            raise self._refused(node, "nothing equals None; write field(…).is_null()")
        try:
            return pc.scalar(pa.scalar(literal, _literal_type([literal], beside)))
        except (pa.ArrowException, OverflowError) as error:
            raise self._refused(node, str(error)) from None

    def _literal(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(str() | int() | float() | None as value):
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
                return -value
            case ast.Call(function, arguments, []) if _name(function) in _TIMES:
                try:
                    return _TIMES[_name(function)](*map(self._literal, arguments))
                except (TypeError, ValueError) as error:
                    raise self._refused(node, str(error)) from None
            case ast.Name(name):
                raise self._refused(node, f'write field("{name}") for a column')
        raise self._refused(node, "not understood here")

    def _refused(self, node: ast.AST, why: str) -> ConfigError:
        part = ast.get_source_segment(self._text, node) or self._text
        before = self._text.encode()[: getattr(node, "col_offset", 0)].decode()
        return ConfigError(f"where: at character {len(before) + 1}, `{part}`: {why}")


def _name(function: ast.AST) -> str:
    """What is called: `field`, `pc.field` and `ds.field` are one; empty for anything else."""
    match function:
        case ast.Name(name):
            return name
        case ast.Attribute(of, name) if _is_module(of):
            return name
    return ""


def _is_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in _MODULES


def _type_at(outer: pa.Schema | None, path: Sequence[str]) -> pa.DataType | None:
    """The type of a column, or of a field in structs; None where there is none."""
    found: Any = outer
    for name in path:
        if not isinstance(found, pa.Schema | pa.StructType):
            return None
        found = next((field.type for field in found if field.name == name), None)
    return found


def _literal_type(literals: Sequence[Any], beside: pa.DataType | None) -> pa.DataType | None:
    """The type that literals need where they are compared with a column of another one; None: the
    one that they have by themselves."""
    if not literals:
        return None
    if all(type(each) is int for each in literals):
        is_unsigned = beside is not None and pa.types.is_uint64(beside) and min(literals) >= 0
        if is_unsigned or max(literals) >= 2**63:
            return pa.uint64()  # Arrow would make both signed, and fail beyond 2^63
        if beside is not None and pa.types.is_decimal(beside):
            return beside  # for an int64, Arrow's decimals are too short
    if beside is not None and all(isinstance(each, datetime) for each in literals):
        return pa.timestamp("us", getattr(beside, "tz", None))
    return None


def _comparable(dtype: pa.DataType) -> pa.DataType | None:
    """The type of which the same values can be compared (Arrow 26); None: this one itself."""
    if pa.types.is_dictionary(dtype):
        return _comparable(dtype.value_type) or dtype.value_type
    if dtype == pa.string_view():
        return pa.large_string()
    if dtype == pa.binary_view():
        return pa.large_binary()
    return pa.float32() if pa.types.is_float16(dtype) else None


def _wrong_schema(why: str) -> ShardError:
    return ShardError(ShardReason.WRONG_SCHEMA, f"where: {why}")
