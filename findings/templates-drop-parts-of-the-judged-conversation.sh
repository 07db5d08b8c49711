#!/usr/bin/env bash
# trl 1.16.0 and axolotl 0.19.0, templates for DeepSeek-V3 and Mistral v2/v3: text that never arrives.
#
# Expected: a chat template writes what the messages say, or refuses them with an error.
# Seen: DeepSeek-V3's template writes of an assistant's turn only what stands behind its last
#   </think>, also of the last turn, so that two answers that differ in their reasoning, or one
#   that quotes the tag, come out as the same text. Mistral's template writes the system message with
#   the last user turn, and only where that turn is the last message: a conversation that ends with
#   the assistant, as all that a reward model reads do, loses it without a word.
# Why it matters here: such a pair is a tie and such a system message has no effect, and neither
#   shows in a score. Rows are noted `answer_rewritten` and `same_tokens`, and `check` shows what a
#   template keeps (batch_scorer/render/probe.py).
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip transformers==5.19.0 jinja2
pip --no-deps trl==1.16.0 axolotl==0.19.0
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import importlib.metadata
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def text(package: str, name: str, *turns: tuple[str, str]) -> str:
    files = importlib.metadata.files(package) or []
    template = next(file for file in files if file.name == name)
    core = Tokenizer(models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = Path(str(template.locate())).read_text()
    talk = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(talk, tokenize=False)


ask = ("user", "How many legs has a spider?")
right, wrong = (
    text("trl", "deepseekv3.jinja", ask, ("assistant", f"<think>{why}</think>Eight."))
    for why in ("Arachnids have four pairs.", "Every animal has as many.")
)
print("DeepSeek-V3:", repr(right))
assert right == wrong and "Arachnids" not in right

system = ("system", "Answer in French.")
asked = text("axolotl", "mistral_v2v3.jinja", system, ask)
answered = text("axolotl", "mistral_v2v3.jinja", system, ask, ("assistant", "Eight."))
print("Mistral, asked:", repr(asked))
print("Mistral, answered:", repr(answered))
assert "Answer in French." in asked and "Answer in French." not in answered
PYTHON
