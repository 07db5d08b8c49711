"""Replies from vLLM: a judge that writes its verdicts.

vLLM runs the whole language model, head included, as this package reads its checkpoint
(`vllm_loader.py`), and samples from it; `replies.py` says which tokens to ask for next and what
their text is. Questions are asked in the order of their tokens, so that what they share is still
in the prefix cache, and the next part of a reply goes before all questions that wait.

Legend: S sequences, each the question of one reply.
"""

import gc
import importlib.util
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from transformers import PretrainedConfig

from batch_scorer.backends import vllm_engine
from batch_scorer.backends.base import EngineDied, EngineSettings, MakeBackend, unscorable
from batch_scorer.backends.replies import Writer, Writing, end_ids, seed_of
from batch_scorer.backends.vllm_engine import (
    Engine,
    count_prompts,
    dying_of_any_error,
    engine_config,
    longest_sequence,
)
from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.judges.page import Generation, Page, may_guide, reply_schema
from batch_scorer.models.adapter import Adapter, ModelFiles
from batch_scorer.models.registry import EMBEDDING
from batch_scorer.models.tokenizer import load_tokenizer
from batch_scorer.records import Effort, Reply, RowError, Scores, TokenizedRows

logger = logging.getLogger(__name__)

_GUIDE = "xgrammar"
"""What holds a reply to a JSON schema; the package has the same name."""
_BROKEN = "the model's logits are not all numbers"


class Question(NamedTuple):
    """What a reply depends on: the prompt, its token ids as big-endian int32, the seed, and how
    many verdicts the reply holds, 0 where it is held to no schema. They sort as the ids do."""

    prompt: bytes
    seed: int
    verdicts: int

    @property
    def ids(self) -> list[int]:
        """The prompt's token ids."""
        ids: list[int] = np.frombuffer(self.prompt, dtype=">i4").tolist()
        return ids


def questions_of(
    rows: TokenizedRows, sequences: Sequence[int], page: Page, *, guided: bool
) -> list[Question]:
    """The questions of these sequences. Those that must get the same reply are equal."""
    ids = rows.token_ids.astype(">i4")
    asked = []
    for sequence in sequences:
        first, stop = rows.sequence_offsets[sequence : sequence + 2]
        seed = page.generation.seed if rows.seeds is None else int(rows.seeds[sequence])
        count = 1 if rows.verdicts is None else int(rows.verdicts[sequence])
        prompt = ids[first:stop].tobytes()
        sampled = page.generation.temperature > 0
        asked.append(Question(prompt, seed if sampled else 0, count if guided else 0))
    return asked


class VLLMGenerationBackend:
    """A judge that vLLM lets write; see `Backend` for what it does. `Scores.values` is
    float32[S, 0], what it wrote is in `Scores.replies`.

    A question has `max_tokens` of the settings at most, and beyond them there is room for all that
    the page lets the judge write. Raises ModelError for a model that cannot run here, ConfigError
    where nothing is left for questions or vLLM does not sample as the page says, MissingExtraError
    without a vLLM that fits.
    """

    num_outputs = 0

    def __init__(self, settings: EngineSettings) -> None:
        if settings.judge is None or settings.tokenizer_dir is None:
            raise ConfigError("judge: an engine that writes replies needs a page and a tokenizer")
        self._page = page = settings.judge
        files = settings.read_files()
        adapter = settings.adapter or EMBEDDING
        config = engine_config(settings, files, adapter)
        text_config = config.get_text_config()
        trusts = settings.trust_remote_code
        tokenizer = load_tokenizer(settings.tokenizer_dir, trust_remote_code=trusts)
        ends = end_ids(settings.model_dir, text_config, tokenizer)
        self._writer = Writer(page, tokenizer, ends)
        self._vocabulary_size: int = text_config.vocab_size
        self._max_tokens, longest = _limits(settings, text_config, self._writer.room_tokens)
        self._engine = _GenerationEngine(
            settings, files, adapter, config, self._writer, max_tokens=longest
        )
        self.provenance: dict[str, Any] = {
            "backend": "vllm",
            **self._engine.facts,
            "max_tokens": self._max_tokens,
            "guided": _GUIDE if self._engine.guided else None,
            "end_ids": ends,
            "sampling": page.generation.model_dump(mode="json"),
        }
        try:
            self._check_engine()
        except (ModelError, EngineDied) as error:
            self.close()
            if isinstance(error, EngineDied):  # at the first tokens: vLLM cannot run this model
                raise ModelError(f"{settings.model_dir}: {error}") from error
            raise
        logger.info("judging with %s", self.provenance)

    def score(self, rows: TokenizedRows) -> Scores:
        """The replies to all questions in `rows`, in their order; None for those with errors."""
        sequences, errors = self._askable(rows)
        asked = questions_of(rows, sequences, self._page, guided=self._engine.guided)
        effort = Effort()
        written = self._write(sorted(set(asked)), effort)
        replies: list[Reply | None] = [None] * rows.num_sequences
        for sequence, question in zip(sequences, asked, strict=True):
            replies[sequence] = written[question]
        values = np.empty((rows.num_sequences, 0), dtype=np.float32)
        return Scores(values, errors, effort=effort, replies=replies)

    def greedy(self, rows: TokenizedRows, max_tokens: int) -> list[list[int] | None]:
        """See `WritingBackend`."""
        writer = self._writer.greedy(max_tokens)
        sequences, _ = self._askable(rows)
        asked = questions_of(rows, sequences, writer.page, guided=False)
        written = {
            question: writing.generated
            for question, writing in self._engine.run(sorted(set(asked)), Effort(), writer)
        }
        self._engine.clear_cache()  # a run's own prompts find it as they would without this
        ids: list[list[int] | None] = [None] * rows.num_sequences
        for sequence, question in zip(sequences, asked, strict=True):
            ids[sequence] = written[question]
        return ids

    def close(self) -> None:
        """Free the device."""
        self._engine.close()
        del self._engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _askable(self, rows: TokenizedRows) -> tuple[list[int], dict[int, RowError]]:
        """The sequences that can be asked, and why others cannot, beside those that arrive with an
        error."""
        errors = unscorable(
            rows, max_tokens=self._max_tokens, vocabulary_size=self._vocabulary_size
        )
        refused = set(errors) | set(rows.sequence_errors)
        return [s for s in range(rows.num_sequences) if s not in refused], errors

    def _check_engine(self) -> None:
        """Raise ModelError where vLLM cannot write with this model."""
        name = self.provenance["model_class"]
        if self._engine.looks_ahead:
            raise ModelError(f"{name} attends to later tokens in vLLM: it cannot write")
        ids = (np.arange(8, dtype=np.int64) * 7 + 1) % self._vocabulary_size
        short = Generation(max_tokens=1, temperature=self._page.generation.temperature)
        writer = self._writer.with_generation(short)
        verdicts = int(self._engine.guided)
        question = Question(ids.astype(">i4").tobytes(), seed=0, verdicts=verdicts)
        for reply in self._engine.replies([question], Effort(), writer).values():
            if reply.ended == "error":
                dtype = self.provenance["dtype"]
                raise ModelError(f"{name} cannot write in {dtype}: {reply.detail}")
        self._engine.clear_cache()

    def _write(self, questions: list[Question], effort: Effort) -> dict[Question, Reply]:
        """The replies to these questions.

        Keys and values that are not numbers stay in vLLM's cache and break what is computed in the
        same block later. So every question whose logits are no numbers is asked again, alone and
        on a clean cache, and only then its reply is an error.
        """
        written = self._engine.replies(questions, effort, self._writer)
        suspects = [question for question, reply in written.items() if reply.detail == _BROKEN]
        for question in suspects:
            self._engine.clear_cache()
            written.update(self._engine.replies([question], effort, self._writer))
        if suspects:
            self._engine.clear_cache()
        return written


class _GenerationEngine(Engine):
    """vLLM with a whole language model, which writes replies; `guided`: it holds them to a schema
    of JSON."""

    def __init__(
        self,
        settings: EngineSettings,
        files: ModelFiles,
        adapter: Adapter,
        config: PretrainedConfig,
        writer: Writer,
        *,
        max_tokens: int,
    ) -> None:
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine import EngineCoreRequest

        try:
            _sampling(writer)
        except VLLMValidationError as error:
            raise ConfigError(f"generation: vLLM refuses it: {error}") from error
        guided = may_guide(writer.page) and importlib.util.find_spec(_GUIDE) is not None
        runner: dict[str, Any] = {
            "runner": "generate",
            "scheduling_policy": "priority",
            "generation_config": "vllm",  # none beside the page's
            "skip_tokenizer_init": not guided,
        }
        if guided:
            runner |= {
                "tokenizer": str(settings.tokenizer_dir),
                "tokenizer_mode": "hf",
                # Otherwise a judge may write blanks until it is cut.
                "structured_outputs_config": {"backend": _GUIDE, "disable_any_whitespace": True},
            }
        super().__init__(
            settings,
            files,
            adapter,
            config,
            task="generate",
            runner=runner,
            whole=True,
            max_tokens=max_tokens,
        )
        self._schema = cache(partial(reply_schema, writer.page))
        self._guide = cache(self._make_guide)
        self.guided = guided and self._takes(self._schema(1))
        self._new_request = partial(
            EngineCoreRequest,
            pooling_params=None,
            mm_features=None,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )

    def replies(
        self, questions: Sequence[Question], effort: Effort, writer: Writer
    ) -> dict[Question, Reply]:
        """The replies to these questions, as `run` writes them."""
        written = {}
        for question, writing in self.run(questions, effort, writer):
            assert writing.reply is not None
            written[question] = writing.reply
        return written

    def run(
        self, questions: Sequence[Question], effort: Effort, writer: Writer
    ) -> Iterator[tuple[Question, Writing]]:
        """Questions, each with what was written once its reply is there, as they are done. The work
        is added to `effort`: of prompts, what was computed and what was found in the cache; what
        parts of a reply compute again of the parts before them; and all that was generated.

        vLLM has as many requests as fit into a step, so that the next part of a reply does not wait
        until its prompt has left the cache. Raises EngineDied for any exception of vLLM.
        """
        waiting = iter(questions)
        running: dict[str, tuple[Question, Writing]] = {}
        with dying_of_any_error():
            while True:
                free = vllm_engine.MAX_SEQUENCES - len(running)
                for question in itertools.islice(waiting, free):
                    schema = self._schema(question.verdicts) if question.verdicts else None
                    writing = writer.begin(question.ids, schema)
                    running[self._ask(question, writing, writer)] = question, writing
                if not running:
                    return
                outputs = self._step()
                effort.num_batches += bool(outputs)  # none while a schema is compiled
                for output in outputs:
                    if output.request_id not in running:
                        continue  # made before it was known that the part is over
                    question, writing = running[output.request_id]
                    self._count(output, writing, effort)
                    if not self._take(output, writing):
                        continue
                    del running[output.request_id]
                    if writing.reply is None:
                        running[self._ask(question, writing, writer)] = question, writing
                    else:
                        yield question, writing

    def _ask(self, question: Question, writing: Writing, writer: Writer) -> str:
        """Send vLLM the next part of a reply; returns the request's name."""
        part = writing.part
        assert part is not None
        number = next(self._request_numbers)
        is_greedy = not writer.page.generation.temperature
        sampling = _sampling(
            writer,
            max_tokens=part.max_tokens,
            seed=None if is_greedy else seed_of(question.seed, part.number),
            structured_outputs=None if part.schema is None else self._guide(part.schema),
        )
        request = self._new_request(
            request_id=str(number),
            prompt_token_ids=part.prompt_ids,
            sampling_params=sampling,
            priority=-part.number,
            arrival_time=float(number),  # orders the requests of one priority
        )
        self._engine.engine_core.add_request(request)
        return str(number)

    def _take(self, output: Any, writing: Writing) -> bool:
        """Whether the request is over."""
        ended = None if output.finish_reason is None else str(output.finish_reason)
        if output.num_nans_in_logits:
            writing.fail(_BROKEN)
        elif not writing.take(output.new_token_ids):
            if ended in ("stop", "length"):
                writing.finish(cast(Literal["stop", "length"], ended))
            elif ended is not None:
                writing.fail(f"vLLM ended the request: {ended}")
            else:
                return False
        if ended is None:
            self._engine.engine_core.abort_requests([output.request_id])
        return True

    def _count(self, output: Any, writing: Writing, effort: Effort) -> None:
        effort.generated_tokens += len(output.new_token_ids)
        if output.prefill_stats is None:  # they come with a request's first tokens
            return
        assert writing.part is not None
        cached = output.prefill_stats.num_cached_tokens
        found = Effort()
        count_prompts(found, [len(writing.part.prompt_ids)], [cached])
        if writing.continues:
            found.shared_tokens = 0  # of its own beginning
        effort.add(found)

    def _takes(self, schema: str) -> bool:
        from vllm.exceptions import VLLMValidationError

        try:
            self._guide(schema)
        except VLLMValidationError as error:
            logger.warning("replies are not held to their schema, which vLLM refuses: %s", error)
            return False
        return True

    def _make_guide(self, schema: str) -> Any:
        """vLLM's parameters for a schema, checked once. Raises vLLM's error where it refuses it.

        `SamplingParams.verify` does the same, but imports every package that could do it.
        """
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams
        from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

        guide = StructuredOutputsParams(json=schema)
        guide._backend = _GUIDE
        validate_xgrammar_grammar(SamplingParams(structured_outputs=guide))
        return guide


BACKEND: MakeBackend = VLLMGenerationBackend


def _sampling(writer: Writer, **of_request: Any) -> Any:
    """vLLM's parameters for what is written as the writer's page says. Raises vLLM's error where it
    refuses them."""
    from vllm import SamplingParams

    generation = writer.page.generation
    return SamplingParams(
        temperature=generation.temperature,
        top_p=generation.top_p,
        stop_token_ids=sorted(writer.end_ids),
        detokenize=False,
        **of_request,
    )


def _limits(
    settings: EngineSettings, config: PretrainedConfig, room_tokens: int
) -> tuple[int, int]:
    """Tokens of the longest question, and of that with its reply."""
    positions = getattr(config, "max_position_embeddings", None)
    longest = longest_sequence(settings, config)
    if positions:
        longest = min(longest, positions - room_tokens)
    if longest < 1:
        raise ConfigError(
            f"generation: the judge may write {room_tokens} tokens, and {settings.model_dir} has "
            f"positions for {positions}: nothing is left for the question"
        )
    return longest, longest + room_tokens
