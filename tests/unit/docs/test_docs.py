"""Documents that could drift are held to the code; run this file to rewrite the generated ones."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from batch_scorer.config import Config
from batch_scorer.decontamination.recipe import Decontamination
from batch_scorer.errors import RowNote, RowReason, ShardReason
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.families import ADAPTERS
from batch_scorer.models.families.attribute_regression import labels
from batch_scorer.normalization.recipe import Normalization
from batch_scorer.selection.recipe import Selection

ROOT = Path(__file__).parents[3]
SETTINGS = ROOT / "docs" / "settings.md"
MODELS = ROOT / "docs" / "models.md"
JOB_SCHEMA = ROOT / "docs" / "job.schema.json"

_INTRO = """# Settings

One object for the command line, the YAML file and Python: `token_budget` is `--token-budget`,
`token_budget:` and `load_config(token_budget=…)`. A flag goes on top of the file. Unknown names are
refused.

**scores**: enters the fingerprint; another value cannot reuse old scores. **layout**: fixed for an
output once it has been written to. **runtime**: free to change when a run is resumed.

In every path or URL `~/` is the home folder, `${NAME}` a variable of the environment (it must be
set), and `$${` stands for `${`; the path is recorded as it is used. `submit` leaves them to the
job, where they are the cluster's. YAML's `off` is read as it is spelled here. In Python a path may
be a `Path`.
"""


def settings_page() -> str:
    parts = [_INTRO]
    for role in ("scores", "layout", "runtime"):
        parts.append(f"\n## {role}\n")
        for name, field in Config.model_fields.items():
            if Config.roles()[name] == role:
                text = " ".join((field.description or "").split())
                parts.append(f"\n**`{name}`**{_default(field)}  \n{text}\n")
    return "".join(parts)


def _default(field: Any) -> str:
    if field.is_required():
        return " (needed)"
    value = field.default
    parts = [] if value in (None, "", {}) else [f"default `{getattr(value, 'value', value)}`"]
    if choices := [str(getattr(c, "value", c)) for c in _choices(field.annotation)]:
        parts.append(f"one of {', '.join(f'`{c}`' for c in choices)}")
    return f" ({'; '.join(parts)})" if parts else ""


def _choices(kind: Any) -> list[Any]:
    found: list[Any] = []
    for part in (kind, *get_args(kind)):
        if hasattr(part, "__members__"):
            found += list(part)
        elif "Literal" in str(part):
            found += [arg for arg in get_args(part) if isinstance(arg, str)]
    return list(dict.fromkeys(found))


def test_the_settings_page_is_made_from_the_settings() -> None:
    assert SETTINGS.read_text() == settings_page(), "run: python -m tests.unit.docs.test_docs"


def job_schema() -> str:
    """JSON Schema of job files, for editors. No key is required: flags may give it."""
    made = Config.model_json_schema()
    settings = made["properties"]
    for name, setting in settings.items():
        setting.pop("title", None)
        role = setting.pop("role")
        setting["description"] = f"[{role}] {' '.join(setting['description'].split())}"
        settings[name] = dict(sorted(setting.items(), key=lambda item: item[0] != "description"))
    many = {key: settings["inputs"].pop(key) for key in ("type", "items", "minItems")}
    settings["inputs"]["anyOf"] = [{"type": "string"}, many]
    for definition in made["$defs"].values():
        del definition["title"], definition["description"]
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A job of batch-scorer",
        "description": "Every key is a setting of docs/settings.md; flags go on top of it.",
        "type": "object",
        "additionalProperties": False,
        "properties": settings,
        "$defs": made["$defs"],
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def test_the_schema_of_job_files_is_made_from_the_settings() -> None:
    assert JOB_SCHEMA.read_text() == job_schema(), "run: python -m tests.unit.docs.test_docs"


PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "cluster/*.md", "benchmarks/*.md", "tests/*.md")
    for page in ROOT.glob(pattern)
)


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _links(page):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_id)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
        text = (ROOT / file).read_text()
        assert not name or f"def {name}(" in text, f"{page.name}: {file} has no {name}"


def test_the_index_lists_every_page_once() -> None:
    index = ROOT / "docs" / "README.md"
    pages = {_id(page) for page in ROOT.glob("docs/**/*.md") if page != index}
    listed = [f"docs/{target}" for target in _links(index) if not target.startswith("..")]
    assert sorted(listed) == sorted(pages)


def _promises(page: str, heading: str) -> list[str]:
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.split(r"\n(?=\| |- )", section)[1:]


def test_every_promise_of_the_readme_names_what_holds_it() -> None:
    promises = _promises("README.md", "What it promises")
    assert len(promises) > 5
    for promise in promises:
        assert re.search(r"\]\(tests/[\w/]+\.py\)", promise), promise


def test_every_promise_of_survival_names_a_test() -> None:
    promises = _promises("docs/survival.md", "Promises")[1:]  # without the table's head
    assert len(promises) > 5
    for promise in promises:
        assert re.search(r"`tests/[\w/]+\.py`", promise), promise


_MODELS_INTRO = """# Models

A family is data (`batch_scorer/models/families/`): where the head lies, which tokens it reads, what
text it was trained on. The family is found from config.json, the names of the tensors and, where
neither decides, the model's name; `--adapter` names it outright. Body and head are apart: either
engine runs the body, the head is ours, in float32, and no family needs remote code. Each family is
held to a plain model, one sequence at a time, in `tests/parity/test_matrix.py`.

`score` is the raw output, in the cross_encoder families after their activation; higher is better in
every family. Attributes come beside it, in `rewards`, raw. A model that no family fits can be
scored by the Python code that comes with it, with `--trust-remote-code`, on the hf engine; the run
records that.

A DPO policy is a reward model together with the model that DPO began with: `--adapter
implicit_reward --model POLICY --reference-model REFERENCE`. Nothing in its files shows this use, so
it has to be asked for. Both models read one token trie, shared prefixes once each; the answer's
tokens alone count. A density ratio is the same with `--beta 1`: the stronger model is `--model`,
the weaker one `--reference-model`, and exchanged they give the other sign. It is held to plain
language models in `tests/parity/test_implicit.py`. A policy may be a LoRA adapter; its base is then
the reference: `--model ADAPTER --reference-model BASE`.

## What each trainer writes

Each row is a folder that `tests/parity/test_trainers.py` builds, and scores as the trainer does.
Adapters, names that training wrappers leave, and what is refused: [checkpoints.md](checkpoints.md).
Shards of FSDP, DeepSpeed, verl, NeMo and Megatron are no model yet; the message names the program
that converts them.

| trainer | what the folder holds | family |
|---|---|---|
| TRL | RewardTrainer: `*ForSequenceClassification`, `score.weight` [1, H] | `sequence_classifier` |
| TRL, compiled | the same, names begin with `_orig_mod.` | `sequence_classifier` |
| OpenRLHF | `RewardModel`, head `score.weight`; texts end in a blank and EOS | `openrlhf` |
| OpenRLHF, value_head | the same, `value_head_prefix` value_head | `openrlhf_value_head` |
| OpenRLHF, normalised | `mean` and `std` in config.json: score (raw - mean) / std | `openrlhf` |
| verl | merged: `*ForTokenClassification`, `score.weight` and `score.bias`, read \
at the last token | `token_classifier` |
| LLaMA-Factory | `*ForCausalLM` and `value_head.safetensors` (`v_head.summary.*`) | `value_head` |
| LLaMA-Factory, bin | the same as `value_head.bin`; only tensors are read from it | `value_head` |
| LLaMA-Factory, score | config of a `*ForCausalLM`, `score.weight` in the weights \
| `sequence_classifier` |
| ms-swift | `*ForSequenceClassification` with one label | `sequence_classifier` |
| ms-swift, PPO | `*ForCausalLM` and `value_head.safetensors` | `value_head` |
| axolotl | `reward_model: true`: `*ForSequenceClassification` with one label \
| `sequence_classifier` |
| axolotl, FSDP | the same with `_fsdp_wrapped_module.` inside the names | `sequence_classifier` |
| open-instruct | `*ForSequenceClassification` with one label | `sequence_classifier` |
| open-instruct, DDP | the same with `module.` before and `_orig_mod.` inside the names \
| `sequence_classifier` |
| NeMo and Megatron, exported | converted to `*ForSequenceClassification`, shards and an index \
| `sequence_classifier` |

The endings of texts differ too (OpenRLHF's is added; TRL's comes from the chat template): the
setting `eos` says what to do where a template leaves it out.

## Bodies with layers that keep a state

Mamba, linear attention and short convolutions carry a state from token to token, so such a body is
neither packed nor shares prefixes. On hf it runs padded: `attention` is then `eager` by itself, and
`--attention packed` is refused. `tests/parity/test_hybrid.py` holds tiny ones of twelve kinds to
one sequence at a time. vLLM runs some, without its prefix cache. The others it refuses in one line
when a worker starts, before its first shard; a race under `--backend auto` then goes to hf. Seen
with vLLM 0.32's build for CPUs and tiny bodies:

| kind | vllm on a CPU |
|---|---|
| `falcon_h1`, `granitemoehybrid` (Mamba-2) | runs; in float32 as close as other bodies |
| `qwen3_next` (gated delta rule) | runs in bfloat16 only, with linear heads of 128 |
| `lfm2` (short convolutions) | refused: sequences see each other's states, which the probe at the \
start finds |
| `jamba` (Mamba-1) | refused: that build has no kernel (`selective_scan_fwd`) |
| `nemotron_h` | refused: its experts are for GPUs only |
| `olmo_hybrid` | refused: asks for Triton |
| `qwen3_5` | refused without torchvision, which the tests' set-up leaves out; not tried with it |
| `zamba2` | a tiny one could not be loaded; no other was tried |
| `bamba`, `recurrent_gemma`, `minimax` | refused: vLLM has no decoder for them |

On a GPU none was tried; the gate decides.

## Families

| family | what it is | engines | outputs beside `score` |
|---|---|---|---|
"""
# A config that gives every family all the outputs it can have.
_FULL_CONFIG = {"mean": 0.0, "std": 1.0}


def models_page() -> str:
    parts = [_MODELS_INTRO]
    scoring = [adapter for adapter in ADAPTERS if not adapter.refused]
    for adapter in scoring:
        outputs = _outputs(adapter)
        count = f"{len(outputs)} attributes" if len(outputs) > 1 else ", ".join(outputs)
        parts.append(
            f"| [`{adapter.name}`](#{adapter.name}) | {adapter.summary} | "
            f"{', '.join(adapter.engines)} | {count} |\n"
        )
    for adapter in scoring:
        parts.append(_family(adapter))
    parts.append("\n## Refused\n\n")
    for adapter in ADAPTERS:
        if adapter.refused:
            parts.append(
                f"- **{adapter.summary}** ({', '.join(adapter.models)}): {adapter.refused}\n"
            )
    parts.append("\n## Published scores\n\n")
    parts.append(
        "What their makers report, mostly in bfloat16: check a new machine against them.\n\n"
    )
    parts.append("| model | input | score | source |\n|---|---|---|---|\n")
    for adapter in ADAPTERS:
        for known in adapter.references:
            parts.append(f"| {known.model} | {known.case} | {known.score} | {known.source} |\n")
    return "".join(parts)


def _family(adapter: Adapter) -> str:
    head = ", ".join(f"`{name}`" for name in list(adapter.head)[:4])
    head += f" and {len(adapter.head) - 4} more" if len(adapter.head) > 4 else ""
    lines = [
        f"\n## {adapter.name}\n\n{adapter.summary[0].upper()}{adapter.summary[1:]}.\n",
        f"models: {'; '.join(adapter.models)}",
        f"found by: {_found_by(adapter)}",
        f"head: {head}" if head else "head: the model's own",
        f"reads: {adapter.reads}",
        f"text: {_text(adapter)}",
    ]
    if outputs := _outputs(adapter):
        lines.append(f"outputs beside the score: {', '.join(outputs)}")
    if adapter.step_aggregation:
        lines.append(f"score: the {adapter.step_aggregation} of the steps' (`--step-aggregation`)")
    if adapter.reads_any_token:
        lines.append("token scores: what the head gives at every token (`--token-scores`)")
    lines += [f"trap: {trap}" for trap in adapter.traps]
    return lines[0] + "\n" + "".join(f"- {line}\n" for line in lines[1:])


def _outputs(adapter: Adapter) -> tuple[str, ...]:
    if adapter.attributes is labels and not adapter.has_score({}):
        return ("a score only with weights; the outputs that id2label names",)
    if adapter.attributes is labels:
        return ("the attributes that id2label names",)
    return adapter.attributes(_FULL_CONFIG)


def _found_by(adapter: Adapter) -> str:
    if adapter.asked_only and not adapter.model_ids:
        return f"`--adapter {adapter.name}`"
    how = "architecture " + ", ".join(f"`{name}`" for name in adapter.architectures)
    if adapter.is_cross_encoder:
        return f"{how}, saved as a CrossEncoder"
    if adapter.model_ids:
        return f"{how} and a name like {', '.join(f'`{name}`' for name in adapter.model_ids)}"
    return how


def _text(adapter: Adapter) -> str:
    prompt = adapter.prompt
    parts = [
        "the tokenizer's chat template" if prompt.template is None else "a template of its own"
    ]
    if prompt.pair:
        parts = ["the pair (question, answer), where the tokenizer has no chat template"]
    if prompt.system is not None:
        parts.append(
            f"system prompt “{prompt.system}”" if prompt.system else "an empty system turn"
        )
    if prompt.steps is not None:
        tag, how = prompt.steps.tag.strip(), prompt.steps.layout
        steps = "every step followed by" if how == "tagged" else "every step a turn, answered by"
        parts.append(f"{steps} `{tag}`")
    if prompt.suffix_id_of is not None:
        parts.append(f"the config's `{prompt.suffix_id_of}` at the end")
    if prompt.beside is not None and prompt.beside.field == "other":
        parts.append("both answers of a row, the scored one first")
    elif prompt.beside is not None:
        parts.append(f"the row's `{prompt.beside.field}`")
    if prompt.eos == "openrlhf":
        parts.append("line feeds at the end stripped, then a blank and EOS unless it ends in EOS")
    return "; ".join(parts)


def test_the_models_page_is_made_from_the_families() -> None:
    assert MODELS.read_text() == models_page(), "run: python -m tests.unit.docs.test_docs"


def test_every_trap_names_a_test() -> None:
    lines = [line for line in (ROOT / "docs" / "traps.md").read_text().splitlines() if "T-" in line]
    for line in lines:
        _, trap, _, held_by, _ = line.split("|")
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held_by)
        assert tests or "there is no curation" in held_by or "labels are not read" in held_by, trap


def test_every_reason_is_explained() -> None:
    text = (ROOT / "docs" / "reasons.md").read_text()
    for reason in (*RowReason, *RowNote, *ShardReason):
        assert f"`{reason.value}`" in text, reason


def test_flags_in_the_documents_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Config.model_fields}
    known |= {"--ignore-column", "--template-argument", "--reward"}
    known |= {
        "--column",
        "--store-option",
        "--no-ray",
        "--no-fast-tokenizer",
        "--config",
        "--json",
        "--help",
    }
    known |= {"--ray", "--version", "--tiny", "--threads", "--sizes", "--data", "--minutes"}
    known |= {"--contestant", "--rows"}  # of benchmarks, as those before
    known |= {"--many", "--rounds", "--workload", "--benchmark", "--legacy-xstest-weights"}
    known |= {"--repair", "--html", "--compare"}
    known |= {"--against", "--dry-run", "--output", "--recipe"}
    known |= {f"--{name.replace('_', '-')}" for name in Decontamination.model_fields}
    known |= {"--repair", "--beside", "--recipe", "--offset", "--split"}
    known |= {f"--{name.replace('_', '-')}" for name in Selection.model_fields}
    known |= {f"--{name.replace('_', '-')}" for name in Normalization.model_fields}
    known |= {"--repair", "--marked", "--to", "--card"}
    known |= {"--since", "--until", "--rescore", "--max-shards", "--dry-run"}
    known |= {"--address", "--token-file", "--tag", "--no-wait", "--nodes", "--gpus-per-node"}
    other_programs = {"embedded-model.md"}  # its flags are those of a script in examples/
    pages = [page for page in ROOT.glob("docs/*.md") if page.name not in other_programs]
    for page in (*pages, ROOT / "README.md"):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()):
            assert flag in known, f"{page.name}: {flag}"


if __name__ == "__main__":
    SETTINGS.write_text(settings_page())
    MODELS.write_text(models_page())
    JOB_SCHEMA.write_text(job_schema())
