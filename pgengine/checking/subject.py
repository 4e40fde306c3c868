"""What is checked: estimators resolved, with the exact gradient of each one's own objective; and what is refused."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from pgengine.checking.settings import check_settings, resolve_estimators
from pgengine.environments import EnvironmentFacts, EpisodeEnvironment, open_environment
from pgengine.environments.tabular import TabularMDP
from pgengine.errors import SpecError
from pgengine.exact import check_exact, count_trajectories, exact_gradient, exact_return
from pgengine.labels import Label, label
from pgengine.policies import Policy, create_policy
from pgengine.spec import AlgorithmSpec, GradientCheckSpec, MixtureBehaviourSpec, PolicyBehaviourSpec

__all__ = [
    "MAX_BATCHES",
    "MAX_TRAJECTORIES",
    "Candidate",
    "Subject",
    "open_subject",
    "opened_environment",
    "refuse",
]

MAX_TRAJECTORIES = 200_000
"""Trajectories of an MDP that are enumerated at most."""
MAX_BATCHES = 5_000_000
"""Batches, trajectories to the power K, that are enumerated at most for one estimator."""


@dataclass(frozen=True)
class Candidate:
    """One estimator and what it is compared with.

    Attributes:
        algorithm: Resolved.
        label: What the engine says it is.
        J: Exact value of its own objective.
        gradient: [P] exact gradient of that objective.
    """

    algorithm: AlgorithmSpec
    label: Label
    J: float
    gradient: Float64[np.ndarray, "P"]

    @property
    def target(self) -> Float64[np.ndarray, "P"]:
        """What its expectation is held against: the gradient, times the label's factor if there is one."""
        return self.gradient if self.label.factor is None else self.label.factor * self.gradient


@dataclass(frozen=True)
class Subject:
    """Everything that both modes need.

    Attributes:
        environment: Open.
        policy: At whose parameters.
        behaviour: Who acts for estimators whose behaviour is of kind `policy`, or None.
        candidates: The estimators.
    """

    environment: EpisodeEnvironment
    policy: Policy
    behaviour: Policy | None
    candidates: list[Candidate]

    def actor(self, algorithm: AlgorithmSpec) -> Policy:
        """Who acts for an estimator: at the first update an older policy is the present one."""
        named = algorithm.importance.behaviour
        if isinstance(named, MixtureBehaviourSpec):
            return self.policy.mixed_with_uniform(named.epsilon)
        if isinstance(named, PolicyBehaviourSpec) and self.behaviour is not None:
            return self.behaviour
        return self.policy


def refuse(
    spec: GradientCheckSpec,
    facts: EnvironmentFacts,
    policy: Policy | None = None,
    *,
    behaviour: Policy | None = None,
    environment: EpisodeEnvironment | None = None,
) -> None:
    """Refuses what has no exact gradient, or cannot be enumerated, before anything is played.

    Args:
        spec: The check.
        facts: Of its environment.
        policy: At whose parameters, in the place of a new one made from the spec.
        behaviour: Who acts for estimators whose behaviour is of kind `policy`.
        environment: The environment, if it is open already.

    Raises:
        SpecError: with a pointer from the root of the check's spec, a code, and the way out.
    """
    spec = _of_policy(spec, policy)
    trainings = check_settings(spec, facts, has_behaviour=behaviour is not None)
    opened = environment or opened_environment(spec)
    try:
        if spec.mode == "enumerate" and isinstance(opened, TabularMDP):
            for index, training in enumerate(trainings):
                _refuse_enumeration(f"/estimators/{index}", training.algorithm, opened)
        made = policy or _created(spec, facts)
        for who in (made, behaviour):
            if who is not None:
                who.fits(facts)
        # whatever else the exact gradient needs, it says itself
        check_exact(made, opened)
    finally:
        if environment is None:
            opened.close()


def _of_policy(spec: GradientCheckSpec, policy: Policy | None) -> GradientCheckSpec:
    """The check as it is for a policy that was given: what fits together depends on that one."""
    return spec if policy is None else spec.model_copy(update={"policy": policy.spec})


def _refuse_enumeration(pointer: str, algorithm: AlgorithmSpec, mdp: TabularMDP) -> None:
    if mdp.reward_deviation is not None and np.any(mdp.reward_deviation[~mdp.terminal] > 0.0):
        raise SpecError(
            "/environment/reward_deviation",
            "rewards_not_countable",
            "rewards with Gaussian noise cannot be enumerated; leave the noise out, or take mode sample",
        )
    count = count_trajectories(mdp, survival=algorithm.survival)
    if count > MAX_TRAJECTORIES:
        raise SpecError(
            "/environment/horizon",
            "too_many_trajectories",
            f"expected at most {MAX_TRAJECTORIES} trajectories, there are {count:.3g}; take a shorter horizon, or "
            "mode sample",
        )
    batches = count**algorithm.trajectories
    if batches > MAX_BATCHES:
        raise SpecError(
            f"{pointer}/trajectories",
            "too_many_batches",
            f"expected at most {MAX_BATCHES} batches, there are {count:.0f} trajectories and so {batches:.3g} batches "
            f"of {algorithm.trajectories}; take fewer trajectories in a batch, a shorter horizon, or mode sample",
        )


def open_subject(
    spec: GradientCheckSpec, environment: EpisodeEnvironment, policy: Policy | None, behaviour: Policy | None
) -> Subject:
    """Resolves the estimators and finds the exact gradient of each one's own objective.

    Raises:
        SpecError: as `refuse` does.
    """
    facts = environment.facts
    refuse(spec, facts, policy, behaviour=behaviour, environment=environment)
    made = policy or _created(spec, facts)
    exact: dict[tuple[float, float], tuple[float, np.ndarray]] = {}
    candidates = []
    for training in resolve_estimators(_of_policy(spec, policy), facts):
        objective = (training.algorithm.gamma, training.algorithm.entropy_coefficient)
        if objective not in exact:
            gamma, entropy = objective
            J = exact_return(made, environment, gamma=gamma, entropy=entropy)
            gradient = exact_gradient(made, environment, gamma=gamma, entropy=entropy)
            exact[objective] = float(J), np.asarray(gradient, dtype=np.float64)
        candidates.append(Candidate(training.algorithm, label(training, facts), *exact[objective]))
    return Subject(environment, made, behaviour, candidates)


def opened_environment(spec: GradientCheckSpec) -> EpisodeEnvironment:
    """The environment of a check.

    Raises:
        SpecError: with a pointer from the root of the check's spec.
    """
    try:
        return open_environment(spec.environment)
    except SpecError as error:
        raise error.under("/environment") from None


def _created(spec: GradientCheckSpec, facts: EnvironmentFacts) -> Policy:
    try:
        return create_policy(spec.policy, spec.environment, facts, seed=spec.seed)
    except SpecError as error:
        raise error.under("/policy") from None
