"""A nightly root with a history: new rows, a rewritten file, a row without score, another model."""

from pathlib import Path
from typing import Any

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import Row, pair_rows, parquet, table_of
from tests.helpers.places import Place
from tests.helpers.scored import CANARY


def night_rows(count: int, start: int = 0) -> list[Row]:
    """Pairs of two sources, whose names are markup."""
    rows = pair_rows(count, start)
    for number, row in enumerate(rows):
        row["source"] = f"<b>source {number % 2}</b>"
    return rows


def nightly_root(place: Place, model: Path, other: Path, *flags: object) -> tuple[Place, list[Any]]:
    """The root after four nights, and what each printed. The last one has another model."""
    rows = night_rows(12)
    printed = []

    def night(own: Path, **files: list[Row]) -> None:
        (place / "in").write({f"{name}.parquet": parquet(table_of(f)) for name, f in files.items()})
        ended = run_cli(
            "nightly", (place / "in").url, "--model", own, "--output", (place / "root").url,
            "--backend", "fake", "--no-ray", "--shard-rows", "8", *place.flags, *flags, "--json",
        )  # fmt: skip
        assert ended.exit_code == 0, ended.err
        printed.append(ended.json)

    night(model, a=rows)
    night(model, b=night_rows(9, 100))
    changed = [*rows[:5], {**rows[5], "chosen": None}, *night_rows(3, 200)]
    changed[0] = {**changed[0], "source": CANARY}
    night(model, a=changed)
    night(other, c=night_rows(4, 300))
    return place / "root", printed
