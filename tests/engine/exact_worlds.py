"""Random finite MDPs with everything that can make an exact answer go wrong, and linear systems."""

import numpy as np

import pgengine
from pgengine.environments import Lqr
from pgengine.spec import (
    GaussianSpec,
    LinearPolicySpec,
    LqrSpec,
    MlpPolicySpec,
    PolicySpec,
    TabularSpec,
)


def _rows(generator: np.random.Generator, *shape: int) -> np.ndarray:
    rows = generator.dirichlet(np.ones(shape[-1]), size=shape[:-1])
    return rows / rows.sum(axis=-1, keepdims=True)


def world(
    seed: int,
    *,
    S: int = 4,
    A: int = 3,
    horizon: int | None = 4,
    aliased: bool = False,
    drawn_rewards: bool = False,
    noisy_rewards: bool = False,
    terminal: bool = True,
) -> TabularSpec:
    """Random transitions and rewards; with `terminal` the last state ends an episode, and any action may lead there."""
    generator = np.random.default_rng(seed)
    rewards: dict[str, object] = {"transition_rewards": generator.normal(size=(S, A, S)).tolist()}
    if drawn_rewards:
        rewards = {
            "reward_values": [-1.0, 0.25, 2.0],
            "reward_probabilities": _rows(generator, S, A, 3).tolist(),
        }
    initial = np.zeros(S)
    initial[: S - terminal] = _rows(generator, S - terminal)
    return TabularSpec(
        transitions=_rows(generator, S, A, S).tolist(),
        initial=initial.tolist(),
        terminal=[S - 1] if terminal else [],
        horizon=horizon,
        observations=[s // 2 for s in range(S)] if aliased else None,
        reward_deviation=generator.uniform(0.5, 1.5, size=(S, A)).tolist() if noisy_rewards else None,
        **rewards,  # type: ignore[arg-type]
    )


def opened(spec: TabularSpec) -> pgengine.TabularMDP:
    """The environment of a spec."""
    return pgengine.TabularMDP(spec)


def policy_on(spec: TabularSpec | LqrSpec, policy: PolicySpec | None = None, *, seed: int = 0) -> pgengine.Policy:
    """A policy whose parameters are all random, so that nothing is symmetric; a table unless another is given."""
    made = pgengine.create_policy(policy or LinearPolicySpec(), spec, pgengine.describe(spec), seed=seed)
    generator = np.random.default_rng(seed)
    for name, array in made.parameters.items():
        made.parameters[name] = generator.normal(size=array.shape).astype(np.float32)
    return made


MLP = MlpPolicySpec(hidden=[5])


def system(seed: int = 0, *, n: int = 3, m: int = 2, horizon: int = 8) -> LqrSpec:
    """A random linear system that is held without much effort, with full cost matrices and an offset at the start."""
    generator = np.random.default_rng(seed)
    dynamics = generator.normal(size=(n, n))
    dynamics /= 1.2 * np.abs(np.linalg.eigvals(dynamics)).max()
    root, other = generator.normal(size=(n, n)), generator.normal(size=(m, m))
    return LqrSpec(
        dynamics=dynamics.tolist(),
        control=generator.normal(size=(n, m)).tolist(),
        state_cost=(root @ root.T / n).tolist(),
        action_cost=(other @ other.T / m + 0.5 * np.eye(m)).tolist(),
        noise_deviation=generator.uniform(0.1, 0.4, size=n).tolist(),
        initial_mean=generator.normal(size=n).tolist(),
        initial_deviation=generator.uniform(0.2, 1.0, size=n).tolist(),
        horizon=horizon,
    )


def gaussian_on(spec: LqrSpec, *, sigma: str = "learned", initial_sigma: float = 0.5, seed: int = 0) -> pgengine.Policy:
    """A linear Gaussian policy with small random gains."""
    policy = LinearPolicySpec(distribution=GaussianSpec(sigma=sigma, initial_sigma=initial_sigma))  # type: ignore[arg-type]
    made = policy_on(spec, policy, seed=seed)
    for array in made.parameters.values():
        array *= np.float32(0.2)
    return made


def opened_system(spec: LqrSpec) -> Lqr:
    """The environment of a spec."""
    return Lqr(spec)
