"""What a run has to do: its plan, minus what is committed, and what has to make room for it."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from batch_scorer.errors import LeaseLostError, ShardReason
from batch_scorer.failpoints import failpoint
from batch_scorer.inputs.plan import Plan
from batch_scorer.job import Job
from batch_scorer.outputs.manifest import committed
from batch_scorer.outputs.reuse import Earlier, keep, kept, nearest
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Commit, Receipt, Shard, Status
from batch_scorer.storage import Store, Version, in_threads

log = logging.getLogger("batch_scorer")

_DELETERS = 16
_BEGUN = "begun by a run that did not come to its end"
"""Of a file that is half done and not looked at: how much is left is not known."""


class Fate(Enum):
    """What becomes of a scored shard that is stored, under a new plan."""

    DONE = "is what the plan wants"
    RETRIED = "is what the plan wants, with marked rows that are tried again"
    STALE = "has the name of a wanted shard, and was made of something else"
    OUTDATED = "is a piece of a file that is cut differently now"
    ASIDE = "its input is there, but was not looked at"
    UNREADABLE = "its input is there, but cannot be used now"
    GONE = "its input is not there"


@dataclass(frozen=True, slots=True)
class Work:
    """A plan minus what is committed.

    `todo` is to be scored now; what is `left` has to wait for another run. `gone` are shards
    without an input, `failed` files that cannot be used and shards whose place another's object
    has. Of what is stored now, the `replaced` shards make room for those in `todo`, and the
    `outdated` are pieces of a file that is cut differently now. `aside` are copies that an earlier
    run made of such shards, and did not live to remove.
    """

    plan: Plan
    todo: list[Shard]
    done: list[Receipt]
    gone: list[Receipt]
    failed: list[Receipt]
    left: list[Receipt] = field(default_factory=list)
    replaced: list[Receipt] = field(default_factory=list)
    outdated: list[Receipt] = field(default_factory=list)
    aside: list[Earlier] = field(default_factory=list)


def remaining(
    plan: Plan,
    job: Job,
    output: Store,
    *,
    epoch: int | None = None,
    max_shards: int | None = None,
) -> Work:
    """Subtract what is committed under the same identity; changes nothing.

    Shards with rows that are marked for one of `retry_marked` are to be scored again, after all
    others, those first that were tried least often. With `max_shards` the first N of the rest are
    to be scored; the others are left, or, where their marked rows would only be tried again, stay
    as they are. Raises, for a run that holds the lease at `epoch`, LeaseLostError where a newer run
    has cut a file differently.
    """
    wanted = {shard.output_key: shard for shard in plan.shards}
    identities = {
        key: shard.identity(job.fingerprint.digest, job.config.column_prefix)
        for key, shard in wanted.items()
    }
    inputs = {part.input for part in plan.not_asked} | {s.source.key for s in plan.shards}
    unusable = {receipt.input for receipt in plan.failed}
    retried = set(job.config.retry_marked)

    def fate_of(key: str, commit: Commit) -> Fate:
        if key in wanted:
            if commit.identity != identities[key]:
                return Fate.STALE
            return Fate.DONE if retried.isdisjoint(commit.reasons) else Fate.RETRIED
        if commit.input in inputs:
            return Fate.OUTDATED
        if commit.input in plan.aside:
            return Fate.ASIDE
        return Fate.UNREADABLE if commit.input in unusable else Fate.GONE

    found: dict[Fate, list[Receipt]] = {fate: [] for fate in Fate}
    state = OutputState(output)
    in_the_way: dict[str, Receipt] = {}
    for info, receipt in state.shards():
        if receipt is not None and receipt.commit is not None:
            found[fate_of(info.key, receipt.commit)].append(receipt)
        elif info.key in wanted:
            detail = f"{output.url(info.key)} was not written by this program, or is damaged"
            reason = ShardReason.OBJECT_IN_THE_WAY
            failed = Receipt.of_shard(wanted[info.key], Status.FAILED, reason, detail)
            in_the_way[info.key] = failed
        else:
            log.warning("%s is not ours; left alone", output.url(info.key))
    if epoch is not None and any(r.commit and r.commit.epoch > epoch for r in found[Fate.OUTDATED]):
        raise LeaseLostError(f"{output.root}: a newer run works here; this one stops")

    roots = {shard.source.key: shard.source.root for shard in plan.shards}
    roots |= {key: source.root for key, source in plan.aside.items()}
    finished = {receipt.output_key for fate in (Fate.DONE, Fate.RETRIED) for receipt in found[fate]}
    undone = [s for key, s in wanted.items() if key not in finished and key not in in_the_way]
    stop = len(wanted) if max_shards is None else max_shards
    todo, left = undone[:stop], undone[stop:]
    tried = sorted(found[Fate.RETRIED], key=_retries)
    again, later = tried[: stop - len(todo)], tried[stop - len(todo) :]
    done, aside = (
        [replace(r, status=Status.COMMITTED, input_root=roots[r.input]) for r in receipts]
        for receipts in (found[Fate.DONE] + later, found[Fate.ASIDE])
    )
    todo += [replace(wanted[r.output_key], retries=_retries(r) + 1) for r in again]
    stale = {receipt.output_key: receipt for receipt in [*found[Fate.STALE], *again]}
    replaced = [stale[shard.output_key] for shard in todo if shard.output_key in stale]
    versions = {r.output_key: r.stored.version for r in replaced if r.stored is not None}
    # A file that waits as a whole keeps its old pieces: nothing comes in their place yet.
    waiting = {shard.source.key for shard in left} - {shard.source.key for shard in todo}
    waiting -= {receipt.input for receipt in done}
    begun = _begun(aside, state.manifest) if plan.aside else set()
    return Work(
        plan=plan,
        todo=[replace(shard, replaces=versions.get(shard.output_key)) for shard in todo],
        done=done + aside,
        failed=[*plan.failed, *in_the_way.values()],
        gone=[replace(receipt, status=Status.INPUT_GONE) for receipt in found[Fate.GONE]],
        left=[
            *(Receipt.of_shard(shard, Status.LEFT) for shard in left),
            *(
                Receipt.of_file(plan.aside[key], Status.LEFT, detail=_BEGUN)
                for key in sorted(begun & plan.aside.keys())
            ),
        ],
        replaced=replaced,
        outdated=[receipt for receipt in found[Fate.OUTDATED] if receipt.input not in waiting],
        aside=kept(job.config, output),
    )


def _retries(receipt: Receipt) -> int:
    return 0 if receipt.commit is None else receipt.commit.retries


def make_room(work: Work, job: Job, output: Store, donors: Iterable[Earlier] = ()) -> Work:
    """Copy aside what is about to be replaced, and remove old pieces; note in each shard where its
    file's rows may be found scored, in those copies or in other outputs (`donors`).

    Under the lease. What a crash leaves behind is found again by `remaining`.
    """
    fingerprint = job.fingerprint.digest
    rewritten = {shard.source.key for shard in work.todo}
    doomed = [receipt for receipt in work.outdated if receipt.input in rewritten]
    copies = keep(output, [*work.replaced, *doomed])
    failpoint("room.before_delete")

    def remove(receipt: Receipt) -> None:
        if receipt.stored is not None:
            output.delete_version(receipt.output_key, receipt.stored.version)

    for _ in in_threads(remove, work.outdated, _DELETERS):
        pass
    failpoint("room.after_delete")
    aside = list({copy.key: copy for copy in [*work.aside, *copies]}.values())
    candidates: dict[str, list[Earlier]] = defaultdict(list)
    for earlier in [*aside, *donors]:
        candidates[earlier.commit.input].append(earlier)
    todo = [
        replace(shard, earlier=nearest(shard, candidates[shard.source.key], fingerprint))
        if shard.source.key in candidates
        else shard
        for shard in work.todo
    ]
    return replace(work, todo=todo, aside=aside)


def remove_strays(epoch: int, output: Store, receipts: Sequence[Receipt]) -> None:
    """Remove what a run of an older plan has committed since `remaining` looked: pieces of a file
    that is cut in another way by now, whose rows a glob would find twice.

    After `Lease.close`: whoever comes later than this look takes its shard back itself.
    """
    if epoch == 1:
        return  # there is no older plan
    named = {receipt.output_key for receipt in receipts}
    now = (Status.COMMITTED, Status.NOT_ASKED)
    inputs = {receipt.input for receipt in receipts if receipt.status in now}
    others = (info for info in OutputState(output).objects() if info.key not in named)
    for info, receipt in committed(output, others, {}):
        commit = receipt.commit if receipt else None
        if commit is not None and commit.input in inputs and commit.epoch < epoch:
            output.delete_version(info.key, info.version)


def clear(work: Work, output: Store, receipts: Sequence[Receipt]) -> None:
    """Remove the copies of all files of which nothing is left to do, now that a run has ended."""
    failpoint("earlier.before_delete")
    unfinished = {r.input for r in receipts if r.status in (Status.FAILED, Status.LEFT)}
    keys = (copy.key for copy in work.aside if copy.commit.input not in unfinished)
    for _ in in_threads(output.delete, keys, _DELETERS):
        pass


def _begun(stored: Sequence[Receipt], published: Sequence[Receipt]) -> set[str]:
    """Inputs that were being scored when a run ended too soon: their shards are not, all of them,
    those that the last run that came to its end has published."""

    def by_input(receipts: Sequence[Receipt]) -> dict[str, set[tuple[str, Version | None]]]:
        shards: dict[str, set[tuple[str, Version | None]]] = defaultdict(set)
        for receipt in receipts:
            if receipt.status in (Status.COMMITTED, Status.INPUT_GONE):
                version = None if receipt.stored is None else receipt.stored.version
                shards[receipt.input].add((receipt.output_key, version))
        return shards

    now, then = by_input(stored), by_input(published)
    unfinished = {r.input for r in published if r.status in (Status.FAILED, Status.LEFT)}
    return {
        key
        for key in now.keys() | then.keys()
        if now.get(key) != then.get(key) or key in unfinished
    }
