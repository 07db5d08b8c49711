"""The responses of a shard, read again for the reward functions, and what these give for them.

Legend: R rows, S responses, A responses that can be read.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batch_scorer import formats
from batch_scorer.errors import RowReason
from batch_scorer.formats.messages import text_of
from batch_scorer.inputs.files import column_names, columns_of_shard, read_apart
from batch_scorer.job import AnyJob
from batch_scorer.records import Conversation, RewardedRows, RowError, Shard
from batch_scorer.rewards.calls import BATCH, Batch, Pace, ask
from batch_scorer.rewards.functions import columns_read

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Responses:
    """What functions are asked about. `places` is int64[A], which of the S responses are in the
    batches; `errors` names the others. `row_offsets` and `row_errors` as in `RewardedRows`."""

    batches: list[Batch]
    places: IntArray
    errors: dict[int, RowError]
    row_offsets: IntArray
    row_errors: dict[int, RowError]


def reward_shard(job: AnyJob, shard: Shard, pace: Pace) -> RewardedRows:
    """What the job's reward functions give for the shard's rows.

    Raises ShardError: the file cannot be read (`read_apart`), or a function cannot be loaded here.
    """
    config = job.config
    asked = read_apart(config, shard.source.size_bytes, _responses, job, shard)
    made = RewardedRows(asked.row_offsets, asked.row_errors, {}, {})
    for reward in job.rewards:
        values = np.full(int(asked.row_offsets[-1]), np.nan, np.float32)
        values[asked.places], errors = ask(reward, asked.batches, config, pace)
        own = {int(asked.places[place]): error for place, error in errors.items()}
        made.values[reward.name], made.errors[reward.name] = values, asked.errors | own
    return made


def _responses(job: AnyJob, shard: Shard) -> _Responses:
    """In a process that may die of the file; what it packs is not looked into on the way."""
    options = job.config.store_options
    needed, wanted = formats.columns_needed(shard.layout), columns_read(job.rewards)
    there = column_names(shard, options) if wanted else []
    beside = [name for name in wanted if there.count(name) == 1]  # of two nobody knows which
    columns, malformed = columns_of_shard(shard, options, [*dict.fromkeys([*needed, *beside])])
    parsed = formats.parse(columns, shard.layout)
    parsed.row_errors.update(malformed)
    owners = np.repeat(np.arange(parsed.num_rows), np.diff(parsed.row_offsets)).tolist()
    errors: dict[int, RowError] = {}
    asked: list[tuple[int, Conversation, str]] = []
    for place, (row, sequence) in enumerate(zip(owners, parsed.sequences, strict=True)):
        steps = parsed.steps.get(place)
        found = _apart(sequence, parsed.prompt_lengths.get(row, 0))
        if isinstance(found, RowError):
            errors[place] = found
        else:
            before, response = found
            asked.append(
                (place, before, response if steps is None else job.step_separator.join(steps))
            )
    batches = []
    for start in range(0, len(asked), BATCH):
        places, prompts, responses = zip(*asked[start : start + BATCH], strict=True)
        rows = [owners[place] for place in places]
        values = {name: [columns[name][row] for row in rows] for name in beside}
        batches.append(Batch.of(prompts, responses, values))
    return _Responses(
        batches,
        np.array([place for place, _, _ in asked], np.int64),
        errors,
        parsed.row_offsets,
        parsed.row_errors,
    )


def _apart(sequence: Any, prompt_length: int) -> tuple[Conversation, str] | RowError:
    """The messages before a response, and its text. Of text that is scored as it is, what stands
    apart as the prompt is one message."""
    if isinstance(sequence, RowError):
        return sequence
    if isinstance(sequence, str):
        prompt, response = sequence[:prompt_length], sequence[prompt_length:]
        return ([{"role": "user", "content": prompt}] if prompt else []), response
    if isinstance(sequence[0], dict):
        *before, last = sequence
        return before, text_of(last)
    return RowError(RowReason.BAD_STRUCTURE, "token ids hold no text that a function could read")
