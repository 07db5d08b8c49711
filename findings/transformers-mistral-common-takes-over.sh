#!/usr/bin/env bash
# transformers 5.19.0 with mistral-common 1.13.1: an installed package decides how a folder tokenises.
#
# Expected: `AutoTokenizer.from_pretrained(folder)` gives the tokenizer that is saved in the folder
#   (tokenizer.json and chat_template.jinja), whatever else is installed.
# Seen: where `model_type` is mistral, tekken.json lies in the folder too and mistral-common can be
#   imported, the class is MistralCommonBackend. It does not use the folder's template, and refuses
#   every conversation that ends with the assistant's turn, which is all that a reward model scores.
#   `mistral_format=False` gives the folder's own tokenizer.
# Why it matters here: vLLM asks for mistral-common, so a reward model that scores on one machine
#   fails on all rows on the one where vLLM is installed; batch_scorer/models/tokenizer.py passes that
#   argument.
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip transformers==5.19.0 jinja2
cat > "$folder/look.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

model = Path(sys.argv[1])
if not model.exists():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))
    saved = PreTrainedTokenizerFast(tokenizer_object=core)
    saved.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    saved.save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "mistral"}))
for options in ({}, {"mistral_format": False}):
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, **options)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    try:
        ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
        print(type(tokenizer).__name__, ids)
    except Exception as error:
        print(type(tokenizer).__name__, type(error).__name__, error)
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" > "$folder/before"
pip mistral-common==1.13.1
cp "$("$folder/venv/bin/python" -c \
    'import mistral_common, pathlib; print(pathlib.Path(mistral_common.__file__).parent)')"/data/tekken_240911.json \
    "$folder/model/tekken.json"
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" > "$folder/after"
echo "without mistral-common:"; cat "$folder/before"
echo "with mistral-common:"; cat "$folder/after"
[ "$(grep -c TokenizersBackend "$folder/before")" = 2 ]
grep -q "^MistralCommonBackend InvalidMessageStructureException" "$folder/after"
grep -q "^TokenizersBackend \[" "$folder/after"
