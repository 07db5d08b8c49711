"""How near the two best tokens are where sound engines write different ones.

    python -m benchmarks.written_tokens            # 11 minutes on 2 busy cores
    python -m benchmarks.written_tokens --tiny     # a smoke test: the random model alone

Plain transformers in float32 writes behind some questions. Behind every beginning of these texts
plain transformers and vLLM, each in float32 and in bfloat16, are asked for the one next token.
Distances are between logits, as shares of the logits' standard deviation. `parity/replies.py` does
not compare tokens whose logits are nearer than it allows for: here stands what its constants rest
on. The last line is the whole result as JSON.

Legend: S questions, N tokens written behind each.
"""

import importlib.util
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.plain_answers import Greedy, plain_gaps, plain_greedy
from batch_scorer.config import Device
from batch_scorer.judges.page import Generation, Page, PageMessage, VerdictRule
from batch_scorer.models.registry import JUDGE, adapter_named
from batch_scorer.models.tokenizer import load_tokenizer
from batch_scorer.parity.replies import EXACT_NOISE, LEAST_HALF_NOISE, ROUNDING_FACTOR
from benchmarks.common import command_line, print_table, report, tokenized
from tests.helpers.language_models import embedded_language_model, random_language_model

NUM_TOKENS = 24
QUESTIONS = (
    "Name three colours.",
    "What is 2 + 2? Answer in one word.",
    "Which is better, tea or coffee? Say why in two sentences.",
    "Write a limerick about a lighthouse.",
    "How do plants make sugar?",
    "Translate 'good morning' into French, German and Spanish.",
    "My train leaves at 9:40 and takes 85 minutes. When do I arrive?",
    "Grade this answer from 1 to 5 and say why. Question: Where is Paris? Answer: In Spain.",
    "Is this answer helpful? Question: How do I boil an egg? Answer: In water, for seven minutes.",
    "Which answer is better? A: The sun is a star. B: The sun is a planet.",
    "Explain recursion to a child.",
    "List the criteria of a good summary.",
)
PAGE = Page(
    about="For the benchmark.",
    mode="pointwise",
    messages=(PageMessage(role="user", content="{{ prompt }}"),),
    verdict=VerdictRule(by="pattern", pattern="(.)", low=1, high=5),
    generation=Generation(max_tokens=NUM_TOKENS),
)

Sequences = list[list[int]]


def main() -> None:
    asked = command_line(__doc__).parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"random": random_language_model(Path(folder) / "random")}
        if not asked.tiny:
            models["SmolLM2-135M"] = embedded_language_model(Path(folder) / "embedded")
        for name, model_dir in models.items():
            result[name] = measured(model_dir)
            print_measured(name, result[name])
    report("written_tokens", asked, result)


def measured(model_dir: Path) -> dict[str, Any]:
    """By engine and dtype, what became of the tokens of plain transformers in float32."""
    tokenizer = load_tokenizer(model_dir)
    prompts: Sequences = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    exact = EngineSettings(
        model_dir,
        dtype="float32",
        device=Device.CPU,
        adapter=adapter_named(JUDGE),
        max_tokens=512,
        judge=PAGE,
        tokenizer_dir=model_dir,
    )
    greedy = plain_greedy(exact, tokenized(prompts), NUM_TOKENS)
    found: dict[str, Any] = {"places": greedy.ids.size, "spread": round(greedy.spread, 3)}
    for dtype in ("float32", "bfloat16"):
        settings = replace(exact, dtype=dtype)
        gaps = plain_gaps(settings, tokenized(prompts), greedy)
        moved = np.abs(gaps - greedy.gaps) / greedy.spread
        half = max(LEAST_HALF_NOISE, ROUNDING_FACTOR * float(moved.max()))
        found[f"plain {dtype}"] = {
            "moved_most": round(float(moved.max()), 6),
            "moved_mean": round(float(moved.mean()), 6),
            **changed(greedy, gaps < 0),
            "allowed": round(EXACT_NOISE if dtype == "float32" else half, 4),
        }
        if importlib.util.find_spec("vllm") is not None:
            found[f"vllm {dtype}"] = changed(greedy, other_tokens(settings, prompts, greedy))
    return found


def changed(greedy: Greedy, is_other: npt.NDArray[np.bool_]) -> dict[str, float]:
    """How many tokens are others, and how far their logits are from those of the best ones."""
    distances = greedy.gaps[is_other] / greedy.spread
    return {
        "other_tokens": int(is_other.sum()),
        "furthest": round(float(distances.max(initial=0)), 6),
    }


def other_tokens(
    settings: EngineSettings, prompts: Sequences, greedy: Greedy
) -> npt.NDArray[np.bool_]:
    """bool[S, N]: where vLLM writes another token behind the same ones."""
    from batch_scorer.backends.vllm_generation import VLLMGenerationBackend

    begun = [
        [*prompt, *ids[:place]]
        for prompt, ids in zip(prompts, greedy.ids.tolist(), strict=True)
        for place in range(NUM_TOKENS)
    ]
    with closing(VLLMGenerationBackend(settings)) as backend:
        written = backend.greedy(tokenized(begun), 1)
    next_ids = np.array([-1 if ids is None else ids[0] for ids in written])
    is_other: npt.NDArray[np.bool_] = next_ids.reshape(greedy.ids.shape) != greedy.ids
    return is_other


def print_measured(name: str, found: dict[str, Any]) -> None:
    print(
        f"\n{name}: {found['places']} places, logits with a standard deviation of {found['spread']}"
    )
    columns = ("moved_most", "moved_mean", "other_tokens", "furthest", "allowed")
    rows = ((k, *(v.get(c, "") for c in columns)) for k, v in found.items() if isinstance(v, dict))
    print_table(("", *(column.replace("_", " ") for column in columns)), rows)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
