"""The known families of reward models, similar ones in one file.

The order decides: a model gets the first adapter that fits and whose head is in the weights, so
special ones come before general ones.
"""

from batch_scorer.models.adapter import Adapter
from batch_scorer.models.families import (
    armorm,
    attribute_regression,
    beaver,
    conditioned,
    cross_encoder,
    encoder,
    implicit,
    internlm2,
    judge,
    mlp_head,
    oasst_pythia,
    pairwise,
    process_reward,
    refused,
    regression_head,
    reward_distribution,
    sequence_classifier,
    token_logit,
    value_head,
)

ADAPTERS: tuple[Adapter, ...] = (
    *refused.ADAPTERS,
    *armorm.ADAPTERS,
    *reward_distribution.ADAPTERS,
    *mlp_head.ADAPTERS,
    *conditioned.ADAPTERS,
    *pairwise.ADAPTERS,
    *internlm2.ADAPTERS,
    *beaver.ADAPTERS,
    *oasst_pythia.ADAPTERS,
    *process_reward.ADAPTERS,
    *token_logit.ADAPTERS,
    *implicit.ADAPTERS,
    *judge.ADAPTERS,
    *regression_head.ADAPTERS,
    *value_head.ADAPTERS,
    *attribute_regression.ADAPTERS,
    *cross_encoder.ADAPTERS,
    *sequence_classifier.ADAPTERS,
    *attribute_regression.NAMED_OUTPUTS,
    *encoder.ADAPTERS,
)
