"""Whatever a scheduler does to a nightly: every shard is committed once, and readers lose nothing.

Schedulers skip triggers, double them, send them late, together, or again for a day long past; they
kill what they started; and people change files while a night is at work. HISTORIES in the
environment is how many such stories `make slow` makes up.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from batch_scorer import Config
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.nightly.night import Night, run_night
from batch_scorer.records import Scores, TokenizedRows
from tests.fault.histories import FIRST_DAY, Histories
from tests.helpers.inputs import pair_rows, parquet, table_of
from tests.helpers.places import Place
from tests.helpers.tiny import tiny_reward_model

pytestmark = pytest.mark.fault

FEW, MANY = 40, int(os.environ.get("HISTORIES", "100"))
STEPS = 12


@pytest.mark.parametrize("histories", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_every_history_ends_well(histories: int, tiny_model: Path, tmp_path: Path) -> None:
    class Machine(Histories):
        models: ClassVar[list[Path]] = [
            tiny_model,
            tiny_reward_model(tmp_path / "other", bos=True),
        ]

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_thirty_missed_nights_are_caught_up_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(str(tmp_path))
    days = [FIRST_DAY + timedelta(days) for days in range(30)]
    for number, day in enumerate(days):
        (place / "in").write({f"dt={day}/x.parquet": parquet(table_of(pair_rows(2, 2 * number)))})
    asked: list[int] = []
    score_all = FakeBackend.score

    def counting(self: FakeBackend, rows: TokenizedRows) -> Scores:
        asked.append(rows.num_sequences)
        return score_all(self, rows)

    monkeypatch.setattr(FakeBackend, "score", counting)
    config = Config(
        model=str(tiny_model),
        inputs=((place / "in").url,),
        output=(place / "out").url,
        backend="fake",
        use_ray=False,
    )
    caught_up = run_night(config, Night())
    assert caught_up.record is not None
    assert caught_up.record.series[0].rows.new == 60
    assert sum(asked) == 120

    def written() -> dict[str, Any]:
        return {i.key: i.version for i in (place / "out").store.list() if "_batch" not in i.key}

    before = written()
    for day in days:
        late = run_night(config, Night(until=day))
        assert (late.record, late.is_complete) == (None, True)
    assert sum(asked) == 120
    assert {k: v for k, v in written().items() if "_SUCCESS" not in k} == {
        k: v for k, v in before.items() if "_SUCCESS" not in k
    }
