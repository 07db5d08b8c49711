"""Which rows the gate compares: those whose token ids are, and the fewer that are scored again."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.config import Config
from batch_scorer.errors import ModelError, ParityError, RowReason, ShardError
from batch_scorer.inputs.files import read_apart, row_numbers
from batch_scorer.job import Job
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.files import read_json
from batch_scorer.models.registry import adapter_named
from batch_scorer.parity.cover import Candidate, choose, traits_of
from batch_scorer.parity.raw_questions import raw_questions
from batch_scorer.parity.raw_rows import read_raw_rows
from batch_scorer.parity.raw_sequences import RawSequence, raw_sequences
from batch_scorer.parity.rendering import ComparedRow, compare_rows
from batch_scorer.records import ParsedRows, RowError, Shard, TokenizedRows
from batch_scorer.render import renderer_of
from batch_scorer.render.questions import ask
from batch_scorer.render.rows import tokenized
from batch_scorer.shard import parse_shard
from batch_scorer.storage import open_store

log = logging.getLogger("batch_scorer")

SAMPLE_ROWS = 10
SAMPLE_TOKENS = {"cpu": 6_000, "cuda": 100_000}
"""Most tokens beside the shortest, median and longest row: plain Hugging Face is slow."""
_ROWS_COMPARED, _TOKENS_COMPARED = 64, 200_000
"""Rows whose token ids alone are compared, which is cheap."""
_SEQUENCES_PER_ROW = 4
_WINDOW_ROWS = 48
"""Rows that are read together: at the beginning, in the middle and at the end of a shard."""

ReadRows: TypeAlias = Callable[[Shard, Config], ParsedRows]


@dataclass(frozen=True, slots=True)
class Sample:
    """S of the job's sequences: their places, token ids, and which are pairs.

    `marked` counts the sequences that were read and have no score, by reason. `compared` is how
    many rows had the right token ids, `covered` counts them by what they hold (`cover.traits_of`),
    and `explained` their sequences that differ from transformers' own call, by the setting that is
    why.
    """

    names: tuple[str, ...]
    rows: TokenizedRows
    pairs: tuple[tuple[int, int], ...]
    marked: dict[str, int]
    compared: int
    covered: dict[str, int]
    explained: dict[str, int]

    @property
    def num_truncated(self) -> int:
        return int((self.rows.truncated_tokens > 0).sum())

    @property
    def digest(self) -> str:
        rows = self.rows
        parts = [rows.token_ids.tobytes(), rows.sequence_offsets.tobytes()]
        if rows.answer_starts is not None:
            parts.append(rows.answer_starts.tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(frozen=True, slots=True)
class _Window:
    """Some rows of a shard: as the product reads and tokenises them, and as the gate reads them.

    `numbers` are those of its rows in the file; `raw` has the rows that can be scored.
    """

    shard: Shard
    numbers: Sequence[int]
    parsed: ParsedRows
    rows: TokenizedRows
    raw: Mapping[int, Sequence[RawSequence | None]]

    def name(self, row: int) -> str:
        return _name(self.shard, self.numbers[row])

    def compared(self, row: int) -> ComparedRow:
        start, stop = self.rows.row_offsets[row : row + 2].tolist()
        bounds = self.rows.sequence_offsets[start : stop + 1].tolist()
        starts = self.rows.answer_starts
        return ComparedRow(
            name=self.name(row),
            raw=self.raw[row],
            parsed=self.parsed.sequences[start:stop],
            arguments=self.parsed.arguments.get(row, {}),
            ids=[self.rows.token_ids[a:b].tolist() for a, b in pairwise(bounds)],
            truncated=self.rows.truncated_tokens[start:stop].tolist(),
            notes=self.rows.notes.get(row, ()),
            answer_starts=None if starts is None else starts[start:stop].tolist(),
        )


def choose_sample(job: Job, shards: Sequence[Shard], read: ReadRows = parse_shard) -> Sample | None:
    """Rows that cover what the job holds, out of a few shards; None if none there can be scored.

    `read` is how the product reads a shard's rows. Tokenizers are loaded in a process apart: they
    take seconds, and hundreds of MB. Raises ModelError if the chat template refuses every row, and
    ParityError if token ids are not those of the tokenizer's call on the raw row.
    """
    windows, refused = _windows(job, shards, read)
    candidates = [_candidate(windows, part, row) for part, w in enumerate(windows) for row in w.raw]
    if not candidates:
        template = [e for e in refused if e.reason is RowReason.TEMPLATE_ERROR]
        if template:
            raise ModelError(
                f"{job.model_dir}: the chat template refuses all of the first rows: "
                f"{template[0].detail}"
            )
        return None
    chosen = choose(candidates, SAMPLE_ROWS, SAMPLE_TOKENS[job.device])
    # Every window counts as something to cover.
    by_window = [replace(c, traits=c.traits | {f"window {c.part}"}) for c in candidates]
    compared = choose(by_window, _ROWS_COMPARED, _TOKENS_COMPARED)
    explained = _compared(job, [windows[each.part].compared(each.row) for each in compared])
    parts = [(windows[c.part].name(c.row), _take(windows[c.part].rows, c.row)) for c in chosen]
    rows = join_rows([ids for _, ids in parts])
    names = [
        f"{name}, {place + 1} of {ids.num_sequences}" if ids.num_sequences > 1 else name
        for name, ids in parts
        for place in range(ids.num_sequences)
    ]
    firsts = rows.row_offsets[:-1][np.diff(rows.row_offsets) > 1].tolist()
    traits = {(c.part, c.row): c.traits for c in candidates}
    covered = Counter(trait for each in compared for trait in traits[each.part, each.row])
    return Sample(
        names=tuple(names),
        rows=rows,
        pairs=tuple((first, first + 1) for first in firsts),
        marked=dict(Counter(error.reason.value for error in refused)),
        compared=len(compared),
        covered=dict(sorted(covered.items())),
        explained=explained,
    )


# What is read


def _windows(
    job: Job, shards: Sequence[Shard], read: ReadRows
) -> tuple[list[_Window], list[RowError]]:
    """Rows of the first, the middle and the last shard, and why some of them are not scored."""
    keys = [shard.output_key for shard in shards]
    ordered = sorted(range(len(keys)), key=keys.__getitem__)
    places = sorted({0, len(ordered) // 2, len(ordered) - 1}) if ordered else []
    found: list[_Window] = []
    refused: list[RowError] = []
    for part in [part for place in places for part in parts_of(shards[ordered[place]])]:
        try:
            parsed = read(part, job.config)
            window = read_apart(job.config, part.source.size_bytes, _window, job, part, parsed)
        except ShardError as error:
            log.warning("%s: not sampled: %s", part.source.key, error)
            continue
        refused += [*window.rows.sequence_errors.values(), *window.rows.row_errors.values()]
        found.append(window)
    return found, refused


def _window(job: Job, part: Shard, parsed: ParsedRows) -> _Window:
    """These rows, which the product has parsed, tokenised by it, and read by the gate itself."""
    options = job.config.store_options
    rows = tokenized(parsed, job.config, job.model)
    if job.model.judge is not None:
        parsed, _ = ask(parsed, job.model.judge, job.config.reasoning)
    numbers = row_numbers(part, options)
    return _Window(part, numbers, parsed, rows, _raw(part, job, numbers, _scorable(rows)))


def parts_of(shard: Shard) -> list[Shard]:
    """Its beginning, middle and end; all of a small one."""
    rows = shard.num_rows
    if rows <= 3 * _WINDOW_ROWS:
        return [shard]
    if shard.where is not None:  # where the matching rows are is known from the beginning on
        return [replace(shard, num_rows=3 * _WINDOW_ROWS)]
    starts = (0, (rows - _WINDOW_ROWS) // 2, rows - _WINDOW_ROWS)
    return [
        replace(
            shard,
            first_row=shard.first_row + start,
            skip_rows=shard.skip_rows + start,
            num_rows=_WINDOW_ROWS,
        )
        for start in starts
    ]


def _raw(
    shard: Shard, job: Job, numbers: Sequence[int], rows: Sequence[int]
) -> dict[int, Sequence[RawSequence | None]]:
    """These rows, read by the gate itself. Raises ParityError for one that it cannot read."""
    if not rows:
        return {}
    places = {row: numbers[row] - shard.first_row for row in rows}
    store = open_store(shard.source.root, job.config.store_options)
    found = read_raw_rows(store, shard, list(places.values()))
    sequences: dict[int, Sequence[RawSequence | None]] = {}
    for row, place in places.items():
        name = _name(shard, numbers[row])
        if place not in found:
            raise ParityError(f"{name}: it is scored, but the file has no such row")
        try:
            if (page := job.model.judge) is None:
                sequences[row] = raw_sequences(found[place], shard.layout)
            else:
                reasoning = job.config.reasoning
                sequences[row] = raw_questions(found[place], shard.layout, page, reasoning)
        except (LookupError, TypeError, ValueError, SyntaxError) as error:
            raise ParityError(
                f"{name}: it is scored, but is not what it is read as: {error}"
            ) from error
    return sequences


def _name(shard: Shard, number: int) -> str:
    return f"{shard.source.key} row {number}"


def _scorable(rows: TokenizedRows) -> list[int]:
    """The rows all of whose sequences can be scored."""
    owners = np.searchsorted(rows.row_offsets, list(rows.sequence_errors), side="right") - 1
    broken = {*rows.row_errors, *owners.tolist()}
    sizes = np.diff(rows.row_offsets).tolist()
    return [row for row in range(rows.num_rows) if sizes[row] and row not in broken]


def _candidate(windows: Sequence[_Window], part: int, row: int) -> Candidate:
    window = windows[part]
    start, stop = window.rows.row_offsets[row : row + 2]
    tokens = window.rows.sequence_offsets[stop] - window.rows.sequence_offsets[start]
    traits = traits_of(window.raw[row])
    if row in window.rows.special_tokens:
        traits |= {"special text"}
    return Candidate(part, row, int(tokens), traits)


def _compared(job: Job, rows: Sequence[ComparedRow]) -> dict[str, int]:
    """`compare_rows` with transformers' own call. Raises ModelError where its process dies."""
    try:
        return read_apart(job.config, 0, _explained, job, rows)
    except ShardError as error:
        path = job.model.tokenizer_path
        raise ModelError(f"{path}: its tokenizer cannot be run: {error}") from None


def _explained(job: Job, rows: Sequence[ComparedRow]) -> dict[str, int]:
    from batch_scorer.backends.plain_tokenizer import PlainTokenizer

    plain = PlainTokenizer(
        job.model.tokenizer_path,
        job.model.prompt,
        config_dir=job.model.path,
        trust_remote_code=job.config.trust_remote_code,
    )
    return compare_rows(plain, rows)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model sees of the sample's first sequence.

    `text` has special tokens visible, `pooled` are those tokens that the head reads (() where the
    model pools by itself), `leading_bos` is how many BOS ids it starts with, None for a tokenizer
    without one.
    """

    text: str
    pooled: tuple[str, ...]
    leading_bos: int | None


def look_at_first(job: Job, sample: Sample) -> Seen:
    """Load tokenizer and model family, and see with them. Raises ModelError."""
    renderer = renderer_of(job.config, job.model)
    first = sample.rows.token_ids[: sample.rows.sequence_offsets[1]]
    return Seen(
        text=renderer.visible(first),
        pooled=_pooled(job, adapter_named(job.adapter), first),
        leading_bos=_leading(first, renderer.bos_id),
    )


def _pooled(job: Job, adapter: Adapter, ids: npt.NDArray[np.int32]) -> tuple[str, ...]:
    if job.embedding is not None or adapter.build_head is None:
        return ()
    places = adapter.pooling.positions(ids, read_json(job.model_dir / "config.json"))
    if isinstance(places, RowError):
        return (places.detail,)
    renderer = renderer_of(job.config, job.model)
    return tuple(renderer.visible(ids[place : place + 1]) for place in places)


def _take(rows: TokenizedRows, row: int) -> TokenizedRows:
    """The first few sequences of one row."""
    start = int(rows.row_offsets[row])
    stop = min(int(rows.row_offsets[row + 1]), start + _SEQUENCES_PER_ROW)
    taken = rows.take(np.arange(start, stop))
    return replace(taken, row_offsets=np.array([0, stop - start]))


def join_rows(parts: Sequence[TokenizedRows]) -> TokenizedRows:
    """Several parts' rows as one; the parts have no errors."""

    def joined(offsets: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(o) for o in offsets]))])

    starts = [part.answer_starts for part in parts if part.answer_starts is not None]
    return TokenizedRows(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        sequence_offsets=joined([part.sequence_offsets for part in parts]),
        row_offsets=joined([part.row_offsets for part in parts]),
        truncated_tokens=np.concatenate([part.truncated_tokens for part in parts]),
        sequence_errors={},
        row_errors={},
        answer_starts=np.concatenate(starts) if starts else None,
    )


def _leading(ids: npt.NDArray[np.int32], token_id: int | None) -> int | None:
    """How many ids at the start are this one; None without one."""
    if token_id is None:
        return None
    others = np.flatnonzero(ids != token_id)
    return int(others[0]) if len(others) else len(ids)
