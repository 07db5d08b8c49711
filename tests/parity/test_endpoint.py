"""A served judge's replies and probabilities are those of its server, asked one question at a time
by hand, and the probabilities those of plain Hugging Face."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from batch_scorer.backends.endpoint_client import Endpoint, EndpointSettings, ServedQuestion
from batch_scorer.backends.replies import REPLACEMENT, seed_of
from batch_scorer.errors import ConfigError
from batch_scorer.judges.page import Page, reply_schema
from batch_scorer.records.judging import Reply
from tests.helpers.chat_server import Fault, dealt, faulty, question_text
from tests.helpers.language_models import END, plain_reply
from tests.helpers.vllm_server import MAX_TOKENS, VllmServer, vllm_server

pytestmark = pytest.mark.slow  # the server takes a minute to start

COUNT = 12
SYSTEM = "You judge answers. " * 50
"""Longer than a block of vLLM's prefix cache, 128 tokens on a CPU."""
PATTERN: dict[str, Any] = {"by": "pattern", "pattern": "([AB])", "choices": {"A": 1, "B": 0}}
JSON: dict[str, Any] = {"by": "json", "low": 1, "high": 5}
CLOSING = "\nSo: "


def page(verdict: dict[str, Any] = PATTERN, begins: str = "", **generation: Any) -> Page:
    return Page.model_validate(
        {
            "about": "For tests.",
            "mode": "pointwise",
            "messages": [{"role": "user", "content": "?"}],
            "begins": begins,
            "verdict": verdict,
            "generation": {"max_tokens": 24, "temperature": 1.0, **generation},
        }
    )


QUESTIONS = [
    ServedQuestion(
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Here is {question_text(number)}."},
        ],
        seed=100 + number,
        verdicts=1,
    )
    for number in range(COUNT)
]


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    with vllm_server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


def settings(server: VllmServer) -> EndpointSettings:
    (variable,) = server.environment
    return EndpointSettings(server.base_url, server.model, api_key_env=variable)


def by_hand(server: VllmServer, question: ServedQuestion, **body: Any) -> Any:
    """The first choice of the server's answer."""
    sampled = {"seed": question.seed, "temperature": 1.0, "max_tokens": 24, **body}
    messages = body.get("messages", question.messages)
    return server.complete(**{**sampled, "messages": messages})["choices"][0]


def right(choice: Any, begins: str = "") -> tuple[str, str]:
    return begins + choice["message"]["content"], choice["finish_reason"]


def texts(replies: list[Reply]) -> list[tuple[str, str]]:
    return [(reply.text, reply.ended) for reply in replies]


def test_replies_are_those_of_the_server(server: VllmServer) -> None:
    endpoint = Endpoint(settings(server), page())
    replies, usage = endpoint.ask(QUESTIONS)
    assert texts(replies) == [right(by_hand(server, each)) for each in QUESTIONS]
    assert usage.generated_tokens > sum(reply.generated_tokens for reply in replies) > COUNT
    assert usage.requests == COUNT + 1 and usage.uncounted == 0
    assert endpoint.provenance["served_models"] == [server.model]
    # The prompts begin with the same message.
    assert endpoint.ask(QUESTIONS)[1].cached_prompt_tokens > 0


def test_a_reply_is_its_seeds_own(server: VllmServer) -> None:
    """The same for the same seed, whatever it is asked beside; another one for another seed."""
    endpoint = Endpoint(settings(server), page())
    replies, _ = endpoint.ask(QUESTIONS)
    alone = [endpoint.ask([question])[0][0] for question in QUESTIONS[:3]]
    assert texts(alone) == texts(replies[:3])
    others, _ = endpoint.ask([replace(each, seed=each.seed + 1000) for each in QUESTIONS])
    assert all(one.text != other.text for one, other in zip(replies, others, strict=True))


def test_a_reply_ends_before_a_stop_text(server: VllmServer) -> None:
    free, _ = Endpoint(settings(server), page()).ask(QUESTIONS)
    stop = next(letter for letter in free[0].text[3:] if letter.isascii() and letter.isalpha())
    replies, _ = Endpoint(settings(server), page(stop=[stop])).ask(QUESTIONS)
    assert texts(replies) == [right(by_hand(server, each, stop=[stop])) for each in QUESTIONS]
    assert any(reply.ended == "stop" for reply in replies)
    assert all(stop not in reply.text for reply in replies)


def test_a_reply_is_held_to_its_schema(server: VllmServer) -> None:
    made = page(JSON, max_tokens=1000, temperature=2.0)  # so that some texts end
    endpoint = Endpoint(settings(server), made)
    replies, _ = endpoint.ask(QUESTIONS)
    assert endpoint.provenance["response_format"] == "json_schema"
    schema = json.loads(reply_schema(made, 1))
    held_to = {"type": "json_schema", "json_schema": {"name": "any", "schema": schema}}
    expected = [
        right(by_hand(server, each, max_tokens=1000, temperature=2.0, response_format=held_to))
        for each in QUESTIONS[:3]
    ]
    assert texts(replies[:3]) == expected
    whole = [json.loads(reply.text) for reply in replies if reply.ended == "stop"]
    assert whole
    for found in whole:
        jsonschema.validate(found, schema)


def test_a_begun_reply_goes_on(server: VllmServer) -> None:
    replies, _ = Endpoint(settings(server), page(begins="I think")).ask(QUESTIONS)
    for question, reply in zip(QUESTIONS, replies, strict=True):
        choice = by_hand(
            server,
            question,
            messages=[*question.messages, {"role": "assistant", "content": "I think"}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
        assert (reply.text, reply.ended) == right(choice, "I think")


def test_a_verdict_goes_on_behind_the_closing(server: VllmServer) -> None:
    """As in two requests by hand, the second of which goes on with a message."""
    replies, _ = Endpoint(settings(server), page(closing=CLOSING, verdict_tokens=6)).ask(QUESTIONS)
    for question, reply in zip(QUESTIONS, replies, strict=True):
        begun = by_hand(server, question)["message"]["content"] + CLOSING
        choice = by_hand(
            server,
            question,
            messages=[*question.messages, {"role": "assistant", "content": begun}],
            add_generation_prompt=False,
            continue_final_message=True,
            max_tokens=6,
            seed=seed_of(question.seed, 1) % 2**31,
        )
        assert (reply.text, reply.ended) == right(choice, begun)


def test_a_verdict_is_what_plain_hugging_face_writes_behind_the_closing(
    server: VllmServer,
) -> None:
    greedy = page(temperature=0.0, closing=CLOSING, verdict_tokens=12)
    replies, _ = Endpoint(settings(server), greedy).ask(QUESTIONS)
    tokenizer: Any = AutoTokenizer.from_pretrained(server.model_dir)
    model = AutoModelForCausalLM.from_pretrained(server.model_dir, dtype=torch.float32)
    compared = 0
    for question, reply in zip(QUESTIONS, replies, strict=True):
        critique, _, verdict = reply.text.rpartition(CLOSING)
        messages = [*question.messages, {"role": "assistant", "content": critique + CLOSING}]
        prompt = tokenizer.apply_chat_template(
            messages, continue_final_message=True, return_dict=False
        )
        ids, is_all = plain_reply(model, prompt, 12, [END], noise=1e-3)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if is_all:
            assert verdict == text
        else:  # the last character may lack bytes
            assert verdict.startswith(text.rstrip(REPLACEMENT))
        compared += len(ids)
    assert compared > 6 * COUNT


def test_probabilities_are_those_of_plain_hugging_face(server: VllmServer) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(server.model_dir)
    model = AutoModelForCausalLM.from_pretrained(server.model_dir, dtype=torch.float32)
    expected = []
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            list(question.messages), add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        expected.append(logits.softmax(-1).numpy())
    # Three of the likely words of the vocabulary, and the least likely one.
    spelled = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    likely = np.argsort(-np.mean(expected, axis=0))
    words = [spelled[token].strip() for token in likely if token < len(spelled)]
    words = [word for word in words if word.isalpha()]
    choices = dict.fromkeys([*words[:3], words[-1]], 1.0)
    made = page({"by": "probability", "choices": choices})

    found, usage = Endpoint(settings(server), made).probabilities(QUESTIONS)
    assert not found.errors and usage.generated_tokens == COUNT + 1
    assert np.isfinite(found.values).any() and np.isnan(found.values).any()
    for row, (probabilities, unseen) in enumerate(zip(expected, found.unseen, strict=True)):
        # A token that is not among the top ones counts for nothing, and is at most so probable.
        top = set(np.argsort(-probabilities)[:20].tolist())
        for column, choice in enumerate(choices):
            tokens = [token for token, text in enumerate(spelled) if text.strip() == choice]
            listed = [probabilities[token] for token in tokens if token in top]
            value = found.values[row, column]
            if listed:
                assert value == pytest.approx(sum(listed), abs=1e-5)
            else:
                assert np.isnan(value)
            others = [probabilities[token] for token in tokens if token not in top]
            assert all(probability <= unseen + 1e-5 for probability in others)


def test_what_the_server_refuses_is_told_apart(server: VllmServer) -> None:
    """A question that is too long costs itself; a setting ends the asking."""
    long = replace(QUESTIONS[1], messages=[{"role": "user", "content": "word " * MAX_TOKENS}])
    replies, _ = Endpoint(settings(server), page()).ask([QUESTIONS[0], long, QUESTIONS[2]])
    assert replies[1].ended == "error" and replies[1].tries == 1
    assert "error" not in (replies[0].ended, replies[2].ended)
    with pytest.raises(ConfigError):
        Endpoint(settings(server), page(max_tokens=MAX_TOKENS + 1)).ask(QUESTIONS)
    with pytest.raises(ConfigError):
        Endpoint(replace(settings(server), model="another"), page()).ask(QUESTIONS)


def test_a_wrong_key_is_refused_and_not_shown(
    server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE", "canary-wrong-key")
    wrong = Endpoint(replace(settings(server), api_key_env="JUDGE"), page())
    with pytest.raises(ConfigError) as caught:
        wrong.ask(QUESTIONS)
    assert "canary-wrong-key" not in repr(caught.value)
    with pytest.raises(ConfigError):
        Endpoint(replace(settings(server), api_key_env=None), page()).ask(QUESTIONS)


def test_faults_on_the_way_change_no_reply(server: VllmServer) -> None:
    undisturbed, _ = Endpoint(settings(server), page()).ask(QUESTIONS)
    plan = dealt(2 * len(Fault), COUNT, most=3, seed=5)
    with faulty(server.base_url, plan) as proxy:
        made = replace(settings(server), base_url=proxy.base_url, timeout_s=20.0, attempts=9)
        replies, _ = Endpoint(made, page()).ask(QUESTIONS)
    assert proxy.injected == dict.fromkeys(Fault, 2)
    assert texts(replies) == texts(undisturbed)
