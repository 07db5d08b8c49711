"""States that a drill is there to reach. One that never gets there proves nothing, so it fails."""

from collections import Counter
from collections.abc import Mapping, Sequence

from batch_scorer.failpoints import FAILPOINTS
from tests.fault.proxy import Answered, Kind
from tests.fault.sleepers import Slept

FAULTS_PER_STATE: Mapping[str, Mapping[str, int]] = {
    "races": {
        "many created one shard": 4,
        "many replaced one stale shard": 4,
        "a writer was refused by an equal commit": 1,
    },
    "failpoints": {
        "the lease of a killed run was taken over": 2,
        "a shard of a killed run was kept": 3,
    },
    "sleepers": {
        "the lease of a run that sleeps was taken over": 3,
        "a late writer was refused by the store": 20,
        "a late writer created a shard": 10,
        "a late shard was withdrawn": 20,
        "a late run was told that its output is another's": 4,
    },
    "store_faults": {
        "an answer was lost, and the store refused the same PUT again": 50,
        "a shard's PUT was refused by an equal object": 100,
        "a run got through its faults": 25,
        "a run reported a fault, and the next one finished": 50,
    },
    "kills": {
        "a worker was killed while shards were left": 10,
        "a node was lost while shards were left": 10,
        "a driver was killed while shards were left": 10,
        "a run was resumed that had committed shards": 20,
    },
}
"""By part: the state, and within how many faults of the part it has to occur once."""

_NO_LEASE = {"claim.before_put", "lease.before_take", "put.applied"}
_HAVE_SHARDS = list(FAILPOINTS)[list(FAILPOINTS).index("commit.after_put") :]


def never_seen(part: str, faults: int, seen: Mapping[str, int]) -> list[str]:
    """The states that so many faults must have reached, and did not often enough."""
    wrong = []
    for state, per in FAULTS_PER_STATE[part].items():
        least = faults // per
        if seen.get(state, 0) < least:
            wrong.append(f"only {seen.get(state, 0)} times in {faults} faults: {state} ({least})")
    return wrong


def of_killed(failpoint: str) -> Counter[str]:
    """`failpoint`: where the run was killed."""
    return Counter(
        {
            "the lease of a killed run was taken over": failpoint not in _NO_LEASE,
            "a shard of a killed run was kept": failpoint in _HAVE_SHARDS,
        }
    )


def of_sleeper(slept: Slept, output: str, late: Sequence[Answered]) -> Counter[str]:
    """`late`: what the store answered to the sleeper after it woke up."""
    puts = _puts_of_shards(late)
    created = {put.key.rpartition(f"/{output}/")[2] for put in puts if put.is_done}
    name = slept.failpoint.partition(":")[0]
    return Counter(
        {
            "the lease of a run that sleeps was taken over": name not in _NO_LEASE,
            "a late writer was refused by the store": any(put.is_refused for put in puts),
            "a late writer created a shard": bool(created),
            "a late shard was withdrawn": bool(created - set(slept.left)),
            "a late run was told that its output is another's": slept.code in (2, 3),
        }
    )


def of_faults(answered: Sequence[Answered], code: int) -> Counter[str]:
    """`answered`: by the store, to a run that ended with this code."""
    seen: Counter[str] = Counter()
    lost: set[str] = set()
    for put in (one for one in answered if one.method == "PUT"):
        if put.is_refused and put.key in lost:
            seen["an answer was lost, and the store refused the same PUT again"] += 1
            seen["a shard's PUT was refused by an equal object"] += _is_shard(put.key)
            lost.discard(put.key)
        elif put.is_done and put.kind in (Kind.LOST, Kind.TWICE, Kind.RESET, Kind.STALL):
            lost.add(put.key)
        else:
            lost.discard(put.key)
    seen["a run got through its faults"] += code == 0
    seen["a run reported a fault, and the next one finished"] += code != 0
    return seen


def _puts_of_shards(answered: Sequence[Answered]) -> list[Answered]:
    return [one for one in answered if one.method == "PUT" and _is_shard(one.key)]


def _is_shard(key: str) -> bool:
    return key.endswith(".parquet") and "/_batch_scorer/" not in key
