"""Reward functions in a file of their own, as a user writes them: good ones and bad ones."""

from pathlib import Path

SOURCE = '''"""Rewards of a test."""

import os
import sys
import time
from pathlib import Path


def length(responses):
    return [float(len(text)) for text in responses]


def named(responses, answer):
    """Whether the answer of the row is in the response."""
    return [
        (None, "no answer") if word is None else float(word in text)
        for text, word in zip(responses, answer)
    ]


def turns(prompts, *, factor=1):
    return [factor * len(messages) for messages in prompts]


def slow(responses):
    time.sleep(0.3)
    return length(responses)


def until_gone(responses, *, file):
    """Raises as long as a file is there."""
    if Path(file).exists():
        raise OSError("the service is away")
    return length(responses)


def at_fault(responses, *, fault):
    """Does something wrong about each response that holds FAULT; else its length."""
    bad = ["FAULT" in text for text in responses]
    if any(bad):
        print("a response is at fault", flush=True)
        if fault == "hang":
            time.sleep(3600)
        elif fault == "raise":
            raise ValueError("it cannot be read")
        elif fault == "leave":
            sys.exit("gone")
        elif fault == "die":
            os._exit(7)
        elif fault == "short":
            return [0.0] * (len(responses) - 1)
        elif fault == "fill":
            bytearray(1 << 36)
    wrong = {"nan": float("nan"), "inf": float("-inf"), "text": "0.5", "none": None}
    return [
        wrong.get(fault) if is_bad else float(len(text)) for text, is_bad in zip(responses, bad)
    ]
'''


def reward_file(folder: Path) -> Path:
    """Written into the folder."""
    file = folder / "own_rewards.py"
    file.write_text(SOURCE)
    return file
