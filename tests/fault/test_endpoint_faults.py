"""A served judge that fails in every way costs time, no reply; and its key is told to nobody."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.backends.endpoint_client import Endpoint, EndpointSettings, ServedQuestion
from batch_scorer.judges.page import Page
from batch_scorer.records.judging import Reply
from tests.helpers.chat_server import (
    Body,
    Fault,
    FaultProxy,
    always_right,
    chat_server,
    dealt,
    faulty,
    question_text,
    reply_text,
)
from tests.helpers.program import REPOSITORY

pytestmark = pytest.mark.fault

FAULTS = 200
MOST = 3
CONCURRENCY = 32
TIMEOUT_S = 5.0
KEY = "canary-key-of-a-judge/+&"
PAGE: dict[str, Any] = {
    "about": "For tests.",
    "mode": "pairwise",
    "messages": [{"role": "user", "content": "?"}],
    "verdict": {"by": "pattern", "pattern": "([AB])", "choices": {"A": 1, "B": 0}},
}


def questions(count: int) -> list[ServedQuestion]:
    return [
        ServedQuestion([{"role": "user", "content": question_text(number)}], seed=7 * number)
        for number in range(count)
    ]


def endpoint(proxy: FaultProxy, attempts: int) -> Endpoint:
    settings = EndpointSettings(
        proxy.base_url, "judge", concurrency=CONCURRENCY, timeout_s=TIMEOUT_S, attempts=attempts
    )
    return Endpoint(settings, Page.model_validate(PAGE))


@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_faults_lose_double_and_swap_no_reply(seed: int) -> None:
    asked = questions(150)
    plan = dealt(FAULTS, len(asked), MOST, seed)
    with chat_server() as server, faulty(server.base_url, plan) as proxy:
        # A busy machine may need more time than there is for an answer: some tries to spare.
        replies, usage = endpoint(proxy, attempts=MOST + 5).ask(asked)
    assert proxy.injected.keys() == set(Fault) and proxy.injected.total() == FAULTS
    for number, (question, reply) in enumerate(zip(asked, replies, strict=True)):
        right = reply_text(question.messages, question.seed)
        assert reply == Reply(
            right, "stop", prompt_tokens=10, generated_tokens=5, tries=reply.tries
        )
        assert reply.tries >= 1 + len(plan.get(number, []))
    # What was asked again was the same question, with the same seed.
    seen = {json.dumps(body, sort_keys=True) for body in server.bodies}
    assert len(seen) == len(asked) + 1  # and the trial
    assert usage.retries == sum(reply.tries - 1 for reply in replies)
    assert usage.requests == len(asked) + 1 + usage.retries
    # Counted once for each reply, whatever else the server computed.
    assert usage.generated_tokens == 5 * (len(asked) + 1)
    assert server.most_at_once <= CONCURRENCY and proxy.most_at_once <= CONCURRENCY


@pytest.mark.parametrize("fault", Fault)
def test_a_question_that_always_fails_is_an_error_and_the_others_are_answered(fault: Fault) -> None:
    asked = questions(6)
    with chat_server() as server, faulty(server.base_url, {2: [fault] * 2}) as proxy:
        replies, _ = endpoint(proxy, attempts=2).ask(asked)
    assert proxy.injected == Counter({fault: 2})
    assert [reply.ended for reply in replies] == ["stop"] * 2 + ["error"] + ["stop"] * 3
    assert (replies[2].text, replies[2].tries) == ("", 2) and replies[2].detail


@pytest.mark.parametrize("again_after_s", [0.0, 0.02])
def test_an_answer_that_comes_twice_answers_no_other_question(again_after_s: float) -> None:
    asked = questions(60)
    with chat_server(again_after_s=again_after_s) as server:
        settings = EndpointSettings(server.base_url, "judge", concurrency=4)
        replies, _ = Endpoint(settings, Page.model_validate(PAGE)).ask(asked)
    assert [reply.text for reply in replies] == [
        reply_text(question.messages, question.seed) for question in asked
    ]


ASKER = """
import json, logging, pickle, sys, traceback
from pathlib import Path
from batch_scorer.backends.endpoint_client import Endpoint, EndpointSettings, ServedQuestion
from batch_scorer.judges.page import Page

logging.basicConfig(level=logging.DEBUG, filename="log")
wrong_url, url, page, messages = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
print(sys.argv)
questions = [ServedQuestion(each, seed) for seed, each in enumerate(messages)]
for address in (url, wrong_url):
    for place in ({"api_key_env": "JUDGE"}, {"api_key_file": Path("key")}):
        settings = EndpointSettings(address, "judge", attempts=2, timeout_s=5, **place)
        endpoint = Endpoint(settings, Page(**page))
        print(endpoint, vars(endpoint), settings)
        try:
            pickle.dumps(endpoint)
        except TypeError as error:
            print(repr(error))
        try:
            replies, usage = endpoint.ask(questions)
            logging.getLogger("batch_scorer").warning("%r %r", replies, usage)
            recorded = (settings, replies, usage, endpoint.provenance)
            Path("record").write_bytes(pickle.dumps(recorded))
            print(replies, usage, endpoint.provenance)
        except Exception as error:
            Path("error").write_bytes(pickle.dumps(error))
            shown = traceback.TracebackException.from_exception(error, capture_locals=True)
            print("".join(shown.format()), error.__context__, error.__cause__)
"""


@pytest.fixture(scope="module")
def asked_with_key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a process that asked with a key, logging all it can, and what it printed. The
    server tells the key in its errors; another one refuses it, and tells it too."""
    folder = tmp_path_factory.mktemp("asker")
    (folder / "key").write_text(KEY)
    told = f"Incorrect API key provided: {KEY}"

    def refuse(body: Body) -> tuple[int, Body]:
        return 401, {"error": {"message": told}}

    def answer(body: Body) -> tuple[int, Body]:
        is_wrong = body["messages"][0]["content"] == question_text(20)
        return (400, {"error": {"message": told}}) if is_wrong else always_right(body)

    plan = {number: [fault] * 2 for number, fault in enumerate(Fault)}
    messages = [list(each.messages) for each in questions(21)]
    with (
        chat_server(answer) as server,
        chat_server(refuse) as other,
        faulty(server.base_url, plan, message=told) as proxy,
    ):
        done = subprocess.run(
            [
                *(sys.executable, "-X", "dev", "-c", ASKER, other.base_url, proxy.base_url),
                *(json.dumps(PAGE), json.dumps(messages)),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            check=True,
            env={"JUDGE": KEY, "PYTHONPATH": str(REPOSITORY), "PYTHONASYNCIODEBUG": "1"},
        )
    assert server.authorizations.keys() == other.authorizations.keys() == {f"Bearer {KEY}"}
    assert proxy.injected.total() == 2 * len(Fault)
    (folder / "key").unlink()
    return folder, done.stdout + done.stderr


def test_the_key_is_told_nowhere(asked_with_key: tuple[Path, str]) -> None:
    folder, said = asked_with_key
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert files.keys() == {"log", "record", "error"}
    # What is searched holds what was said.
    assert b"Incorrect API key provided: ***" in files["record"]
    assert b"HTTP status 400" in files["log"] and "HTTP status 401" in said
    assert "ConfigError" in said and "_refuse" in said
    for text in (said.encode(), *files.values()):
        assert KEY.encode() not in text
