"""JSON Lines and JSON arrays."""

import json
from collections.abc import Callable
from typing import Any

from tests.corpus.case import Case, Row, asks, file_case, lines

KEY = "m.jsonl"
BOM = b"\xef\xbb\xbf"
GOOD = lines(asks(1))
Q_UTF8 = "text that is not UTF-8 marks its row"


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * depth + closing * depth).encode()


def line_with(x: str | bytes) -> bytes:
    """A line that can be scored, with this JSON in a column that is not read."""
    text = x.encode() if isinstance(x, str) else x
    return b'{"prompt": "What?", "response": "That.", "x": ' + text + b"}\n"


def mixed(*values: Any) -> bytes:
    return lines(
        [{**row, "x": value} for row, value in zip(asks(len(values)), values, strict=True)]
    )


def with_prompts(*prompts: Any) -> bytes:
    return lines([{"prompt": prompt, "response": "Yes."} for prompt in prompts])


def keys(count: int) -> bytes:
    return lines([{**asks(1)[0], **{f"k{i}": i for i in range(count)}}, *asks(1)])


def in_a_value(depth: int) -> bytes:
    return line_with(nested(depth)) + GOOD


WHOLE: dict[str, tuple[bytes | Callable[[], bytes], int]] = {
    "no end of line": (GOOD.strip(), 1),
    "a byte order mark": (BOM + GOOD, 1),
    "carriage returns": (lines(asks(3), "\r\n"), 3),
    "blank lines": (b"\n\n" + GOOD + b"  \n\t\n" + GOOD + b"\n\n\n", 2),
    "blanks before and after": (b"  " + GOOD.strip() + b" \t\n", 1),
    "form feeds between": (GOOD + b"\f\n\v\n" + GOOD, 2),
    "keys in another order": (lines(asks(1)) + b'{"response": "b", "prompt": "a"}\n', 2),
    "escapes": (b'{"prompt": "\\u0041\\n\\t\\/\\\\", "response": "\\u00e9"}\n', 1),
    "a pair of surrogates": (b'{"prompt": "\\ud83d\\ude00", "response": "b"}\n', 1),
    "a zero": (b'{"prompt": "a\\u0000b", "response": "b"}\n', 1),
    "line separators inside": (lines([{"prompt": "a\u2028b\u2029c\x85d", "response": "b"}]), 1),
    "right to left": (with_prompts("\u202eabc", "\u0627\u0644"), 2),
    "marks that join": (with_prompts("e" + "\u0301" * 500), 1),
    "100,000 letters": (with_prompts("tea " * 1000), 1),
    "other types beside": (mixed(1, "a", None, [1], {"b": 1}, True), 6),
    "whole numbers beyond 64 bits": (mixed(2**64, -(2**64), 10**40, 1), 4),
    "a number of 4000 digits": (line_with("9" * 4000) + GOOD, 2),
    "numbers at the ends": (mixed(2**63 - 1, -(2**63), 2**53 + 1), 3),
    "fractions": (mixed(0.1, 1e308, 5e-324, -0.0), 4),
    "a number beyond float64": (line_with("1e400") + GOOD, 2),
    "whole and fraction": (mixed(1, 1.5), 2),
    "NaN": (mixed(float("nan"), 1.0), 2),
    "infinity": (mixed(float("inf"), float("-inf")), 2),
    "texts that look like dates": (mixed("2026-11-28", "2026-11-28T12:00:00Z", "x"), 3),
    "lists of other types": (mixed([1, "a"], [None], [[1]], []), 4),
    "objects of other keys": (mixed({"a": 1}, {"b": "c"}, {}, None), 4),
    "objects of other types": (mixed({"a": 1}, {"a": "c"}, {"a": [1]}), 3),
    "an empty key": (line_with("1").replace(b'"x"', b'""'), 1),
    "a key with a dot": (line_with("1").replace(b'"x"', b'"a.b"'), 1),
    "a key with a zero": (line_with("1").replace(b'"x"', b'"a\\u0000b"'), 1),
    "a long key": (lambda: line_with("1").replace(b'"x"', b'"' + b"k" * 10_000 + b'"'), 1),
    "keys in two cases": (line_with("1").replace(b'"x"', b'"PROMPT"'), 1),
    "a key that comes late": (GOOD * 40 + line_with("1"), 41),
    "a type that changes late": (line_with("1") * 40 + line_with('"a"'), 41),
    "only null beside": (mixed(None, None), 2),
    "only empty lists beside": (mixed([], []), 2),
    "only empty objects beside": (mixed({}, {}), 2),
    "lists 30 deep": (in_a_value(30), 2),
    "objects 50 deep": (line_with('{"a":' * 50 + "1" + "}" * 50) + GOOD, 2),
    "300 keys": (keys(300), 2),
    "a value twice as long as all": (line_with(json.dumps("a" * 200_000)) + GOOD, 2),
    "a thousand lines": (lines(asks(1000)), 1000),
}

BAD: dict[str, tuple[bytes, int, Row]] = {
    "a cut line": (GOOD + GOOD[:20] + b"\n" + GOOD, 2, {"malformed_json": 1}),
    "a cut last line": (GOOD + GOOD[:20], 1, {"malformed_json": 1}),
    "two objects in a line": (GOOD.strip() + GOOD + GOOD, 1, {"malformed_json": 1}),
    "an object over two lines": (
        GOOD + b'{"prompt": "a",\n"response": "b"}\n', 1, {"malformed_json": 2},
    ),
    "a comma behind": (GOOD + GOOD.strip() + b",\n", 1, {"malformed_json": 1}),
    "a comma too much": (GOOD + b'{"prompt": "a", "response": "b",}\n', 1, {"malformed_json": 1}),
    "single quotes": (GOOD + b"{'prompt': 'a', 'response': 'b'}\n", 1, {"malformed_json": 1}),
    "a comment": (b"// rows\n" + GOOD, 1, {"malformed_json": 1}),
    "a list among objects": (GOOD + b"[1, 2]\n", 1, {"malformed_json": 1}),
    "a number among objects": (GOOD + b"7\n", 1, {"malformed_json": 1}),
    "a text among objects": (GOOD + b'"a"\n', 1, {"malformed_json": 1}),
    "null among objects": (GOOD + b"null\n", 1, {"null_value": 1}),
    "an unescaped tab": (GOOD + b'{"prompt": "a\tb", "response": "b"}\n', 1, {"malformed_json": 1}),
    "an escape of no kind": (GOOD + b'{"prompt": "\\x", "response": "b"}\n', 1,
                             {"malformed_json": 1}),
    "a short escape": (GOOD + b'{"prompt": "\\u12", "response": "b"}\n', 1, {"malformed_json": 1}),
    "an open text": (GOOD + b'{"prompt": "a\n' + GOOD, 2, {"malformed_json": 1}),
    "an open bracket": (GOOD + b"{\n" + GOOD, 2, {"malformed_json": 1}),
    "only closing brackets": (GOOD + b"}}}]\n" + GOOD, 2, {"malformed_json": 1}),
    "zeros between": (GOOD + bytes(20) + b"\n" + GOOD, 2, {"malformed_json": 1}),
    "hexadecimal": (GOOD + b'{"prompt": 0x10, "response": "b"}\n', 1, {"malformed_json": 1}),
    "a number with a zero before": (GOOD + line_with("01"), 1, {"malformed_json": 1}),
    "a null prompt": (with_prompts("a", None), 1, {"null_value": 1}),
    "a missing prompt": (GOOD + b'{"response": "b"}\n', 1, {"null_value": 1}),
    "an empty object": (GOOD + b"{}\n", 1, {"null_value": 1}),
    "an empty prompt": (with_prompts("a", "", " \n"), 1, {"empty": 2}),
    "a prompt that is a number": (with_prompts("a", 7), 1, {"bad_structure": 1}),
    "a prompt that is an object": (with_prompts("a", {"x": 1}), 1, {"null_value": 1}),
    "a prompt that is a list": (with_prompts("a", ["x"]), 1, {"bad_structure": 1}),
    "a prompt that is true": (with_prompts("a", True), 1, {"bad_structure": 1}),
}  # fmt: skip

FAILED: dict[str, tuple[bytes, str]] = {
    "only a bracket": (b"{", "unreadable_file"),
    "only text": (b"hello\nworld\n", "unreadable_file"),
    "only zeros": (bytes(100), "unreadable_file"),
    "all bytes": (bytes(range(256)), "unreadable_file"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "unreadable_file"),
    "numbers alone": (b"1\n2\n", "unreadable_file"),
    "other keys": (b'{"a": 1}\n', "wrong_schema"),
    "empty objects": (b"{}\n{}\n", "unreadable_file"),
    "a Parquet file": (b"PAR1" + bytes(50) + b"PAR1", "unreadable_file"),
    "a page of the web": (b"<!DOCTYPE html>\n<html></html>\n", "unreadable_file"),
    "a score column": (lines([{**asks(1)[0], "score": 1}]), "column_collision"),
}

EMPTY = {"empty": b"", "blank": b"\n \n\t\n", "a byte order mark alone": BOM}

ARRAYS: dict[str, tuple[bytes, int, Row, str | None]] = {
    "an array": (json.dumps(asks(3)).encode(), 3, {}, None),
    "an array over lines": (json.dumps(asks(3), indent=2).encode(), 3, {}, None),
    "an array after a mark": (BOM + json.dumps(asks(2)).encode(), 2, {}, None),
    "an array of blanks between": (
        b"\n\n[ " + GOOD.strip() + b"\n,\n" + GOOD + b"]\n\n",
        2,
        {},
        None,
    ),
    "a cut array": (json.dumps(asks(3)).encode()[:-10], 0, {}, "unreadable_file"),
    "an array with more behind": (json.dumps(asks(2)).encode() + b"7", 0, {}, "unreadable_file"),
    "two arrays": (json.dumps(asks(2)).encode() * 2, 0, {}, "unreadable_file"),
    "an array with a comma too much": (b"[" + GOOD.strip() + b",]", 0, {}, "unreadable_file"),
    "an array of numbers": (b"[1, 2]", 0, {}, "unreadable_file"),
    "an array of arrays": (b"[[1], [2]]", 0, {}, "unreadable_file"),
    "an array of one open bracket": (b"[", 0, {}, "unreadable_file"),
    "an object among rows": (
        json.dumps([*asks(1), {"response": "b"}]).encode(),
        1,
        {"null_value": 1},
        None,
    ),
}

CASES: list[Case] = [
    *(file_case(name, KEY, data, rows) for name, (data, rows) in WHOLE.items()),
    *(file_case(name, KEY, data, n, marked=marked) for name, (data, n, marked) in BAD.items()),
    *(file_case(f"failed: {n}", KEY, data, failed=why) for n, (data, why) in FAILED.items()),
    *(file_case(f"no rows: {name}", KEY, data) for name, data in EMPTY.items()),
    *(
        file_case(name, "m.json", data, rows, marked=marked, failed=failed)
        for name, (data, rows, marked, failed) in ARRAYS.items()
    ),
    file_case("an empty array", "m.json", b"[]"),
    file_case("a key twice", KEY, GOOD + line_with("1").replace(b'"x"', b'"prompt"'), 1,
              marked={"malformed_json": 1}),
    file_case("a surrogate alone", KEY, GOOD + b'{"prompt": "\\ud800", "response": "b"}\n', 1,
              marked={"not_utf8": 1}),
    file_case("a surrogate alone beside", KEY, GOOD + line_with('"\\udfff"'), 1,
              marked={"not_utf8": 1}),
    file_case("lists 60 deep", KEY, in_a_value(60), 2),
    file_case("a byte that is no text", KEY, GOOD + b'{"prompt": "\xff", "response": "b"}\n', 1,
              marked={"not_utf8": 1}),
    file_case("a letter of Latin 1", KEY, GOOD + b'{"prompt": "caf\xe9", "response": "b"}\n', 1,
              marked={"not_utf8": 1}),
    file_case("a surrogate as bytes", KEY, GOOD + b'{"prompt": "\xed\xa0\x80", "response": "b"}\n',
              1, marked={"not_utf8": 1}),
    file_case("a letter in more bytes", KEY, GOOD + b'{"prompt": "\xc0\xaf", "response": "b"}\n',
              1, marked={"not_utf8": 1}),
    file_case("a cut letter at the end", KEY, GOOD + GOOD.strip()[:-3] + b"\xe2\x82", 1,
              marked={"not_utf8": 1}),
    *(
        file_case(f"{what} deeper than {bound}", KEY, line_with(text) + GOOD, 1,
                  marked={"too_nested": 1}, flags=("--max-nesting", bound))
        for bound in (5, 20)
        for what, text in (
            ("lists", nested(bound)), ("objects", '{"a":' * bound + "1" + "}" * bound),
            ("lists that do not close", "[" * 2 * bound),
        )
    ),
    file_case("lists as deep as they may be", KEY, line_with(nested(4)) + GOOD, 2,
              flags=("--max-nesting", 5)),
    file_case("brackets in a text", KEY, line_with(json.dumps("[{" * 50)) + GOOD, 2,
              flags=("--max-nesting", 5)),
    file_case("brackets behind a quote", KEY, line_with(json.dumps('"[[[[[[["')) + GOOD, 2,
              flags=("--max-nesting", 5)),
    *(
        file_case(f"a line {more} bytes too long", KEY,
                  (line := line_with(json.dumps("a" * 900))).strip() + b" " * (
                      2000 + more - len(line.strip())) + b"\n" + GOOD, 1,
                  marked={"row_too_large": 1}, flags=("--max-row-bytes", 2000))
        for more in (2, 5000)
    ),
    file_case("a line as long as it may be", KEY, line_with(json.dumps("a" * 900)) + GOOD, 2,
              flags=("--max-row-bytes", 2000)),
    file_case("a long line without an end", KEY, GOOD + b'{"prompt": "' + b"a" * 5000, 1,
              marked={"row_too_large": 1}, flags=("--max-row-bytes", 2000)),
    *(
        file_case(f"{count} keys of {bound}", KEY, keys(count), 1, marked={"too_many_keys": 1},
                  flags=("--max-keys", bound))
        for count, bound in ((20, 10), (200, 100))
    ),
    file_case("many keys inside", KEY,
              line_with(json.dumps({f"k{i}": i for i in range(50)})) + GOOD, 1,
              marked={"too_many_keys": 1}, flags=("--max-keys", 20)),
    file_case("other keys in each line", KEY,
              lines([{**row, f"k{i}": i} for i, row in enumerate(asks(50))]), 50),
    file_case("shards of two lines", KEY, GOOD * 7, 7, flags=("--shard-rows", 2)),
    file_case("a cut line between shards", KEY, GOOD * 2 + b"{\n" + GOOD * 2, 4,
              marked={"malformed_json": 1}, flags=("--shard-rows", 2)),
    file_case("suffix ndjson", "m.ndjson", GOOD, 1),
    file_case("suffix in capitals", "M.JSONL", GOOD, 1),
    file_case("lines in a file of JSON", "m.json", GOOD * 2, 2),
]  # fmt: skip
