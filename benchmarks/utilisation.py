"""What share of the CPU's matrix units the hf backend uses, and where the rest goes.

FLOPs are those of the tokens that went through the model, prefixes once; what the last layer leaves
out is left out here too. The peak is that of large matrix products in the same dtype, measured
before and after every turn. Eager and compiled layers take turns. A profile of one thread then says
what share of its time the operators take.

    python -m benchmarks.utilisation
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.device import cpu_has_bfloat16, matmul_peak
from batch_scorer.backends.hf import HFBackend
from batch_scorer.models.adapter import ModelFiles
from batch_scorer.models.cost import model_cost
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.registry import choose_adapter
from batch_scorer.records import TokenizedRows
from benchmarks.common import WORKLOADS, command_line, model_of, print_table, report, tokenize

GROUPS = {
    "matrix products of the linear layers": ("mkldnn::_linear_pointwise", "aten::mm"),
    "attention: products": ("aten::baddbmm", "aten::bmm"),
    "attention: softmax and mask": ("aten::_softmax", "aten::add_"),
    "attention: gathering": ("aten::index_select",),
}
"""Operators by what they are for; everything else is elementwise work, copies and Python."""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=160, help="pairs")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = model_of(asked, Path(folder))
        workload = WORKLOADS["hh"]
        table = workload.read(2 if asked.tiny else asked.rows, None)
        rows = tokenize(table, workload.layout, model_dir)
        result = measure(model_dir, rows, 1 if asked.tiny else asked.rounds, tiny=asked.tiny)
    report("utilisation", asked, result)


def measure(model_dir: Path, rows: TokenizedRows, rounds: int, *, tiny: bool) -> dict[str, Any]:
    dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    files = read_model_files(model_dir)
    cost = model_cost(files, choose_adapter(files))
    assert cost is not None
    backends = {"eager": backend_of(model_dir, dtype)}
    if not tiny:  # compiling takes longer than the rest of a tiny run
        backends["compiled"] = backend_of(model_dir, dtype, compile=True)
    for backend in backends.values():
        backend.score(rows)
    shares: dict[str, list[float]] = {name: [] for name in backends}
    peaks = [matmul_peak("cpu", dtype)]
    for _ in range(rounds):
        for name, backend in backends.items():
            started = time.perf_counter()
            effort = backend.score(rows).effort
            seconds = time.perf_counter() - started
            peaks.append(matmul_peak("cpu", dtype))
            done = cost.flops(effort.computed_tokens, effort.attended_pairs)
            done -= 2 * left_out(files) * effort.computed_tokens
            shares[name].append(done / seconds / statistics.mean(peaks[-2:]))
    print_table(
        ["layers", "utilisation, median", "least", "most"],
        [
            [name, f"{statistics.median(some):.1%}", f"{min(some):.1%}", f"{max(some):.1%}"]
            for name, some in shares.items()
        ],
    )
    return {
        "tiny": tiny,
        "tokens": rows.num_tokens,
        "computed_tokens": effort.computed_tokens,
        "dtype": dtype,
        "rounds": rounds,
        "peak_gflops": round(statistics.median(peaks) / 1e9),
        "utilisation": {name: round(statistics.median(some), 3) for name, some in shares.items()},
        "profile": {name: profiled(backend, rows) for name, backend in backends.items()},
    }


def backend_of(model_dir: Path, dtype: str, *, compile: bool = False) -> HFBackend:
    return HFBackend(EngineSettings(model_dir, dtype=dtype, device="cpu", compile=compile))


def left_out(files: ModelFiles) -> int:
    """Weights of the last layer that only pooled tokens meet: those behind the attention."""
    last = f"layers.{files.config['num_hidden_layers'] - 1}."
    behind = ("o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
    shapes = [
        shape for name, shape in files.shapes.items() if last in name and name.endswith(behind)
    ]
    return sum(rows * columns for rows, columns in shapes)


def profiled(backend: HFBackend, rows: TokenizedRows) -> dict[str, float]:
    """Share of the time of one thread, by what it is spent on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    part = rows.part(0, max(1, rows.num_rows // 4))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for lot in backend._lay_out(part).lots:
            backend._score_lot(part, lot)
    torch.set_num_threads(threads)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = {
        group: sum(event.self_cpu_time_total for event in events if event.key in names) / total
        for group, names in GROUPS.items()
    }
    shares["everything else"] = 1 - sum(shares.values())
    print_table(["one thread's time", "share"], [[n, f"{s:.1%}"] for n, s in shares.items()])
    return {name: round(share, 3) for name, share in shares.items()}


if __name__ == "__main__":
    main()
