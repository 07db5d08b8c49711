"""End what `up.py` started, by process id, and remove its folder.

python -m cluster.local.down [--folder /tmp/bs-local]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from cluster.local.processes import end_processes_in
from cluster.local.seaweed import remove_sockets
from cluster.local.up import DEFAULT_FOLDER, STATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="the folder of up.py")
    folder: Path = parser.parse_args().folder
    try:
        state = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        sys.exit(f"error: {folder} is no folder of a local cluster: it has no {STATE}")
    ended = end_processes_in(folder)
    remove_sockets(state["s3"])
    shutil.rmtree(folder)
    print(f"ended {ended} processes; {folder} is removed")


if __name__ == "__main__":
    main()
