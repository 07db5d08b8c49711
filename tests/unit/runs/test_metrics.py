from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.config import ENGINES
from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.outputs.claim import claim_output
from batch_scorer.outputs.lease import Lease
from batch_scorer.outputs.ledger import Ledger
from batch_scorer.pipeline import worker
from batch_scorer.records import ScoredRows, Scores, TokenizedRows
from batch_scorer.reports.figures import duration, figure_rows, scaled
from batch_scorer.runs.metrics import Metrics, newest_run, record_run
from batch_scorer.runs.status import read_status
from batch_scorer.storage import Store
from tests.helpers.receipts import FAILED, ONE, OTHER, RUN, SHARD


def test_figures_are_sums_over_shards() -> None:
    figures = Metrics.of([ONE, OTHER]).to_json(RUN)
    assert figures == {
        "goodput_tokens_per_s_per_device": 1500 / 5.0 / 2,
        "computed_ratio": 900 / 1500,
        "padding_share": 100 / 1000,
        "model_flop_utilisation": 2e6 / 4e6,
        "idle_share": 1.0 / 5.0,
        "scored_tokens": 1500,
        "reused_rows": 0,
        "reused_sequences": 0,
        "reused_tokens": 0,
        "tokenized_sequences": 0,
        "num_batches": 3,
        "computed_tokens": 900,
        "padding_tokens": 100,
        "shared_tokens": 350,
        "attended_pairs": 40_000,
        "oom_splits": 0,
        "generated_tokens": 0,
        "token_cost": None,
        "model_flop": 900 * 2000.0 + 40_000 * 5.0,
        "peak_flop_per_s": 1e6,
        "span_s": 5.0,
        "read_s": 0.5,
        "tokenize_s": 1.0,
        "wait_s": 1.0,
        "score_s": 4.0,
        "reward_s": 0.5,
        "write_s": 1.5,
        "workers": 1,
        "devices": 2,
    }


def test_where_workers_come_and_go_each_counts_for_as_long_as_it_was_there() -> None:
    run = replace(RUN, workers=4, devices=8, is_elastic=True)
    metrics = Metrics.of([ONE, OTHER])
    assert metrics.goodput(run) == 1500 / ((4.0 + 1.0) * 2)  # scored and waited, on two devices


def test_every_figure_is_explained() -> None:
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    assert [name for name in Metrics().to_json(RUN) if f"`{name}`" not in page] == []


def test_the_peak_is_that_of_the_worker_that_scored() -> None:
    slow = replace(OTHER, engine="slow", spent=replace(OTHER.spent, peak_flops=0.5e6))
    metrics = Metrics.of([ONE, slow])
    assert metrics.utilisation(RUN) == 2e6 / (3.0 * 1e6 + 1.0 * 0.5e6)
    assert metrics.peak_flops == 3.5e6 / 4.0


def test_the_best_look_at_the_peak_counts_for_all_of_a_run() -> None:
    """A worker's first look may come while other stages keep its cores busy."""
    disturbed = replace(ONE, spent=replace(ONE.spent, peak_flops=0.2e6))
    assert Metrics.of([disturbed, OTHER]).peak_flops == 1e6


def test_a_served_judge_s_tokens_have_a_price() -> None:
    run = replace(RUN, token_prices={"prompt": 2.0, "generated": 8.0})
    metrics = Metrics.of([ONE, OTHER])
    metrics.effort.generated_tokens = 70
    assert metrics.token_cost(run) == ((900 + 350) * 2.0 + 70 * 8.0) / 1e6
    assert metrics.token_cost(RUN) is None


def test_nothing_is_divided_by_nothing() -> None:
    for metrics in (Metrics(), Metrics.of([FAILED])):
        figures = metrics.to_json(RUN)
        assert [name for name, value in figures.items() if value is None] == [
            "goodput_tokens_per_s_per_device",
            "computed_ratio",
            "padding_share",
            "model_flop_utilisation",
            "idle_share",
            "token_cost",
            "peak_flop_per_s",
        ]
        assert figure_rows(figures) == []
        assert metrics.left_s(1500) is None


def test_utilisation_is_not_known_where_a_peak_or_the_cost_is_not() -> None:
    unmeasured = Metrics.of([ONE, replace(OTHER, spent=replace(OTHER.spent, peak_flops=0.0))])
    assert unmeasured.utilisation(RUN) is unmeasured.peak_flops is None
    metrics = Metrics.of([ONE, OTHER])
    assert metrics.utilisation(replace(RUN, cost=None)) is None
    assert metrics.model_flop(replace(RUN, cost=None)) is None


def test_utilisation_is_at_most_all_of_the_device(tmp_path: Path) -> None:
    """The peak was measured while the stages before it were busy: 149.6 % was shown."""
    underestimated = Metrics.of([replace(ONE, spent=replace(ONE.spent, peak_flops=0.1e6))])
    flop = underestimated.model_flop(RUN)
    assert flop is not None and flop / underestimated.possible_flop > 1
    assert underestimated.utilisation(RUN) == 1.0
    figures = underestimated.to_json(RUN)
    assert figures["model_flop_utilisation"] == 1.0
    assert dict(figure_rows(figures))["model-FLOP utilisation"].startswith("100.0% of")

    store = Store(str(tmp_path / "out"), {}, create=True)
    record_run(store, RUN, {**figures, "model_flop_utilisation": 1.496})  # from before the bound
    assert newest_run(store) == (RUN, figures)


def test_a_failed_shard_is_work_that_is_over_but_no_goodput() -> None:
    metrics = Metrics.of([ONE, replace(FAILED, estimated_tokens=200)])
    assert metrics.scored_tokens == 1000
    # 1,000 of 1,500 estimated tokens took 4 seconds.
    assert metrics.left_s(1500) == 2.0
    assert metrics.left_s(900) == 0.0


def test_a_run_is_recorded_when_it_sets_out_and_when_it_has_ended(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), {}, create=True)
    assert newest_run(store) is None
    record_run(store, RUN, None)
    assert newest_run(store) == (RUN, None)
    figures = Metrics.of([ONE]).to_json(RUN)
    record_run(store, RUN, figures)
    assert newest_run(store) == (RUN, figures)
    later = replace(RUN, epoch=11, cost=None)
    record_run(store, later, None)
    assert newest_run(store) == (later, None)


def test_status_follows_a_run_by_its_receipts(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), {}, create=True)
    claim_output(store, Fingerprint({}), {}, {})
    before = replace(ONE, output_key="before.parquet", epoch=RUN.epoch - 1)
    Ledger(store, RUN.epoch - 1, "earlier", every_s=0).add(before)
    assert read_status(store.root).metrics is None
    with Lease(store, "digest", 30.0) as lease:
        record_run(store, RUN, None)
        Ledger(store, RUN.epoch, lease.holder_id, every_s=0).add(replace(ONE, epoch=RUN.epoch))
        status = read_status(store.root)
        assert status.state == "running"
        assert status.metrics == Metrics.of([ONE]).to_json(RUN)
        assert status.left_s == Metrics.of([ONE]).left_s(RUN.estimated_tokens) == 3.5
    assert (read_status(store.root).state, read_status(store.root).left_s) == ("interrupted", None)
    record_run(store, RUN, Metrics.of([ONE, OTHER]).to_json(RUN))
    assert read_status(store.root).metrics == Metrics.of([ONE, OTHER]).to_json(RUN)


def test_figures_in_words() -> None:
    rows = dict(figure_rows(Metrics.of([ONE, OTHER]).to_json(RUN)))
    assert rows == {
        "goodput": "150 tokens/s per device",
        "computed of the rows' tokens": "60.0%",
        "padding": "10.0%",
        "model-FLOP utilisation": "50.0% of 1.00 MFLOP/s measured",
        "device idle between shards": "20.0%",
        "reading, tokenising, writing": "0.5 s, 1.0 s, 1.5 s",
        "reward functions": "0.5 s",
    }
    assert [scaled(value, "FLOP") for value in (0, 12.3, 999.4, 999.6, 3.2e15)] == [
        "0.00 FLOP", "12.3 FLOP", "999 FLOP", "1.00 kFLOP", "3.20 PFLOP",
    ]  # fmt: skip
    assert (duration(65.9), duration(3661)) == ("1:05", "1:01:01")


def test_waits_and_scores_of_a_worker_add_up_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests and checks after the backend count as waiting, as does a shard that fails."""
    # One look at the start, two for each shard: 3 s in the backend of 4, a failure, 2 s of 2.5.
    clock = iter([0.0, 10.0, 14.0, 15.0, 16.0, 17.0, 19.5])
    scored: Iterator[Any] = iter([3.0, ShardError(ShardReason.INTERNAL, "torn"), 2.0])

    def score_shard(*_: Any) -> ScoredRows:
        result = next(scored)
        if isinstance(result, ShardError):
            raise result
        nothing = np.zeros(1, dtype=np.int64)
        return ScoredRows(
            Scores(np.zeros((0, 1), np.float32)), np.zeros(0, np.int32), np.zeros(0, np.int32),
            nothing, {}, "", {}, score_s=result,
        )  # fmt: skip

    timer = SimpleNamespace(perf_counter=lambda: next(clock), time=lambda: 0.0)
    monkeypatch.setattr(worker, "time", timer)
    monkeypatch.setattr(worker, "score_shard", score_shard)
    config = SimpleNamespace(hang_s=60.0)
    job: Any = SimpleNamespace(engine=ENGINES["fake"], config=config, judging=None)
    scorer = worker.Scorer(job, None, lambda job: FakeBackend())
    nothing = np.zeros(2, np.int64)
    rows = TokenizedRows(
        np.zeros(0, np.int32), nothing, np.arange(2), np.zeros(1, np.int32), {}, {}
    )
    waits = [scorer.score(worker.Item(SHARD, rows)).spent.wait_s for _ in range(3)]
    assert waits == [1.0, 0.0, 1.5]
