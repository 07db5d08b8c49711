#!/usr/bin/env bash
# bitsandbytes 0.50.2: on CPUs, 4-bit weights whose rows are not whole blocks are dequantised wrongly.
#
# Expected: functional.dequantize_4bit undoes functional.quantize_4bit up to the rounding. Blocks are
#   cut from the flat weight, so one may hold the end of a row and the beginning of the next.
# Seen: the kernel for CPUs (cdequantize_blockwise_cpu_nf4_fp32 and its like) takes other scales for
#   such blocks: a weight of 64 x 96 in blocks of 64 comes back with errors of four times the rounding,
#   without a warning. bitsandbytes' own generic code, on the same codes and scales, is right.
# Why it matters here: batch_scorer/models/bitsandbytes.py reads blocks as they are cut; the library's
#   CPU kernel can be its reference only where every row is whole blocks.
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip torch==2.13.0 packaging numpy==2.4.6
pip --no-deps bitsandbytes==0.50.2
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import torch
from bitsandbytes import functional

torch.manual_seed(0)


def error(columns: int) -> tuple[float, float]:
    """The largest error of the kernel, and of the definition."""
    weight = torch.randn(64, columns)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    places = torch.stack((codes >> 4, codes & 15), dim=-1).flatten().long()
    meant = (state.code[places] * state.absmax.repeat_interleave(64)).reshape(weight.shape)
    back = functional.dequantize_4bit(codes, state)
    return float((back - weight).abs().max()), float((meant - weight).abs().max())


for columns in (128, 96):
    kernel, definition = error(columns)
    print(f"64 x {columns}: off by {kernel:.3f}, by the definition by {definition:.3f}")
assert error(128)[0] < 0.6 < 1 < error(96)[0] and error(96)[1] < 0.6
PYTHON
