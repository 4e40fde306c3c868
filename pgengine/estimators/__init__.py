"""The weight of every step in the estimate of the policy gradient.

    estimate = sum over rows of score_row * grad log pi(a_row|s_row) + entropy_row * grad H(pi(.|s_row))

One pure function of rows and settings, for any leading batch dimensions, so that enumeration needs no second version.
Everything is float64 numpy: weights are data, no gradient flows through them.

    rewards ─► with entropy ─► times ratio ─► credit ─► minus baseline ─► standardised ─► times gamma^t ─► mean ─► score
"""

from pgengine.estimators.batch_baselines import batch_mean, leave_one_out
from pgengine.estimators.returns import reward_to_go, total_return
from pgengine.estimators.rows import BatchRows, StepWeights
from pgengine.estimators.weights import step_weights

__all__ = [
    "BatchRows",
    "StepWeights",
    "batch_mean",
    "leave_one_out",
    "reward_to_go",
    "step_weights",
    "total_return",
]
