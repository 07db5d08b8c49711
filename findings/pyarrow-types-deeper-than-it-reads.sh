#!/usr/bin/env bash
# pyarrow 26.0.1: writes Parquet files whose types lie deeper than it reads.
#
# Expected: a table that `pyarrow.parquet.write_table` writes without an error can be opened with
#   `pyarrow.parquet.ParquetFile`, or the writer refuses it.
# Seen: 50 lists in each other, or 99 structs, are written without a word, and opening the file raises
#   OSError, "Parquet schema too deeply nested". 49 lists and 98 structs are read.
# Why it matters here: a column of a JSON file may be nested so deep, and the scored file would be lost
#   to every reader. Such a column is written as JSON text (batch_scorer/formats/storable.py).
#
# Needs Python 3.11; takes a minute. Exits with 0 while this is so, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import io

import pyarrow as pa
import pyarrow.parquet as pq


def opens(times: int, around) -> bool:
    dtype = pa.int64()
    for _ in range(times):
        dtype = around(dtype)
    file = io.BytesIO()
    pq.write_table(pa.table({"column": pa.array([None], dtype)}), file)
    try:
        pq.ParquetFile(io.BytesIO(file.getvalue()))
    except OSError as error:
        print(f"{times} times {around.__name__}: {error}")
        return False
    return True


def struct(inner: pa.DataType) -> pa.DataType:
    return pa.struct([("field", inner)])


assert opens(49, pa.list_) and opens(98, struct)
assert not opens(50, pa.list_) and not opens(99, struct)
PYTHON
