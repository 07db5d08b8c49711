"""Benchmarks computed from scores: RewardBench 1 and 2, RM-Bench, JudgeBench; and any pairs.

One file per benchmark defines what it counts; `evaluate` finds the benchmark of a scored output and
reads what it needs.
"""

from enum import StrEnum


class Benchmark(StrEnum):
    """What can be evaluated; the values are the choices of `--benchmark`."""

    REWARDBENCH = "rewardbench"
    REWARDBENCH_2 = "rewardbench-2"
    RM_BENCH = "rm-bench"
    JUDGEBENCH = "judgebench"
    PAIRS = "pairs"
