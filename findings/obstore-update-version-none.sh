#!/usr/bin/env bash
# obstore 0.12.1: what `put` returns cannot be given back to `put`.
#
# Expected: `UpdateVersion` is typed `version: str | None`, and its documentation recommends to keep
#   both fields of a put's result, tag and version, for the next conditional put. So
#   `put(store, key, data, mode=result_of_the_last_put)` replaces exactly that version.
# Seen: wherever the store has no version (local, memory, S3 without versioning, Azure), the result
#   holds `version: None`, and passing it on raises TypeError: 'None' is not an instance of 'str'.
#   Without the field the same call succeeds.
# Why it matters here: a compare-and-swap written as the types allow works on GCS and on S3 with
#   versioning, and fails everywhere else; batch_scorer/storage/versions.py leaves the field out.
#
# Exits with 0 while this is so, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check obstore==0.12.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import obstore
from obstore.store import MemoryStore

store = MemoryStore()
first = obstore.put(store, "key", b"1")
print("put:", first)
try:
    print("put with that result as mode:", obstore.put(store, "key", b"2", mode=first))
except TypeError as error:
    print("put with that result as mode: TypeError:", error)
    print("without `version`:", obstore.put(store, "key", b"2", mode={"e_tag": first["e_tag"]}))
else:
    sys.exit("changed: a put's result can be given back")
PYTHON
