"""Outputs in which older runs have left rows twice."""

import pytest

from batch_scorer import verify
from batch_scorer.outputs.repair import find_strays
from tests.helpers.in_process import run_cli
from tests.stores.jobs import StoreJob
from tests.stores.readers import rows_by_reader

pytestmark = [
    pytest.mark.fault,
    pytest.mark.parametrize("any_store", ["s3-versioned", "azure"], indirect=True),
]


def test_old_pieces_that_stayed_are_removed_and_the_rows_are_there_once(job: StoreJob) -> None:
    """The pieces of a rewritten file, where a run could not remove them (fault 1)."""
    job.run(job.config("out"))
    before = (job.place / "out").shards()
    job.write_inputs(newer=True)
    job.run(job.config("out"))
    old = before.keys() - (job.place / "out").shards().keys()
    assert old
    (job.place / "out").write({key: before[key].data for key in old})
    found = rows_by_reader(job.mirrored("out"))
    assert found == dict.fromkeys(found, 12 + 4)
    url, options = (job.place / "out").url, job.place.options
    assert len(verify(url, options).problems) == len(old)

    strays = find_strays(url, options)
    assert {stray.key for stray in strays} == old
    ended = run_cli("verify", url, *(job.place / "out").flags, "--repair")
    assert ended.exit_code == 0, ended.err
    assert all(f"to be removed: {key}: " in ended.out for key in old)
    assert f"removed {len(old)} scored shards" in ended.out
    assert find_strays(url, options) == []
    again = run_cli("verify", url, *(job.place / "out").flags, "--repair")
    assert "removed 0 scored shards" in again.out
    job.assert_right("out", job.undisturbed(), same_bytes=False)

    # And once more: nothing of it is scored again.
    shards = (job.place / "out").shards()
    job.run(job.config("out"))
    assert (job.place / "out").shards() == shards
