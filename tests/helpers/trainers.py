"""Pairs as the code of other trainers prepares them for training, each in a process of its own.

Their packages are in a folder that is put behind all others, in those processes alone: two of them
bring a package called `tests`, and LLaMA-Factory changes transformers when it is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.program import REPOSITORY

PACKAGES = Path(sys.prefix) / "trainers"
"""Where the tests' set-up puts them."""


Rows = list[dict[str, Any]]


def prepared(trainer: str, directory: Path, *calls: dict[str, Any]) -> list[Rows]:
    """What the function of that name below gives for each of these arguments, in one process, since
    loading a trainer takes seconds; caches go to `directory`."""
    out = directory / "prepared.json"
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.trainers", trainer, json.dumps(calls), str(out)],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "HF_HOME": str(directory / "cache"),
            # LLaMA-Factory asks for an older transformers, for its models.
            "DISABLE_VERSION_CHECK": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    results: list[Rows] = json.loads(out.read_text())
    return results


def openrlhf(path: str, tokenizer: str, prompt_key: str | None, is_dpo: bool) -> Rows:
    """As OpenRLHF's `train_rm` or `train_dpo` prepares `--data.dataset PATH` with
    `--data.apply_chat_template`: the texts that are read, and the margin of the label (`train_rm`)
    or the part that is taken for the prompt (`train_dpo`)."""
    from openrlhf.datasets import RewardDataset
    from openrlhf.datasets.utils import blending_datasets
    from transformers import AutoTokenizer

    data = SimpleNamespace(
        prompt_key=prompt_key,
        chosen_key="chosen",
        rejected_key="rejected",
        apply_chat_template=True,
        tokenizer_chat_template=None,
    )
    strategy = SimpleNamespace(
        args=SimpleNamespace(data=data, use_ms=False),
        print=lambda *_: None,
        is_rank_0=lambda: True,
    )
    rows = blending_datasets(path, strategy=strategy, dataset_split="train")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    made = RewardDataset(
        rows, loaded, max_length=512, strategy=strategy, is_dpo=is_dpo, num_processors=None
    )
    found = []
    for i in range(len(made)):
        chosen, _, rejected, _, extra = made[i]
        row = {"chosen": loaded.decode(chosen[0]), "rejected": loaded.decode(rejected[0])}
        row |= {"prompt": loaded.decode(chosen[0][:extra])} if is_dpo else {"margin": extra}
        found.append(row)
    return found


def llama_factory(dataset_dir: str) -> Rows:
    """As `llamafactory-cli train --stage rm` reads the data set `pairs` of a dataset_info.json,
    before it is tokenised: `_prompt`, `_response` (chosen, rejected) and `_system`."""
    # Not the package's own __init__: it loads what reads sound too, and with it torchaudio, whose
    # builds on PyPI need CUDA's libraries. Loading, converting and dropping do not need it.
    if "llamafactory.data" not in sys.modules:
        spec = importlib.util.find_spec("llamafactory.data")
        assert spec is not None
        sys.modules["llamafactory.data"] = importlib.util.module_from_spec(spec)
    from llamafactory.data.loader import _get_merged_dataset
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import Seq2SeqTrainingArguments

    data = DataArguments(dataset="pairs", dataset_dir=dataset_dir)
    model = ModelArguments(model_name_or_path="none")
    training = Seq2SeqTrainingArguments(output_dir=dataset_dir, report_to=[])
    merged = _get_merged_dataset(data.dataset, model, data, training, "rm")
    rows: Rows = merged.to_list()
    return rows


def verl(files: list[str], tokenizer: str, cache_dir: str) -> Rows:
    """The texts that verl's `RMDataset` gives a reward model."""
    from transformers import AutoTokenizer
    from verl.utils.dataset import RMDataset

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    made = RMDataset(files, loaded, max_length=512, cache_dir=cache_dir)

    def texts(item: dict[str, Any]) -> list[str]:
        both = zip(item["input_ids"], item["attention_mask"], strict=True)
        return [loaded.decode(ids[mask.bool()]) for ids, mask in both]

    items = (texts(made[i]) for i in range(len(made)))
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in items]


if __name__ == "__main__":
    name, given, target = sys.argv[1:]
    sys.path.append(str(PACKAGES))
    prepare = {"openrlhf": openrlhf, "llama_factory": llama_factory, "verl": verl}[name]
    Path(target).write_text(json.dumps([prepare(**arguments) for arguments in json.loads(given)]))
