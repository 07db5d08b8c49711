#!/usr/bin/env bash
# compressed-tensors 0.17.0: weights in blocks that do not divide them are decompressed wrongly.
#
# Expected: FloatQuantizationCompressor.decompress undoes compress, which pads a weight to whole
#   blocks of `block_structure` and cuts the padding off again.
# Seen: decompress does not read the scheme; it takes rows // scale rows as the height of a block and
#   columns // scale columns as its width. With blocks of 48 x 40 on a weight of 64 x 96 it multiplies
#   by scales of other blocks, in float32 and without a warning.
# Why it matters here: batch_scorer/models/quantised.py reads the blocks that the config states, as
#   vLLM does; the library cannot be the reference for blocks that are cut at the edges.
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.19.0 compressed-tensors==0.17.0 psutil==7.2.2
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

torch.manual_seed(0)
compressor = BaseCompressor.get_value_from_registry("float-quantized")


def error(height: int, width: int) -> float:
    """Largest, after compressing and decompressing, as a share of the largest weight."""
    kind = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [height, width]}
    scheme = QuantizationScheme(targets=["Linear"], weights=kind)
    weight = torch.randn(64, 96) * torch.linspace(1, 50, 96)
    rows, columns = -(-64 // height), -(-96 // width)
    scale = torch.stack([
        torch.stack([
            weight[i * height : (i + 1) * height, j * width : (j + 1) * width].abs().max() / 448
            for j in range(columns)
        ])
        for i in range(rows)
    ])
    stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    back = compressor.decompress(stored, scheme)["weight"]
    return float((back - weight).abs().max() / weight.abs().max())


for block in ((32, 48), (48, 40)):
    print(f"blocks of {block}: off by {error(*block):.1%} of the largest weight")
assert error(32, 48) < 0.05 < 0.1 < error(48, 40)
PYTHON
