"""Judges through the whole program: what is written, counted, taken up again and asked again."""

import signal
from itertools import permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer import Config
from batch_scorer.config import Device
from batch_scorer.errors import RowReason
from batch_scorer.records import Receipt
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import score as run_score
from cluster.local.seaweed import S3Server
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import Row, pair_rows, parquet, table_of
from tests.helpers.language_models import random_language_model
from tests.helpers.places import Place, Stored, digests, of_input
from tests.helpers.program import Program, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("one_thread")]

NOISE = 1e-5
"""Of a probability in float32, where the engine's batches are not the same."""

PAIRWISE = """
about: A test.
mode: pairwise
messages:
  - role: user
    content: "{{ fence }}\\n{{ prompt }}|{{ response_a }}|{{ response_b }}\\n{{ fence }} Which?"
verdict: {by: probability, choices: {A: 1, B: 0}, least_mass: 0}
"""
# A random model writes bytes, and some of these signs are among them.
GREEDY = """
about: A test.
mode: pointwise
messages:
  - role: user
    content: "{{ prompt }}|{{ response }}"
verdict:
  by: pattern
  pattern: '([!?<>&|\\[\\]\\\\])'
  choices: {"!": 1, "?": 2, "<": 3, ">": 4, "&": 5, "|": 6, "[": 7, "]": 8, "\\\\": 9}
generation: {max_tokens: 12, stop: ["a", "e", "o"]}
"""
SAMPLING = "votes: 2" + GREEDY.replace(
    "generation: {", "generation: {temperature: 1.0, retries: 1, "
)
WRITING = ("--no-ray", "--backend", "vllm", "--keep-judgement")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that writes, and now and then ends."""
    return random_language_model(tmp_path_factory.mktemp("judge") / "model")


def page_at(folder: Path, text: str) -> Path:
    (folder / "page.yaml").write_text(text)
    return folder / "page.yaml"


def arguments(page: Path, model: Path, place: Place, output: str, *flags: object) -> list[object]:
    return [
        "score", "--task", "judge", "--judge", page, "--model", model, (place / "in").url,
        "--output", (place / output).url, *place.flags, "--json", "--dtype", "float32",
        "--device", "cpu", "--parity-check", "off", *flags,
    ]  # fmt: skip


def rows_of(shards: dict[str, Stored], key: str = "a.parquet") -> list[Row]:
    rows: list[Row] = of_input(shards, key).to_pylist()
    return rows


def chosen(shards: dict[str, Stored]) -> np.ndarray:
    """The scores of the chosen answers, NaN where there is none."""
    return np.array([row["score_chosen"] for row in rows_of(shards)], np.float64)


def judgements(rows: list[Row]) -> list[Row]:
    """Of all rows, those that have any."""
    return [each for row in rows for each in row["judgements"] or ()]


def assert_counted(totals: Row, rows: list[Row]) -> None:
    """The figures are those of the columns."""
    asked = judgements(rows)
    lost = [each["reason"] for each in asked if each["worths"] is None]
    found = totals["judged"]
    assert found["questions"] == len(asked) == found["verdicts"] + len(lost)
    assert found["lost"] == {reason: lost.count(reason) for reason in set(lost)}
    assert found["prompt_tokens"] == sum(each["prompt_tokens"] for each in asked)
    for name in ("generated_tokens", "tries"):
        assert found[name] == sum(each.get(name) or 0 for each in asked)
    assert totals["rows"] == totals["rows_scored"] + totals["rows_marked"]
    assert totals["rows_marked"] == sum(row["score_error"] is not None for row in rows)


class StopAfter:
    """A listener that is interrupted, as by Ctrl-C, once so many shards are committed."""

    def __init__(self, shards: int) -> None:
        self._left = shards

    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


# By probability


def some_rows() -> list[Row]:
    """Pairs, of which one has no second answer to compare with, and one is too long."""
    rows = pair_rows(20)
    rows[3] = {**rows[3], "rejected": None}
    turns = rows[8]["chosen"]
    rows[8] = {**rows[8], "chosen": [turns[0], {**turns[1], "content": "and so on " * 400}]}
    return rows


@pytest.mark.slow
def test_a_killed_run_on_ray_and_s3_ends_in_the_bytes_of_the_plain_loop(
    s3: S3Server, program: Program, model: Path, tmp_path: Path
) -> None:
    place = Place(s3.url("judges"), s3.options)
    rows = some_rows()
    files = {"a.parquet": rows, "b.parquet": pair_rows(4, 100)}
    (place / "in").write({key: parquet(table_of(part)) for key, part in files.items()})
    page = page_at(tmp_path, PAIRWISE)
    judging = arguments(page, model, place, "out", "--shard-rows", 1, "--max-tokens", 1000)
    running = program.start(*judging)

    def has_begun() -> bool:
        assert not running.is_over, running.said()
        return len((place / "out").shard_keys()) >= 2

    wait_until(has_begun, "two shards are committed")
    running.send(signal.SIGKILL)
    running.wait()
    program.wait_until_gone()
    before = (place / "out").shards()
    assert 2 <= len(before) < len(rows) + 4
    resumed = program.run(*judging)
    assert resumed.exit_code == 0, resumed.err
    after = (place / "out").shards()
    assert {key: after[key] for key in before} == before

    def run(output: str, *flags: object) -> dict[str, Stored]:
        others = arguments(page, model, place, output, "--max-tokens", 1000, *flags)
        assert program.run(*others).exit_code == 0
        return (place / output).shards()

    plain = run("plain", "--no-ray", "--shard-rows", 1)
    assert digests(after) == digests(plain)
    # Two workers have fewer threads each, which may change the last bits.
    for_two = run("for-two", "--workers", 2, "--shard-rows", 5)
    np.testing.assert_allclose(chosen(for_two), chosen(plain), rtol=0, atol=NOISE)

    found = rows_of(after)
    assert resumed.json["marked"] == {
        RowReason.NOT_A_PAIR.value: 1, RowReason.TOO_LONG.value: 1
    }  # fmt: skip
    assert_counted(resumed.json, found + rows_of(after, "b.parquet"))
    for row in found:
        if row["score_error"] is None:
            assert [each["shown"] for each in row["judgements"]] == [[0, 1], [1, 0]]
            assert row["score_chosen"] + row["score_rejected"] == pytest.approx(1)
        else:
            assert row["score_chosen"] is row["score_rejected"] is None


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(table_of(pair_rows(14)))})
    return place


def test_neither_the_cut_nor_the_order_of_the_rows_changes_a_score(
    model: Path, tmp_path: Path, disk: Place
) -> None:
    page = page_at(tmp_path, PAIRWISE)
    whole = run_cli(*arguments(page, model, disk, "whole", "--no-ray"))
    cut = run_cli(*arguments(page, model, disk, "cut", "--no-ray", "--shard-rows", 4))
    assert whole.exit_code == cut.exit_code == 0
    (disk / "in").write({"a.parquet": parquet(table_of(pair_rows(14)[::-1]))})
    turned = run_cli(*arguments(page, model, disk, "turned", "--no-ray"))
    assert turned.exit_code == 0

    wanted, *found = (chosen((disk / name).shards()) for name in ("whole", "cut", "turned"))
    assert np.ptp(wanted) > 100 * NOISE
    np.testing.assert_allclose(found[0], wanted, rtol=0, atol=NOISE)
    np.testing.assert_allclose(found[1][::-1], wanted, rtol=0, atol=NOISE)


def test_the_figures_of_a_judge_are_those_of_its_columns(
    model: Path, tmp_path: Path, disk: Place
) -> None:
    ended = run_cli(*arguments(page_at(tmp_path, PAIRWISE), model, disk, "out", "--no-ray"))
    assert ended.exit_code == 0, ended.err
    rows = rows_of((disk / "out").shards())
    assert_counted(ended.json, rows)
    told = ended.json["judged"]
    worths = [[each["worths"][0] for each in row["judgements"]] for row in rows]
    assert told["comparisons"] == len(rows)
    assert told["disagree"] == sum((first > 0.5) == (second > 0.5) for first, second in worths) > 0
    firsts = [worth > 0.5 for pair in worths for worth in pair]
    assert (told["decisive"], told["first_preferred"]) == (len(firsts), sum(firsts))
    assert told["tries"] == told["generated_tokens"] == 0
    status = run_cli("status", disk.url + "/out", "--json").json
    assert status["judged"] == told == (disk / "out").read_json("_SUCCESS")["judged"]
    for command in ("status", "verify"):
        assert run_cli(command, disk.url + "/out").exit_code == 0


def test_a_rewritten_file_takes_the_probabilities_of_equal_questions(
    model: Path, tmp_path: Path, disk: Place
) -> None:
    judging = arguments(page_at(tmp_path, PAIRWISE), model, disk, "out", "--no-ray")
    assert run_cli(*judging).exit_code == 0
    before = rows_of((disk / "out").shards())
    (disk / "in").write({"a.parquet": parquet(table_of(pair_rows(3, 50) + pair_rows(14)))})
    again = run_cli(*judging)
    assert again.exit_code == 0, again.err
    after = rows_of((disk / "out").shards())
    assert [row["judgements"] for row in after[3:]] == [row["judgements"] for row in before]
    assert [row["score_chosen"] for row in after[3:]] == [row["score_chosen"] for row in before]
    asked = sum(each["prompt_tokens"] for each in judgements(after[:3]))
    metrics = again.json["metrics"]
    assert metrics["computed_tokens"] + metrics["shared_tokens"] == asked
    assert metrics["reused_rows"] == len(before)


# Written


@pytest.mark.slow
def test_a_greedy_judge_writes_the_same_for_any_cut_and_after_an_interruption(
    program: Program, model: Path, tmp_path: Path, disk: Place
) -> None:
    page = page_at(tmp_path, GREEDY)
    whole = run_cli(*arguments(page, model, disk, "whole", *WRITING))
    assert whole.exit_code == 0, whole.err
    rows = rows_of((disk / "whole").shards())
    assert_counted(whole.json, rows)
    assert whole.json["judged"]["lost"] and whole.json["judged"]["verdicts"]
    config = Config(
        task="judge", judge=str(page), model=str(model), inputs=((disk / "in").url,),
        output=(disk / "cut").url, backend="vllm", dtype="float32", device=Device.CPU,
        parity_check="off", shard_rows=5, use_ray=False, keep_judgement=True,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        run_score(config, StopAfter(1))
    before = (disk / "cut").shards()
    assert len(before) == 1
    cut = arguments(page, model, disk, "cut", *WRITING, "--shard-rows", 5)
    resumed = run_cli(*cut)
    assert resumed.exit_code == 0, resumed.err
    after = (disk / "cut").shards()
    assert len(after) == 3 and {key: after[key] for key in before} == before
    assert rows_of(after) == rows
    assert resumed.json["judged"] == whole.json["judged"]

    # On Ray a worker is asked about several small shards at once.
    flags = ("--backend", "vllm", "--keep-judgement", "--workers", 1, "--shard-rows", 1)
    on_ray = program.run(*arguments(page, model, disk, "on-ray", *flags))
    assert on_ray.exit_code == 0, on_ray.err
    single = (disk / "on-ray").shards()
    assert len(single) == 14 and rows_of(single) == rows
    assert on_ray.json["judged"] == whole.json["judged"]


@pytest.mark.slow
def test_a_writing_judge_is_asked_again_about_what_it_lost_alone(
    model: Path, tmp_path: Path, disk: Place
) -> None:
    judging = arguments(page_at(tmp_path, SAMPLING), model, disk, "out", *WRITING)
    assert run_cli(*judging).exit_code == 0
    first = judgements(rows_of((disk / "out").shards()))
    is_lost = [each["worths"] is None for each in first]
    assert any(is_lost) and not all(is_lost)
    retrying = [*judging, "--retry-marked", "no_verdict,cut_off"]
    ended = run_cli(*retrying)
    assert ended.exit_code == 0, ended.err
    rows = rows_of((disk / "out").shards())
    assert_counted(ended.json, rows)
    second = judgements(rows)
    asked = 0
    for before, after, lost in zip(first, second, is_lost, strict=True):
        if lost:
            assert after["reply"] != before["reply"]
            asked += after["prompt_tokens"] * after["tries"]
        else:
            assert after == before
    assert sum(each["worths"] is None for each in second) < sum(is_lost)
    metrics = ended.json["metrics"]
    assert metrics["computed_tokens"] + metrics["shared_tokens"] == asked

    # A file that gets more rows keeps these judgements, and asks about what has none.
    (disk / "in").write({"a.parquet": parquet(table_of(pair_rows(16)))})
    ended = run_cli(*judging)
    assert ended.exit_code == 0, ended.err
    third = judgements(rows_of((disk / "out").shards()))
    asked = 0
    for number, after in enumerate(third):
        if number < len(second) and second[number]["worths"] is not None:
            assert after == second[number]
        else:
            asked += after["prompt_tokens"] * after["tries"]
    metrics = ended.json["metrics"]
    assert metrics["computed_tokens"] + metrics["shared_tokens"] == asked


# What is done with scores


def benchmark_rows(name: str) -> list[Row]:
    """A few rows of each, with the columns of the data set."""
    texts = [
        {
            "prompt": row["chosen"][0]["content"],
            "chosen": row["chosen"][1]["content"],
            "rejected": row["rejected"][1]["content"],
        }
        for row in pair_rows(8)
    ]
    if name == "rewardbench":
        return [
            {**text, "subset": "hep-cpp" if n % 2 else "math-prm"} for n, text in enumerate(texts)
        ]
    if name == "judgebench":
        sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
        return [
            {
                "source": sources[n % 4],
                "question": text["prompt"],
                "response_model": "gpt-4o",
                "response_A": text["chosen"],
                "response_B": text["rejected"],
                "label": ("A>B", "B>A")[n % 3 == 0],
            }
            for n, text in enumerate(texts)
        ]
    rows = []
    for n, text in enumerate(texts):
        right = [
            text["chosen"] + mark for mark in (("",) if name == "rewardbench-2" else ("", ".", "!"))
        ]
        wrong = [text["rejected"] + mark for mark in ("", ".", "!")]
        domain = {"domain": ("chat", "math", "code", "safety-refuse")[n % 4]}
        subset = {"id": str(n), "subset": ("Math", "Focus")[n % 2]}
        added = subset if name == "rewardbench-2" else domain
        rows.append({"prompt": text["prompt"], "chosen": right, "rejected": wrong, **added})
    return rows


@pytest.mark.parametrize("name", ["rewardbench", "rewardbench-2", "judgebench", "rm-bench"])
def test_a_benchmark_is_evaluated_by_verdicts_in_both_orders_of_every_pair(
    name: str, model: Path, tmp_path: Path
) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"rows.parquet": parquet(pa.Table.from_pylist(benchmark_rows(name)))})
    _, *flags = arguments(page_at(tmp_path, PAIRWISE), model, place, "out", "--no-ray")
    one_go = run_cli("evaluate", *flags, "--benchmark", name)
    assert one_go.exit_code == 0, one_go.err
    assert one_go.json["rows"] == 8 and one_go.json["unscored"] == 0
    assert run_cli("evaluate", (place / "out").url, "--json").json == one_go.json
    rows = rows_of((place / "out").shards(), "rows.parquet")
    for row in rows:
        count = 2 if name in ("rewardbench", "judgebench") else len(row["chosen"] + row["rejected"])
        orders = [tuple(each["shown"]) for each in row["judgements"]]
        assert sorted(orders) == sorted(permutations(range(count), 2))
    if name == "judgebench":
        right = [(row["margin"] > 0) == (row["label"] == "A>B") for row in rows]
        assert one_go.json["columns"]["Score"]["value"] == sum(right) / len(right)


def test_rows_are_selected_by_a_judge_s_margin(model: Path, tmp_path: Path, disk: Place) -> None:
    page = page_at(tmp_path, PAIRWISE)
    assert run_cli(*arguments(page, model, disk, "out", "--no-ray")).exit_code == 0
    rows = rows_of((disk / "out").shards())
    wanted = [row for row in rows if row["margin"] > 0]
    assert 0 < len(wanted) < len(rows)
    made = run_cli(
        "select", (disk / "out").url, "--above-margin", 0, "--output", (disk / "selected").url
    )
    assert made.exit_code == 0, made.err
    found = [pq.read_table(path) for path in Path((disk / "selected").url).rglob("*.parquet")]
    assert [row["chosen"] for row in pa.concat_tables(found).to_pylist()] == [
        row["chosen"] for row in wanted
    ]


def test_a_night_asks_about_new_rows_alone(model: Path, tmp_path: Path, disk: Place) -> None:
    _, *flags = arguments(page_at(tmp_path, PAIRWISE), model, disk, "night", "--no-ray")
    first = run_cli("nightly", *flags)
    assert first.exit_code == 0, first.err
    (disk / "in").write({"a.parquet": parquet(table_of(pair_rows(17)))})
    second = run_cli("nightly", *flags)
    assert second.exit_code == 0, second.err
    (ended,) = second.json["models"]
    assert ended["metrics"]["reused_rows"] == 14
    assert ended["judged"]["questions"] == 34
    another = page_at(tmp_path, PAIRWISE.replace("Which?", "Who?"))
    _, *flags = arguments(another, model, disk, "night", "--no-ray")
    (ended,) = run_cli("nightly", *flags).json["models"]
    assert ended["metrics"]["reused_rows"] == 0, "another page's verdicts"


@pytest.mark.parametrize("text", [PAIRWISE, GREEDY])
def test_a_judge_that_would_say_the_same_again_is_not_asked_again(
    text: str, model: Path, tmp_path: Path, disk: Place
) -> None:
    judging = arguments(page_at(tmp_path, text), model, disk, "out", *WRITING[:-1])
    refused = run_cli(*judging, "--retry-marked", "no_verdict")
    assert refused.exit_code == 2
    assert refused.error.startswith("retry_marked: no_verdict: ")
    assert not Path(disk.url, "out").exists()
