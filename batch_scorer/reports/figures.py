"""A run's figures in words: the same in the summary and in `status`."""

from collections.abc import Mapping
from typing import Any

from batch_scorer.records import Judged, Rewarded

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each figure of `Metrics.to_json` that is known."""
    rows = []
    if reused := figures.get("reused_sequences"):  # a record from before it was counted has none
        rows.append(("reused", f"{reused:,} sequences, {figures['reused_rows']:,} whole rows"))
    if (goodput := figures["goodput_tokens_per_s_per_device"]) is not None:
        rows.append(("goodput", f"{goodput:,.0f} tokens/s per device"))
    if (computed := figures["computed_ratio"]) is not None:
        rows.append(("computed of the rows' tokens", f"{computed:.1%}"))
    if (padding := figures["padding_share"]) is not None:
        rows.append(("padding", f"{padding:.1%}"))
    if (utilisation := figures["model_flop_utilisation"]) is not None:
        peak = scaled(figures["peak_flop_per_s"], "FLOP/s")
        rows.append(("model-FLOP utilisation", f"{utilisation:.1%} of {peak} measured"))
    if (idle := figures["idle_share"]) is not None:
        rows.append(("device idle between shards", f"{idle:.1%}"))
        seconds = (figures[name] for name in ("read_s", "tokenize_s", "write_s"))
        rows.append(("reading, tokenising, writing", ", ".join(f"{s:.1f} s" for s in seconds)))
    if reward_s := figures.get("reward_s"):  # as above
        rows.append(("reward functions", f"{reward_s:.1f} s"))
    if (cost := figures.get("token_cost")) is not None:
        rows.append(("cost of the tokens", f"{cost:,.4f}"))
    return rows


def verdict_rows(judged: Judged | None) -> list[tuple[str, str]]:
    """Name and value of each figure of a judge's questions; none without a judge."""
    if judged is None:
        return []
    rows = [("verdicts", f"{judged.verdicts:,} of {judged.questions:,} questions")]
    for reason, count in judged.lost.items():
        rows.append((f"  none: {reason}", f"{count:,}"))
    if (flip_rate := judged.flip_rate) is not None:
        rows.append(("orders disagree", f"{flip_rate:.0%} of {judged.comparisons:,} comparisons"))
    if (first := judged.first_share) is not None:
        rows.append(
            ("prefer the answer shown first", f"{first:.0%} of {judged.decisive:,} verdicts")
        )
    if (longer := judged.longer_share) is not None:
        rows.append(("prefer the longer answer", f"{longer:.0%} of {judged.unequal:,} verdicts"))
    rows.append(("tokens of the questions", f"{judged.prompt_tokens:,}"))
    if judged.tries:
        rows.append(("written", f"{judged.generated_tokens:,} tokens in {judged.tries:,} replies"))
    return rows


def reward_rows(rewards: Mapping[str, Rewarded]) -> list[tuple[str, str]]:
    """Name and value of each figure of the reward functions, and the rows that lack a value of
    theirs by reason."""
    rows = []
    for name, counts in rewards.items():
        rows.append(
            (f"reward {name}", f"{counts.values:,} values of {counts.responses:,} responses")
        )
        rows += [(f"  rows: {reason}", f"{count:,}") for reason, count in counts.marked.items()]
    return rows


def scaled(value: float, unit: str) -> str:
    """With a prefix and three digits: 3.2e15 FLOP are 3.20 PFLOP."""
    place = 0
    while abs(value) >= 999.5 and place < len(_PREFIXES) - 1:
        value /= 1000
        place += 1
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {_PREFIXES[place]}{unit}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
