#!/usr/bin/env bash
# openrlhf 0.11.2: the beginning of every answer is cut off, where the template's prompt for a reply holds
# more than a finished reply begins with.
#
# Expected: with --data.apply_chat_template and --data.prompt_key, RewardDataset reads of each side
#   what the template makes of prompt and answer.
# Seen: the answer is what is left of that text after as many characters as the prompt has when it is
#   rendered for a reply. DeepSeek-V3's template opens <think> there, which its finished replies do not
#   have: eight characters of each answer are gone, of a shorter one EOS's too, and answers that
#   differed there alone become the same text. Nemotron-3's closing tag loses its first character.
#   Nothing is said.
# Why it matters here: such a pair trains on two sides that are alike. Without prompt_key nothing is cut
#   for a reward model, so docs/training-layouts.md names the layout `skywork` for it. DPO cuts in both
#   cases.
#
# Needs Python 3.11 on Linux; takes a minute or two. Exits with 0 while this is so, and with 1 when it
# has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.19.0 datasets==5.2.0 jinja2
pip --no-deps openrlhf==0.11.2 pylatexenc==2.11 trl==1.16.0
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import importlib.metadata
from pathlib import Path

from openrlhf.datasets.reward_dataset import preprocess_data
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

ask = {"role": "user", "content": "Is the sky blue?"}
yes, no = ({"role": "assistant", "content": text} for text in ("Yes.", "Nay."))


def read(template: str, prompt_key: str | None, is_dpo: bool = False) -> tuple[str, str]:
    """What RewardDataset reads of both sides, before newlines at the end and EOS."""
    core = Tokenizer(models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    files = importlib.metadata.files("trl") or []
    [path] = [file for file in files if file.name == template]
    tokenizer.chat_template = Path(str(path.locate())).read_text()
    if prompt_key:
        row = {"prompt": [ask], "chosen": [yes], "rejected": [no]}
    else:
        row = {"chosen": [ask, yes], "rejected": [ask, no]}
    prompt, chosen, rejected, _ = preprocess_data(
        row,
        prompt_key=prompt_key,
        apply_chat_template=tokenizer.apply_chat_template,
        is_dpo=is_dpo,
    )
    return prompt + chosen, prompt + rejected


for name in ("deepseekv3.jinja", "nemotron_3_nano.jinja"):
    print(name)
    cut, cut_dpo = read(name, "prompt"), read(name, None, is_dpo=True)
    whole = read(name, None)
    for sides in (cut, cut_dpo, whole):
        print(*(f"  {side!r}" for side in sides), sep="\n")
    assert cut == cut_dpo
    assert "Yes." in whole[0] and "Nay." in whole[1]
    assert cut[0] != whole[0] and cut[1] != whole[1]
    assert (cut[0] == cut[1]) == (name == "deepseekv3.jinja")
PYTHON
