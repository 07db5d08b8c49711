import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / ".venv" / "mistral-common"
"""Where the tests' set-up puts mistral-common, which no other test can import."""

SHOW = """
import sys
from pathlib import Path
from batch_scorer.models.tokenizer import load_tokenizer
from transformers.utils.import_utils import is_mistral_common_available
print(is_mistral_common_available(), load_tokenizer(Path(sys.argv[1]))("Hi there").input_ids)
"""


def test_the_folders_own_tokenizer_is_taken_whatever_is_installed(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    shutil.copy(next(PACKAGE.rglob("tekken_*.json")), tmp_path / "tekken.json")
    shown = []
    for path in (str(ROOT), f"{ROOT}{os.pathsep}{PACKAGE}"):
        ended = subprocess.run(
            [sys.executable, "-c", SHOW, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        shown.append(ended.stdout.split(maxsplit=1))
    (without, ids), (with_it, same_ids) = shown
    assert (without, with_it) == ("False", "True")
    assert ids == same_ids != "[]"
