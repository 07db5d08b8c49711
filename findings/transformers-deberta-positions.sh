#!/usr/bin/env bash
# transformers 5.19.0, DebertaV2: max_position_embeddings changes the scores of short sequences.
#
# Expected: `max_position_embeddings` is a limit. Raising it in a DeBERTa-v2 or v3 with relative
#   positions and no absolute ones (position_biased_input false) changes no output for sequences within
#   the old limit.
# Seen: with the usual `max_relative_positions: -1` the logarithmic buckets of distances are cut by
#   max_position_embeddings, so another limit puts the same distance into another bucket.
# Output seen: 60 tokens, the limit raised from 512 to 1024: states move by 0.27 of their spread
# Why it matters here: PairRM reads more than the 512 positions of its config. Where
#   batch_scorer/models/families/pairwise.py raises the limit, it sets max_relative_positions to the old
#   one, so that the buckets stay.
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.19.0
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import torch
from transformers import DebertaV2Config, DebertaV2Model

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "type_vocab_size": 0, "relative_attention": True,
    "max_relative_positions": -1, "position_biased_input": False, "position_buckets": 16,
    "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
ids = torch.arange(1, 61)[None]


def states(limit: int, weights: dict[str, torch.Tensor] | None = None):
    torch.manual_seed(0)
    model = DebertaV2Model(DebertaV2Config(**SHAPE, max_position_embeddings=limit)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
        if weights is not None:
            model.load_state_dict(weights)  # all of them, in the same shapes
        return model(input_ids=ids).last_hidden_state, model.state_dict()


before, weights = states(512)
again, _ = states(512, weights)
after, _ = states(1024, weights)
moved = float((after - before).abs().max() / before.std())
print(f"60 tokens, the limit raised from 512 to 1024: states move by {moved:.2f} of their spread")
assert float((again - before).abs().max()) == 0.0 and moved > 0.01
PYTHON
