"""Reward functions: a user's own numbers beside the model's scores.

`functions.py` finds a function and says what it is, `calls.py` asks it in a process that may die of
it. The other files are the shipped ones, each with a function `reward`.
"""
