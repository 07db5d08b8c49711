"""What the plain loop hands to its reader."""

from collections.abc import Mapping
from pathlib import Path

from batch_scorer import Config, logs, score
from batch_scorer.records import Receipt
from batch_scorer.runs.remaining import Work
from tests.helpers.inputs import pairs, parquet


class Reader:
    """Notes the fields that its log lines would carry."""

    def __init__(self) -> None:
        self.planned_with: Mapping[str, logs.Field] = {}
        self.finished_with: list[Mapping[str, logs.Field]] = []

    def planned(self, work: Work) -> None:
        self.planned_with = logs.carry().fields

    def finished(self, receipt: Receipt) -> None:
        self.finished_with.append(logs.carry().fields)


def test_a_reader_of_receipts_does_not_log_with_a_shard_s_attempt(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Receipts were handed on while the fields of their shard were set."""
    (tmp_path / "a.parquet").write_bytes(parquet(pairs(4)))
    reader = Reader()
    config = Config(
        model=str(tiny_model),
        inputs=(str(tmp_path / "a.parquet"),),
        output=str(tmp_path / "out"),
        backend="fake",
        shard_rows=2,
        use_ray=False,
    )
    score(config, reader)
    assert reader.planned_with["run"] == "out:1"
    assert reader.finished_with == [reader.planned_with] * 2
