import subprocess
import sys
from importlib import import_module
from typing import get_args

import pytest

from batch_scorer.config import ENGINES, Config


def test_the_setting_backend_names_every_engine() -> None:
    assert get_args(Config.model_fields["backend"].annotation) == ("auto", *ENGINES)


def test_the_options_of_engines_are_settings() -> None:
    assert {name for facts in ENGINES.values() for name in facts.options} <= set(Config.roles())


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_a_file_with_what_makes_it(name: str) -> None:
    assert callable(import_module(f"batch_scorer.backends.{name}").BACKEND)


def test_an_engine_without_a_model_is_made_without_torch() -> None:
    """Else every worker of a dry run would take seconds to start."""
    code = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from batch_scorer.backends.registry import make_backend\n"
        "from batch_scorer.config import ENGINES, Config\n"
        "config = Config(model='m', inputs=('in',), output='out', backend='fake')\n"
        "job = SimpleNamespace(config=config, backend='fake', adapter='armorm', model_dir=None,\n"
        "    dtype='float32', device='cpu', attention='packed', max_tokens=9, embedding=None,\n"
        "    model=SimpleNamespace(lora_dir=None, judge=None, verdict_ids=(),\n"
        "                          tokenizer_path=None),\n"
        "    placement_group=None, engine=ENGINES['fake'], writes=False)\n"
        "assert make_backend(job).num_outputs == 1\n"
        "assert not {'torch', 'aiohttp'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
