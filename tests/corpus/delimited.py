"""CSV and TSV."""

from tests.corpus.case import Case, Row, file_case

KEY = "m.csv"
HEAD = b"prompt,response\n"
BOM = b"\xef\xbb\xbf"

WHOLE: dict[str, tuple[bytes, int]] = {
    "plain": (HEAD + b"a,b\nc,d\n", 2),
    "no end of line": (HEAD + b"a,b", 1),
    "carriage returns": (b"prompt,response\r\na,b\r\nc,d\r\n", 2),
    "a byte order mark": (BOM + HEAD + b"a,b\n", 1),
    "quotes": (HEAD + b'"a, and ""more""","b"\n', 1),
    "lines in a value": (HEAD + b'"a\nb\r\nc",d\n', 1),
    "blank lines": (HEAD + b"\na,b\n\n\nc,d\n\n", 2),
    "blanks around": (HEAD + b" a , b \n", 1),
    "a quote inside": (HEAD + b'a "b" c,d\n', 1),
    "only commas in quotes": (HEAD + b'",,",b\n', 1),
    "more columns": (b"x,prompt,y,response\n1,a,2,b\n", 1),
    "an empty name": (b"prompt,response,\na,b,c\n", 1),
    "a zero": (HEAD + b"a\0b,c\n", 1),
    "a formula": (HEAD + b"=1+1,@SUM(A1)\n", 1),
    "an escape of a terminal": (HEAD + b"\x1b[31ma,b\n", 1),
    "the separator of records": (HEAD + "a\u2028b,c\x1ed\n".encode(), 1),
    "a value of 200,000 letters": (HEAD + b"a," + b"tea" * 1000 + b"\n", 1),
    "a thousand rows": (HEAD + b"a,b\n" * 1000, 1000),
    "100 columns": (b",".join([b"prompt", b"response", *(b"c%d" % i for i in range(98))]) + b"\n"
                    + b",".join(b"%d" % i for i in range(100)) + b"\n", 1),
    "the header once more": (HEAD + b"a,b\n" + HEAD, 2),
}  # fmt: skip

BAD: dict[str, tuple[bytes, int, Row]] = {
    "a value too many": (HEAD + b"a,b\nc,d,e\n", 1, {"bad_structure": 1}),
    "a value too few": (HEAD + b"a,b\nc\n", 1, {"bad_structure": 1}),
    "empty values": (HEAD + b"a,b\n,\n", 1, {"empty": 1}),
    "only quotes": (HEAD + b'a,b\n"",""\n', 1, {"empty": 1}),
    "blanks for values": (HEAD + b"a,b\n , \n", 1, {"empty": 1}),
    "semicolons in a row": (HEAD + b"a,b\na;b\n", 1, {"bad_structure": 1}),
}

FAILED: dict[str, tuple[bytes, str]] = {
    "an open quote": (HEAD + b'a,b\n"c,d\n', "unreadable_file"),
    "text behind a quote": (HEAD + b'"a"b,c\n', "unreadable_file"),
    "a name twice": (b"prompt,prompt\na,b\n", "unreadable_file"),
    "a header that is no text": (b"prompt,resp\xffonse\na,b\n", "unreadable_file"),
    "other names": (b"a,b\n1,2\n", "wrong_schema"),
    "semicolons": (b"prompt;response\na;b\n", "wrong_schema"),
    "one column": (b"prompt\na\n", "wrong_schema"),
    "tabs": (b"prompt\tresponse\na\tb\n", "wrong_schema"),
    "a score column": (b"prompt,response,score\na,b,1\n", "column_collision"),
    "UTF-16": ("prompt,response\na,b\n".encode("utf-16"), "unreadable_file"),
    "JSON": (b'{"prompt": "a"}\n{"prompt": "b"}\n', "wrong_schema"),
}

CASES: list[Case] = [
    *(file_case(name, KEY, data, rows) for name, (data, rows) in WHOLE.items()),
    *(file_case(name, KEY, data, n, marked=marked) for name, (data, n, marked) in BAD.items()),
    *(file_case(f"failed: {n}", KEY, data, failed=why) for n, (data, why) in FAILED.items()),
    file_case("a mark before quotes", KEY, BOM + b'"prompt","response"\na,b\n', 1),
    file_case("blank lines before the header", KEY, b"\n\n" + HEAD + b"a,b\nc,d\n", 2),
    file_case("empty", KEY, b""),
    file_case("only a header", KEY, HEAD),
    file_case("a byte that is no text", KEY, HEAD + b"a,b\nc,\xff\n", 1, marked={"not_utf8": 1}),
    file_case("a row too large", KEY, HEAD + b"a,b\n" + b"c" * 3000 + b",d\n", 1,
              marked={"row_too_large": 1}, flags=("--max-row-bytes", 2000)),
    file_case("shards of two rows", KEY, HEAD + b'"a\nb",c\n' * 7, 7, flags=("--shard-rows", 2)),
    file_case("TSV", "m.tsv", b"prompt\tresponse\na\tb,c\n", 1),
    file_case("TSV with quotes", "m.tsv", b'prompt\tresponse\n"a\tb"\tc\n', 1),
    file_case("TSV with commas", "m.tsv", HEAD + b"a,b\n", failed="wrong_schema"),
    file_case("TSV with a tab too many", "m.tsv", b"prompt\tresponse\na\tb\nc\td\t\n", 1,
              marked={"bad_structure": 1}),
    file_case("suffix in capitals", "M.CSV", HEAD + b"a,b\n", 1),
]  # fmt: skip
