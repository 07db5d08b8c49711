"""Start a local Ray cluster and an S3 server in the background; `down.py` ends both.

python -m cluster.local.up [--nodes 4] [--gpus-per-node 1] [--folder /tmp/bs-local]
"""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from cluster.local.local_cluster import MOST_NODES, start_cluster
from cluster.local.processes import end_processes_in
from cluster.local.seaweed import start_s3

DEFAULT_FOLDER = Path("/tmp/bs-local")
STATE = "cluster.json"
_CPUS_PER_NODE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=4, help=f"workers, {MOST_NODES} at most")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="fake ones, for scheduling")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="for all that it keeps")
    asked = parser.parse_args()
    folder: Path = asked.folder.resolve()
    down = shlex.join(["python", "-m", "cluster.local.down", "--folder", str(folder)])
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        sys.exit(f"error: {folder} exists; is a cluster up there? To end it:  {down}")
    try:
        s3 = start_s3(folder / "s3")
        cluster = start_cluster(
            folder, nodes=asked.nodes, cpus=_CPUS_PER_NODE, gpus=asked.gpus_per_node,
            env=s3.environment,
        )  # fmt: skip
    except BaseException as error:
        end_processes_in(folder)
        shutil.rmtree(folder)
        if isinstance(error, (RuntimeError, ValueError)):
            sys.exit(f"error: {error}")
        raise
    pids = {node.name: node.pid for node in (cluster.head, *cluster.nodes)} | {"s3": s3.pid}
    state = {"address": cluster.address, "dashboard": cluster.dashboard, "s3": s3.endpoint}
    (folder / STATE).write_text(json.dumps({**state, "pids": pids}, indent=2) + "\n")
    print(
        f"{asked.nodes} nodes of {_CPUS_PER_NODE} CPUs and {asked.gpus_per_node} fake GPUs, and an "
        f"S3 server at {s3.endpoint}, run in the background; state, logs and token: {folder}\n"
    )
    for name, value in (cluster.environment | s3.environment).items():
        print(f"export {name}={shlex.quote(value)}")
    options = " ".join(f"--store-option {name}={value}" for name, value in s3.options.items())
    print(
        "\nThen, on CPUs, as the GPUs are none:\n"
        f"batch-scorer submit -- score INPUT --model MODEL --device cpu \\\n"
        f"    --output {s3.url('scored')} {options}\n"
        f"\nTo end it:\n{down}"
    )


if __name__ == "__main__":
    main()
