"""A judge that is served elsewhere, behind an OpenAI-compatible server: POST /chat/completions.

It gets messages, not token ids: the server applies the chat template of its model.

Legend: Q questions, C choices of the page's verdict.

Every question is asked until it has an answer that can be read, at most `attempts` times, always
with the same body and seed. It has a connection of its own, and an answer is taken when all of it
is there. So none is lost, doubled or given to another question. Where the page has a `closing`, the
verdict behind it is asked for in a second request, which goes on with the reply.
"""

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Any, NoReturn

import aiohttp
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from batch_scorer.backends import replies
from batch_scorer.backends.pacing import Pace, asked_wait_s, wait_s
from batch_scorer.backends.replies import CLOSE, OPEN, seed_of
from batch_scorer.credentials import wrong_url
from batch_scorer.errors import ConfigError
from batch_scorer.judges.page import Page, may_guide, reply_schema
from batch_scorer.logs import log, mask
from batch_scorer.records.judging import Ended, Reply

TOP_TOKENS = 20
"""How many of the most probable tokens are asked for: the most that OpenAI and a vLLM without a
setting of its own give."""

_MOST_BYTES = 1 << 26
"""Of an answer; beyond it the server is broken."""
_CHUNK_BYTES = 1 << 16
_CONNECT_TIMEOUT_S = 30.0
_MOST_QUOTED = 200
"""Characters of a message that is not ours."""
_BYTES_PER_TOKEN = 4
"""Of a prompt, as its tokens are estimated for `tokens_per_minute` until the server has counted."""

_AGAIN = frozenset({408, 409, 425, 429})
"""These statuses, and all from 500, may pass."""
_OF_A_QUESTION = frozenset({400, 403, 413, 422})
"""These refuse a question, when a trial with the same settings was answered: too long a prompt, a
filter of contents. All others are about the settings."""
_OF_THE_KEY = frozenset({401, 403})

_TRIAL = "Write the word yes."
_CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
"""vLLM's parameters for a reply that goes on where the last message ends."""
_ENDED: dict[str | None, Ended] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where a judge is served, and how hard it may be asked.

    base_url       what stands before /chat/completions, as a rule ending in /v1.
    model          the name that the server knows the judge by.
    api_key_env    the environment variable that holds the key; or
    api_key_file   the file that does. Neither: the server asks for none.
    concurrency    most requests in flight.
    requests_per_minute, tokens_per_minute  limits of this process, tokens being those of prompts
                   and replies; None: no limit.
    timeout_s      for one request, from its start to the end of its answer.
    attempts       how often a request is sent at most.

    Raises ConfigError for values that cannot be used.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    api_key_file: Path | None = None
    concurrency: int = 32
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_s: float = 600.0
    attempts: int = 6

    def __post_init__(self) -> None:
        if problem := wrong_url(self.base_url) or _url_problem(self.base_url):
            raise ConfigError(f"endpoint: {problem}")
        if not self.model:
            raise ConfigError("model: the name that the server knows the judge by is needed")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ConfigError("api_key_env and api_key_file: set one of them")
        for name in ("concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: at least 1")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"{name}: a number above 0")

    @property
    def url(self) -> str:
        """Where questions are sent."""
        return f"{self.base_url.rstrip('/')}/chat/completions"


@dataclass(frozen=True, slots=True)
class ServedQuestion:
    """What a judge is asked: `role` and `content` of each message, the seed that its reply is
    sampled from, and how many verdicts the reply has to hold."""

    messages: Sequence[Mapping[str, str]]
    seed: int
    verdicts: int = 1


@dataclass(slots=True)
class Usage:
    """What asking took. Tokens are counted by the server, for answers that arrived: what
    it computed for a lost answer, nobody knows."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    """Of the prompt tokens, those that the server says it had computed before."""
    generated_tokens: int = 0
    requests: int = 0
    retries: int = 0
    """Requests that asked a question again."""
    uncounted: int = 0
    """Answers for which the server gave no counts."""


@dataclass(frozen=True, slots=True)
class Probabilities:
    """How probable each choice is as the next token.

    `values` is float32[Q, C], the choices in the page's order: the sum over those of the
    `TOP_TOKENS` most probable tokens that spell the choice, whitespace around it aside. NaN where
    none of them does. No other token is more probable than `unseen`, float32[Q]: NaN stands for at
    most that, and is to be read as 0. `errors` says of the questions without an answer what failed;
    they are NaN everywhere.

    A choice that takes several tokens is never found. `prompt_tokens` is int32[Q], the server's
    count, 0 where there is none.
    """

    values: npt.NDArray[np.float32]
    unseen: npt.NDArray[np.float32]
    errors: dict[int, str]
    prompt_tokens: npt.NDArray[np.int32]


class Endpoint:
    """Asks a served judge the questions of a page.

    The key is read here. Raises ConfigError where it cannot be had. An object of this class cannot
    be pickled; settings and page can.
    """

    def __init__(self, settings: EndpointSettings, page: Page) -> None:
        self._settings = settings
        self._page = page
        self._closing = page.generation.closing if page.generates else ""
        self._key = _read_key(settings)
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._chance = random.Random()
        self._form: _Form | None = None
        self._served: set[str] = set()
        self._system_fingerprints: set[str] = set()

    @property
    def provenance(self) -> dict[str, Any]:
        """Who gave the replies: JSON values, without the key.

        `response_format` is `refused` where the server does not take the schema of the reply, and
        null where it was not sent one. What the server says of itself is in `served_models` and
        `system_fingerprints`.
        """
        form = self._form
        taken = None
        if form is not None and may_guide(self._page):
            taken = "json_schema" if form.with_schema else "refused"
        return {
            "engine": "endpoint",
            "base_url": self._settings.base_url,
            "model": self._settings.model,
            "response_format": taken,
            "served_models": sorted(self._served),
            "system_fingerprints": sorted(self._system_fingerprints),
            "aiohttp": aiohttp.__version__,
        }

    def try_out(self) -> None:
        """Make the trial now, so that wrong settings show before the first question. Raises
        ConfigError as `ask` does."""
        asyncio.run(self._ask_all([], Usage()))

    def ask(self, questions: Sequence[ServedQuestion]) -> tuple[list[Reply], Usage]:
        """The replies, in the questions' order. A server that stays broken gives `error` replies.

        Raises ConfigError where the server refuses the settings: the key, the model's name, the
        address, a parameter. May not be called inside a running event loop.
        """
        if self._page.verdict.by == "probability":
            raise ValueError("this page reads probabilities; ask for `probabilities`")
        outcomes, usage = self._run(questions)
        return [self._reply(outcome) for outcome in outcomes], usage

    def probabilities(self, questions: Sequence[ServedQuestion]) -> tuple[Probabilities, Usage]:
        """The probabilities of the page's choices, in the questions' order.

        Raises ConfigError as `ask` does, and where the server gives no log probabilities.
        """
        if self._page.verdict.by != "probability":
            raise ValueError("this page reads replies; `ask` for them")
        outcomes, usage = self._run(questions)
        choices = list(self._page.verdict.choices)
        values = np.full((len(questions), len(choices)), np.nan, np.float32)
        unseen = np.full(len(questions), np.nan, np.float32)
        errors: dict[int, str] = {}
        prompt_tokens = np.zeros(len(questions), np.int32)
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome.got, _Fault):
                errors[place] = outcome.got.detail
            else:
                prompt_tokens[place] = outcome.got.prompt_tokens
                values[place], unseen[place] = choice_probabilities(outcome.got.top_tokens, choices)
        return Probabilities(values, unseen, errors, prompt_tokens), usage

    def _run(self, questions: Sequence[ServedQuestion]) -> tuple[list["_Outcome"], Usage]:
        usage = Usage()
        outcomes = asyncio.run(self._ask_all(questions, usage)) if questions else []
        return outcomes, usage

    async def _ask_all(self, questions: Sequence[ServedQuestion], usage: Usage) -> list["_Outcome"]:
        outcomes: dict[int, _Outcome] = {}
        places = iter(range(len(questions)))

        # As many of these as requests may be in flight. One that waits to ask again asks nothing
        # else meanwhile: a server in trouble gets fewer requests.
        async def work(session: aiohttp.ClientSession, form: _Form) -> None:
            for place in places:
                outcomes[place] = await self._ask_in_parts(session, questions[place], form, usage)

        failure: BaseException | None = None
        async with self._session() as session:
            form = self._form or await self._find_form(session, usage)
            if isinstance(form, _Fault):
                fault = _Fault(f"not asked, since a trial had no answer: {form.detail}")
                return [_Outcome(fault, tries=0)] * len(questions)
            self._form = form
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(min(self._settings.concurrency, len(questions))):
                        tasks.create_task(work(session, form))
            except ExceptionGroup as group:
                failure = group.exceptions[0]
        if failure is not None:
            raise failure
        return [outcomes[place] for place in range(len(questions))]

    def _session(self) -> aiohttp.ClientSession:
        """Keeps no cookies and reads neither proxies nor passwords from the environment."""
        return aiohttp.ClientSession(
            # A connection for each request: what a broken proxy sends late would else be taken for
            # the answer to the next one. Without a limit, which those who ask keep themselves.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(
                self._settings.timeout_s, sock_connect=_CONNECT_TIMEOUT_S
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _find_form(self, session: aiohttp.ClientSession, usage: Usage) -> "_Form | _Fault":
        """What the server takes, by trials with the settings of all questions and short texts; a
        fault where it gives no answer. Raises ConfigError where it refuses them."""
        trial = ServedQuestion([{"role": "user", "content": _TRIAL}], seed=0)
        form = _Form(with_schema=may_guide(self._page))
        outcome = await self._ask_in_parts(session, trial, form, usage)
        if _is_refused(outcome.got) and form.with_schema:
            form = replace(form, with_schema=False)
            outcome = await self._ask_in_parts(session, trial, form, usage)
        got = outcome.got
        if isinstance(got, _Fault):
            return self._refuse(got.detail) if _is_refused(got) else got
        if may_guide(self._page) and not form.with_schema:
            log.warning(
                "%s takes no JSON schema: replies are not held to one", self._settings.base_url
            )
        if self._page.verdict.by == "probability" and not got.top_tokens:
            self._refuse("it gives no log probabilities; judge by `pattern` or `json`")
        if not (self._page.begins or self._closing):
            return form
        if self._closing and outcome.critique is None:
            self._refuse("its trial has no answer behind which the page's `closing` could stand")
        # With the same messages, a server that continues the last one has fewer prompt tokens:
        # those that end it and begin another are missing.
        critique = None if outcome.critique is None else self._written(outcome.critique).whole
        body = self._body(trial, form, critique)
        closed = {name: value for name, value in body.items() if name not in _CONTINUE}
        other = (await self._ask(session, {**closed, "max_tokens": 1}, usage)).got
        if isinstance(other, _Fault):
            return self._refuse(other.detail) if _is_refused(other) else other
        if not 0 < got.prompt_tokens < other.prompt_tokens:
            part = "closing" if self._closing else "begins"
            self._refuse(f"it does not go on with a reply that was begun; the page has `{part}`")
        return form

    def _refuse(self, detail: str) -> NoReturn:
        raise ConfigError(f"{self._settings.base_url}, model {self._settings.model}: {detail}")

    def _body(
        self, question: ServedQuestion, form: "_Form", critique: str | None = None
    ) -> dict[str, Any]:
        """What is sent for a question, or for the verdict behind its critique, which begins as the
        page says; of a page that reads probabilities, for one token."""
        page, generation = self._page, self._page.generation
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [dict(message) for message in question.messages],
            "seed": question.seed if critique is None else seed_of(question.seed, 1) % 2**31,
        }
        if begun := page.begins if critique is None else critique + self._closing:
            body["messages"].append({"role": "assistant", "content": begun})
            body |= _CONTINUE
        if page.verdict.by == "probability":
            # Greedy: some servers put the sampled token among the most probable ones.
            greedy = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 1}
            return {**body, **greedy, "logprobs": True, "top_logprobs": TOP_TOKENS}
        most_tokens = generation.max_tokens + generation.thinking_tokens
        body |= {
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "max_tokens": most_tokens if critique is None else generation.verdict_tokens,
        }
        if generation.stop:
            body["stop"] = list(generation.stop)
        if form.with_schema and (critique is not None or not self._closing):
            schema = json.loads(reply_schema(page, question.verdicts))
            held_to = {"name": "reply", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": held_to}
        return body

    async def _ask_in_parts(
        self,
        session: aiohttp.ClientSession,
        question: ServedQuestion,
        form: "_Form",
        usage: Usage,
    ) -> "_Outcome":
        """Ask a question, and, where the page has a `closing`, go on with its reply behind it."""
        outcome = await self._ask(session, self._body(question, form), usage)
        if not self._closing or isinstance(outcome.got, _Fault):
            return outcome
        written = self._written(outcome.got)
        if written.answer is None or written.ended == "error":
            return outcome
        body = self._body(question, form, critique=written.whole)
        verdict = await self._ask(session, body, usage)
        return _Outcome(verdict.got, outcome.tries + verdict.tries - 1, critique=outcome.got)

    async def _ask(
        self, session: aiohttp.ClientSession, body: dict[str, Any], usage: Usage
    ) -> "_Outcome":
        """Send a body until it is answered or refused, or often enough. Raises ConfigError for a
        refusal that is not about the question."""
        data = json.dumps(body).encode()
        estimate = len(data) // _BYTES_PER_TOKEN + body["max_tokens"]
        tries = 0
        while True:
            tries += 1
            now = time.monotonic()
            await asyncio.sleep(self._pace.start(now, estimate) - now)
            usage.requests += 1
            usage.retries += tries > 1
            got = await self._send(session, data)
            if isinstance(got, _Answer):
                self._count(got, usage)
                if got.usage is not None:
                    self._pace.correct(got.prompt_tokens + got.generated_tokens - estimate)
                return _Outcome(got, tries)
            if got.about is _About.SETTINGS:
                self._refuse(got.detail)
            if got.about is _About.QUESTION or tries == self._settings.attempts:
                return _Outcome(got, tries)
            await asyncio.sleep(wait_s(tries, got.asked_wait_s, self._chance))

    async def _send(self, session: aiohttp.ClientSession, data: bytes) -> "_Answer | _Fault":
        """One request. The key is in no local variable, which a traceback might show."""
        headers = {"Content-Type": "application/json"}
        try:
            async with session.post(
                self._settings.url,
                data=data,
                headers=headers if self._key is None else self._key.added_to(headers),
                allow_redirects=False,  # the key is for this host alone
            ) as response:
                body = bytearray()
                async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                    body += chunk
                    if len(body) > _MOST_BYTES:
                        return _Fault(f"an answer of more than {_MOST_BYTES} bytes")
                status = response.status
                asked_s = asked_wait_s(response.headers, datetime.now(UTC))
        except TimeoutError as error:
            return _Fault(f"{type(error).__name__}: no answer in time")
        except (aiohttp.ClientError, OSError) as error:
            return _Fault(self._quoted(f"{type(error).__name__}: {error}"))
        if status != 200:
            return self._refusal(status, bytes(body), asked_s)
        try:
            answer = _Answer.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors(include_input=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"])) or "the answer"
            return _Fault(f"no chat completion: {place}: {first['type']}")
        if self._page.verdict.by == "probability" and self._form and not answer.top_tokens:
            return _Fault("an answer without log probabilities")
        return answer

    def _refusal(self, status: int, body: bytes, asked_s: float | None) -> "_Fault":
        """What an answer with another status than 200 means."""
        detail = f"HTTP status {status}"
        if status in _OF_THE_KEY:  # these messages may hold the key in a form of the server's own
            detail += ": the key is missing, wrong, or not good for this"
        elif status == 404:
            detail += ": no such model, or nothing at this address; endpoint ends in /v1 as a rule"
        elif 300 <= status < 400:
            detail += ": redirects are not followed; set endpoint to the last address"
        elif message := _message(body):
            detail += f": {self._quoted(message)}"
        if status in _AGAIN or status >= 500:
            return _Fault(detail, asked_wait_s=asked_s)
        about = _About.QUESTION if status in _OF_A_QUESTION else _About.SETTINGS
        return _Fault(detail, about)

    def _quoted(self, text: str) -> str:
        """A part of foreign text, without the key and other secrets."""
        return mask(text if self._key is None else self._key.hidden_in(text))[:_MOST_QUOTED]

    def _count(self, answer: "_Answer", usage: Usage) -> None:
        usage.prompt_tokens += answer.prompt_tokens
        usage.cached_prompt_tokens += answer.cached_prompt_tokens
        usage.generated_tokens += answer.generated_tokens
        usage.uncounted += answer.usage is None
        if answer.model:
            self._served.add(answer.model)
        if answer.system_fingerprint:
            self._system_fingerprints.add(answer.system_fingerprint)

    def _reply(self, outcome: "_Outcome") -> Reply:
        if isinstance(outcome.got, _Fault):
            return Reply("", "error", tries=outcome.tries, detail=outcome.got.detail)
        first, last = outcome.critique or outcome.got, outcome.got
        written = self._written(first)
        text, generated = written.answer or "", first.generated_tokens
        if last is not first:
            text += self._closing + (last.choices[0].message.content or "")
            generated += last.generated_tokens
        finish_reason = last.choices[0].finish_reason
        ended = _ENDED.get(finish_reason, "error")
        detail = f"finish_reason {self._quoted(finish_reason or 'missing')}"
        return Reply(
            text=text,
            ended=ended,
            reasoning=written.reasoning,
            prompt_tokens=first.prompt_tokens,
            generated_tokens=generated,
            tries=outcome.tries,
            detail=detail if ended == "error" else "",
        )

    def _written(self, answer: "_Answer") -> "_Written":
        message = answer.choices[0].message
        apart = message.reasoning or message.reasoning_content or ""
        whole = self._page.begins + (message.content or "")
        if apart and message.content is None:
            reasoning, text = "", None  # it was cut while it thought
        else:
            reasoning, text = split_thinking(whole)
        if apart:
            whole = f"{OPEN}\n{apart}\n{CLOSE}\n\n{whole}"
        elif reasoning and not whole.lstrip().startswith(OPEN):  # the template wrote it
            whole = f"{OPEN}\n{whole}"
        return _Written(
            reasoning="\n".join(filter(None, (apart, reasoning))),
            answer=text,
            whole=whole,
            ended=_ENDED.get(answer.choices[0].finish_reason, "error"),
        )


def split_thinking(text: str) -> tuple[str, str | None]:
    """What stands in the think block that a reply begins with, and the answer behind it.

    Where the chat template opened the block, the reply has its end alone. The answer is None where
    the block is not closed.
    """
    is_opened_before = CLOSE in text and not text.lstrip().startswith(OPEN)
    thinking = replies.split_thinking(OPEN if is_opened_before else "", text)
    if thinking.start is None:
        return thinking.reasoning.strip(), None
    answer = text[thinking.start :]
    return thinking.reasoning.strip(), answer.lstrip() if thinking.start else answer


def choice_probabilities(
    top_tokens: Sequence[tuple[str, float]], choices: Sequence[str]
) -> tuple[npt.NDArray[np.float32], float]:
    """`values` and `unseen` of `Probabilities` for one question, float32[C] and a number, from the
    most probable tokens, at least one, and their log probabilities."""
    probabilities = [math.exp(min(logprob, 0.0)) for _, logprob in top_tokens]
    values = np.full(len(choices), np.nan, np.float32)
    for place, choice in enumerate(choices):
        found = [
            probability
            for (token, _), probability in zip(top_tokens, probabilities, strict=True)
            if token.strip() == choice.strip()
        ]
        if found:
            values[place] = sum(found)
    return values, max(0.0, min(*probabilities, 1 - sum(probabilities)))


class _About(Enum):
    """What a server's refusal is about; a fault is about neither and may pass."""

    SETTINGS = auto()
    QUESTION = auto()


@dataclass(frozen=True, slots=True)
class _Fault:
    """A request without an answer."""

    detail: str
    about: _About | None = None
    asked_wait_s: float | None = None


def _is_refused(got: "_Answer | _Fault") -> bool:
    return isinstance(got, _Fault) and got.about is _About.QUESTION


@dataclass(frozen=True, slots=True)
class _Form:
    """What of a question's body depends on the server."""

    with_schema: bool


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a question, after how many requests. `critique`: the answer that `got` goes on
    with behind the page's `closing`."""

    got: "_Answer | _Fault"
    tries: int
    critique: "_Answer | None" = None


@dataclass(frozen=True, slots=True)
class _Written:
    """A reply's parts; the answer is None where a think block is not closed. `whole` is all of
    it, with what the page begins it with, and `ended` says how it did."""

    reasoning: str
    answer: str | None
    whole: str
    ended: Ended


class _Message(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Token(BaseModel):
    token: str
    logprob: Annotated[float, Field(allow_inf_nan=False)]


class _Position(BaseModel):
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _CachedTokens(BaseModel):
    cached_tokens: Annotated[int, Field(ge=0)] | None = None


class _Counts(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    prompt_tokens_details: _CachedTokens | None = None


class _Answer(BaseModel):
    """As much of a chat completion as is read, in OpenAI's form; reasoning as vLLM and DeepSeek
    have it."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Counts | None = None
    model: str | None = None
    system_fingerprint: str | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.usage.prompt_tokens if self.usage else 0

    @property
    def generated_tokens(self) -> int:
        return self.usage.completion_tokens if self.usage else 0

    @property
    def cached_prompt_tokens(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage else None
        return (details.cached_tokens or 0) if details else 0

    @property
    def top_tokens(self) -> list[tuple[str, float]]:
        """The most probable first tokens with their log probabilities; none where the server does
        not tell."""
        logprobs = self.choices[0].logprobs
        positions = (logprobs.content if logprobs else None) or []
        return [(top.token, top.logprob) for top in positions[0].top_logprobs] if positions else []


class _Key:
    """A credential. It shows itself in the header of a request and nowhere else."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value.strip()

    def __repr__(self) -> str:
        return "_Key(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled: it would travel")

    @property
    def problem(self) -> str | None:
        """Why it can be no key."""
        if not self._value:
            return "is empty"
        if not (self._value.isascii() and self._value.isprintable()):
            return "holds what no header can: a line break, or a letter beyond ASCII"
        return None

    def added_to(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {**headers, "Authorization": f"Bearer {self._value}"}

    def hidden_in(self, text: str) -> str:
        return text.replace(self._value, "***")


def _read_key(settings: EndpointSettings) -> _Key | None:
    """The key, from its place. Raises ConfigError, which names the place alone."""
    if settings.api_key_env is not None:
        where = f"api_key_env: the variable {settings.api_key_env}"
        if settings.api_key_env not in os.environ:
            raise ConfigError(f"{where} is not set")
        key = _Key(os.environ[settings.api_key_env])
    elif settings.api_key_file is not None:
        where = f"api_key_file: {settings.api_key_file}"
        try:
            # Not decoded as UTF-8, whose errors hold the bytes.
            key = _Key(settings.api_key_file.read_text(encoding="latin-1"))
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from None
    else:
        return None
    if problem := key.problem:
        raise ConfigError(f"{where} {problem}")
    return key


def _url_problem(url: str) -> str | None:
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https") or not rest.split("/")[0]:
        return "an address that begins with http:// or https:// is needed"
    if "?" in url or "#" in url:
        return "an address without ? and # is needed: /chat/completions is put behind it"
    return None


def _message(body: bytes) -> str:
    """A server's own words about a refusal, on one line. OpenAI's form: {"error": {"message"}}."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    for name in ("error", "message"):
        if isinstance(found, dict):
            found = found.get(name, found)
    return " ".join(found.split()) if isinstance(found, str) else ""
