"""The engines by name, and what the rest of the program has to know of them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the rest of the program has to know about an engine.

    options          settings that it takes and not every engine does; the others are refused.
    runs_model       whether the model gives the scores. Then plain Hugging Face gives the same,
                     the model's family decides which engines can run it, and a score costs
                     floating-point operations. Otherwise there is one score a sequence.
    writes           whether it can let a judge write its verdict.
    is_served        whether the model is another program's, which is sent messages; then there is
                     no model folder here.
    package          what must be installed beside the requirements of this package.
    shares_prefixes  whether it computes once a prefix that several sequences of a shard have, in
                     packed batches. `shares_in_steps`: also where all tokens of a sequence are
                     read.
    """

    options: frozenset[str] = frozenset()
    runs_model: bool = True
    writes: bool = False
    is_served: bool = False
    package: str | None = None
    shares_prefixes: bool = False
    shares_in_steps: bool = False


ENGINES = {
    "hf": EngineFacts(
        options=frozenset({"attention", "compile", "invariant", "precision", "token_scores"}),
        shares_prefixes=True,
        shares_in_steps=True,
    ),
    "vllm": EngineFacts(
        options=frozenset(
            {
                *("compile", "invariant", "quantization", "token_scores"),
                *("tensor_parallel", "pipeline_parallel"),
            }
        ),
        package="vllm",
        writes=True,
        shares_prefixes=True,  # but requests for all tokens do not read its cache
    ),
    "endpoint": EngineFacts(
        options=frozenset(
            {
                *("endpoint", "api_key_env", "api_key_file", "requests_in_flight"),
                *("requests_per_minute", "tokens_per_minute", "token_prices"),
                *("request_timeout_s", "request_attempts"),
            }
        ),
        runs_model=False,
        writes=True,
        is_served=True,
    ),
    "fake": EngineFacts(runs_model=False),
}
"""The engines by name, in the order in which `auto` prefers them; each is `backends/<name>.py`."""
