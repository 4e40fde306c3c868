"""The best that can be done in a finite MDP, three ways that differ.

    optimal_values      no limit on time, any policy of the state: policy iteration
    optimal_plan        up to the horizon, the action may depend on the time: backward induction
    best_stationary     up to the horizon, one distribution for each observation at all times: what a policy without
                        a clock can reach, possibly by acting at random

On FrozenLake 4x4 with 100 steps they are 0.8235, 0.7442 and 0.740. Learning is measured against the third.

Source: Sun, the optimum where the transition is known; Sutton and Barto, Reinforcement Learning, sections 4.3 and 13.1.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from pgengine.environments.tabular import TabularMDP
from pgengine.errors import SpecError
from pgengine.exact.ascent import climb
from pgengine.exact.finite import (
    Visits,
    check_size,
    live_model,
    never_ends,
    no_certain_end,
    reached_from,
    visit_weights,
)

__all__ = ["BestStationary", "OptimalPlan", "OptimalValues", "best_stationary", "optimal_plan", "optimal_values"]

TIE = 1e-12  # an action replaces another only if it is better by this, as a share of the largest value
EVERY_ROW = 2_000  # up to so many pairs of observation and action, all single changes are tried


@dataclass(frozen=True)
class OptimalValues:
    """The optimum without a limit on time.

    Attributes:
        J: Best expected return from the initial distribution.
        v: [S] best expected return from a state on; NaN in states that no episode reaches, if nothing is discounted.
        q: [S, A] the same after a given action.
        actions: [S] a best action; 0 in terminal states.
    """

    J: float
    v: Float64[np.ndarray, "S"]
    q: Float64[np.ndarray, "S A"]
    actions: Int[np.ndarray, "S"]


@dataclass(frozen=True)
class OptimalPlan:
    """The optimum up to the horizon for policies that see the state and the time.

    Attributes:
        J: Best expected return from the initial distribution.
        v: [H, S] best expected return from a state at a time on, discounted from there.
        q: [H, S, A] the same after a given action.
        actions: [H, S] a best action.
    """

    J: float
    v: Float64[np.ndarray, "H S"]
    q: Float64[np.ndarray, "H S A"]
    actions: Int[np.ndarray, "H S"]


@dataclass(frozen=True)
class BestStationary:
    """The best policy found among tables of one distribution for each observation.

    Attributes:
        J: Its expected return.
        probabilities: [O, A] the policy; a row may be truly random where states look alike or time is short. Uniform
            for observations that are never made.
        gap: How much J would rise for a full step to the best actions if it were linear: zero exactly where no small
            change helps.
    """

    J: float
    probabilities: Float64[np.ndarray, "O A"]
    gap: float


def optimal_values(mdp: TabularMDP, *, gamma: float) -> OptimalValues:
    """The optimum over all policies of the state, the horizon left out.

    Without a discount the maximum is over the policies under which every episode ends.

    Args:
        mdp: Where.
        gamma: Discount per environment step, in [0, 1].

    Raises:
        SpecError: with gamma 1, if some state that can be reached has no way to an end, or there are gains without
            end.

    Source: Sutton and Barto, section 4.3, policy iteration; Bertsekas, Dynamic Programming and Optimal Control,
    volume II, chapter 3, for the undiscounted case.
    """
    expected, onward = live_model(mdp)
    S, A = expected.shape
    inside = ~mdp.terminal
    if gamma == 1.0:
        possible = np.any(onward > 0.0, axis=1)
        inside = inside & reached_from(mdp.initial > 0.0, possible)
        if np.any(inside & never_ends(mdp, np.ones((S, A)))):
            no_certain_end()
        actions = _proper(mdp, inside)
    else:
        actions = expected.argmax(axis=1)
    states = np.flatnonzero(inside)
    everything = np.arange(S)
    v = np.where(mdp.terminal, 0.0, np.nan)
    while True:
        moves = onward[everything, actions]
        if gamma == 1.0 and np.any(inside & never_ends(mdp, np.eye(A)[actions])):
            raise SpecError(
                "/environment",
                "unbounded_optimum",
                "some way of going round for ever gains reward each time, so there is no best return; take gamma "
                "below 1, or a horizon",
            )
        v[states] = np.linalg.solve(
            np.eye(len(states)) - gamma * moves[np.ix_(states, states)], expected[states, actions[states]]
        )
        q = expected + gamma * onward @ np.where(inside, v, 0.0)
        better = q.argmax(axis=1)
        gain = q[everything, better] - q[everything, actions]
        change = inside & (gain > TIE * max(1.0, float(np.abs(v[states]).max(initial=0.0))))
        if not change.any():
            break
        actions = np.where(change, better, actions)
    q[~inside & ~mdp.terminal] = np.nan
    J = float(mdp.initial[states] @ v[states])
    return OptimalValues(J, v, q, np.where(inside, actions, 0))


def _proper(mdp: TabularMDP, inside: np.ndarray) -> np.ndarray:
    """Actions under which every episode ends: each state takes one that may lead nearer to an end."""
    actions = np.zeros(len(inside), dtype=np.int64)
    near = mdp.terminal.copy()
    while True:
        ways = np.any(mdp.transitions[:, :, near] > 0.0, axis=2)
        fresh = inside & ~near & ways.any(axis=1)
        if not fresh.any():
            return actions
        actions[fresh] = ways[fresh].argmax(axis=1)
        near = near | fresh


def optimal_plan(mdp: TabularMDP, *, gamma: float) -> OptimalPlan:
    """The optimum up to the horizon, by backward induction.

    Args:
        mdp: Where, with a horizon.
        gamma: Discount per environment step, in [0, 1].

    Raises:
        SpecError: if the MDP has no horizon, or one so long that the plan cannot be kept.

    Source: Sun, J = E sum_{h<H} r.
    """
    if mdp.horizon is None:
        raise SpecError(
            "/environment/horizon", "plan_needs_horizon", "a plan needs a last step; ask for optimal values instead"
        )
    expected, onward = live_model(mdp)
    H, (S, A) = mdp.horizon, expected.shape
    check_size(H, S * A)
    v, q = np.zeros((H, S)), np.zeros((H, S, A))
    following = np.zeros(S)
    for t in range(H - 1, -1, -1):
        q[t] = expected + gamma * onward @ following
        following = v[t] = q[t].max(axis=1)
    return OptimalPlan(float(mdp.initial @ v[0]), v, q, q.argmax(axis=2))


# --- the best of the class --------------------------------------------------------------------------------------------


def best_stationary(
    mdp: TabularMDP, *, gamma: float, entropy: float = 0.0, starts: int = 8, seed: int = 0
) -> BestStationary:
    """The best policy without a clock that this search finds: one distribution for each observation.

    J is climbed by its exact gradient from several starts, over p = z^2 / sum z^2, in which a distribution can reach
    an edge of the simplex in a few steps, where a softmax would crawl towards it for ever. Then single rows are put
    on single actions as long as that helps, and climbed from again. J is not concave in the policy, so the result is
    the best that was found; what the state and the time allow bounds it from above, and where that is reached the
    search is over.

    Args:
        mdp: Where.
        gamma: Discount per environment step, in [0, 1].
        entropy: Units of reward for each nat of entropy; 0 is the plain return.
        starts: Random starts, beside the uniform policy and the optimum of the states.
        seed: Of the random starts.

    Raises:
        SpecError: without a horizon as `optimal_values`; with one as `optimal_plan`.
    """
    shape = int(mdp.observations.max()) + 1, mdp.transitions.shape[1]
    of_states, bound = _of_states(mdp, gamma, shape)
    if entropy:
        bound = np.inf
    enough = bound - TIE * max(1.0, abs(bound))
    generator = np.random.default_rng(seed)
    tables = [np.full(shape, 1.0 / shape[1]), of_states]
    tables += [generator.dirichlet(np.ones(shape[1]), size=shape[0]) for _ in range(starts)]
    objective = _Objective(mdp, gamma, entropy)
    best_value, best_table = objective.value(of_states), of_states
    for table in tables:
        if best_value >= enough:
            return objective.described(best_value, best_table)  # nothing can be better
        value, found = objective.climbed(_loosened(table))
        if value > best_value:
            best_value, best_table = value, found
    best_value, best_table = objective.polished(best_value, best_table)
    return objective.described(best_value, best_table)


def _of_states(mdp: TabularMDP, gamma: float, shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    """The optimum of the states, mixed over those that look alike, and what no policy can exceed."""
    if mdp.horizon is None:
        optimum = optimal_values(mdp, gamma=gamma)
        actions, bound = optimum.actions, optimum.J
    else:
        plan = optimal_plan(mdp, gamma=gamma)
        actions, bound = plan.actions[0], plan.J
    table = np.zeros(shape)
    np.add.at(table, (mdp.observations[~mdp.terminal], actions[~mdp.terminal]), 1.0)
    table[table.sum(axis=1) == 0.0] = 1.0
    mixed: np.ndarray = table / table.sum(axis=1, keepdims=True)
    return mixed, bound


def _loosened(table: np.ndarray) -> np.ndarray:
    """A little of every action: what has no probability would never gain any."""
    loosened: np.ndarray = 0.99 * table + 0.01 / table.shape[1]
    return loosened


class _Objective:
    def __init__(self, mdp: TabularMDP, gamma: float, entropy: float) -> None:
        self._mdp, self._gamma, self._entropy = mdp, gamma, entropy

    def _visits(self, table: np.ndarray) -> Visits | None:
        try:
            with np.errstate(divide="ignore"):
                return visit_weights(self._mdp, np.log(table), gamma=self._gamma, entropy=self._entropy)
        except SpecError as error:
            if error.code != "no_certain_end":
                raise
            return None  # no candidate

    def value(self, table: np.ndarray) -> float:
        visits = self._visits(table)
        return -np.inf if visits is None else visits.J

    def _slopes(self, table: np.ndarray, visits: Visits) -> np.ndarray:
        """How fast J rises with each probability."""
        if not self._entropy:
            return visits.actions
        logs = np.log(np.maximum(table, 1e-300))
        slopes: np.ndarray = visits.actions - self._entropy * visits.entropies[:, None] * (logs + 1.0)
        return slopes

    def described(self, value: float, table: np.ndarray) -> BestStationary:
        visits = self._visits(table)
        assert visits is not None  # it has a value
        slopes = self._slopes(table, visits)
        gap = float((slopes.max(axis=1) - (table * slopes).sum(axis=1)).sum())
        unseen = visits.entropies == 0.0
        return BestStationary(value, np.where(unseen[:, None], 1.0 / table.shape[1], table), gap)

    def climbed(self, table: np.ndarray) -> tuple[float, np.ndarray]:
        shape = table.shape

        def on_sphere(flat: np.ndarray) -> tuple[float, np.ndarray]:
            z = flat.reshape(shape)
            norm = (z**2).sum(axis=1, keepdims=True)
            p = z**2 / norm
            visits = self._visits(p)
            if visits is None:
                return -np.inf, np.zeros_like(flat)
            slopes = self._slopes(p, visits)
            return visits.J, (2.0 * z / norm * (slopes - (p * slopes).sum(axis=1, keepdims=True))).ravel()

        value, flat = climb(on_sphere, np.sqrt(table).ravel())
        squares = flat.reshape(shape) ** 2
        return value, squares / squares.sum(axis=1, keepdims=True)

    def polished(self, value: float, table: np.ndarray) -> tuple[float, np.ndarray]:
        """Puts single rows on single actions while that helps, and climbs on from there."""
        while True:
            least = value + TIE * max(1.0, abs(value))
            changed, moved = self._with_better_rows(value, table)
            if changed <= least:
                return (changed, moved) if changed > value else (value, table)
            value, table = changed, moved
            climbed, elsewhere = self.climbed(_loosened(table))
            if climbed > value:
                value, table = climbed, elsewhere

    def _with_better_rows(self, value: float, table: np.ndarray) -> tuple[float, np.ndarray]:
        visits = self._visits(table)
        assert visits is not None  # it has a value
        slopes = self._slopes(table, visits)
        promised = slopes.max(axis=1) - (table * slopes).sum(axis=1)
        everywhere = table.size <= EVERY_ROW
        for o in range(len(table)):
            if not everywhere and promised[o] <= TIE * max(1.0, abs(value)):
                continue  # no small change of this row helps
            for a in range(table.shape[1]) if everywhere else [int(slopes[o].argmax())]:
                candidate = table.copy()
                candidate[o] = np.eye(table.shape[1])[a]
                if (here := self.value(candidate)) > value:
                    value, table = here, candidate
        return value, table
