"""Settings that are wrong: one line, exit code 2, and nothing is written."""

from pathlib import Path

from tests.corpus.case import Case, asks, file_case, lines

YAML = {
    "that is a list": ("- a\n- b\n", "expected `setting: value` lines"),
    "that is a text": ("hello\n", "expected `setting: value` lines"),
    "that is a number": ("7\n", "expected `setting: value` lines"),
    "with an open bracket": ("columns: [a\n", "not readable as YAML"),
    "with tabs": ("columns:\n\ta: b\n", "not readable as YAML"),
    "with an unknown tag": ("columns: !!python/object:os.system {}\n", "not readable as YAML"),
    "with an unknown name": ("colums: {a: b}\n", "did you mean `columns`?"),
    "with a number for a text": ("where: 7\n", "where"),
    "with a text for a number": ("shard_rows: many\n", "shard_rows"),
    "with 0 for a number": ("shard_rows: 0\n", "shard_rows"),
    "with a number below 0": ("limit: -1\n", "limit"),
    "with NaN": ("beta: .nan\n", "beta"),
    "with infinity for a whole number": ("limit: .inf\n", "limit"),
    "with null for a number": ("shard_rows: null\n", "shard_rows"),
    "with a list for an object": ("columns: [a]\n", "columns"),
    "with a number for a name": ("columns: {1: a}\n", "columns"),
    "with a number as a setting": ("7: a\n", "7"),
    "with null as a setting": ("null: a\n", "None"),
    "with a key that is a list": ("[a, b]: c\n", "YAML"),
    "with a zero": ("where: a\0b\n", "not readable as YAML"),
    "with two documents": ("limit: 1\n---\nlimit: 2\n", "not readable as YAML"),
    "with an anchor that is not there": ("where: *a\n", "not readable as YAML"),
    "with a date that is none": ("template_date: 2026-13-45\n", "month must be"),
    "with a format of no kind": ("format: none_such\n", "format"),
    "with a credential": ("store_options: {aws_secret_access_key: x}\n", "credential"),
    "with a beta and no reference": ("beta: 0.2\n", "beta"),
}

FLAGS: dict[str, tuple[tuple[object, ...], str]] = {
    "a where that is none": (("--where", "field("), "where"),
    "a where of no column": (("--where", "1 == 1"), "no column"),
    "a where that calls": (("--where", "__import__('os')"), "where"),
    "a where of deep brackets": (("--where", "(" * 500 + "1" + ")" * 500), "where"),
    "a column that no file has": (("--keep-columns", "none_such"), "none_such"),
    "a model without its name": (("--model", "b=/nowhere"), "a name of its own"),
    "an exclude of everything": (("--exclude", "*"), "every file is excluded"),
    "a template that is not there": (("--chat-template", "/nowhere/none.jinja"), "template"),
    "a config that is not there": (("--config", "/nowhere/none.yaml"), "no config file"),
    "a config that is a folder": (("--config", "/tmp"), "a folder"),
    "an input that is not there": (("/nowhere/none.parquet",), "nowhere"),
    "an input of no kind": (("/bin/sh",), "unknown file type"),
    "a pattern without a match": (("/nowhere/*.parquet",), "nowhere"),
    "a number beyond all bounds": (("--max-nesting", 901), "max_nesting"),
}


def nothing(folder: Path) -> None:
    """The healthy files alone."""


def yaml_case(name: str, text: str, says: str) -> Case:
    """The settings lie beside the inputs' folder; `Job.run` reads `{beside}` as that place."""

    def make(inputs: Path) -> None:
        (inputs.parent / "settings.yaml").write_text(text)

    return Case(
        f"YAML {name}", make, flags=("--config", "{beside}/settings.yaml"), says=says,
    )  # fmt: skip


CASES: list[Case] = [
    *(yaml_case(name, text, says) for name, (text, says) in YAML.items()),
    *(Case(name, nothing, flags=flags, says=says) for name, (flags, says) in FLAGS.items()),
    Case("an empty config", nothing,
         flags=("--config", "/dev/null")),
    Case("a glob with an open bracket", nothing, flags=("--exclude", "[a")),
    Case("a glob with a range that runs back", nothing, flags=("--exclude", "[z-a].jsonl"),
         says="bad character range"),
    Case("a glob with a zero", nothing, flags=("--exclude", "a\0b"), says="is not a path"),
    Case("an input with a zero in its name", nothing, flags=("/tmp/a\0b.parquet",),
         says="is not a path"),
    file_case("an exclude with marks", "m.jsonl", lines(asks(2)), flags=("--exclude", "m*")),
]  # fmt: skip
