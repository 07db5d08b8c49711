"""How much memory the gate's reference takes: layer by layer from disk, and whole.

    python -m benchmarks.streaming            # about a minute on 2 cores
    python -m benchmarks.streaming --tiny     # a smoke test: sizes too small to mean anything

A random Llama of 24 layers, stored in bfloat16 and scored in float32, each road in a process of
its own. Memory is the process's largest resident set (VmHWM: mapped pages of the files counted in)
above what it had when everything was imported and a tiny model scored. The last line is the whole
result as JSON.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.plain import Road
from benchmarks.common import (
    Child,
    Floats,
    agreement,
    command_line,
    print_table,
    random_config,
    report,
    tokenized,
    write_random_model,
)

ROADS = {"layer by layer": Road("float32", streamed=True), "whole": Road("float32", streamed=False)}


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    layers: int
    hidden: int
    vocabulary: int
    lengths: tuple[int, ...]


FULL = Scale(24, 1152, 8000, (16, 32, 48, 64, 96, 128))
TINY = Scale(4, 192, 500, (4, 8))


@dataclass(frozen=True)
class Measured:
    """What one road took."""

    peak_mb: float
    seconds: float
    scores: Floats


def main() -> None:
    asked = command_line(__doc__).parse_args()
    scale = TINY if asked.tiny else FULL
    random = np.random.default_rng(0)
    sequences = [random.integers(3, scale.vocabulary, length).tolist() for length in scale.lengths]
    with tempfile.TemporaryDirectory() as folder:
        wide, small = Path(folder) / "wide", Path(folder) / "small"
        build(scale, wide, sequences[:3])
        build(TINY, small, [[3, 4, 5], [6, 7]])
        sizes = float32_mb(wide, scale.layers)
        measured = {}
        for name in ROADS:
            child = Child({})
            measured[name] = child.call(measure, name, wide, small, sequences)
            child.close()
    streamed, whole = measured.values()
    bound = 2 * sizes["layer"] + sizes["rest"]
    print_table(
        ["", "peak MB", "seconds"],
        [[name, round(road.peak_mb), round(road.seconds, 1)] for name, road in measured.items()],
    )
    print(f"  two layers and what is no layer: {bound:.0f} MB; all weights: {sizes['all']:.0f} MB")
    result: dict[str, Any] = {
        "layers": scale.layers,
        "sequences": len(sequences),
        "tokens": sum(scale.lengths),
        "float32_mb": {name: round(size, 1) for name, size in sizes.items()},
        "peak_mb": {name: round(road.peak_mb, 1) for name, road in measured.items()},
        "within_two_layers_and_rest": streamed.peak_mb <= bound,
        "seconds": {name: round(road.seconds, 1) for name, road in measured.items()},
        "agreement": agreement(streamed.scores, whole.scores),
    }
    report("streaming", asked, result)


def measure(name: str, wide: Path, small: Path, sequences: list[list[int]]) -> Measured:
    """Score the wide model on this road, in a process that has scored the small one already."""
    road = ROADS[name]
    road.scores(settings_for(small), tokenized([[3, 4, 5], [6, 7]]))
    before = status_mb("VmRSS")
    started = time.perf_counter()
    scores = road.scores(settings_for(wide), tokenized(sequences)).values[:, 0]
    return Measured(status_mb("VmHWM") - before, time.perf_counter() - started, scores)


def settings_for(model_dir: Path) -> EngineSettings:
    return EngineSettings(model_dir, dtype="float32", device="cpu")


def status_mb(field: str) -> float:
    """A line of /proc/self/status, which Linux writes in KiB, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


def build(scale: Scale, model_dir: Path, sequences: list[list[int]]) -> None:
    config = random_config(
        "llama",
        layers=scale.layers,
        hidden=scale.hidden,
        vocabulary=scale.vocabulary,
        positions=512,
    )
    write_random_model(config, model_dir, sequences)
    file = model_dir / "model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})


def float32_mb(model_dir: Path, layers: int) -> dict[str, float]:
    """The weights' size in float32: one layer's, what is no layer, and all."""
    sizes = {"layer": 0.0, "rest": 0.0, "all": 0.0}
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no dict
                size = 4 * float(np.prod(weights.get_slice(name).get_shape())) / 1e6
                sizes["all"] += size
                if ".layers." in name:
                    sizes["layer"] += size / layers
                else:
                    sizes["rest"] += size
    return sizes


if __name__ == "__main__":
    main()
