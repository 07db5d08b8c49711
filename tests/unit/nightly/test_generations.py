"""Which generation a nightly run scores, and what `latest.json` names."""

from dataclasses import replace
from pathlib import Path

import pytest

from batch_scorer.errors import LeaseLostError
from batch_scorer.nightly.generations import (
    Generation,
    Latest,
    choose,
    donor_of,
    held,
    move_latest,
    read_generations,
    read_latest,
    record_generations,
)
from batch_scorer.records import Receipt, Status
from batch_scorer.storage import Store, Version
from tests.helpers.receipts import COMMIT, DONE, stored

FIRST = Generation("main", 1, "a" * 64, {"shard_rows": 10})
OTHER_MODEL = Generation("main", 2, "b" * 64, {"shard_rows": 10})
AGAIN = replace(FIRST, number=3, is_rescore=True)
SAFETY = Generation("safety_", 1, "c" * 64, {"shard_rows": 10})  # of an earlier version


def latest(*generations: Generation) -> Latest:
    return Latest({generation.series: generation.path for generation in generations}, Version("v"))


def wanted(generation: Generation, *, rescore: bool = False) -> Generation:
    return replace(generation, number=0, is_rescore=rescore)


def test_the_newest_of_the_same_fingerprint_is_resumed() -> None:
    known = [FIRST, OTHER_MODEL]
    assert choose(known, wanted(FIRST), latest(FIRST)) == FIRST
    assert choose(known, wanted(FIRST), latest(OTHER_MODEL)) == FIRST  # the model is back
    assert choose(known, wanted(OTHER_MODEL), latest(FIRST)) == OTHER_MODEL  # was interrupted
    assert choose([*known, AGAIN], wanted(FIRST), latest(FIRST)) == AGAIN  # so was this


def test_another_model_or_layout_is_a_new_generation() -> None:
    assert choose([], wanted(FIRST), None) == FIRST
    assert choose([FIRST], wanted(OTHER_MODEL), latest(FIRST)) == OTHER_MODEL
    other_cut = replace(FIRST, layout={"shard_rows": 20})
    assert choose([FIRST], wanted(other_cut), latest(FIRST)) == replace(other_cut, number=2)


def test_a_rescore_is_a_new_generation_unless_one_is_under_way() -> None:
    known = [FIRST, OTHER_MODEL]
    assert choose(known, wanted(FIRST, rescore=True), latest(OTHER_MODEL)) == AGAIN
    assert choose([*known, AGAIN], wanted(FIRST, rescore=True), latest(OTHER_MODEL)) == AGAIN
    after = choose([*known, AGAIN], wanted(FIRST, rescore=True), latest(AGAIN))
    assert after == replace(AGAIN, number=4)
    # Before anything is complete there is nothing to be done again.
    assert choose([FIRST], wanted(FIRST, rescore=True), None) == FIRST


def test_scores_are_reused_of_the_same_models_or_of_some_and_never_by_a_rescore() -> None:
    other_cut = replace(FIRST, number=3, layout={"shard_rows": 20})
    known = [FIRST, SAFETY, OTHER_MODEL, other_cut]
    assert donor_of(known, other_cut, latest(OTHER_MODEL)) == FIRST
    assert donor_of(known, other_cut, latest(other_cut)) is None  # it is complete
    # Of other models, what readers take may have the scores of some.
    assert donor_of([FIRST, SAFETY, OTHER_MODEL], OTHER_MODEL, latest(FIRST)) == FIRST
    assert donor_of([FIRST, AGAIN], AGAIN, latest(FIRST)) is None


def test_generations_and_the_pointer_are_kept(tmp_path: Path) -> None:
    root = Store(str(tmp_path), {}, create=True)
    assert read_generations(root) == []
    record_generations(root, [FIRST, SAFETY])
    record_generations(root, [FIRST, SAFETY, AGAIN])
    assert read_generations(root) == [FIRST, SAFETY, AGAIN]
    first, *_ = root.read_json("_batch_scorer/generations.json")["generations"]
    assert (first["line"], first["path"]) == ("main", FIRST.path)

    assert read_latest(root) is None
    move_latest(root, FIRST, 1, None)
    found = read_latest(root)
    assert found is not None
    assert found.paths == {"main": FIRST.path}
    body = root.read_json("latest.json")
    assert (body["path"], body["generation"], body["night"]) == (FIRST.path, "a" * 12 + "-1", 1)

    move_latest(root, OTHER_MODEL, 2, found)
    with pytest.raises(LeaseLostError):
        move_latest(root, FIRST, 3, found)
    with pytest.raises(LeaseLostError):
        move_latest(root, FIRST, 3, None)
    assert root.read_json("latest.json")["path"] == OTHER_MODEL.path


def of(key: str, source: str, status: Status = Status.COMMITTED, version: str = "v") -> Receipt:
    """A shard of version "v", made of a file of version "v", unless told otherwise."""
    commit = replace(COMMIT, input=source, input_etag=Version(version).etag)
    return replace(DONE, output_key=key, input=source, status=status, stored=stored(commit))


def test_an_input_is_held_once_all_its_rows_are_committed() -> None:
    first = [
        of("x.1", "x"), of("x.2", "x"), of("y", "y"), of("z.1", "z"), of("z.2", "z", Status.LEFT),
        of("old", "old", Status.INPUT_GONE), of("bad", "bad", Status.FAILED),
        of("w", "w", version="v2"),
    ]  # fmt: skip
    assert held(first) == {"x": '"v"', "y": '"v"', "w": '"v2"'}
