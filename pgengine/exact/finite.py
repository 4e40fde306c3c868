"""J, values, visits and gradients of a policy on a finite MDP, by linear algebra in float64.

With a horizon all quantities are indexed by the time step, because what a state is worth depends on how many steps are
left; without one they are stationary and come from linear systems. Two independent ways lead to the gradient:

    differentiating J       J is propagated as a function of log pi, and autograd does the rest
    the theorem             grad J = sum over t, s of d_t(s) sum over a of q_t(s, a) grad pi(a|s)

where d_t(s) = gamma^t P(s_t = s and the episode goes on) is not a distribution: its mass over all t and s is the
expected discounted number of steps, which the printed theorem leaves out.

What the policy sees may be less than the state: pi(a|s) = pi(a|o(s)). Values are those of states, gradients those of
what the policy can choose. `discount: termination` has the same J, v, q and d as weights by powers of gamma.

Source: Sun, J = E sum_{h<H} r; Bereyhi, chapter 5, J = E_{S~p} v(S), policy gradient theorem.
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float64

from pgengine.environments.tabular import TabularMDP
from pgengine.errors import ShapeMismatch, SpecError
from pgengine.exact.tables import (
    entropies_of,
    entropy_of_rows,
    flat_gradient,
    log_policy,
    parameters_in_double,
    policy_table,
)
from pgengine.policies import Policy

__all__ = ["ExactValues", "Visits", "exact_values", "finite_gradient", "table_return", "visit_weights"]

MAX_NUMBERS = 50_000_000  # of a table over time and states


@dataclass(frozen=True)
class ExactValues:
    """What a policy is worth, in units of reward; "*H" is the horizon, or nothing where there is none.

    Attributes:
        J: Expected return from the initial distribution.
        v: [*H, S] expected return from a state (at a time) on, discounted from there; zero in terminal states, NaN
            where the episode may never end and nothing is discounted.
        q: [*H, S, A] the same if the given action is taken first.
        d: [*H, S] discounted probability of acting in the state (at a time): not normalised.
        mass: Sum of d: the expected number of steps, discounted.
    """

    J: float
    v: Float64[np.ndarray, "*H S"]
    q: Float64[np.ndarray, "*H S A"]
    d: Float64[np.ndarray, "*H S"]
    mass: float


@dataclass(frozen=True)
class _Chain:
    """An MDP in which the policy has been fixed."""

    pi: np.ndarray  # [S, A]
    entropies: np.ndarray  # [S]
    expected: np.ndarray  # [S, A] expected reward, zero in terminal states
    onward: np.ndarray  # [S, A, S] probability of a next state in which the episode goes on
    moves: np.ndarray  # [S, S] the same under the policy
    gains: np.ndarray  # [S] expected reward under the policy, with what is given for entropy
    initial: np.ndarray  # [S]


def live_model(mdp: TabularMDP) -> tuple[Float64[np.ndarray, "S A"], Float64[np.ndarray, "S A S"]]:
    """Expected rewards [S, A], and the probability [S, A, S] of next states in which the episode goes on."""
    live = ~mdp.terminal
    transitions = mdp.transitions * live[:, None, None]
    return (transitions * mdp.rewards).sum(axis=2), transitions * live


def _chain(mdp: TabularMDP, log_pi: np.ndarray, entropy: float) -> _Chain:
    _check_table(mdp, log_pi.shape)
    expected, onward = live_model(mdp)
    pi, entropies = np.exp(log_pi)[mdp.observations], entropy_of_rows(log_pi)[mdp.observations]
    entropies = np.where(mdp.terminal, 0.0, entropies)
    moves = np.einsum("sa,sap->sp", pi, onward)
    gains = (pi * expected).sum(axis=1) + entropy * entropies
    return _Chain(pi, entropies, expected, onward, moves, gains, mdp.initial)


def _check_table(mdp: TabularMDP, shape: tuple[int, ...]) -> None:
    wanted = (int(mdp.observations.max()) + 1, mdp.transitions.shape[1])
    if tuple(shape) != wanted:
        raise ShapeMismatch(f"expected a table of observations and actions {wanted}, found {tuple(shape)}")


def check_size(horizon: int, numbers: int) -> None:
    """Refuses tables over time that are too large to keep.

    Raises:
        SpecError: if there are more than MAX_NUMBERS in all.
    """
    if horizon * numbers > MAX_NUMBERS:
        raise SpecError(
            "/environment/horizon",
            "exact_too_large",
            f"exact values of {horizon} steps with {numbers} numbers each are too many to keep; take a horizon of at "
            f"most {MAX_NUMBERS // numbers}, or none",
        )


# --- values -----------------------------------------------------------------------------------------------------------


def exact_values(
    policy: Policy | np.ndarray | torch.Tensor, mdp: TabularMDP, *, gamma: float, entropy: float = 0.0
) -> ExactValues:
    """J, v, q and d of a policy.

        v_t(s) = sum_a pi(a|s) q_t(s, a) + entropy * H(pi(.|s))
        q_t(s, a) = r(s, a) + gamma * sum_s' P(s'|s, a) v_{t+1}(s')

    Args:
        policy: A policy without memory, or its table [O, A] of log-probabilities.
        mdp: Where; its horizon decides whether time is an index.
        gamma: Discount per environment step, in [0, 1].
        entropy: Units of reward that each nat of the policy's entropy is worth at each step; 0 is the plain return.

    Raises:
        SpecError: if the policy has no table, the tables would be too large, or there is neither a horizon nor a
            discount and the episode may never end.
        ShapeMismatch: if a table does not have the shape of the MDP's observations and actions.

    Source: Bereyhi, chapter 5, v and q, the Bellman equations; Sun, J = E sum_{h<H} r.
    """
    chain = _chain(mdp, policy_table(policy), entropy)
    if mdp.horizon is None:
        v, d = _stationary(mdp, chain, gamma)
    else:
        check_size(mdp.horizon, chain.pi.size)
        v, d = _backward(chain, gamma, mdp.horizon), _forward(chain, gamma, mdp.horizon)
    following = np.zeros_like(v)
    if mdp.horizon is None:
        following = v
    else:
        following[:-1] = v[1:]
    q = chain.expected + gamma * np.einsum("sap,...p->...sa", chain.onward, np.nan_to_num(following))
    if mdp.horizon is None and np.isnan(v).any():
        q[np.any(chain.onward[:, :, np.isnan(v)] > 0.0, axis=2)] = np.nan
    start = v if mdp.horizon is None else v[0]
    J = float(mdp.initial[mdp.initial > 0.0] @ start[mdp.initial > 0.0])
    return ExactValues(J, v, q, d, float(d.sum()))


def _backward(chain: _Chain, gamma: float, horizon: int) -> np.ndarray:
    v = np.zeros((horizon, len(chain.gains)))
    v[-1] = chain.gains
    for t in range(horizon - 2, -1, -1):
        v[t] = chain.gains + gamma * (chain.moves @ v[t + 1])
    return v


def _forward(chain: _Chain, gamma: float, horizon: int) -> np.ndarray:
    d = np.zeros((horizon, len(chain.gains)))
    d[0] = chain.initial
    for t in range(1, horizon):
        d[t] = gamma * (d[t - 1] @ chain.moves)
    return d


def _stationary(mdp: TabularMDP, chain: _Chain, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and visits without a horizon, by linear systems over the live states whose values are finite."""
    finite = ~mdp.terminal if gamma < 1.0 else ~mdp.terminal & ~never_ends(mdp, chain.pi)
    reached = reached_from(mdp.initial > 0.0, chain.moves > 0.0)
    if np.any(reached & ~finite & ~mdp.terminal):
        no_certain_end()
    inside = np.flatnonzero(finite)
    system = np.eye(len(inside)) - gamma * chain.moves[np.ix_(inside, inside)]
    v = np.where(mdp.terminal, 0.0, np.nan)
    v[inside] = np.linalg.solve(system, chain.gains[inside])
    d = np.zeros(len(v))
    d[inside] = np.linalg.solve(system.T, mdp.initial[inside])
    return v, np.maximum(d, 0.0)


def no_certain_end() -> NoReturn:
    """Refuses a return that is a sum without an end.

    Raises:
        SpecError: always.
    """
    raise SpecError(
        "/environment/horizon",
        "no_certain_end",
        "without a horizon and without a discount the episode may never end under this policy; declare a horizon, or "
        "take gamma below 1",
    )


def reached_from(first: Bool[np.ndarray, "S"], edges: Bool[np.ndarray, "S S"]) -> Bool[np.ndarray, "S"]:
    """What can be reached from the first ones along edges, themselves included."""
    reached, fresh = first.copy(), first
    while fresh.any():
        fresh = edges[fresh].any(axis=0) & ~reached
        reached |= fresh
    return reached


def never_ends(mdp: TabularMDP, chances: Float64[np.ndarray, "S A"]) -> Bool[np.ndarray, "S"]:
    """Live states from which the episode may go on for ever, if actions are taken with these chances.

    Only which numbers are above zero matters, so rounding does not.
    """
    live = ~mdp.terminal
    possible = (chances > 0.0)[:, :, None] & (mdp.transitions > 0.0) & live[:, None, None]
    edges = possible.any(axis=1)
    ending = reached_from(live & edges[:, mdp.terminal].any(axis=1), edges.T)
    endless: np.ndarray = live & reached_from(live & ~ending, edges.T)
    return endless


# --- gradients --------------------------------------------------------------------------------------------------------


def table_return(
    mdp: TabularMDP, log_pi: Float64[torch.Tensor, "O A"], *, gamma: float, entropy: float = 0.0
) -> Float64[torch.Tensor, ""]:
    """J as a differentiable function of the log-probabilities, by propagating the distribution of the state.

        J = E[sum_t gamma^t (r_t + entropy * H(pi(.|s_t)))]

    Args:
        mdp: Where.
        log_pi: Log-probabilities of all observations and actions.
        gamma: Discount per environment step, in [0, 1].
        entropy: Units of reward for each nat of entropy.

    Raises:
        SpecError: without a horizon, if nothing is discounted and the episode may never end.

    Source: Sun, J = E sum_{h<H} r; Bereyhi, J = E_{S~p} v(S).
    """
    _check_table(mdp, tuple(log_pi.shape))
    expected, onward = (torch.as_tensor(part) for part in live_model(mdp))
    observations = torch.as_tensor(mdp.observations)
    pi = log_pi.exp()[observations]
    gains = (pi * expected).sum(dim=1)
    if entropy:
        gains = gains + torch.as_tensor(~mdp.terminal).double() * entropy * entropies_of(log_pi)[observations]
    moves = torch.einsum("sa,sap->sp", pi, onward)
    d = torch.as_tensor(mdp.initial)
    if mdp.horizon is None:
        chain = moves.detach().numpy()
        reached = reached_from(mdp.initial > 0.0, chain > 0.0)
        if gamma == 1.0 and np.any(reached & never_ends(mdp, pi.detach().numpy())):
            no_certain_end()
        where = torch.as_tensor(np.flatnonzero(reached))
        system = torch.eye(len(where), dtype=torch.float64) - gamma * moves[where][:, where]
        values: torch.Tensor = torch.linalg.solve(system, gains[where])
        return torch.dot(d[where], values)
    J = torch.zeros((), dtype=torch.float64)
    for t in range(mdp.horizon):
        J = J + gamma**t * (d @ gains)
        d = d @ moves
    return J


@dataclass(frozen=True)
class Visits:
    """What the policy gradient theorem multiplies the gradients of a policy with.

    Attributes:
        actions: [O, A] sum over times and states that look so of d_t(s) q_t(s, a): weight of grad pi(a|o).
        entropies: [O] sum of d_t(s): weight of the gradient of the entropy, before its coefficient.
        J: Expected return.
    """

    actions: Float64[np.ndarray, "O A"]
    entropies: Float64[np.ndarray, "O"]
    J: float


def visit_weights(mdp: TabularMDP, log_pi: Float64[np.ndarray, "O A"], *, gamma: float, entropy: float = 0.0) -> Visits:
    """The weights of grad pi(a|o) in the policy gradient theorem, without keeping q of every step.

    Raises:
        SpecError: without a horizon, if nothing is discounted and the episode may never end; with one, if it is so
            long that the values of all steps cannot be kept.

    Source: Bereyhi, chapter 5, policy gradient theorem, with the factor that the printed form leaves out.
    """
    chain = _chain(mdp, log_pi, entropy)
    if mdp.horizon is None:
        v, d = _stationary(mdp, chain, gamma)
        visits, onward = d, np.outer(d, np.nan_to_num(v))
        J = float(mdp.initial @ np.nan_to_num(v))
    else:
        check_size(mdp.horizon, len(chain.gains))
        v_t, d_t = _backward(chain, gamma, mdp.horizon), _forward(chain, gamma, mdp.horizon)
        visits, onward = d_t.sum(axis=0), d_t[:-1].T @ v_t[1:]  # [S, S']: sum over t of d_t(s) v_{t+1}(s')
        J = float(mdp.initial @ v_t[0])
    per_state = visits[:, None] * chain.expected + gamma * np.einsum("sap,sp->sa", chain.onward, onward)
    actions, entropies = np.zeros(log_pi.shape), np.zeros(len(log_pi))
    np.add.at(actions, mdp.observations, per_state)
    np.add.at(entropies, mdp.observations, np.where(mdp.terminal, 0.0, visits))
    return Visits(actions, entropies, J)


def finite_gradient(
    policy: Policy, mdp: TabularMDP, *, gamma: float, entropy: float, theorem: bool
) -> Float64[torch.Tensor, "P"]:
    """Gradient of J by the theorem or by differentiation, flat in the order of the parameters' names."""
    parameters = parameters_in_double(policy)
    log_pi = log_policy(policy, parameters)
    if not theorem:
        return flat_gradient(table_return(mdp, log_pi, gamma=gamma, entropy=entropy), parameters)
    weights = visit_weights(mdp, log_pi.detach().numpy(), gamma=gamma, entropy=entropy)
    surrogate = (torch.as_tensor(weights.actions) * log_pi.exp()).sum()
    if entropy:
        surrogate = surrogate + entropy * (torch.as_tensor(weights.entropies) * entropies_of(log_pi)).sum()
    return flat_gradient(surrogate, parameters)
