#!/usr/bin/env bash
# obstore 0.12.1: a local folder's listing leaves files out, or fails for all of them because of one.
#
# Expected: `LocalStore(folder).list()` gives every file below the folder, or names the one that it
#   cannot give.
# Seen: a link to a file that is gone, and a named pipe, are left out without a word. A folder that
#   links to itself, or a name with a control character, ends the listing with an error, and none of
#   the files beside it is given. Opening the store on a file instead of a folder succeeds.
# Why it matters here: what is not listed is not scored, and nobody would hear of it. Local folders are
#   listed by our own walk, which names each entry that it cannot use (batch_scorer/storage/folders.py).
#
# Needs Python 3.11; takes a minute. Exits with 0 while this is so, and with 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check obstore==0.12.1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import LocalStore


def made(name: str) -> Path:
    place = Path(sys.argv[1]) / name
    place.mkdir()
    (place / "a.parquet").write_bytes(b"a")
    return place


def listed(place: Path) -> list[str]:
    return [each["path"] for page in LocalStore(str(place)).list() for each in page]


quiet = made("quiet")
os.mkfifo(quiet / "pipe.parquet")
(quiet / "gone.parquet").symlink_to(quiet / "nothing")
print("listed:", listed(quiet))
assert listed(quiet) == ["a.parquet"]

circle, control = made("circle"), made("control")
(circle / "again").symlink_to(circle)
(control / "a\nb.parquet").write_bytes(b"b")
for place in (circle, control):
    try:
        listed(place)
    except (BaseError, ValueError) as error:
        print(f"{place.name}: {str(error).splitlines()[0][:90]}")
    else:
        raise SystemExit(f"{place.name}: the listing comes to its end now")

LocalStore(str(quiet / "a.parquet"))
PYTHON
