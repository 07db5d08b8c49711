"""Which rows the gate compares, and whether their token ids are those of the tokenizer's call.

Legend: R rows.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from batch_scorer.errors import ModelError, ParityError, RowReason, ShardError
from batch_scorer.inputs.files import row_numbers
from batch_scorer.job import Job
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.directory import read_json
from batch_scorer.models.registry import adapter_named
from batch_scorer.records import ParsedRows, RowError, SequenceInput, Shard, TokenizedRows
from batch_scorer.render import renderer_of
from batch_scorer.shard import parse_shard

log = logging.getLogger("batch_scorer")

SAMPLE_ROWS = 8
SAMPLE_TOKENS = {"cpu": 6_000, "cuda": 100_000}
"""Most tokens beside the shortest, median and longest row: plain Hugging Face is slow."""
_SEQUENCES_PER_ROW = 4
_ROWS_READ = 128


@dataclass(frozen=True, slots=True)
class Sample:
    """S of the job's sequences: their places, token ids, and which are pairs.

    `shown` is the first sequence's text with special tokens visible, `pooled` those of its
    tokens that the head reads (() where the model pools by itself), `leading_bos` how many BOS
    ids it starts with, None for a tokenizer without one. `marked` counts the sequences that were
    read and have no score, by reason.
    """

    names: tuple[str, ...]
    rows: TokenizedRows
    pairs: tuple[tuple[int, int], ...]
    shown: str
    pooled: tuple[str, ...]
    leading_bos: int | None
    marked: dict[str, int]

    @property
    def num_truncated(self) -> int:
        return int((self.rows.truncated_tokens > 0).sum())

    @property
    def digest(self) -> str:
        ids, offsets = self.rows.token_ids.tobytes(), self.rows.sequence_offsets.tobytes()
        return hashlib.sha256(ids + offsets).hexdigest()


def choose_sample(job: Job, shards: Sequence[Shard]) -> Sample | None:
    """Short, median and long rows of a few shards; None if no row there can be scored.

    Raises ModelError if the chat template refuses every row, and ParityError if token ids are
    not those of the tokenizer's call.
    """
    ordered = sorted(shards, key=lambda shard: shard.output_key)
    places = sorted({0, len(ordered) // 2, len(ordered) - 1}) if ordered else []
    read: list[tuple[Shard, ParsedRows, TokenizedRows]] = []
    refused: list[RowError] = []
    renderer, adapter = renderer_of(job.config, job.model), adapter_named(job.adapter)
    for shard in [ordered[place] for place in places]:
        part = replace(shard, num_rows=min(_ROWS_READ, shard.num_rows))
        try:
            parsed = parse_shard(part, job.config.store_options)
            rows = renderer.tokenize(parsed)
        except ShardError as error:
            log.warning("%s: not sampled: %s", shard.source.key, error)
            continue
        refused += [*rows.sequence_errors.values(), *rows.row_errors.values()]
        read.append((shard, parsed, rows))
    parts: list[tuple[str, list[SequenceInput], TokenizedRows]] = []
    for place, row in choose_rows([rows for *_, rows in read], SAMPLE_TOKENS[job.device]):
        shard, parsed, rows = read[place]
        inputs, ids = _take(parsed.sequences, rows, row)
        number = row_numbers(shard, job.config.store_options)[row]
        parts.append((f"{shard.source.key} row {number}", inputs, ids))
    if not parts:
        template = [e for e in refused if e.reason is RowReason.TEMPLATE_ERROR]
        if template:
            raise ModelError(
                f"{job.model_dir}: the chat template refuses all of the first rows: "
                f"{template[0].detail}"
            )
        return None
    rows = join_rows([ids for _, _, ids in parts])
    _check_rendering(job, [sequence for _, inputs, _ in parts for sequence in inputs], rows)
    names = [
        f"{name}, {place + 1} of {ids.num_sequences}" if ids.num_sequences > 1 else name
        for name, _, ids in parts
        for place in range(ids.num_sequences)
    ]
    firsts = rows.row_offsets[:-1][np.diff(rows.row_offsets) > 1].tolist()
    first = rows.token_ids[: rows.sequence_offsets[1]]
    return Sample(
        names=tuple(names),
        rows=rows,
        pairs=tuple((first, first + 1) for first in firsts),
        shown=renderer.visible(first),
        pooled=_pooled(job, adapter, first),
        leading_bos=_leading(first, renderer.bos_id),
        marked=dict(Counter(error.reason.value for error in refused)),
    )


def _pooled(job: Job, adapter: Adapter, ids: npt.NDArray[np.int32]) -> tuple[str, ...]:
    if job.embedding is not None or adapter.build_head is None:
        return ()
    places = adapter.pooling.positions(ids, read_json(job.model_dir / "config.json"))
    if isinstance(places, RowError):
        return (places.detail,)
    renderer = renderer_of(job.config, job.model)
    return tuple(renderer.visible(ids[place : place + 1]) for place in places)


def choose_rows(parts: Sequence[TokenizedRows], max_tokens: int) -> list[tuple[int, int]]:
    """(part, row) of the rows to sample, shortest first: shortest, median and longest of all, then
    the lengths between while they fit `max_tokens`.

    Only rows all of whose sequences can be scored.
    """
    usable: list[tuple[int, int, int]] = []  # tokens, part, row
    for part, rows in enumerate(parts):
        broken = set(rows.row_errors)
        owners = np.searchsorted(rows.row_offsets, list(rows.sequence_errors), side="right") - 1
        broken |= set(owners.tolist())
        tokens = np.diff(rows.sequence_offsets[rows.row_offsets]).tolist()
        usable += [
            (tokens[i], part, i) for i in range(rows.num_rows) if tokens[i] and i not in broken
        ]
    if not usable:
        return []
    usable.sort()
    last = len(usable) - 1
    wanted = [0, last, last // 2, *np.linspace(0, last, SAMPLE_ROWS).astype(int).tolist()]
    chosen: list[tuple[int, int, int]] = []
    spent = 0
    for place in dict.fromkeys(wanted):
        tokens_of_row = usable[place][0]
        if len(chosen) < SAMPLE_ROWS and (len(chosen) < 3 or spent + tokens_of_row <= max_tokens):
            chosen.append(usable[place])
            spent += tokens_of_row
    return [(part, row) for _, part, row in sorted(chosen)]


def _take(
    sequences: Sequence[SequenceInput | RowError], rows: TokenizedRows, row: int
) -> tuple[list[SequenceInput], TokenizedRows]:
    """The first few sequences of one row, as parsed and as token ids."""
    start = int(rows.row_offsets[row])
    stop = min(int(rows.row_offsets[row + 1]), start + _SEQUENCES_PER_ROW)
    bounds = rows.sequence_offsets[start : stop + 1]
    taken = TokenizedRows(
        token_ids=rows.token_ids[bounds[0] : bounds[-1]],
        sequence_offsets=bounds - bounds[0],
        row_offsets=np.array([0, stop - start]),
        truncated_tokens=rows.truncated_tokens[start:stop],
        sequence_errors={},
        row_errors={},
    )
    return [s for s in sequences[start:stop] if not isinstance(s, RowError)], taken


def join_rows(parts: Sequence[TokenizedRows]) -> TokenizedRows:
    """Several parts' rows as one; the parts have no errors."""

    def joined(offsets: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(o) for o in offsets]))])

    return TokenizedRows(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        sequence_offsets=joined([part.sequence_offsets for part in parts]),
        row_offsets=joined([part.row_offsets for part in parts]),
        truncated_tokens=np.concatenate([part.truncated_tokens for part in parts]),
        sequence_errors={},
        row_errors={},
    )


def _check_rendering(job: Job, inputs: Sequence[SequenceInput], rows: TokenizedRows) -> None:
    from batch_scorer.backends.plain import PlainTokenizer

    renderer = renderer_of(job.config, job.model)
    plain = PlainTokenizer(
        job.model_dir,
        adapter_named(job.adapter).prompt,
        trust_remote_code=job.config.trust_remote_code,
    )
    for index, sequence in enumerate(inputs):
        ids = rows.token_ids[rows.sequence_offsets[index] : rows.sequence_offsets[index + 1]]
        if (_leading(ids, renderer.bos_id) or 0) > 1:
            raise ParityError(f"a sequence starts with BOS twice: {renderer.visible(ids[:12])!r}")
        wanted = plain.token_ids(sequence)
        if wanted is not None and not rows.truncated_tokens[index] and wanted != ids.tolist():
            raise ParityError(
                "token ids are not those of the tokenizer's own chat template: "
                f"{renderer.visible(ids[:12])!r} here, "
                f"{renderer.visible(np.array(wanted[:12], dtype=np.int32))!r} there"
            )


def _leading(ids: npt.NDArray[np.int32], token_id: int | None) -> int | None:
    """How many ids at the start are this one; None without one."""
    if token_id is None:
        return None
    others = np.flatnonzero(ids != token_id)
    return int(others[0]) if len(others) else len(ids)
