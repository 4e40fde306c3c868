"""Best policies of finite MDPs: against trying all, against closed forms, and the three that differ."""

import math
from itertools import product

import numpy as np
import pytest

import pgengine
from pgengine.environments import TabularMDP
from pgengine.exact import best_stationary, exact_values, optimal_plan, optimal_values
from pgengine.spec import GymnasiumSpec, TabularSpec
from tests.engine.exact_worlds import opened, world


def catalogue(id: str, **settings: object) -> TabularMDP:
    mdp = pgengine.open_environment(GymnasiumSpec(id=id, **settings))  # type: ignore[arg-type]
    assert isinstance(mdp, TabularMDP)
    return mdp


def table_of(actions: tuple[int, ...], A: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.eye(A)[list(actions)])


# --- against trying all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_policy_iteration_finds_what_trying_all_policies_finds(gamma: float) -> None:
    for seed in range(3):
        mdp = opened(world(seed, horizon=None))
        found = optimal_values(mdp, gamma=gamma)
        tried = [
            exact_values(table_of((*actions, 0), 3), mdp, gamma=gamma).v for actions in product(range(3), repeat=3)
        ]
        assert found.v == pytest.approx(np.max(tried, axis=0), abs=1e-12)
        assert pytest.approx(mdp.initial @ found.v, abs=1e-12) == found.J
        own = exact_values(table_of(tuple(found.actions), 3), mdp, gamma=gamma)
        assert own.v == pytest.approx(found.v, abs=1e-12)
        assert own.q == pytest.approx(found.q, abs=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_backward_induction_finds_what_trying_all_plans_finds(gamma: float) -> None:
    """All 4^3 choices of actions for two live states and three times, each worth what its own recursion says."""
    for seed in range(3):
        mdp = opened(world(seed, S=3, A=2, horizon=3))
        found = optimal_plan(mdp, gamma=gamma)
        reward = (mdp.transitions * mdp.rewards).sum(axis=2)
        best = -math.inf
        for plan in product(product(range(2), repeat=2), repeat=3):
            v = np.zeros(3)
            for actions in reversed(plan):
                v = np.array([reward[s, a] + gamma * mdp.transitions[s, a] @ v for s, a in enumerate(actions)] + [0.0])
            best = max(best, float(mdp.initial @ v))
        assert pytest.approx(best, abs=1e-12) == found.J
        assert found.v[:, :2] == pytest.approx(found.q[:, :2].max(axis=2), abs=0.0)
        assert found.v[0] @ mdp.initial == pytest.approx(found.J, abs=1e-15)


@pytest.mark.parametrize("aliased", [False, True])
def test_the_best_stationary_policy_is_above_all_that_were_tried_and_below_the_plan(aliased: bool) -> None:
    for seed in range(2):
        mdp = opened(world(seed, S=3, A=2, horizon=3, aliased=aliased))
        found = best_stationary(mdp, gamma=0.9, starts=3)
        rows = int(mdp.observations.max()) + 1
        grid = np.linspace(0.0, 1.0, 21)
        with np.errstate(divide="ignore"):
            tried = max(
                exact_values(np.log(np.array([[p, 1.0 - p] for p in (*chosen, 0.5)][:rows])), mdp, gamma=0.9).J
                for chosen in (product(grid, repeat=2) if rows == 3 else ((p, 0.5) for p in grid))
            )
        assert tried <= found.J + 1e-12
        assert tried + 2e-2 > found.J
        assert found.J <= optimal_plan(mdp, gamma=0.9).J + 1e-12
        assert found.gap < 1e-6
        with np.errstate(divide="ignore"):
            assert pytest.approx(found.J, abs=1e-12) == exact_values(np.log(found.probabilities), mdp, gamma=0.9).J


# --- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_three_optima_of_frozen_lake_differ() -> None:
    """4x4 with 100 steps: for ever, with a clock, and without one."""
    mdp = catalogue("FrozenLake-v1")
    best = best_stationary(mdp, gamma=1.0)
    assert pytest.approx(14 / 17, abs=1e-12) == optimal_values(mdp, gamma=1.0).J  # 0.8235
    assert pytest.approx(0.7442, abs=5e-5) == optimal_plan(mdp, gamma=1.0).J
    assert pytest.approx(0.7402, abs=5e-5) == best.J
    assert best.gap < 1e-9
    assert value_without_chance(mdp, best.probabilities) == pytest.approx(best.J, abs=1e-9)


def value_without_chance(mdp: TabularMDP, table: np.ndarray) -> float:
    """J once each row, one after the other, is put on the one of its actions that leaves J highest."""
    value = -math.inf
    for row in range(len(table)):
        tried = []
        for action in np.eye(table.shape[1]):
            changed = table.copy()
            changed[row] = action
            with np.errstate(divide="ignore"):
                tried.append((float(mdp.initial @ exact_values(np.log(changed), mdp, gamma=1.0).v[0]), changed))
        value, table = max(tried, key=lambda pair: pair[0])
    return value


def test_chance_stands_in_for_a_clock() -> None:
    """One state, two steps: stay for 1/2, or leave with 1. Leave with p: J(p) = 1 + p / 2 - p^2 / 2, best at p = 1/2.

    With a clock one stays first and leaves then, 3/2; without one and without chance J is 1, whatever one does.
    """
    mdp = opened(
        TabularSpec(
            transitions=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]],
            rewards=[[0.5, 1.0], [0.0, 0.0]],
            initial=[1.0, 0.0],
            terminal=[1],
            horizon=2,
        )
    )
    best = best_stationary(mdp, gamma=1.0)
    assert pytest.approx(1.5, abs=1e-15) == optimal_plan(mdp, gamma=1.0).J
    assert pytest.approx(1.125, abs=1e-12) == best.J
    assert best.probabilities[0] == pytest.approx([0.5, 0.5], abs=1e-5)
    assert value_without_chance(mdp, best.probabilities) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("horizon", [None, 200])
def test_states_that_look_alike_want_a_random_policy(horizon: int | None) -> None:
    """The short corridor with switched actions: J(p) = -2 (2 - p) / (p (1 - p)), best at p(right) = 2 - sqrt 2."""
    corridor = catalogue("pgengine/Aliased-v0").spec.model_copy(update={"horizon": horizon})
    best = best_stationary(opened(corridor), gamma=1.0, starts=2)
    assert pytest.approx(-(6.0 + 4.0 * math.sqrt(2.0)), abs=1e-6) == best.J  # -11.657
    assert best.probabilities[0, 1] == pytest.approx(2.0 - math.sqrt(2.0), abs=1e-5)
    assert best.gap < 1e-6
    assert pytest.approx(-3.0, abs=1e-12) == optimal_values(opened(corridor), gamma=1.0).J


def test_without_memory_the_maze_is_a_toss_of_a_coin() -> None:
    maze = catalogue("pgengine/TMaze-v0")
    assert pytest.approx(0.5, abs=1e-12) == best_stationary(maze, gamma=1.0, starts=2).J
    assert pytest.approx(1.0, abs=1e-12) == optimal_plan(maze, gamma=1.0).J


def test_a_hill_that_is_not_the_highest_is_left_by_putting_a_row_on_one_action() -> None:
    """All states look alike. Left twice gives 1, right four times 1.5; from the middle uphill is to the left.

    Four rare states, each better off with left, keep the optimum of the states from pointing to the right.
    """
    S, over = 10, 9
    transitions, rewards = np.zeros((S, 2, S)), np.zeros((S, 2))
    transitions[:, :, over] = 1.0
    for s, a, after in ((0, 0, 4), (0, 1, 1), (1, 1, 2), (2, 1, 3)):
        transitions[s, a, [over, after]] = 0.0, 1.0
    rewards[4, 0], rewards[3, 1], rewards[5:9, 0] = 1.0, 1.5, 1.0
    hills = TabularSpec(
        transitions=transitions.tolist(),
        rewards=rewards.tolist(),
        initial=[0.996, 0.0, 0.0, 0.0, 0.0, 0.001, 0.001, 0.001, 0.001, 0.0],
        terminal=[over],
        horizon=4,
        observations=[0] * S,
    )
    best = best_stationary(opened(hills), gamma=1.0, starts=0)
    assert pytest.approx(0.996 * 1.5, abs=1e-12) == best.J
    assert best.probabilities[0] == pytest.approx([0.0, 1.0], abs=1e-9)


def test_entropy_in_the_objective_makes_the_best_policy_a_softmax_of_the_rewards() -> None:
    """One step: max over pi of E[r] + beta H is beta log sum exp(r / beta), at pi proportional to exp(r / beta)."""
    means, beta = np.array([1.0, 0.2, -0.5]), 0.7
    bandit = TabularSpec(
        transitions=[[[0.0, 1.0]] * 3] * 2,
        rewards=[means.tolist(), [0.0] * 3],
        initial=[1.0, 0.0],
        terminal=[1],
        horizon=1,
    )
    best = best_stationary(opened(bandit), gamma=1.0, entropy=beta, starts=2)
    weights = np.exp(means / beta)
    assert pytest.approx(beta * math.log(weights.sum()), abs=1e-12) == best.J
    assert best.probabilities[0] == pytest.approx(weights / weights.sum(), abs=1e-6)
    assert best_stationary(opened(bandit), gamma=1.0, starts=2).probabilities[0] == pytest.approx([1.0, 0.0, 0.0])


def test_a_walk_to_the_end_is_found_although_going_round_is_possible() -> None:
    cliff = catalogue("CliffWalking-v1", max_episode_steps=100)
    assert optimal_values(cliff, gamma=1.0).J == -13.0
    assert pytest.approx(-13.0, abs=0.0) == optimal_plan(cliff, gamma=1.0).J
    assert pytest.approx(-13.0, abs=1e-12) == best_stationary(cliff, gamma=1.0).J


# --- what has no optimum ---------------------------------------------------------------------------------------------


def ring(*, gain: float, end: bool) -> TabularSpec:
    """Two states that can go round for ever, gaining each time; the first can also end."""
    return TabularSpec(
        transitions=[
            [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0] if end else [0.0, 1.0, 0.0]],
            [[1.0, 0.0, 0.0]] * 2,
            [[0.0, 0.0, 1.0]] * 2,
        ],
        rewards=[[gain, 0.5], [0.0, 0.0], [0.0, 0.0]],
        initial=[1.0, 0.0, 0.0],
        terminal=[2],
    )


def test_gains_without_end_have_no_optimum() -> None:
    with pytest.raises(pgengine.SpecError) as refused:
        optimal_values(opened(ring(gain=1.0, end=True)), gamma=1.0)
    assert refused.value.code == "unbounded_optimum"
    assert optimal_values(opened(ring(gain=-1.0, end=True)), gamma=1.0).J == 0.5
    assert pytest.approx(1.0 / (1.0 - 0.25), abs=1e-12) == optimal_values(opened(ring(gain=1.0, end=True)), gamma=0.5).J


def test_a_task_without_an_end_or_a_last_step_is_refused() -> None:
    mdp = opened(ring(gain=1.0, end=False))
    for ask in (optimal_values, best_stationary):
        with pytest.raises(pgengine.SpecError) as refused:
            ask(mdp, gamma=1.0)
        assert (refused.value.code, refused.value.pointer) == ("no_certain_end", "/environment/horizon")
    with pytest.raises(pgengine.SpecError) as refused:
        optimal_plan(mdp, gamma=1.0)
    assert (refused.value.code, refused.value.pointer) == ("plan_needs_horizon", "/environment/horizon")
