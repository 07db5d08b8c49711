#!/usr/bin/env bash
# transformers 5.19.0, template of trl 1.16.0: equal rows get other text tomorrow, and how to stop it.
#
# Expected: one tokenizer and one conversation give one text; the documentation of chat templates
#   names `strftime_now` as a function of the environment, not as an argument.
# Seen: Llama-3.2's template prints today's date through `strftime_now`, so the text changes at
#   midnight with every file of the model unchanged. A keyword argument `strftime_now` of
#   `apply_chat_template` goes before the function of that name and freezes the date.
# Why it matters here: scores of one output must not depend on the day on which a row was read;
#   batch_scorer/render/template.py passes such a function, with the date on which the output was begun.
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip transformers==5.19.0 jinja2
pip --no-deps trl==1.16.0
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import datetime
import importlib.metadata
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

files = importlib.metadata.files("trl") or []
template = next(file for file in files if file.name == "llama3_2.jinja")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>")
tokenizer.chat_template = Path(str(template.locate())).read_text()
talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def text(**arguments: object) -> str:
    return tokenizer.apply_chat_template(talk, tokenize=False, **arguments)


def frozen(day: int):
    return datetime.datetime(2026, 7, day).strftime


today = datetime.date.today().strftime("%d %b %Y")
print("unasked, the text holds", today, ":", today in text())
print("frozen, it is that of the argument:", "04 Jul 2026" in text(strftime_now=frozen(4)))
assert today in text()
assert "04 Jul 2026" in text(strftime_now=frozen(4)) and today not in text(strftime_now=frozen(4))
assert text(strftime_now=frozen(4)) != text(strftime_now=frozen(5))
PYTHON
