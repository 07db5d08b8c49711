"""The gate: are the engine's scores plain Hugging Face's, on some of this job's rows?

`sample` reads some of the job's rows again, on a road of the gate's own: the raw row (`raw_rows`),
its conversation (`raw_sequences`), transformers' call (`backends.plain_tokenizer`). Token ids have
to be the same, or a recorded setting is why (`rendering`). `gate` scores fewer of them again, with
plain Hugging Face: eager, one sequence at a time, float32 where it fits; scores may differ by
rounding. How much rounding is usual is measured: plain Hugging Face runs in the engine's dtype too.

    sample = choose_sample(job, shards)           on the driver; raises for a wrong rendering
    reference = reference_of(job, sample)         on a worker, before its engine takes the memory
    report = compare_engine(job, sample, reference, backend)

Of a judge that writes, tokens are compared in place of scores (`replies`).
"""

from batch_scorer.parity.gate import Sampled, Samples, ScoresReport, check_engine, proven_backend
from batch_scorer.parity.replies import RepliesReport
from batch_scorer.parity.report import ParityReport
from batch_scorer.parity.sample import Sample, Seen, choose_sample, look_at_first

__all__ = [
    "ParityReport",
    "RepliesReport",
    "Sample",
    "Sampled",
    "Samples",
    "ScoresReport",
    "Seen",
    "check_engine",
    "choose_sample",
    "look_at_first",
    "proven_backend",
]
