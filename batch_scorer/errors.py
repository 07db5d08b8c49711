"""What can go wrong, as types; each has the exit code it ends with.

BatchScorerError
├── ConfigError            a setting is wrong or two settings contradict each other   exit 2
│   └── MissingExtraError  an optional package is needed; the message names it        exit 2
├── InputError             an input path, file or schema cannot be used at all        exit 2
├── ModelError             the model directory cannot give true scores                exit 2
│   └── ParityError        the engine's scores are not those of plain Hugging Face    exit 2
├── OutputError            the output is not writable, or belongs to other work       exit 2
│   └── OutputHeldError    another live run holds the output                          exit 2
├── IncompleteError        the run ended with shards that are not committed           exit 3
│   ├── LeaseLostError     another run took the output over while this one worked     exit 3
│   └── StorageError       the store failed after all retries                         exit 3
├── IntegrityError         what is stored is not what was committed                   exit 4
└── ShardError             one shard cannot be scored; recorded, the job goes on

A failing *row* is not an exception: it keeps its place and carries a `RowReason`.
"""

from enum import IntEnum, StrEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """How the program ends, for schedulers."""

    DONE = 0
    CONFIG = 2
    INCOMPLETE = 3
    INTEGRITY = 4


class RowReason(StrEnum):
    """Why a row has no score: the closed set of values in the `score_error` column."""

    NULL_VALUE = "null_value"
    EMPTY = "empty"
    BAD_STRUCTURE = "bad_structure"
    UNKNOWN_ROLE = "unknown_role"
    MALFORMED_JSON = "malformed_json"
    NOT_UTF8 = "not_utf8"
    ROW_TOO_LARGE = "row_too_large"
    TOO_NESTED = "too_nested"
    TOO_MANY_KEYS = "too_many_keys"
    TEMPLATE_ERROR = "template_error"
    TOO_LONG = "too_long"
    BAD_TOKEN_ID = "bad_token_id"
    NON_FINITE_SCORE = "non_finite_score"
    OUT_OF_MEMORY = "out_of_memory"
    NO_MARK = "no_mark"
    NO_STEPS = "no_steps"
    ENGINE_ERROR = "engine_error"
    WORKER_CRASH = "worker_crash"
    CONTEXT_NOT_READ = "context_not_read"
    UNSUPPORTED_MEDIA = "unsupported_media"
    SPECIAL_TEXT = "special_text"
    STEPS_DIFFER = "steps_differ"
    ANSWER_NOT_FOUND = "answer_not_found"
    NOT_A_PAIR = "not_a_pair"
    NO_VERDICT = "no_verdict"
    VERDICT_OUT_OF_RANGE = "verdict_out_of_range"
    CUT_OFF = "cut_off"
    INCONSISTENT_VERDICTS = "inconsistent_verdicts"
    BAD_RUBRIC = "bad_rubric"
    MARKER_IN_TEXT = "marker_in_text"
    REWARD_NONE = "reward_none"
    REWARD_RAISED = "reward_raised"
    REWARD_INVALID = "reward_invalid"
    REWARD_TIMED_OUT = "reward_timed_out"
    REWARD_DIED = "reward_died"

    @property
    def may_pass(self) -> bool:
        """Whether the same row, under the same model and settings, may have a score another time:
        machines and engines decide it too, and not the row and the model's files alone."""
        return self in (
            RowReason.OUT_OF_MEMORY,
            RowReason.NON_FINITE_SCORE,
            RowReason.ENGINE_ERROR,
            RowReason.WORKER_CRASH,
            RowReason.NO_VERDICT,
            RowReason.VERDICT_OUT_OF_RANGE,
            RowReason.CUT_OFF,
            RowReason.REWARD_RAISED,
            RowReason.REWARD_TIMED_OUT,
            RowReason.REWARD_DIED,
        )


class RowNote(StrEnum):
    """What is worth knowing of a row that has a score: the values in the `score_notes` column."""

    ANSWER_REWRITTEN = "answer_rewritten"
    SAME_TOKENS = "same_tokens"
    ROLE_RENAMED = "role_renamed"
    PARTS_JOINED = "parts_joined"


class ShardReason(StrEnum):
    """Why a shard is not committed: the closed set of values in the manifest's `reason`."""

    UNREADABLE_FILE = "unreadable_file"
    READER_DIED = "reader_died"
    TOO_LARGE = "too_large"
    WRONG_ROW_COUNT = "wrong_row_count"
    WRONG_SCHEMA = "wrong_schema"
    COLUMN_COLLISION = "column_collision"
    OVER_LENGTH_ROW = "over_length_row"
    INPUT_CHANGED = "input_changed"
    INPUT_GONE = "input_gone"
    STORE_FAILED = "store_failed"
    WORKER_DIED = "worker_died"
    SUPERSEDED = "superseded"
    OBJECT_IN_THE_WAY = "object_in_the_way"
    REWARD_UNUSABLE = "reward_unusable"
    INTERNAL = "internal"

    @property
    def may_pass(self) -> bool:
        """Whether trying the shard again in the same run can help."""
        return self is ShardReason.STORE_FAILED


class BatchScorerError(Exception):
    """Base of every failure this package raises on purpose."""

    exit_code: ClassVar[ExitCode] = ExitCode.INCOMPLETE


class ConfigError(BatchScorerError):
    """A setting is wrong; the message names it and what would be right."""

    exit_code = ExitCode.CONFIG


class MissingExtraError(ConfigError):
    """An optional package is needed; the message says what to install."""


class InputError(BatchScorerError):
    """An input path, file or schema cannot be used at all."""

    exit_code = ExitCode.CONFIG


class ModelError(BatchScorerError):
    """The model directory cannot give true scores."""

    exit_code = ExitCode.CONFIG


class ParityError(ModelError):
    """The engine's scores are not those of plain Hugging Face."""


class OutputError(BatchScorerError):
    """The output is not writable, or belongs to other work."""

    exit_code = ExitCode.CONFIG


class OutputHeldError(OutputError):
    """Another live run holds the output."""


class IncompleteError(BatchScorerError):
    """The run ended with shards that are not committed; the same command finishes it."""


class LeaseLostError(IncompleteError):
    """Another run took the output over while this one worked."""


class StorageError(IncompleteError):
    """The store failed after all retries; running the same command again may succeed."""


class IntegrityError(BatchScorerError):
    """What is stored is not what was committed."""

    exit_code = ExitCode.INTEGRITY


class ShardError(BatchScorerError):
    """One shard cannot be scored. It is recorded with its reason and the job goes on."""

    def __init__(self, reason: ShardReason, detail: str) -> None:
        self.reason = reason
        self.detail = " ".join(detail.split("\n"))  # some libraries say what is wrong in many lines
        # Both go to Exception: errors pickle by their args, and these cross process boundaries.
        super().__init__(reason, self.detail)

    def __str__(self) -> str:
        return self.detail


def cause_of(error: Exception) -> str:
    """What went wrong, for a line that names the file already; an OSError's text names it too."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
