"""What is sent to a served judge, and what becomes of its answers, by a server on this machine."""

import asyncio
import copy
import json
import math
import pickle
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.backends.endpoint_client import (
    TOP_TOKENS,
    Endpoint,
    EndpointSettings,
    ServedQuestion,
    Usage,
    choice_probabilities,
    split_thinking,
)
from batch_scorer.errors import ConfigError
from batch_scorer.judges.page import Page, reply_schema
from batch_scorer.records.judging import Reply
from tests.helpers.chat_server import (
    Answer,
    Body,
    ChatServer,
    always_right,
    chat_server,
    completion,
    question_text,
    reply_text,
)

RULES: dict[str, dict[str, Any]] = {
    "pattern": {"by": "pattern", "pattern": "([AB])", "choices": {"A": 1, "B": 0}},
    "json": {"by": "json", "choices": {"A": 1, "B": 0}},
    "probability": {"by": "probability", "choices": {"Yes": 1, "No": 0}},
}
KEY = "canary-key-of-a-judge"


def page(by: str = "pattern", **changes: Any) -> Page:
    messages = [{"role": "user", "content": "?"}]
    made = {"about": "For tests.", "mode": "pairwise", "messages": messages, "verdict": RULES[by]}
    return Page.model_validate({**made, **changes})


def settings(server: ChatServer, **changes: Any) -> EndpointSettings:
    return EndpointSettings(server.base_url, "judge", **{"attempts": 2, **changes})


def questions(count: int, first: int = 0) -> list[ServedQuestion]:
    numbers = range(first, first + count)
    return [
        ServedQuestion([{"role": "user", "content": question_text(number)}], seed=1000 + number)
        for number in numbers
    ]


def ask(answer: Answer, page: Page, count: int = 1) -> list[Reply]:
    with chat_server(answer) as server:
        return Endpoint(settings(server), page).ask(questions(count))[0]


def saying(**message: Any) -> Answer:
    """Answers with this message; `finish_reason` is that of the choice."""
    finish_reason = message.pop("finish_reason", "stop")

    def answer(body: Body) -> tuple[int, Body]:
        choice = {"message": message, "finish_reason": finish_reason}
        return 200, {**completion(body), "choices": [choice]}

    return answer


def refusing(status: int, unless: str) -> Answer:
    """Refuses what has no part `unless` in its messages."""

    def answer(body: Body) -> tuple[int, Body]:
        if unless in json.dumps(body["messages"]):
            return always_right(body)
        return status, {"error": {"message": "refused"}}

    return answer


def test_replies_come_in_the_order_of_the_questions() -> None:
    with chat_server() as server:
        asked = questions(40)
        replies, usage = Endpoint(settings(server), page()).ask(asked)
    assert replies == [
        Reply(reply_text(each.messages, each.seed), "stop", prompt_tokens=10, generated_tokens=5)
        for each in asked
    ]
    assert usage == Usage(410, 164, 205, requests=41)  # a trial, and each question once


def test_a_question_is_sent_with_the_sampling_of_the_page() -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 50, "thinking_tokens": 200}
    with chat_server() as server:
        made = page(generation={**sampling, "stop": ["END"]})
        Endpoint(settings(server), made).ask(questions(1))
    assert server.bodies[-1] == {
        "model": "judge",
        "messages": [{"role": "user", "content": "question 0"}],
        "seed": 1000,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 250,
        "stop": ["END"],
    }


def test_a_reply_in_json_is_held_to_its_schema() -> None:
    made = page("json")
    with chat_server() as server:
        endpoint = Endpoint(settings(server), made)
        endpoint.ask([replace(questions(1)[0], verdicts=3)])
    held_to = server.bodies[-1]["response_format"]["json_schema"]
    assert held_to["schema"] == json.loads(reply_schema(made, 3)) and held_to["strict"]
    assert endpoint.provenance["response_format"] == "json_schema"


def test_a_server_that_takes_no_schema_is_asked_without() -> None:
    def answer(body: Body) -> tuple[int, Body]:
        return (400, {}) if "response_format" in body else always_right(body)

    with chat_server(answer) as server:
        endpoint = Endpoint(settings(server), page("json"))
        replies, usage = endpoint.ask(questions(5))
        endpoint.ask(questions(5, first=5))
    assert [reply.ended for reply in replies] == ["stop"] * 5
    assert endpoint.provenance["response_format"] == "refused"
    assert sum("response_format" in body for body in server.bodies) == 1
    assert (usage.requests, usage.retries) == (7, 0)


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "<think>\nwell\n</think>\n\nA"}, "A", "well"),
        ({"content": "well</think>A"}, "A", "well"),
        ({"content": "<think>well A"}, "", "well A"),
        ({"content": "A <think>"}, "A <think>", ""),
        ({"content": "A", "reasoning_content": "well"}, "A", "well"),
        ({"content": "A", "reasoning": "well"}, "A", "well"),
        ({"content": None, "reasoning": "well"}, "", "well"),
        ({"content": None}, "", ""),
    ],
)
def test_thinking_is_no_part_of_the_answer(
    message: dict[str, Any], text: str, reasoning: str
) -> None:
    (reply,) = ask(saying(**message), page())
    assert (reply.text, reply.reasoning, reply.ended) == (text, reasoning, "stop")


@given(st.text(), st.text())
def test_a_think_block_is_split_off_whole(reasoning: str, answer: str) -> None:
    reasoning = reasoning.replace("</think>", "").replace("<think>", "")
    assert split_thinking(f"<think>{reasoning}</think>{answer}") == (
        reasoning.strip(),
        answer.lstrip(),
    )


@pytest.mark.parametrize(
    ("finish_reason", "ended"),
    [("stop", "stop"), ("length", "length"), ("content_filter", "error"), (None, "error")],
)
def test_how_a_reply_ended(finish_reason: str | None, ended: str) -> None:
    (reply,) = ask(saying(content="A", finish_reason=finish_reason), page())
    assert (reply.ended, bool(reply.detail)) == (ended, ended == "error")


def continuing(body: Body) -> tuple[int, Body]:
    """As a server that takes vLLM's parameters: fewer tokens where the last message goes on."""
    found = completion(body)
    found["usage"]["prompt_tokens"] = 8 if body.get("continue_final_message") else 10
    return 200, found


def test_a_reply_that_was_begun_is_part_of_its_text() -> None:
    with chat_server(continuing) as server:
        (reply,), _ = Endpoint(settings(server), page(begins="I say ")).ask(questions(1))
    messages = [*questions(1)[0].messages, {"role": "assistant", "content": "I say "}]
    assert reply.text == f"I say {reply_text(messages, 1000)}"
    assert server.bodies[-1]["messages"] == messages
    assert server.bodies[-1]["add_generation_prompt"] is False


def test_a_server_that_would_not_go_on_with_a_begun_reply_is_refused() -> None:
    with pytest.raises(ConfigError):
        ask(always_right, page(begins="I say "))


CLOSED = {"closing": " So: ", "verdict_tokens": 4, "temperature": 1.0, "stop": ["END"]}


def critic(**critique: Any) -> Answer:
    """Answers with this message, then the verdict A behind what the reply is begun with."""
    first = saying(**critique)

    def answer(body: Body) -> tuple[int, Body]:
        if body["messages"][-1]["role"] == "user":
            return first(body)
        status, found = saying(content="A", finish_reason="length")(body)
        return status, {**found, "usage": continuing(body)[1]["usage"]}

    return answer


@pytest.mark.parametrize(
    ("critique", "begun", "text", "reasoning"),
    [
        ({"content": "Fine."}, "Fine.", "Fine.", ""),
        ({"content": "Fine", "finish_reason": "length"}, "Fine", "Fine", ""),
        ({"content": ""}, "", "", ""),
        ({"content": "<think>w</think>Fine."}, "<think>w</think>Fine.", "Fine.", "w"),
        ({"content": "w</think>Fine."}, "<think>\nw</think>Fine.", "Fine.", "w"),
        ({"content": "Fine.", "reasoning": "w"}, "<think>\nw\n</think>\n\nFine.", "Fine.", "w"),
    ],
)
def test_a_verdict_goes_on_behind_the_closing(
    critique: dict[str, Any], begun: str, text: str, reasoning: str
) -> None:
    """All of what the judge wrote stands before it, its thoughts too. The verdict has a seed of
    its own, and the question is asked once, with the tokens of both parts."""
    with chat_server(critic(**critique)) as server:
        replies, usage = Endpoint(settings(server), page(generation=CLOSED)).ask(questions(1))
    expected = Reply(
        f"{text} So: A", "length", reasoning=reasoning, prompt_tokens=10, generated_tokens=10
    )
    assert replies == [expected]
    assert (usage.requests, usage.retries, usage.generated_tokens) == (5, 0, 25)
    asked, verdict = server.bodies[-2:]
    assert verdict["messages"] == [
        *asked["messages"],
        {"role": "assistant", "content": f"{begun} So: "},
    ]
    assert (asked["max_tokens"], verdict["max_tokens"]) == (1024, 4)
    assert verdict["continue_final_message"] and not verdict["add_generation_prompt"]
    assert verdict["seed"] != asked["seed"] and 0 <= verdict["seed"] < 2**31
    same = ("temperature", "top_p", "stop")
    assert [verdict[name] for name in same] == [asked[name] for name in same]


def test_a_reply_that_was_begun_goes_on_behind_the_closing() -> None:
    def answer(body: Body) -> tuple[int, Body]:
        text = body["messages"][-1]["content"]
        status, found = saying(content="A" if text.endswith("So: ") else "fine.")(body)
        return status, {**found, "usage": continuing(body)[1]["usage"]}

    (reply,) = ask(answer, page(begins="It is ", generation=CLOSED))
    assert reply.text == "It is fine. So: A"


@pytest.mark.parametrize(
    "critique",
    [{"content": "<think>w"}, {"content": None, "reasoning": "w"}, {"finish_reason": "other"}],
)
def test_a_critique_that_is_none_gets_no_verdict(critique: dict[str, Any]) -> None:
    """A think block that was not closed, or what the server ended. The trial has one."""

    def answer(body: Body) -> tuple[int, Body]:
        is_asked = body["messages"][0]["content"] == question_text(0)
        return critic(**{"content": "Fine.", **(critique if is_asked else {})})(body)

    with chat_server(answer) as server:
        endpoint = Endpoint(settings(server), page(generation=CLOSED))
        (none, other), usage = endpoint.ask(questions(2))
    assert "A" not in none.text and other.text == "Fine. So: A"
    assert usage.requests == 3 + 1 + 2


def test_a_judge_that_does_not_come_to_an_end_of_its_thoughts_in_a_trial_is_refused() -> None:
    with pytest.raises(ConfigError):
        ask(critic(content="<think>w"), page(generation=CLOSED))


def test_a_schema_holds_the_verdict_behind_the_closing_alone() -> None:
    with chat_server(critic(content="Fine.")) as server:
        made = page("json", generation={"closing": " As JSON: "})
        endpoint = Endpoint(settings(server), made)
        endpoint.ask(questions(1))
        assert endpoint.provenance["response_format"] == "json_schema"
        asked, verdict = server.bodies[-2:]
        assert "response_format" not in asked and "response_format" in verdict
        begun = Endpoint(settings(server), page("json", generation={"closing": ' {"verdict":'}))
        begun.ask(questions(1))
        assert begun.provenance["response_format"] is None
        assert "response_format" not in server.bodies[-1]


@pytest.mark.parametrize(
    "answer",
    [
        saying(content="Fine."),  # it begins another message
        lambda body: (400, {}) if "continue_final_message" in body else always_right(body),
    ],
)
def test_a_server_that_would_not_go_on_behind_a_closing_is_refused(answer: Answer) -> None:
    with pytest.raises(ConfigError):
        ask(answer, page(generation=CLOSED))


def test_a_verdict_that_fails_costs_its_question_alone() -> None:
    def answer(body: Body) -> tuple[int, Body]:
        is_second = body["messages"][-1]["role"] == "assistant"
        if is_second and body["messages"][0]["content"] == question_text(1):
            return 503, {}
        return critic(content="Fine.")(body)

    replies = ask(answer, page(generation=CLOSED), count=3)
    assert [(reply.ended, reply.tries) for reply in replies] == [
        ("length", 1),
        ("error", 2),
        ("length", 1),
    ]


@pytest.mark.parametrize("status", [301, 307, 400, 401, 402, 403, 404, 405, 422])
def test_refused_settings_are_an_error_before_any_question(status: int) -> None:
    with chat_server(refusing(status, unless="nothing of it")) as server:
        with pytest.raises(ConfigError):
            Endpoint(settings(server), page()).ask(questions(20))
        assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_refused_question_costs_itself_alone(status: int) -> None:
    def answer(body: Body) -> tuple[int, Body]:
        is_wrong = body["messages"][0]["content"] == question_text(3)
        return (status, {}) if is_wrong else always_right(body)

    replies = ask(answer, page(), count=6)
    assert [reply.ended for reply in replies] == ["stop"] * 3 + ["error"] + ["stop"] * 2
    assert replies[3].tries == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_key_that_is_revoked_meanwhile_ends_the_asking(status: int) -> None:
    with pytest.raises(ConfigError):
        ask(refusing(status, unless="Write the word yes"), page(), count=20)


def test_a_server_that_stays_broken_gives_error_replies() -> None:
    replies = ask(refusing(503, unless="nothing of it"), page(), count=20)
    assert [(reply.ended, reply.text, reply.tries) for reply in replies] == [("error", "", 0)] * 20


def test_a_question_is_asked_so_often_and_no_more() -> None:
    def answer(body: Body) -> tuple[int, Body]:
        is_wrong = body["messages"][0]["content"] == question_text(1)
        return (500, {}) if is_wrong else always_right(body)

    with chat_server(answer) as server:
        replies, usage = Endpoint(settings(server, attempts=3), page()).ask(questions(3))
    assert [(reply.ended, reply.tries) for reply in replies] == [
        ("stop", 1),
        ("error", 3),
        ("stop", 1),
    ]
    assert (usage.requests, usage.retries) == (6, 2)


def test_nobody_at_the_address_gives_error_replies() -> None:
    with chat_server() as server:
        gone = settings(server)
    replies, usage = Endpoint(gone, page()).ask(questions(2))
    assert [reply.ended for reply in replies] == ["error", "error"]
    assert (usage.requests, usage.retries) == (2, 1)


@pytest.mark.parametrize("concurrency", [1, 4, 64])
def test_as_many_requests_are_in_flight_as_allowed(concurrency: int) -> None:
    """The server answers none until it has so many at once."""
    gate = threading.Barrier(concurrency, timeout=600)

    def answer(body: Body) -> tuple[int, Body]:
        if body["messages"][0]["content"].startswith("question"):
            gate.wait()
            time.sleep(0.2)  # in which one too many would come
        return always_right(body)

    with chat_server(answer) as server:
        asked = questions(3 * concurrency)
        replies, _ = Endpoint(settings(server, concurrency=concurrency), page()).ask(asked)
    assert {reply.ended for reply in replies} == {"stop"}
    assert server.most_at_once == concurrency


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which the endpoint would have slept: it does not."""
    seconds: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float) -> None:
        seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return seconds


@pytest.mark.parametrize(
    "limit", [{"requests_per_minute": 60 / 1e6}, {"tokens_per_minute": 15 * 60 / 1e6}]
)
def test_requests_are_as_far_apart_as_the_limits_say(
    limit: dict[str, float], slept: list[float]
) -> None:
    """A million seconds, beside which those that the test takes are none. An answer has 15 tokens,
    whatever was thought before it came."""
    with chat_server() as server:
        Endpoint(settings(server, concurrency=1, **limit), page()).ask(questions(3))
    assert [round(seconds / 1e6) for seconds in slept] == [0, 1, 2, 3]


def test_a_server_in_trouble_gets_the_time_that_it_asks_for(slept: list[float]) -> None:
    with chat_server(refusing(503, unless="nothing of it"), Retry_After="50") as server:
        Endpoint(settings(server, attempts=3), page()).ask(questions(1))
    assert len([seconds for seconds in slept if 50 <= seconds <= 55]) == 2


def test_answers_without_counts_are_counted() -> None:
    def answer(body: Body) -> tuple[int, Body]:
        return 200, {**completion(body), "usage": None}

    with chat_server(answer) as server:
        replies, usage = Endpoint(settings(server), page()).ask(questions(2))
    assert [reply.ended for reply in replies] == ["stop", "stop"]
    assert (usage.uncounted, usage.prompt_tokens) == (3, 0)


def test_no_question_asks_for_nothing() -> None:
    with chat_server() as server:
        assert Endpoint(settings(server), page()).ask([]) == ([], Usage())
    assert not server.bodies


def test_what_the_server_says_of_itself_is_recorded() -> None:
    with chat_server() as server:
        endpoint = Endpoint(settings(server), page())
        endpoint.ask(questions(2))
        assert json.loads(json.dumps(endpoint.provenance)) == endpoint.provenance
    assert endpoint.provenance["served_models"] == ["judge-2026-11-29"]


# Probabilities.


def telling(**logprobs: float) -> Answer:
    """Gives these log probabilities, whatever it is asked."""

    def answer(body: Body) -> tuple[int, Body]:
        found = completion(body)
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        found["choices"][0]["logprobs"] = {"content": [{"token": "?", "top_logprobs": top}]}
        return 200, found

    return answer


def test_choices_have_the_probabilities_of_the_tokens_that_spell_them() -> None:
    given_ = {"Yes": 0.5, " Yes": 0.125, "Yes,": 0.05, "No": 0.25, "Maybe": 0.01}
    answer = telling(**{token: math.log(value) for token, value in given_.items()})
    with chat_server(answer) as server:
        found, _ = Endpoint(settings(server), page("probability")).probabilities(questions(2))
    np.testing.assert_allclose(found.values, [[0.625, 0.25]] * 2, rtol=1e-6)
    np.testing.assert_allclose(found.unseen, [0.01] * 2, rtol=1e-6)
    assert not found.errors
    sent = server.bodies[-1]
    assert (sent["max_tokens"], sent["logprobs"], sent["top_logprobs"]) == (1, True, TOP_TOKENS)


def test_a_choice_that_is_not_among_the_most_probable_is_not_known() -> None:
    with chat_server(telling(Yes=math.log(0.9), Perhaps=math.log(0.08))) as server:
        found, _ = Endpoint(settings(server), page("probability")).probabilities(questions(1))
    np.testing.assert_allclose(found.values, [[0.9, np.nan]], rtol=1e-6)
    # What the others have not taken is less than the least of them.
    np.testing.assert_allclose(found.unseen, [0.02], rtol=1e-4)


@given(st.lists(st.floats(1e-6, 1.0), min_size=21, max_size=60), st.data())
def test_what_is_not_known_of_a_choice_is_bounded(
    weights: list[float], data: st.DataObject
) -> None:
    """For any distribution of which the most probable tokens are told."""
    truth = {f"t{place}": weight / sum(weights) for place, weight in enumerate(weights)}
    told = sorted(truth, key=truth.__getitem__, reverse=True)[:TOP_TOKENS]
    choices = data.draw(st.lists(st.sampled_from(sorted(truth)), min_size=2, unique=True))
    values, unseen = choice_probabilities([(each, math.log(truth[each])) for each in told], choices)
    for choice, value in zip(choices, values.tolist(), strict=True):
        if choice in told:
            assert value == pytest.approx(truth[choice], rel=1e-5)
        else:
            assert math.isnan(value) and truth[choice] <= unseen + 1e-9


def test_a_server_without_log_probabilities_is_refused() -> None:
    with chat_server() as server, pytest.raises(ConfigError):
        Endpoint(settings(server), page("probability")).probabilities(questions(1))


def test_a_question_without_an_answer_has_no_probabilities() -> None:
    def answer(body: Body) -> tuple[int, Body]:
        is_wrong = body["messages"][0]["content"] == question_text(1)
        return (500, {}) if is_wrong else telling(Yes=-0.1, No=-3.0)(body)

    with chat_server(answer) as server:
        found, _ = Endpoint(settings(server), page("probability")).probabilities(questions(3))
    assert np.isnan(found.values).all(axis=1).tolist() == [False, True, False]
    assert found.errors.keys() == {1}


def test_each_kind_of_page_has_its_question() -> None:
    with chat_server() as server:
        with pytest.raises(ValueError):
            Endpoint(settings(server), page("probability")).ask(questions(1))
        with pytest.raises(ValueError):
            Endpoint(settings(server), page("json")).probabilities(questions(1))


# The key, and where it goes.


def test_the_key_is_read_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    monkeypatch.setenv("JUDGE", KEY)
    for place in ({"api_key_env": "JUDGE"}, {"api_key_file": file}, {}):
        with chat_server() as server:
            Endpoint(settings(server, **place), page()).ask(questions(1))
        assert set(server.authorizations) == {f"Bearer {KEY}" if place else None}


@pytest.mark.parametrize("value", ["", "  \n", f"{KEY}\nsecond line", f"{KEY}é"])
def test_what_is_no_key_is_refused_and_not_shown(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(value)
    monkeypatch.setenv("JUDGE", value)
    for place in ({"api_key_env": "JUDGE"}, {"api_key_file": file}):
        made = EndpointSettings("http://localhost/v1", "judge", **place)
        with pytest.raises(ConfigError) as caught:
            Endpoint(made, page())
        assert KEY not in repr(caught.value)


def test_a_key_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for place in ({"api_key_env": "NO_SUCH_JUDGE"}, {"api_key_file": tmp_path / "key"}):
        made = EndpointSettings("http://localhost/v1", "judge", **place)
        with pytest.raises(ConfigError):
            Endpoint(made, page())


@pytest.mark.parametrize("status", [401, 403])
def test_what_a_server_says_of_a_refused_key_is_not_told(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tell a part of it."""
    monkeypatch.setenv("JUDGE", KEY)

    def answer(body: Body) -> tuple[int, Body]:
        return status, {"error": {"message": f"Incorrect API key: {KEY[:9]}…{KEY[-3:]}"}}

    with chat_server(answer) as server, pytest.raises(ConfigError) as caught:
        Endpoint(settings(server, api_key_env="JUDGE"), page()).ask(questions(1))
    assert KEY[:9] not in str(caught.value)


def test_the_key_follows_no_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", KEY)
    with chat_server() as elsewhere:

        def answer(body: Body) -> tuple[int, Body]:
            return 307, {}

        location = f"{elsewhere.base_url}/chat/completions"
        with chat_server(answer, Location=location) as server:
            with pytest.raises(ConfigError):
                Endpoint(settings(server, api_key_env="JUDGE"), page()).ask(questions(1))
            assert set(server.authorizations) == {f"Bearer {KEY}"}
    assert not elsewhere.bodies


def test_no_proxy_of_the_environment_is_told_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", KEY)
    with chat_server() as proxy, chat_server() as server:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        Endpoint(settings(server, api_key_env="JUDGE"), page()).ask(questions(1))
        assert server.bodies and not proxy.bodies


def test_an_endpoint_shows_no_key_and_does_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", KEY)
    made = EndpointSettings("http://localhost/v1", "judge", api_key_env="JUDGE")
    endpoint = Endpoint(made, page())
    assert KEY not in f"{endpoint!r} {vars(endpoint)!r} {endpoint.provenance!r} {asdict(made)!r}"
    for carry in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            carry(vars(endpoint)["_key"])
    with pytest.raises(TypeError):
        pickle.dumps(endpoint)
    assert pickle.loads(pickle.dumps(made)) == made


# Settings.


@pytest.mark.parametrize(
    "changes",
    [
        {"base_url": ""},
        {"base_url": "judge.example/v1"},
        {"base_url": "ftp://judge.example/v1"},
        {"base_url": "https://"},
        {"base_url": f"https://user:{KEY}@judge.example/v1"},
        {"base_url": f"https://judge.example/v1?api_key={KEY}"},
        {"base_url": "https://judge.example/v1?version=1"},
        {"model": ""},
        {"api_key_env": "A", "api_key_file": Path("b")},
        {"concurrency": 0},
        {"attempts": 0},
        {"timeout_s": 0.0},
        {"timeout_s": math.inf},
        {"requests_per_minute": 0.0},
        {"tokens_per_minute": math.nan},
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        EndpointSettings(**{"base_url": "https://judge.example/v1", "model": "judge", **changes})
    assert KEY not in str(caught.value)
