"""What it takes to get a run to a failpoint; the drill uses it too."""

import io
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from batch_scorer.outputs.lease import RECORDS
from batch_scorer.records import Commit
from batch_scorer.storage import ObjectMissing
from tests.fault.forked import Scene
from tests.fault.small_job import SmallJob

TERM_S = 0.6
"""Of a lease whose end a test waits for; nothing goes wrong where it takes longer."""
DWELL_S = 300.0
"""At most: a run dwells until the renewal at which its failpoint is has come, and ends or stops it,
or the thread that renews."""
RENEWALS = 2
A_SHARD = "a.rows0-3.parquet"


def scene_of(name: str, job: SmallJob) -> Scene:
    """What it takes to get to a failpoint; `job.undisturbed()` has run."""
    if name == "commit.after_refusal":
        return Scene(appears={A_SHARD: str(_stale_shard(job))})
    return Scene(dwell_s=DWELL_S if "renew" in name else 0.0)


def _stale_shard(job: SmallJob) -> Path:
    """A file with a shard of an older plan: with the right bytes, a refused PUT would be taken for
    one whose answer was lost."""
    table = pq.read_table(io.BytesIO(job.at("undisturbed-in").read(A_SHARD)))
    commit = Commit.from_footer(table.schema.metadata)
    assert commit is not None
    footer = replace(commit, identity="of an older plan").footer()
    file = job.runs.log.parent / A_SHARD
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **footer}), file)
    return file


def sleeper_term_s(failpoint: str) -> float:
    """The lease of a run that will be stopped at a failpoint: long, unless that is a renewal. On a
    local disk nobody can write while a process is stopped in the middle of renewing."""
    return TERM_S if "renew" in failpoint else 60.0


def end_term(job: SmallJob, output: str) -> None:
    """Of the lease of a run that was stopped, which so need not be waited for."""
    store, key = (job.place / output).store, f"{RECORDS}/lease.json"
    with suppress(ObjectMissing):
        data, info = store.read_with_info(key)
        store.replace(key, json.dumps(json.loads(data) | {"ttl_s": 0.0}).encode(), info.version)


def failpoint_of(name: str, action: str) -> str:
    """In the middle of what happens more than once; the lease is renewed beside the run, so there
    while it dwells: whoever sleeps in the middle of a write on a local disk holds up everyone."""
    is_repeated = name.startswith("commit.") and name != "commit.after_refusal"
    count = RENEWALS if "renew" in name else 2 if is_repeated else 1
    return f"{name}:{action}:{count}"
