"""What the stages hand on, and what a process needs to take it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.config import OverLength
from batch_scorer.errors import RowNote, RowReason
from batch_scorer.records import ParsedRows, RowError, Scores, TokenizedRows
from batch_scorer.render import Renderer
from batch_scorer.shard import score_shard
from tests.helpers.tiny import tiny_tokenizer


class Version(str):
    """As torch gives its own: a string that only torch can read back."""


def test_what_an_engine_says_of_itself_is_plain_when_it_travels() -> None:
    backend = FakeBackend()
    backend.provenance["torch"] = Version("2.13")
    offsets = np.array([0, 2])
    rows = TokenizedRows(
        np.array([1, 2], np.int32), offsets, np.array([0, 1]), np.zeros(1, np.int32), {}, {}
    )
    engine = score_shard(rows, backend).engine
    assert engine == backend.provenance
    assert {type(value) for value in engine.values()} == {str}


def rows(**facts: Any) -> TokenizedRows:
    """Two rows of one sequence each, of two and three tokens."""
    return TokenizedRows(
        np.array([1, 2, 3, 4, 5], np.int32), np.array([0, 2, 5]), np.array([0, 1, 2]),
        np.zeros(2, np.int32), {}, {}, **facts,
    )  # fmt: skip


def test_a_sequence_that_is_too_long_keeps_its_length() -> None:
    error = RowError(RowReason.TOO_LONG, "9000 tokens")
    marked = TokenizedRows(
        np.array([1, 2], np.int32), np.array([0, 2, 2]), np.array([0, 1, 2]),
        np.zeros(2, np.int32), {1: error}, {}, too_long={1: 9000},
    )  # fmt: skip
    scored = score_shard(marked, FakeBackend())
    assert scored.lengths.tolist() == [2, 9000]
    assert scored.scores.errors == {1: error}


class TwoSteps(FakeBackend):
    """Gives every sequence the scores of two steps."""

    def score(self, rows: TokenizedRows) -> Scores:
        count = rows.num_sequences
        return replace(
            super().score(rows),
            step_values=np.ones(2 * count, np.float32),
            step_offsets=np.arange(count + 1) * 2,
        )


def test_another_number_of_steps_than_the_row_gives_is_marked() -> None:
    scored = score_shard(rows(given_steps={0: 2, 1: 3}), TwoSteps())
    (error,) = scored.scores.errors.values()
    assert list(scored.scores.errors) == [1] and error.reason is RowReason.STEPS_DIFFER
    assert error.detail == "3 steps in the row, 2 step scores"
    assert np.isnan(scored.scores.values[:, 0]).tolist() == [False, True]
    assert score_shard(rows(given_steps={1: 3}), FakeBackend()).scores.errors == {}


def test_notes_go_with_the_scores() -> None:
    noted = rows(notes={1: (RowNote.SAME_TOKENS,)}, special_tokens={0: 4})
    scored = score_shard(noted, FakeBackend())
    assert (scored.notes, scored.special_tokens) == (noted.notes, noted.special_tokens)


def test_a_process_that_reads_gives_the_same_ids_without_torch(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, bos=True)
    talk = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    parsed = ParsedRows([talk, "a text"], np.array([0, 1, 2]))  # type: ignore[list-item]
    here = Renderer(tmp_path, 100, OverLength.MARK).tokenize(parsed)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from batch_scorer.pipeline.ray_data import _leave_out_torch\n"
        "from batch_scorer.config import OverLength\n"
        "from batch_scorer.records import ParsedRows\n"
        "from batch_scorer.render import Renderer\n"
        "_leave_out_torch()\n"
        f"renderer = Renderer(Path({str(tmp_path)!r}), 100, OverLength.MARK)\n"
        f"rows = renderer.tokenize(ParsedRows([{talk!r}, 'a text'], np.array([0, 1, 2])))\n"
        "assert sys.modules['torch'] is None\n"
        "print(rows.token_ids.tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(here.token_ids.tolist())
