"""All cases of inputs and settings, by kind."""

from tests.corpus import (
    arrow_files,
    conversations,
    delimited,
    directories,
    json_lines,
    packed,
    parquet_files,
    settings,
)

KINDS = {
    "parquet": parquet_files.CASES,
    "jsonl": json_lines.CASES,
    "packed": packed.CASES,
    "csv": delimited.CASES,
    "arrow": arrow_files.CASES,
    "directory": directories.CASES,
    "conversation": conversations.CASES,
    "setting": settings.CASES,
}
