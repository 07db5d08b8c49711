"""Every reason and note of docs/reasons.md is provoked: by a case of the corpus, by a test here, or
by one elsewhere that is named here."""

import re
from pathlib import Path

import pytest

from batch_scorer.config import load_partial_config
from batch_scorer.errors import RowNote, RowReason, ShardError, ShardReason
from batch_scorer.inputs.files import rows_of_shard
from batch_scorer.inputs.plan import make_plan
from batch_scorer.records import Shard
from batch_scorer.storage import Store
from tests.corpus.case import asks, lines
from tests.corpus.kinds import KINDS
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.receipts import COMMIT

ROOT = Path(__file__).parents[2]
HERE = "tests/corpus/test_every_reason.py"
CALLS = "tests/unit/rewards/test_calls.py"
ELSEWHERE: dict[RowReason | RowNote | ShardReason, str] = {
    RowReason.CONTEXT_NOT_READ: f"{HERE}::test_context_that_is_not_read",
    RowReason.NON_FINITE_SCORE: "tests/e2e/test_bad_input.py::"
    "test_a_head_that_gives_no_numbers_marks_all_rows",
    RowReason.OUT_OF_MEMORY: "tests/fault/test_poison.py::"
    "test_rows_at_which_the_engine_raises_are_found_without_a_death",
    RowReason.ENGINE_ERROR: "tests/fault/test_poison.py::"
    "test_rows_at_which_the_engine_raises_are_found_without_a_death",
    RowReason.WORKER_CRASH: "tests/fault/test_poison.py::"
    "test_poison_rows_are_found_and_marked_and_the_others_scored",
    RowReason.NO_MARK: "tests/parity/test_matrix.py::"
    "test_a_prompt_without_its_end_is_marked_and_the_others_scored",
    RowReason.NO_STEPS: "tests/unit/formats/test_steps.py::test_steps_that_are_none_mark_their_row",
    RowReason.STEPS_DIFFER: "tests/unit/test_shard.py::"
    "test_another_number_of_steps_than_the_row_gives_is_marked",
    RowReason.NOT_A_PAIR: "tests/parity/test_conditioned.py::test_what_is_no_pair_is_marked",
    RowReason.ANSWER_NOT_FOUND: "tests/unit/render/test_answer_starts.py::"
    "test_an_answer_that_cannot_be_found_is_marked",
    RowReason.NO_VERDICT: "tests/parity/test_judges.py::"
    "test_choices_that_are_improbable_are_no_verdict",
    RowReason.VERDICT_OUT_OF_RANGE: "tests/unit/judges/test_verdicts.py::test_a_verdict_in_a_text",
    RowReason.CUT_OFF: "tests/unit/judges/test_verdicts.py::"
    "test_a_verdict_that_was_not_given_in_the_end_does_not_count",
    RowReason.INCONSISTENT_VERDICTS: "tests/unit/judges/test_fold.py::test_both_orders_of_a_pair",
    RowReason.BAD_RUBRIC: "tests/unit/judges/test_questions.py::test_what_is_no_rubric",
    RowReason.MARKER_IN_TEXT: "tests/unit/judges/test_questions.py::"
    "test_a_marker_in_a_text_marks_its_row",
    RowReason.REWARD_NONE: f"{CALLS}::test_columns_and_arguments_come_by_name",
    RowReason.REWARD_RAISED: f"{CALLS}::test_a_fault_costs_its_response_alone",
    RowReason.REWARD_INVALID: f"{CALLS}::test_a_fault_costs_its_response_alone",
    RowReason.REWARD_TIMED_OUT: f"{CALLS}::test_a_hang_costs_its_response_alone",
    RowReason.REWARD_DIED: f"{CALLS}::test_a_fault_costs_its_response_alone",
    RowNote.ANSWER_REWRITTEN: "tests/unit/render/test_template.py::"
    "test_an_answer_that_the_template_cuts_is_noted",
    RowNote.SAME_TOKENS: "tests/unit/render/test_template.py::"
    "test_sides_that_differ_in_text_and_not_in_tokens_are_noted",
    RowNote.ROLE_RENAMED: f"{HERE}::test_what_is_done_to_a_text_is_noted",
    RowNote.PARTS_JOINED: f"{HERE}::test_what_is_done_to_a_text_is_noted",
    ShardReason.READER_DIED: f"{HERE}::test_a_reading_process_that_takes_too_much",
    ShardReason.INPUT_CHANGED: f"{HERE}::test_an_input_that_changed_after_it_was_planned",
    ShardReason.INPUT_GONE: f"{HERE}::test_an_input_that_was_removed_after_it_was_planned",
    ShardReason.OBJECT_IN_THE_WAY: f"{HERE}::test_an_object_in_the_way",
    ShardReason.STORE_FAILED: "tests/fault/test_secrets.py::test_the_store_s_refusal_is_told",
    ShardReason.WORKER_DIED: "tests/fault/test_poison.py::"
    "test_poison_rows_are_found_and_marked_and_the_others_scored",
    ShardReason.SUPERSEDED: "tests/fault/test_commit_races.py::"
    "test_a_run_of_an_old_epoch_may_not_begin_a_commit",
    ShardReason.INTERNAL: "tests/fault/test_poison.py::"
    "test_an_engine_that_raises_at_every_row_is_a_defect_and_blames_no_row",
    ShardReason.REWARD_UNUSABLE: f"{CALLS}::"
    "test_a_function_that_cannot_be_loaded_on_this_machine_fails_the_shard",
}


def test_every_reason_is_provoked() -> None:
    cases = [case for found in KINDS.values() for case in found]
    provoked = {reason for case in cases for reason in (*case.marked, *case.failed.values())}
    provoked |= {reason.value for reason in ELSEWHERE}
    assert provoked == {
        reason.value for kind in (RowReason, RowNote, ShardReason) for reason in kind
    }


@pytest.mark.parametrize("reason", ELSEWHERE)
def test_the_test_elsewhere_is_there(reason: RowReason | RowNote | ShardReason) -> None:
    file, _, name = ELSEWHERE[reason].partition("::")
    text = (ROOT / file).read_text()
    assert re.search(rf"^def {name}\(", text, re.MULTILINE)
    assert reason.value in text or reason.name in text or file.startswith("tests/fault")


def planned(folder: Path) -> Shard:
    (folder / "m.jsonl").write_bytes(lines(asks(2)))
    (shard,) = make_plan(load_partial_config(inputs=(str(folder),))).shards
    return shard


def failure(shard: Shard) -> ShardReason:
    with pytest.raises(ShardError) as raised:
        rows_of_shard(shard, {}, None)
    return raised.value.reason


def test_an_input_that_changed_after_it_was_planned(tmp_path: Path) -> None:
    shard = planned(tmp_path)
    (tmp_path / "m.jsonl").write_bytes(lines(asks(3)))
    assert failure(shard) is ShardReason.INPUT_CHANGED


def test_an_input_that_was_removed_after_it_was_planned(tmp_path: Path) -> None:
    shard = planned(tmp_path)
    (tmp_path / "m.jsonl").unlink()
    assert failure(shard) is ShardReason.INPUT_GONE


def score(model: Path, inputs: Path, output: Path, *flags: object) -> dict[str, object]:
    ended = run_cli(
        "score", "--model", model, inputs, "--output", output, "--json", "--no-ray",
        "--backend", "fake", "--dtype", "float32", *flags,
    )  # fmt: skip
    assert ended.exit_code in (0, 3), ended.err
    found: dict[str, object] = ended.json
    return found


def test_an_object_in_the_way(tmp_path: Path) -> None:
    """One that appeared after the run had looked, where our PUT was refused."""
    from batch_scorer.outputs.commit import _look

    (tmp_path / "m.jsonl.parquet").write_bytes(parquet(pairs(1)))
    with pytest.raises(ShardError) as raised:
        _look(Store(str(tmp_path), {}), "m.jsonl.parquet", COMMIT)
    assert raised.value.reason is ShardReason.OBJECT_IN_THE_WAY


def test_context_that_is_not_read(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [*asks(40), *asks(1, system="Be brief.")]  # beyond the rows that the file is judged by
    (tmp_path / "in" / "m.jsonl").write_bytes(lines(rows))
    found = score(tiny_model, tmp_path / "in", tmp_path / "out")
    assert found["marked"] == {RowReason.CONTEXT_NOT_READ: 1}


def test_what_is_done_to_a_text_is_noted(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "in").mkdir()
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "that."}]
    talks = [
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": parts}],
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "That."},
        ],
    ]
    (tmp_path / "in" / "m.jsonl").write_bytes(lines([{"messages": talk} for talk in talks]))
    found = score(tiny_model, tmp_path / "in", tmp_path / "out")
    assert found["notes"] == {RowNote.PARTS_JOINED: 1, RowNote.ROLE_RENAMED: 1}


def test_a_reading_process_that_takes_too_much(tmp_path: Path) -> None:
    """A file that is read within the usual bounds, and not within smaller ones."""
    (tmp_path / "m.jsonl").write_bytes(lines(asks(1, x="a" * (60 << 20))))
    (tmp_path / "n.jsonl").write_bytes(lines(asks(1)))
    config = load_partial_config(inputs=(str(tmp_path),), read_memory_gib=0.25)
    plan = make_plan(config)
    assert {each.input: each.reason for each in plan.failed} == {"m.jsonl": ShardReason.READER_DIED}
    assert [shard.source.key for shard in plan.shards] == ["n.jsonl"]
    usual = make_plan(load_partial_config(inputs=(str(tmp_path),)))
    assert len(usual.shards) == 2 and not usual.failed
