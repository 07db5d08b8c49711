"""What it takes to get a run to a failpoint; the drill uses it too."""

from tests.fault.forked import Scene
from tests.fault.small_job import SmallJob

TERM_S = 0.6
DWELL_S = 3 * TERM_S
"""Longer than a term, so that the lease has to be renewed, three times a term."""
RENEWALS = 6
A_SHARD = "a.rows0-3.parquet"


def scene_of(name: str, job: SmallJob) -> Scene:
    """What it takes to get to a failpoint."""
    if name == "commit.after_refusal":
        # Of the same rows from another folder: with the run's own bytes there, its PUT has won.
        inputs = "in-elsewhere"
        job.write_inputs(inputs)
        job.undisturbed(inputs)
        return Scene(appears={A_SHARD: f"{job.place.url}/undisturbed-{inputs}/{A_SHARD}"})
    return Scene(dwell_s=DWELL_S if "renew" in name else 0.0)


def failpoint_of(name: str, action: str) -> str:
    """In the middle of what happens more than once; the lease is renewed beside the run, so there
    while it dwells: whoever sleeps in the middle of a write on a local disk holds up everyone."""
    is_repeated = name.startswith("commit.") and name != "commit.after_refusal"
    count = RENEWALS if "renew" in name else 2 if is_repeated else 1
    return f"{name}:{action}:{count}"
