"""A self-test: whether a policy's answer to an observation depends on what stands beside it, or on where it stands."""

import math
from copy import copy

import numpy as np

from pgengine.noise import Noise
from pgengine.policies.layers import PAD
from pgengine.policies.policy import Policy
from pgengine.policies.probes import probes

__all__ = ["rows_are_independent"]

TRIED = 3  # observations, each at every place of a block
CYCLE = 4099  # different numbers among the parameters that are tried, a prime, so that no two columns are alike


def rows_are_independent(policy: Policy) -> bool:
    """Whether the outputs for an observation have the same bits alone and at every place of a batch, on this machine.

    Where they have not, an episode can be played again only together with its whole batch: alone its last bits may
    differ, and with them what follows.

    Args:
        policy: Whose shapes are tried. Its own parameters are not: a network of zeros would hide everything.
    """
    trial = copy(policy)
    trial.parameters = {name: _numbers(n, shape) for n, (name, shape) in enumerate(policy.shapes().items())}
    seen = probes(policy.observation_space, policy.memory, TRIED)
    among = trial.outputs(np.repeat(seen, PAD, axis=0)).reshape(TRIED, PAD, -1)
    alone = np.stack([trial.outputs(seen[n : n + 1]) for n in range(TRIED)])
    return np.array_equal(among, np.broadcast_to(alone, among.shape))


def _numbers(index: int, shape: tuple[int, ...]) -> np.ndarray:
    drawn = Noise(0, "acting", 0).matrix("probe", 1 + index, (1, CYCLE))
    return np.resize(drawn / math.sqrt(shape[0]), shape).astype(np.float32)
