"""The weight of every step against a definition written with loops, and what a baseline does to the variance."""

from itertools import product

import numpy as np
import pytest

from pgengine.errors import ShapeMismatch
from pgengine.estimators import step_weights
from pgengine.spec import AlgorithmSpec, ConstantBaselineSpec, LeaveOneOutBaselineSpec, NoBaselineSpec

LENGTHS = {1: [4], 2: [3, 1], 3: [2, 5, 1], 4: [4, 1, 4, 6]}
BASELINES = [NoBaselineSpec(), ConstantBaselineSpec(value=2.5), LeaveOneOutBaselineSpec()]


def discounted(rewards: list[float], t: int, gamma: float) -> float:
    """Sum of the rewards from step t on, seen from step t; zero after the end."""
    return sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))


def naive(episodes: list[list[float]], algorithm: AlgorithmSpec) -> list[float]:
    """Slow and plain."""

    def credit(k: int, t: int) -> float:
        return discounted(episodes[k], 0 if algorithm.credit == "total_return" else t, algorithm.gamma)

    def baseline(k: int, t: int) -> float:
        if algorithm.baseline.kind == "none":
            return 0.0
        if algorithm.baseline.kind == "constant":
            return algorithm.baseline.value
        return sum(credit(j, t) for j in range(K) if j != k) / (K - 1)

    def count(k: int) -> int:
        steps = sum(len(rewards) for rewards in episodes)
        return {"trajectories": K, "all_steps": steps, "own_steps": K * len(episodes[k])}[algorithm.mean_over]

    K = len(episodes)
    power = algorithm.gamma if algorithm.discount_weight == "gamma_power" else 1.0
    return [
        power**t * (credit(k, t) - baseline(k, t)) / count(k) for k in range(K) for t in range(len(episodes[k]))
    ]  # fmt: skip


@pytest.mark.parametrize("gamma", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda baseline: baseline.kind)
@pytest.mark.parametrize("mean_over", ["trajectories", "all_steps", "own_steps"])
@pytest.mark.parametrize("discount_weight", ["none", "gamma_power"])
@pytest.mark.parametrize("credit", ["reward_to_go", "total_return"])
def test_every_weight_is_its_definition(
    credit: str, discount_weight: str, mean_over: str, baseline: object, gamma: float
) -> None:
    generator = np.random.default_rng(0)
    for K, lengths in LENGTHS.items():
        settings = AlgorithmSpec(
            credit=credit, discount_weight=discount_weight, mean_over=mean_over, baseline=baseline, gamma=gamma,
            trajectories=K,
        )  # fmt: skip
        episodes = [generator.normal(1.0, 3.0, size=length).tolist() for length in lengths]
        rewards, offsets = np.concatenate(episodes), np.concatenate([[0], np.cumsum(lengths)])
        if K == 1 and isinstance(baseline, LeaveOneOutBaselineSpec):
            with pytest.raises(ShapeMismatch, match="two trajectories"):
                step_weights(rewards, offsets, settings)
        else:
            assert np.allclose(step_weights(rewards, offsets, settings), naive(episodes, settings), rtol=1e-12)


def test_a_baseline_keeps_the_mean_of_the_estimate_and_takes_its_variance_away() -> None:
    """Two arms that pay 10 and 11, drawn evenly by two trajectories: all four batches, so nothing is random."""
    offsets, arms = np.array([0, 1, 2]), [10.0, 11.0]

    def estimates(baseline: object) -> np.ndarray:
        settings = AlgorithmSpec(baseline=baseline, discount_weight="none", trajectories=2)
        batches = [np.array(batch) for batch in product([0, 1], repeat=2)]
        scores = [0.5 - batch for batch in batches]  # by the score of the first arm
        weights = [step_weights(np.take(arms, batch), offsets, settings) for batch in batches]
        return np.array([w @ score for w, score in zip(weights, scores, strict=True)])

    none, constant, others = (estimates(baseline) for baseline in BASELINES)
    assert np.allclose([none.mean(), constant.mean(), others.mean()], -0.25)
    assert none.var() == pytest.approx(5.25**2 / 2)
    assert constant.var() == pytest.approx((5.25 - 1.25) ** 2 / 2)
    assert others.var() == pytest.approx(0.0625)
