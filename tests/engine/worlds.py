"""Small finite MDPs with known answers, and policies on them."""

from typing import Any

import numpy as np

import pgengine
from pgengine.environments import Step
from pgengine.spec import AlgorithmSpec, GymnasiumSpec, LinearPolicySpec, TabularSpec, TrainingSpec


def random_mdp(seed: int, *, S: int = 3, A: int = 2, horizon: int = 3, terminal: bool = True) -> TabularSpec:
    """Random transitions and rewards r(s, a, s'); if `terminal`, the last state ends an episode."""
    generator = np.random.default_rng(seed)
    transitions = np.round(generator.dirichlet(np.ones(S), size=(S, A)), 3)
    transitions[..., -1] = 1.0 - transitions[..., :-1].sum(axis=-1)
    transitions = np.clip(transitions, 0.0, 1.0)
    initial = np.zeros(S)
    initial[:2] = 0.6, 0.4
    return TabularSpec(
        transitions=transitions.tolist(),
        transition_rewards=generator.normal(size=(S, A, S)).tolist(),
        initial=initial.tolist(),
        terminal=[S - 1] if terminal else [],
        horizon=horizon,
    )


def small_mdp(seed: int, *, horizon: int = 3, starts: int = 2) -> TabularSpec:
    """Three actions, of which one goes on, one ends at random and one ends; episodes of 1 to `horizon` steps.

    22 trajectories from one start at horizon 3, so that all batches of three can be gone through.
    """
    generator = np.random.default_rng(seed)
    on, over = [0.0, 0.0], 1.0
    to_first, to_second = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    q = np.round(generator.uniform(0.3, 0.7, size=2), 3)
    return TabularSpec(
        transitions=[
            [to_second, [0.0, float(q[0]), 1.0 - float(q[0])], [*on, over]],
            [to_first, [float(q[1]), 0.0, 1.0 - float(q[1])], [*on, over]],
            [[*on, over]] * 3,
        ],
        transition_rewards=np.round(generator.normal(size=(3, 3, 3)), 3).tolist(),
        initial=[0.6, 0.4, 0.0] if starts == 2 else [1.0, 0.0, 0.0],
        terminal=[2],
        horizon=horizon,
    )


def steady_mdp(seed: int, *, horizon: int = 2) -> TabularSpec:
    """Two states, three actions, no end before the horizon: all episodes are equally long."""
    generator = np.random.default_rng(seed)
    stay, leave = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    return TabularSpec(
        transitions=[[stay[s], leave[s], stay[s]] for s in range(2)],
        rewards=np.round(generator.normal(size=(2, 3)), 3).tolist(),
        initial=[0.6, 0.4],
        horizon=horizon,
    )


def table_policy(spec: TabularSpec, seed: int = 0) -> pgengine.Policy:
    """A softmax table with random scores, so that no action is symmetric to another."""
    S, A = len(spec.transitions), len(spec.transitions[0])
    theta = np.random.default_rng(seed).normal(size=(S, A)).tolist()
    policy = LinearPolicySpec(initial_parameters={"theta": theta})
    return pgengine.create_policy(policy, spec, pgengine.describe(spec), seed=0)


def algorithm(spec: TabularSpec, **settings: object) -> AlgorithmSpec:
    """A resolved algorithm."""
    facts = pgengine.describe(spec)
    return pgengine.resolve(TrainingSpec(environment=spec, algorithm=settings), facts).algorithm  # type: ignore[arg-type]


def bandit(*means: float) -> TabularSpec:
    """One step, one state that matters; each action has a reward of its own."""
    A = len(means)
    return TabularSpec(
        transitions=[[[0.0, 1.0]] * A, [[0.0, 1.0]] * A],
        rewards=[list(means), [0.0] * A],
        initial=[1.0, 0.0],
        terminal=[1],
        horizon=1,
    )


CARTPOLE = GymnasiumSpec(id="CartPole-v1")
PENDULUM = GymnasiumSpec(id="Pendulum-v1")


class Played:
    """A finite MDP of which nothing is known but what its facts are told to be: no model, no range of returns."""

    def __init__(self, spec: TabularSpec, **known: Any) -> None:
        self._inner = pgengine.TabularMDP(spec)
        hidden = {"exact": None, "states": None, "return_range": None, "cut_return_range": None}
        self.facts = self._inner.facts.model_copy(update=hidden | known)

    @property
    def uniforms(self) -> int:
        return self._inner.uniforms

    def begin(self, noise: np.ndarray) -> np.ndarray:
        return self._inner.begin(noise)

    def step(self, actions: np.ndarray, noise: np.ndarray | None) -> Step:
        return self._inner.step(actions, noise)

    def keep(self, mask: np.ndarray) -> None:
        self._inner.keep(mask)

    def close(self) -> None:
        self._inner.close()


def paying(*chances: float) -> TabularSpec:
    """One step; arm k pays 1 with the k-th probability, else 0."""
    A = len(chances)
    over = [[0.0, 1.0]] * A
    return TabularSpec(
        transitions=[over, over],
        reward_values=[0.0, 1.0],
        reward_probabilities=[[[1.0 - p, p] for p in chances], [[1.0, 0.0]] * A],
        initial=[1.0, 0.0],
        terminal=[1],
        horizon=1,
    )
