"""The families of reward models that are known here, one file each.

The order decides: the first adapter that fits a model and finds its head in the weights has it,
so the special ones stand above the general.
"""

from batch_scorer.models.adapter import Adapter
from batch_scorer.models.families import armorm, encoder, sequence_classifier, value_head

ADAPTERS: tuple[Adapter, ...] = (
    *armorm.ADAPTERS,
    *value_head.ADAPTERS,
    *sequence_classifier.ADAPTERS,
    *encoder.ADAPTERS,
)
