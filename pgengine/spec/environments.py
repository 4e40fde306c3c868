"""What a policy can learn in."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue

from pgengine.spec.base import EpisodeLimit, Numbers, Probability, Spec, Table, Tables

__all__ = ["EnvironmentSpec", "GymnasiumSpec", "LqrSpec", "TabularSpec"]


MOST_VALUES = 10_000
DEEPEST = 32


def _bounded(arguments: dict[str, Any]) -> dict[str, Any]:
    pending: list[tuple[Any, int]] = [(arguments, 0)]
    seen = 0
    while pending:
        value, depth = pending.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"expected at most {MOST_VALUES} values in all arguments, nested {DEEPEST} deep at most")
        if isinstance(value, dict | list):
            pending += [(one, depth + 1) for one in (value.values() if isinstance(value, dict) else value)]
    return arguments


class GymnasiumSpec(Spec):
    """An environment registered with Gymnasium, named by its id.

    Environments that publish their own transition table (Gymnasium's toy-text ids, our teaching catalogue) are played
    from that table, as a finite Markov decision process whose gradient is known exactly.
    """

    kind: Literal["gymnasium"] = "gymnasium"
    """Which kind of environment this is."""
    id: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-/]+$", examples=["CartPole-v1"])]
    """Registered id such as `CartPole-v1`; an id with a colon would import a module and is refused."""
    arguments: Annotated[dict[str, JsonValue], Field(max_length=64), AfterValidator(_bounded)] = Field(
        default_factory=dict
    )
    """Keyword arguments of the environment's constructor: JSON values, at most 10,000 in all."""
    max_episode_steps: EpisodeLimit | None = None
    """Episode limit in environment steps; null takes the id's own. It is part of the objective."""


Name = Annotated[str, Field(min_length=1, max_length=64)]
Names = Annotated[list[Name], Field(max_length=4096, fail_fast=True)]


class TabularSpec(Spec):
    """A finite Markov decision process given as arrays, S states and A actions.

    Give exactly one of `rewards`, `transition_rewards`, and `reward_values` with `reward_probabilities`.

    Source: Sun, Policy Gradient, the tuple M = {T, r, H, mu, S, A}; Bereyhi, chapter 5, random rewards p(s', r|s, a).
    """

    kind: Literal["tabular"] = "tabular"
    """Which kind of environment this is."""
    transitions: Annotated[
        list[
            Annotated[
                list[Annotated[list[Probability], Field(min_length=1, max_length=4096, fail_fast=True)]],
                Field(min_length=1, max_length=256, fail_fast=True),
            ]
        ],
        Field(min_length=1, max_length=4096, fail_fast=True),
    ]
    """[S][A][S]: probability of the next state; each row sums to 1. Rows of terminal states are not used."""
    rewards: Table | None = None
    """[S][A]: reward of an action in a state."""
    transition_rewards: Tables | None = None
    """[S][A][S]: reward of a transition."""
    reward_values: Annotated[list[float], Field(min_length=1, max_length=256, fail_fast=True)] | None = None
    """[R]: values that a random reward can take."""
    reward_probabilities: Tables | None = None
    """[S][A][R]: probability of each of `reward_values`; each row sums to 1."""
    reward_deviation: Table | None = None
    """[S][A]: standard deviation of Gaussian noise that is added to the reward; absent means none."""
    initial: Annotated[list[Probability], Field(fail_fast=True)]
    """[S]: probability that an episode begins in the state; sums to 1."""
    terminal: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] = Field(default_factory=list)
    """Indices of the states in which an episode ends."""
    horizon: EpisodeLimit | None = None
    """Episode limit in environment steps, part of the objective. null: the task must end by itself for certain, or be
    discounted by termination (`algorithm.discount`)."""
    observations: Annotated[list[Annotated[int, Field(ge=0, le=4095)]], Field(fail_fast=True)] | None = None
    """[S]: what the policy sees of each state, 0, 1, …; several states may look alike. Absent: the state itself."""
    features: Tables | None = None
    """[O][A][J]: features x(s, a) of a linear or score policy, one row for each observation; several may be equal.
    Absent means one feature for each pair."""
    state_names: Names | None = None
    """[S]: what people call the states."""
    action_names: Names | None = None
    """[A]: what people call the actions."""


class LqrSpec(Spec):
    """A linear system with quadratic costs: n numbers of state, m of action; the exact reference of Gaussian policies.

        x' = A x + B u + w,  w ~ N(0, diag(noise_deviation^2));  reward = -(x' Q x + u' R u), taken before the step

    Source: Sun, Policy Gradient, LQR as the case in which the optimum is known.
    """

    kind: Literal["lqr"] = "lqr"
    """Which kind of environment this is."""
    dynamics: Annotated[Table, Field(min_length=1, max_length=64)]
    """[n][n]: A."""
    control: Annotated[Table, Field(min_length=1, max_length=64)]
    """[n][m]: B."""
    state_cost: Annotated[Table, Field(min_length=1, max_length=64)]
    """[n][n]: Q, symmetric, positive semidefinite."""
    action_cost: Annotated[Table, Field(min_length=1, max_length=64)]
    """[m][m]: R, symmetric, positive definite."""
    noise_deviation: Numbers | None = None
    """[n]: standard deviation of each number's noise; absent means none."""
    initial_mean: Numbers | None = None
    """[n]: mean of the first state; absent means zero."""
    initial_deviation: Numbers | None = None
    """[n]: standard deviation of each number of the first state; absent means 1."""
    horizon: Annotated[int, Field(ge=1, le=10_000)]
    """Steps of every episode."""


EnvironmentSpec = Annotated[GymnasiumSpec | TabularSpec | LqrSpec, Field(discriminator="kind")]
