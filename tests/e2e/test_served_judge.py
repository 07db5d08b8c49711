"""A judge that is served elsewhere, as a job: every question gets its own reply, whatever fails on
the way, and what the server refuses costs its own row, until it is asked again."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.errors import RowReason
from tests.helpers.chat_server import (
    Body,
    ChatServer,
    chat_server,
    completion,
    dealt,
    faulty,
    question_text,
    reply_text,
)
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import parquet

pytestmark = pytest.mark.e2e

ROWS = 60
PAGE = """
about: A grade that follows from the question.
mode: pointwise
messages:
  - role: user
    content: "{{ fence }}\\n{{ prompt }}\\n{{ response }}\\n{{ fence }}"
verdict: {by: pattern, pattern: 'grade (\\d+)', low: 0, high: 15}
"""
PROBABLE = (
    PAGE.partition("verdict:")[0] + "verdict: {by: probability, choices: {'Yes': 1, 'No': 0}}"
)


def grade_of(messages: list[dict[str, str]], seed: int) -> int:
    """What the judge's only right reply is worth."""
    return int(reply_text(messages, seed)[len("reply ")], 16)


def graded(body: Body) -> tuple[int, Body]:
    """The reply to a question, with its grade."""
    found = completion(body)
    message = found["choices"][0]["message"]
    message["content"] += f" grade {grade_of(body['messages'], body['seed'])}"
    return 200, found


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two files of answers, the questions numbered for the proxy; one row has no answer."""
    (tmp_path / "in").mkdir()
    rows = [
        {"prompt": f"{question_text(number)}.", "response": f"It is {number}."}
        for number in range(ROWS)
    ]
    rows[7] = {**rows[7], "response": None}
    for part in (0, 1):
        table = pa.Table.from_pylist(
            rows[part::2], pa.schema({"prompt": pa.string(), "response": pa.string()})
        )
        (tmp_path / "in" / f"{part}.parquet").write_bytes(parquet(table))
    return tmp_path / "in"


def judge(server: ChatServer, inputs: Path, *flags: object, page: str = PAGE) -> Any:
    """The summary of a job that asks this server."""
    file = inputs.parent / "page.yaml"
    file.write_text(page)
    ended = run_cli(
        "score", "--task", "judge", "--judge", file, "--backend", "endpoint", "--model", "judge-1",
        "--endpoint", server.base_url, inputs, "--output", inputs.parent / "out", "--no-ray",
        "--json", *flags,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    return ended.json


def rows_of(inputs: Path) -> list[dict[str, Any]]:
    return [
        row
        for part in (0, 1)
        for row in pq.read_table(inputs.parent / "out" / f"{part}.parquet").to_pylist()
    ]


def grades(server: ChatServer) -> dict[str, int]:
    """By question, its grade."""
    found: dict[str, int] = {}
    for body in server.bodies:
        content = body["messages"][0]["content"]
        if named := re.search(r"question \d+", content):
            found[named[0]] = grade_of(body["messages"], body["seed"])
    return found


def test_every_row_gets_its_own_verdict_whatever_fails_on_the_way(inputs: Path) -> None:
    with chat_server(graded) as server:
        plan = dealt(40, ROWS, 2, seed=3)
        with faulty(server.base_url, plan) as proxy:
            summary = judge(proxy, inputs, "--request-timeout-s", 5, "--keep-judgement")
        assert sum(proxy.injected.values()) > 30
        right = grades(server)
    assert summary["marked"] == {RowReason.NULL_VALUE: 1}
    assert summary["rows"] == ROWS and summary["rows_scored"] == ROWS - 1
    for row in rows_of(inputs):
        if row["response"] is None:
            assert row["score"] is None and row["judgements"] is None
            continue
        assert row["score"] == right[row["prompt"].rstrip(".")]
        (judgement,) = row["judgements"]
        assert judgement["reply"].startswith("reply ") and judgement["ended"] == "stop"
        assert row["num_tokens"] == judgement["prompt_tokens"] == 10
    assert run_cli("verify", inputs.parent / "out").exit_code == 0


def test_rows_that_the_server_refuses_are_marked_and_asked_again_alone(inputs: Path) -> None:
    def refuses(body: Body) -> tuple[int, Body]:
        if "question 4" in body["messages"][0]["content"]:
            return 400, {"error": {"message": "too long"}}
        return graded(body)

    refused = sum(question_text(n).startswith("question 4") for n in range(ROWS))
    with chat_server(refuses) as server:
        summary = judge(server, inputs)
    assert summary["marked"] == {RowReason.NULL_VALUE: 1, RowReason.ENGINE_ERROR: refused}
    before = {row["prompt"]: row["score"] for row in rows_of(inputs)}
    with chat_server(graded) as server:
        summary = judge(server, inputs, "--retry-marked", "engine_error")
        asked = Counter(grades(server))
        right = grades(server)
    assert summary["marked"] == {RowReason.NULL_VALUE: 1}
    assert len(asked) == refused and all(name.startswith("question 4") for name in asked)
    for row in rows_of(inputs):
        name = row["prompt"].rstrip(".")
        wanted = right[name] if name in right else before[row["prompt"]]
        assert row["score"] == wanted


def test_a_finished_output_asks_nothing(inputs: Path) -> None:
    with chat_server(graded) as server:
        judge(server, inputs, "--token-prices", "prompt=2,generated=8")
        status = run_cli("status", inputs.parent / "out", "--json").json
        # The server counts ten tokens of every question and five of every reply.
        assert status["metrics"]["token_cost"] == pytest.approx((ROWS - 1) * (10 * 2 + 5 * 8) / 1e6)
        asked = len(server.bodies)
        judge(server, inputs)
        assert len(server.bodies) == asked > ROWS - 2


def test_probabilities_of_the_most_probable_tokens(inputs: Path) -> None:
    """The server gives log probabilities that follow from the question."""

    def answer(body: Body) -> tuple[int, Body]:
        yes = -0.1 if "It is 1" in body["messages"][0]["content"] else -2.0
        top = [{"token": "Yes", "logprob": yes}, {"token": "No", "logprob": -2.5}]
        found = completion(body)
        found["choices"][0]["logprobs"] = {"content": [{"top_logprobs": top}]}
        return 200, found

    with chat_server(answer) as server:
        judge(server, inputs, page=PROBABLE)
    for row in rows_of(inputs):
        if row["response"] is None:
            continue
        (judgement,) = row["judgements"]
        if row["response"].startswith("It is 1"):
            yes, no = judgement["probabilities"]
            assert row["score"] == pytest.approx(yes / (yes + no)) and yes == pytest.approx(
                math.exp(-0.1)
            )
        else:  # together they have less than half of the probability
            assert row["score_error"] == RowReason.NO_VERDICT


def test_a_wrong_key_ends_the_job_before_a_row_is_asked(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "canary-of-a-key")
    with chat_server(lambda body: (401, {"error": {"message": "canary-of-a-key?"}})) as server:
        (inputs.parent / "page.yaml").write_text(PAGE)
        ended = run_cli(
            "score", "--task", "judge", "--judge", inputs.parent / "page.yaml", "--backend",
            "endpoint", "--model", "judge-1", "--endpoint", server.base_url, "--api-key-env",
            "JUDGE_KEY", inputs, "--output", inputs.parent / "out", "--no-ray",
        )  # fmt: skip
        assert server.authorizations == {"Bearer canary-of-a-key": 1}
    assert ended.exit_code == 2
    assert "canary-of-a-key" not in ended.out + ended.err
    stored = [file for file in (inputs.parent / "out").rglob("*") if file.is_file()]
    assert stored and all(b"canary-of-a-key" not in file.read_bytes() for file in stored)


def test_a_wrong_address_is_told_before_anything_is_begun(inputs: Path) -> None:
    (inputs.parent / "page.yaml").write_text(PAGE)
    ended = run_cli(
        "score", "--task", "judge", "--judge", inputs.parent / "page.yaml", "--backend", "endpoint",
        "--model", "judge-1", "--endpoint", "localhost:8000", inputs, "--output",
        inputs.parent / "out", "--no-ray",
    )  # fmt: skip
    assert ended.exit_code == 2 and "endpoint: " in ended.err
    assert not (inputs.parent / "out").exists()
