"""What the stages hand on, and what a process needs to take it."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.config import OverLength
from batch_scorer.records import ParsedRows, TokenizedRows
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
