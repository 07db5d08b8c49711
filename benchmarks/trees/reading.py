"""Turns files of pairs into token ids, in whichever tree of this project comes first on the path.

    python benchmarks/trees/reading.py MODEL_DIR [--plain]

`benchmarks/tokenising.py` starts it. For each file that a line of standard input names, it answers
with a line of JSON: pairs, tokens, a digest of the ids, and the CPU seconds of each stage. It
imports nothing of the project that one of the trees lacks.
"""

import hashlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from batch_scorer import shard as steps
from batch_scorer.config import OverLength, load_config
from batch_scorer.render import Renderer


def main(model_dir: Path, *options: str) -> None:
    known = inspect.signature(Renderer).parameters
    # As in a job, where a tree looks whether the model knows all ids.
    wanted: Any = {"vocab_size": 10**6} if "vocab_size" in known else {}
    wanted |= {"fast": False} if "--plain" in options else {}
    renderer: Any = Renderer(model_dir, 10**6, OverLength.MARK, **wanted)
    for line in sys.stdin:
        print(json.dumps(turn(renderer, model_dir, **json.loads(line))), flush=True)


def turn(renderer: Any, model_dir: Path, file: str, alone: bool) -> dict[str, Any]:
    """One file; with `alone`, its texts are then tokenised once more, without what is before."""
    config = load_config(
        model=str(model_dir), inputs=(file,), output=f"{file}.out", shard_tokens=10**9
    )
    (shard,) = make_plan(config).shards
    spent: dict[str, float] = {}
    parsed = timed(spent, "read and parse", lambda: parse(config, shard))
    rows = timed(spent, "render and tokenise", lambda: renderer.tokenize(parsed))
    if alone:
        texts = renderer._tokenizer.apply_chat_template(parsed.sequences, tokenize=False)
        timed(spent, "tokenise alone", lambda: encode(renderer)(texts))
    return {
        "pairs": rows.num_rows,
        "tokens": rows.num_tokens,
        "digest": hashlib.sha256(rows.token_ids.tobytes()).hexdigest(),
        "cpu_s": spent,
    }


def timed(spent: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    started = time.process_time()
    made = work()
    spent[stage] = time.process_time() - started
    return made


# What the trees have in different places


def make_plan(config: Any) -> Any:
    # By its file: another tree may be installed, and would be found for what this one lacks.
    is_new = (Path(steps.__file__).parent / "inputs").is_dir()
    plan: Any = import_module(f"batch_scorer.{'inputs.' * is_new}plan")
    return plan.make_plan(config)


def parse(config: Any, shard: Any) -> Any:
    """The shard's rows cut into sequences, in this process."""
    if hasattr(steps, "_parse"):
        return steps._parse(shard, config.store_options)
    return steps.parse_shard(SimpleNamespace(config=config), shard)  # type: ignore[arg-type]


def encode(renderer: Any) -> Any:
    """Texts → ids, with BOS as the template has it."""
    return renderer._encoder.encode if hasattr(renderer, "_encoder") else renderer._tokenize


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
