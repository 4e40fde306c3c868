"""Between which numbers the returns of an environment lie, found without playing it.

Of a finite MDP the least and the largest return that any sequence of moves can have, by dynamic programming; of classes
whose `step` was read, the bounds of its reward over as many steps as an episode may have.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from pgengine.intervals import ReturnRange

__all__ = ["Moves", "StepRewards", "known_rewards", "range_of_moves", "range_of_steps"]

MOST_WORK = 20_000_000  # moves that are looked at, over all steps; what is left is bounded by the rewards alone
STEP = 20_000  # moves that a step counts for at least, because it begins some thirty operations anew
NEAR = 1e-9  # of two sums of the same rewards in another order


@dataclass(frozen=True)
class Moves:
    """All moves that a finite MDP makes with a probability above zero, ordered by the state that they leave.

    Attributes:
        before: [E] states that they leave, none of them terminal.
        after: [E] states that they lead to.
        rewards: [E] what they pay; a move that pays at random stands here once for each reward.
        initial: [S] whether an episode may begin in the state.
    """

    before: Int[np.ndarray, "E"]
    after: Int[np.ndarray, "E"]
    rewards: Float[np.ndarray, "E"]
    initial: Bool[np.ndarray, "S"]


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is not known
def range_of_moves(moves: Moves, horizon: int | None, *, may_end: bool) -> ReturnRange | None:
    """The least and the largest return, whoever acts, and whether there are no others.

    Args:
        moves: What can happen.
        horizon: Episode limit, or None.
        may_end: Whether an episode may also end after any step, as with a discount by termination.

    Returns:
        None if there is no such range: without a horizon returns may grow without end.
    """
    before, after, rewards = moves.before, moves.after, moves.rewards
    live, starts = np.unique(before, return_index=True)
    at = np.searchsorted(live, before)  # place of each move's state among the live ones
    S = len(moves.initial)
    low, high, many = np.zeros(S), np.zeros(S), np.zeros(S, dtype=bool)
    steps = S + 1 if horizon is None else horizon
    done = min(steps, max(1, MOST_WORK // (STEP + len(before))))
    settled = False
    for _ in range(done):
        ends = [rewards + low[after], rewards + high[after]] + ([rewards] if may_end else [])
        lowest = np.minimum.reduceat(np.minimum.reduce(ends), starts)
        highest = np.maximum.reduceat(np.maximum.reduce(ends), starts)
        between = many[after] | ~np.all([_near(e, lowest[at]) | _near(e, highest[at]) for e in ends], axis=0)
        others = np.logical_or.reduceat(between, starts)
        settled = np.array_equal(low[live], lowest) and np.array_equal(high[live], highest)
        settled = settled and np.array_equal(many[live], others)
        low[live], high[live], many[live] = lowest, highest, others
        if settled:
            break
    if horizon is None and not settled:
        return None
    left = 0 if settled else steps - done
    least = float(low[moves.initial].min()) + left * min(0.0, float(rewards.min()))
    most = float(high[moves.initial].max()) + left * max(0.0, float(rewards.max()))
    if not np.isfinite([least, most]).all():
        return None
    seen = np.concatenate([low[moves.initial], high[moves.initial]])
    two = not left and not many[moves.initial].any() and bool((_near(seen, least) | _near(seen, most)).all())
    return ReturnRange(low=least, high=most, two_values=two)


def _near(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    near: np.ndarray = np.abs(a - b) <= NEAR * np.maximum(1.0, np.abs(b))
    return near


@dataclass(frozen=True)
class StepRewards:
    """Bounds of the reward of one step.

    Attributes:
        low: The least.
        high: The largest.
        at_end: What the last step of an episode may pay above that, once.
    """

    low: float
    high: float
    at_end: float = 0.0


# read off their step functions; actions are those of the action space
_KNOWN = {
    "gymnasium.envs.classic_control.acrobot.AcrobotEnv": StepRewards(-1.0, 0.0),
    "gymnasium.envs.classic_control.cartpole.CartPoleEnv": StepRewards(1.0, 1.0),
    "gymnasium.envs.classic_control.continuous_mountain_car.Continuous_MountainCarEnv": StepRewards(-0.1, 0.0, 100.0),
    "gymnasium.envs.classic_control.mountain_car.MountainCarEnv": StepRewards(-1.0, -1.0),
    # -(angle^2 + 0.1 speed^2 + 0.001 torque^2) with angles up to pi, speeds up to 8 and torques up to 2
    "gymnasium.envs.classic_control.pendulum.PendulumEnv": StepRewards(-(np.pi**2 + 6.4 + 0.004), 0.0),
    "pgengine.environments.particle.ContinuousParticle": StepRewards(-2.0, 0.0),
    "pgengine.environments.particle.Particle": StepRewards(-2.0, 0.0),
}


def known_rewards(environment: object) -> StepRewards | None:
    """Bounds of what a step of an environment pays, by its class; None of a class that is not known.

    Args:
        environment: As it is played: a wrapper around it is another class, and may pay what it likes.
    """
    if getattr(environment, "_sutton_barto_reward", False):  # an argument of CartPole: it pays in another way
        return None
    return _KNOWN.get(f"{type(environment).__module__}.{type(environment).__qualname__}")


def range_of_steps(rewards: StepRewards | None, limit: int, *, fixed: bool) -> ReturnRange | None:
    """The range of a sum of such rewards.

    Args:
        rewards: Bounds of each, or None.
        limit: Steps of an episode at most.
        fixed: Whether every episode has as many.
    """
    if rewards is None:
        return None
    fewest = limit if fixed else 1
    low = min(fewest * rewards.low, limit * rewards.low)
    high = max(fewest * rewards.high, limit * rewards.high) + rewards.at_end
    return ReturnRange(low=low, high=high)
