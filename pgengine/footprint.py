"""How much memory a training or a gradient check takes at least, before a step is played.

All trajectories of a batch are held until it has been learned from. Where every episode is known to take the same
number of steps, the size of a batch is known in advance; where lengths vary an episode may end at once, and nothing is
said.
"""

from math import prod

from pgengine.environments import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.evaluation import WAVE
from pgengine.resolution import as_played
from pgengine.spaces import Space, array_dtype, array_shape
from pgengine.spec import AlgorithmSpec, GradientCheckSpec, TrainingSpec

__all__ = ["check_footprint", "step_bytes"]

HELD = 2  # the steps as they were played and in order of episodes, at the same time


def step_bytes(facts: EnvironmentFacts) -> int:
    """Bytes that one step of a batch takes at least while it is played, whatever the policy."""
    # observation, sample, action, and 8 bytes each for lane and reward; a policy's outputs are some more
    sample = 8 if facts.action_space.kind == "discrete" else _bytes(facts.action_space)
    return HELD * (_bytes(facts.observation_space) + sample + _bytes(facts.action_space) + 16)


def check_footprint(spec: TrainingSpec | GradientCheckSpec, facts: EnvironmentFacts, limit: int) -> None:
    """Refuses what certainly does not fit.

    Args:
        spec: Resolved, of a training or a gradient check.
        facts: Of its environment.
        limit: Bytes that there are.

    Raises:
        SpecError: `does_not_fit`, with the figures.
    """
    if isinstance(spec, TrainingSpec):
        _check(spec.algorithm, facts, spec.algorithm.trajectories, "/algorithm/trajectories", limit)
        _check(spec.algorithm, facts, min(WAVE, spec.evaluation.episodes), "/evaluation/episodes", limit)
    elif spec.mode == "sample":
        for index, algorithm in enumerate(spec.estimators):
            _check(algorithm, facts, algorithm.trajectories, f"/estimators/{index}/trajectories", limit)


def _check(algorithm: AlgorithmSpec, facts: EnvironmentFacts, episodes: int, pointer: str, limit: int) -> None:
    steps = as_played(facts, algorithm).fixed_steps
    if steps is None or (needed := episodes * steps * step_bytes(facts)) <= limit:
        return
    raise SpecError(
        pointer,
        "does_not_fit",
        f"{episodes:,} episodes at once, of {steps:,} steps each, take at least {_gib(needed)} of memory, and there "
        f"may be {_gib(limit)}; take fewer episodes or a shorter limit, or let the operator raise "
        "PGENGINE_TRAINER_MEMORY_BYTES",
    )


def _bytes(space: Space) -> int:
    return prod(array_shape(space)) * array_dtype(space).itemsize


def _gib(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB"
