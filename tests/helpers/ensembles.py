"""An output with the columns of an ensemble: members, what is made of them, and disagreement."""

from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from batch_scorer.records import Format, Layout, TextStyle
from tests.helpers.places import Place
from tests.helpers.scored import CANARY
from tests.helpers.written import write_scored

MEMBERS = ("helpful", "safety", "<b>brief</b>")
ROLLOUTS = Layout(
    Format.ROLLOUT_GROUP, {"prompt": "prompt", "responses": "responses"}, TextStyle.PLAIN
)
SHARD_ROWS = 40


def disagreement_of(scores: list[list[float]]) -> float | None:
    """Of members' scores of a row's answers: the share of pairs of members and of answers that two
    members order differently; None of fewer than two answers."""
    answers = list(combinations(range(len(scores[0])), 2))
    members = list(combinations(scores, 2))
    differ = [np.sign(a[i] - a[j]) != np.sign(b[i] - b[j]) for a, b in members for i, j in answers]
    return float(np.mean(differ)) if differ else None


def ensemble_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Prompts with one to five answers, scored by three members; one in nine lacks a score."""
    random = np.random.default_rng(start)
    rows = []
    for number in range(start, start + count):
        answers = 1 + number % 5
        base = random.normal(size=answers)
        shifts = {"helpful": (1.0, 0.0), "safety": (5.0, 100.0), "<b>brief</b>": (-0.5, 0.0)}
        scores: list[list[float | None]] = [
            np.float32(scale * (base + random.normal(size=answers)) + shift).tolist()
            for scale, shift in shifts.values()
        ]
        complete = [[float(value or 0) for value in each] for each in scores]
        row: dict[str, Any] = {
            "prompt": f"{number}. {CANARY}",
            "responses": [f"answer {k} {CANARY}" for k in range(answers)],
            "source": f"source {number % 3}",
        }
        is_marked = number % 9 == 4
        if is_marked:
            scores[1][0] = None
        for name, each in zip(MEMBERS, scores, strict=True):
            row[f"{name}_scores"] = each
            row[f"{name}_score_error"] = "non_finite_score" if None in each else None
            row[f"{name}_num_tokens"] = [10 + 7 * k for k in range(answers)]
        together = {
            "mean": np.mean(complete, axis=0),
            "min": np.min(complete, axis=0),
            "std": np.std(complete, axis=0),
        }
        for name, values in together.items():
            row[f"{name}_scores"] = values.tolist()
            if is_marked:
                row[f"{name}_scores"][0] = None
        row["score_error"] = "non_finite_score" if is_marked else None
        row["rank_disagreement"] = None if is_marked else disagreement_of(complete)
        rows.append(row)
    return rows


def ensemble_table(rows: list[dict[str, Any]]) -> pa.Table:
    lists, texts = pa.list_(pa.float32()), pa.list_(pa.string())
    kinds = {"prompt": pa.string(), "responses": texts, "source": pa.string()}
    kinds |= {"score_error": pa.string(), "mean_scores": lists, "min_scores": lists}
    kinds |= {"std_scores": lists, "rank_disagreement": pa.float32()}
    for name in MEMBERS:
        kinds[f"{name}_scores"] = lists
        kinds[f"{name}_score_error"] = pa.string()
        kinds[f"{name}_num_tokens"] = pa.list_(pa.int32())
    return pa.Table.from_pylist(rows, pa.schema(kinds))


def ensemble_output(place: Place, shards: int = 3) -> tuple[Place, list[dict[str, Any]]]:
    """The output, and its rows as they are stored."""
    tables = [
        ensemble_table(ensemble_rows(SHARD_ROWS, number * SHARD_ROWS)) for number in range(shards)
    ]
    added = [
        name for name in tables[0].column_names if name not in ("prompt", "responses", "source")
    ]
    write_scored(
        place.store,
        ((f"{number}.parquet", table) for number, table in enumerate(tables)),
        ROLLOUTS,
        added,
    )
    return place, [row for table in tables for row in table.to_pylist()]
