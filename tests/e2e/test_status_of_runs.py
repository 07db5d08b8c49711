"""`status` beside a run that is live, and on the output of `nightly`."""

from functools import partial
from pathlib import Path

import pytest

from batch_scorer import Config, read_status
from batch_scorer.outputs.ledger import Ledger
from batch_scorer.records import Receipt
from batch_scorer.runs import run
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.status import OutputStatus
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place

pytestmark = pytest.mark.e2e

SHARDS = 4
SHARD_ROWS = 5


class Watcher:
    """Asks for the status whenever a shard has ended."""

    def __init__(self, output: str) -> None:
        self._output = output
        self.seen: list[OutputStatus] = []

    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None:
        self.seen.append(read_status(self._output))


def test_the_status_of_a_live_run_follows_it(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(pairs(SHARDS * SHARD_ROWS))})
    monkeypatch.setattr(run, "Ledger", partial(Ledger, every_s=0.0))  # not every ten seconds
    watcher = Watcher((place / "out").url)
    config = Config(
        model=str(tiny_model),
        inputs=((place / "in").url,),
        output=(place / "out").url,
        backend="fake",
        shard_rows=SHARD_ROWS,
        use_ray=False,
    )
    run.score(config, watcher)
    assert [status.state for status in watcher.seen] == ["running"] * SHARDS
    assert [status.shards_committed for status in watcher.seen] == [1, 2, 3, 4]
    assert all(status.holder and status.renewed_s is not None for status in watcher.seen)
    left = [status.left_s for status in watcher.seen]
    assert all(seconds is not None and seconds >= 0 for seconds in left) and left[-1] == 0
    ended = read_status((place / "out").url)
    assert (ended.state, ended.holder, ended.left_s) == ("complete", None, None)


def nightly(place: Place, model: Path, *flags: object) -> None:
    ended = run_cli(
        "nightly", (place / "in").url, "--model", model, "--output", (place / "nights").url,
        "--backend", "fake", "--no-ray", "--shard-rows", SHARD_ROWS, *flags,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err


def test_the_status_of_a_nightly_output_has_its_newest_generation_the_pointer_and_the_last_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(pairs(2 * SHARD_ROWS))})
    nightly(place, tiny_model)
    root = (place / "nights").url
    first = run_cli("status", root, "--json").json
    (old,) = first["latest"].values()
    assert (first["night"]["night"], first["night"]["has_moved"], first["holder"]) == (
        1,
        True,
        None,
    )
    assert {path: status["state"] for path, status in first["generations"].items()} == {
        old: "complete"
    }

    # Other scores need another generation; the second run scores only a part of it.
    nightly(place, tiny_model, "--max-tokens", 3000, "--max-shards", 1)
    second = run_cli("status", root, "--json").json
    assert list(second["latest"].values()) == [old]
    ((new, status),) = second["generations"].items()
    assert new != old
    assert (status["state"], status["shards_committed"], status["shards_left"]) == (
        "interrupted", 1, 1,
    )  # fmt: skip
    assert (second["night"]["night"], second["night"]["has_moved"]) == (2, False)

    shown = run_cli("status", root).out
    assert f"{root}: no nightly run is running" in shown
    assert f"latest.json points to {old} (main)" in shown
    assert f"{root}/{new}: interrupted" in shown
    assert "Nightly run 2" in shown and "1 shards are left" in shown
