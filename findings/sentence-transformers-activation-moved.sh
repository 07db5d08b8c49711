#!/usr/bin/env bash
# sentence-transformers 6.2.0 (transformers 5.19.0): a CrossEncoder's activation left config.json.
#
# Expected: as in versions 4 and 5, `CrossEncoder.save_pretrained` writes the activation under
#   `sentence_transformers` in config.json, next to the weights that it belongs to.
# Seen: config.json has no entry about it, and is that of any classifier of transformers; the activation
#   is in config_sentence_transformers.json, which is read only where modules.json lies beside it. The same
#   weights without these two files score with the default, Sigmoid.
# Output seen: config.json names it: False; with its files -0.0021; without 0.4995
# Why it matters here: batch_scorer/models/cross_encoder.py reads both places, and hub.py fetches both
#   files; who copies only config, weights and tokenizer has another model.
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.19.0 sentence-transformers==6.2.0
"$folder/venv/bin/python" - "$folder" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import json
import sys
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

plain, saved = Path(sys.argv[1]) / "plain", Path(sys.argv[1]) / "saved"
plain.mkdir()
tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tea", "how", "boil", "water"]
(plain / "vocab.txt").write_text("\n".join(tokens))
BertTokenizerFast(vocab_file=str(plain / "vocab.txt")).save_pretrained(plain)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
torch.manual_seed(0)
config = BertConfig(vocab_size=len(tokens), num_attention_heads=2, num_labels=1, **shape)
BertForSequenceClassification(config).save_pretrained(plain)
CrossEncoder(str(plain), activation_fn=torch.nn.Identity(), device="cpu").save_pretrained(str(saved))


def score() -> float:
    model = CrossEncoder(str(saved), device="cpu")
    return float(model.predict([("how tea", "boil water")], show_progress_bar=False)[0])


is_in_config = "activation" in (saved / "config.json").read_text()
beside = json.loads((saved / "config_sentence_transformers.json").read_text())
with_files = score()
for name in ("modules.json", "config_sentence_transformers.json"):
    (saved / name).unlink()
without = score()
print(f"config.json names it: {is_in_config}; with its files {with_files:.4f}; without {without:.4f}")
assert not is_in_config and beside["activation_fn"].endswith("Identity")
assert abs(without - torch.tensor(with_files).sigmoid().item()) < 1e-5
PYTHON
