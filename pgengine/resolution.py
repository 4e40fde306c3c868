"""Writes every default of a training spec out and checks what depends on several fields.

What is stored is what comes out of here, so that a later change of a default changes no run that exists.
"""

import numpy as np
from jaxtyping import Float

from pgengine.distributions import box_is_near_one, open_distribution
from pgengine.environments.episodes import EnvironmentFacts
from pgengine.errors import SpecError
from pgengine.features import check_features
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace
from pgengine.spec import (
    AdamSpec,
    AlgorithmSpec,
    BatchMeanBaselineSpec,
    BernoulliSpec,
    EnvironmentSpec,
    FeaturesSpec,
    FourierFeaturesSpec,
    GaussianSpec,
    GymnasiumSpec,
    LeaveOneOutBaselineSpec,
    LinearPolicySpec,
    LinearValueBaselineSpec,
    MovingAverageBaselineSpec,
    NeuralValueBaselineSpec,
    OneHotFeaturesSpec,
    PlainFeaturesSpec,
    PolicySpec,
    RbfFeaturesSpec,
    ScorePolicySpec,
    SgdSpec,
    SoftmaxSpec,
    StopSpec,
    TableFeaturesSpec,
    TabularSpec,
    TileFeaturesSpec,
    TrainingSpec,
    TransformerPolicySpec,
)

__all__ = ["as_ended", "as_played", "check_ratio_variance", "fill_in", "resolve", "resolve_policy"]

DEFAULT_UPDATES = 500
ON_TABLES: dict[str, object] = {"trajectories": 128, "optimizer": AdamSpec(learning_rate=0.05)}
"""What goes with a table of parameters, a row for each state: a reward that is rarely met needs more trajectories."""


def resolve(spec: TrainingSpec, facts: EnvironmentFacts, *, continues: bool = False) -> TrainingSpec:
    """The same spec with every default written out.

    Args:
        spec: What was asked for.
        facts: What is known of the environment.
        continues: Whether the run goes on with a policy that exists already.

    Raises:
        SpecError: with a pointer from the root of the spec, if fields do not fit one another.
    """
    if not continues:
        spec = fill_in(spec, facts)
    try:
        policy = resolve_policy(spec.policy, facts, spec.environment)
    except SpecError as error:
        raise error.under("/policy") from None
    algorithm = _algorithm(spec.algorithm)
    _check(algorithm, policy, facts)
    changes = {"algorithm": algorithm, "stop": _stop(spec.stop, facts, continues), "policy": policy}
    return spec.model_copy(update=changes)


def fill_in(spec: TrainingSpec, facts: EnvironmentFacts) -> TrainingSpec:
    """The same spec with a policy, and what goes with it, where it leaves its policy out.

    A registered id that publishes its transition table gets a linear softmax and `ON_TABLES`, every other environment
    the defaults of the fields. What a spec names is never changed.

    Args:
        spec: What was asked for.
        facts: What is known of the environment.
    """
    has_table = isinstance(spec.environment, GymnasiumSpec) and facts.exact == "finite_mdp"
    if "policy" in spec.model_fields_set or not has_table:
        return spec
    fields = {name: value for name, value in ON_TABLES.items() if name not in spec.algorithm.model_fields_set}
    return spec.model_copy(update={"policy": LinearPolicySpec(), "algorithm": spec.algorithm.model_copy(update=fields)})


def resolve_policy(
    policy: PolicySpec, facts: EnvironmentFacts, environment: EnvironmentSpec | None = None
) -> PolicySpec:
    """The same policy with its distribution and features written out: those that fit the spaces.

    Args:
        policy: What was asked for.
        facts: What is known of the environment.
        environment: A finite MDP may bring a table of features, which a linear or score policy then reads.

    Raises:
        SpecError: with a pointer from the root of the policy's spec, if it does not fit the spaces.
    """
    changes: dict[str, object] = {}
    distribution = policy.distribution
    if isinstance(policy, ScorePolicySpec) and not isinstance(facts.action_space, DiscreteSpace):
        raise SpecError(
            "/kind", "score_needs_discrete_actions", "a score network gives a number for each action; take mlp"
        )
    if distribution is None:
        distribution = changes["distribution"] = _FITTING[facts.action_space.kind]()
    if isinstance(distribution, GaussianSpec) and isinstance(facts.action_space, BoxSpace):
        distribution = changes["distribution"] = _with_unit(distribution, facts.action_space)
    open_distribution(distribution, facts.action_space)
    if isinstance(policy, LinearPolicySpec | ScorePolicySpec):
        features = _policy_features(policy, facts, environment)
        changes["features"] = features
        if features is not None:
            check_features(features, facts.observation_space, facts.action_space)
    if isinstance(policy, TransformerPolicySpec) and policy.width % policy.heads:
        raise SpecError("/width", "width_not_divisible", f"expected a multiple of heads, which are {policy.heads}")
    if policy.normalise_observations:
        _check_normaliser(policy, facts)
    return policy.model_copy(update=changes)


_FITTING: dict[str, type[SoftmaxSpec | BernoulliSpec | GaussianSpec]] = {
    "discrete": SoftmaxSpec,
    "multi_discrete": SoftmaxSpec,
    "multi_binary": BernoulliSpec,
    "box": GaussianSpec,
}


def _with_unit(distribution: GaussianSpec, space: BoxSpace) -> GaussianSpec:
    """The Gaussian with its unit written out; a deviation that was given is one of the action, as it always was."""
    said = {"initial_sigma", "unit"} & distribution.model_fields_set
    fitting = "action" if said or box_is_near_one(space) else "box"
    unit = distribution.unit if "unit" in said or distribution.action_map == "tanh" else fitting
    return GaussianSpec(**distribution.model_dump() | {"unit": unit})


def _policy_features(
    policy: LinearPolicySpec | ScorePolicySpec, facts: EnvironmentFacts, environment: EnvironmentSpec | None
) -> FeaturesSpec | None:
    has_table = isinstance(environment, TabularSpec) and environment.features is not None
    if policy.features is not None:
        wants_table = isinstance(policy.features, TableFeaturesSpec) and policy.features.values is None
        if wants_table and environment is not None and not has_table:
            raise SpecError(
                "/features/values", "features_missing", "this environment has no table of features; give values"
            )
        return policy.features
    if has_table and isinstance(facts.action_space, DiscreteSpace):
        return TableFeaturesSpec()
    if isinstance(policy, ScorePolicySpec):
        return None
    discrete = isinstance(facts.observation_space, DiscreteSpace | MultiDiscreteSpace)
    return OneHotFeaturesSpec() if discrete else PlainFeaturesSpec()


def _check_normaliser(policy: PolicySpec, facts: EnvironmentFacts) -> None:
    pointer = "/normalise_observations"
    if not isinstance(facts.observation_space, BoxSpace):
        raise SpecError(pointer, "normalise_needs_box", "only boxes of numbers are normalised; set it to false")
    bounded = FourierFeaturesSpec | RbfFeaturesSpec | TileFeaturesSpec
    if isinstance(policy, LinearPolicySpec) and isinstance(policy.features, bounded):
        raise SpecError(
            pointer, "scaled_twice", "these features scale observations by their bounds already; set it to false"
        )


def _algorithm(algorithm: AlgorithmSpec) -> AlgorithmSpec:
    if algorithm.discount_weight is not None:
        return algorithm
    fitting = "gamma_power" if algorithm.credit == "reward_to_go" else "none"
    return algorithm.model_copy(update={"discount_weight": fitting})


def as_played(facts: EnvironmentFacts, algorithm: AlgorithmSpec) -> EnvironmentFacts:
    """The facts of an environment whose episodes also end by the algorithm's discount.

    Args:
        facts: Of the environment by itself.
        algorithm: Whose `survival` is the probability that an episode goes on after a step.
    """
    return as_ended(facts, algorithm.survival)


def as_ended(facts: EnvironmentFacts, survival: float) -> EnvironmentFacts:
    """The facts of an environment whose episodes go on after a step with a probability, if they have not ended anyway.

    Args:
        facts: Of the environment by itself.
        survival: That probability; 1 changes nothing.
    """
    if survival == 1.0:
        return facts
    at_once = survival == 0.0 or facts.max_episode_steps == 1
    changes = {
        "fixed_steps": 1 if at_once or facts.fixed_steps == 1 else None,
        "limit_cuts": facts.limit_cuts and survival > 0.0,
        "ends_for_certain": True,
        "return_range": facts.cut_return_range,
    }
    return facts.model_copy(update=changes)


def check_ratio_variance(
    algorithm: AlgorithmSpec, sigma: Float[np.ndarray, "*#batch D"], behaviour_sigma: Float[np.ndarray, "*#batch D"]
) -> None:
    """Refuses ratios of Gaussian densities whose variance is infinite.

        E_rho[(pi / rho)^2] is finite if and only if sigma^2 < 2 * behaviour_sigma^2

    A clip bounds the ratio, and no ratio is taken without importance weighting: then everything passes.

    Args:
        algorithm: Its importance settings.
        sigma: Standard deviations of the policy that learns.
        behaviour_sigma: Those of the policy that acts.

    Raises:
        SpecError: `ratio_variance_unbounded`.

    Source: Sun, Policy Gradient, the condition max P_theta / rho < infinity, which Gaussians do not keep.
    """
    importance = algorithm.importance
    if importance.kind == "none" or importance.clip is not None:
        return
    if not np.all(np.square(sigma) < 2.0 * np.square(behaviour_sigma)):
        raise SpecError(
            "/algorithm/importance/behaviour",
            "ratio_variance_unbounded",
            "the acting policy's deviation is so small that the ratio has an infinite variance; expected sigma^2 < "
            "2 * (sigma of the acting policy)^2: let it act with a larger sigma, or set importance.clip, which is "
            "biased",
        )


def _check(algorithm: AlgorithmSpec, policy: PolicySpec, facts: EnvironmentFacts) -> None:
    """What does not fit together, field by field of the algorithm.

    Raises:
        SpecError: with the way out.
    """
    _check_discount(algorithm, facts)
    _check_moving(algorithm)
    _check_baseline(algorithm)
    _check_standardise(algorithm, facts)
    _check_entropy(algorithm, policy)
    _check_importance(algorithm, facts)


def _check_discount(algorithm: AlgorithmSpec, facts: EnvironmentFacts) -> None:
    if algorithm.credit == "total_return" and algorithm.discount_weight == "gamma_power":
        raise SpecError(
            "/algorithm/discount_weight",
            "discount_counted_twice",
            "the total return is discounted already; gamma_power belongs to reward_to_go",
        )
    if algorithm.discount == "termination" and algorithm.gamma == 1.0:
        raise SpecError(
            "/algorithm/discount",
            "termination_needs_gamma",
            "episodes would end with probability 1 - gamma = 0; take gamma below 1, or discount weight",
        )
    if facts.limit_from == "none" and not facts.ends_for_certain and algorithm.survival == 1.0:
        raise SpecError(
            "/environment/horizon",
            "no_certain_end",
            "some policies would never end an episode; give a horizon, make every state lead to a terminal one, or set "
            "algorithm.discount to termination with gamma below 1",
        )


def _check_moving(algorithm: AlgorithmSpec) -> None:
    """Parameters that move within an episode are PG_v1 and REINFORCE as printed: one episode, plain SGD."""
    if algorithm.within_episode == "frozen":
        return
    refused = [
        (algorithm.trajectories > 1, "moving_needs_one_trajectory", "expected trajectories = 1"),
        (not isinstance(algorithm.optimizer, SgdSpec), "moving_needs_sgd", "expected the optimizer sgd"),
        (algorithm.steps_per_batch > 1, "moving_needs_one_pass", "expected steps_per_batch = 1"),
        (
            isinstance(algorithm.baseline, LeaveOneOutBaselineSpec | BatchMeanBaselineSpec),
            "moving_needs_another_baseline",
            "a single trajectory has no others to be compared with: take baseline none, constant, moving_average or a "
            "value",
        ),
        (
            algorithm.importance.kind != "none",
            "moving_needs_no_importance",
            "ratios belong to parameters that stand still: expected importance none",
        ),
    ]
    for wrong, code, expected in refused:
        if wrong:
            raise SpecError(
                "/algorithm/within_episode", code, f"{expected}; within_episode frozen goes with everything"
            )


def _check_baseline(algorithm: AlgorithmSpec) -> None:
    baseline = algorithm.baseline
    if isinstance(baseline, LeaveOneOutBaselineSpec) and algorithm.trajectories < 2:
        raise SpecError(
            "/algorithm/baseline",
            "baseline_needs_trajectories",
            "leave_one_out needs at least 2 trajectories; with one, take baseline none or constant",
        )
    own_mean = isinstance(baseline, BatchMeanBaselineSpec) or (
        isinstance(baseline, MovingAverageBaselineSpec) and baseline.includes_batch and baseline.decay == 0.0
    )
    if own_mean and algorithm.trajectories < 2:
        raise SpecError(
            "/algorithm/baseline",
            "baseline_needs_trajectories",
            "the mean of a batch of one trajectory is its own credit, of which nothing would be left; take at least 2 "
            "trajectories, or baseline none or constant",
        )
    if algorithm.horizon == "bootstrap":
        if not isinstance(baseline, LinearValueBaselineSpec | NeuralValueBaselineSpec):
            raise SpecError(
                "/algorithm/baseline",
                "bootstrap_needs_value_baseline",
                "bootstrap asks a value what a cut episode is worth; take baseline linear_value or neural_value, or "
                "horizon episode",
            )
        if algorithm.credit == "total_return":
            raise SpecError(
                "/algorithm/credit",
                "bootstrap_needs_reward_to_go",
                "a value that is fitted to total returns does not say what is still to come; take reward_to_go, or "
                "horizon episode",
            )


def _check_standardise(algorithm: AlgorithmSpec, facts: EnvironmentFacts) -> None:
    if algorithm.standardise == "leave_one_out":
        if algorithm.credit != "total_return":
            raise SpecError(
                "/algorithm/standardise",
                "standardise_needs_total_return",
                "the deviation of the other trajectories' returns belongs to credit total_return",
            )
        if algorithm.trajectories < 3:
            raise SpecError(
                "/algorithm/standardise",
                "standardise_needs_trajectories",
                "a deviation of the others needs at least 3 trajectories",
            )
    one_weight = algorithm.credit == "total_return" or as_played(facts, algorithm).fixed_steps == 1
    if algorithm.standardise == "batch" and algorithm.trajectories == 1 and one_weight:
        raise SpecError(
            "/algorithm/standardise",
            "standardise_needs_trajectories",
            "with one trajectory all weights are alike, and nothing would be left; take at least 2 trajectories",
        )


def _check_entropy(algorithm: AlgorithmSpec, policy: PolicySpec) -> None:
    squashed = isinstance(policy.distribution, GaussianSpec) and policy.distribution.action_map == "tanh"
    if algorithm.entropy is not None and squashed:
        raise SpecError(
            "/algorithm/entropy",
            "entropy_of_squashed",
            "the entropy of squashed actions has no closed form, and that of the draws before tanh grows without "
            "bound; take action_map clip, or no entropy",
        )


def _check_importance(algorithm: AlgorithmSpec, facts: EnvironmentFacts) -> None:
    importance = algorithm.importance
    if importance.kind == "none":
        if importance.behaviour.kind != "current":
            raise SpecError(
                "/algorithm/importance/kind",
                "behaviour_needs_importance",
                "what another policy did is the gradient of this one only with weights; take importance kind "
                "per_decision or trajectory",
            )
        for field, set_ in (("clip", importance.clip is not None), ("self_normalise", importance.self_normalise)):
            if set_:
                raise SpecError(
                    f"/algorithm/importance/{field}",
                    "ratio_setting_needs_importance",
                    f"there are no ratios without weighting; leave {field} out, or take importance kind per_decision "
                    "or trajectory",
                )
        return
    if importance.kind == "per_decision" and algorithm.credit == "total_return":
        raise SpecError(
            "/algorithm/importance/kind",
            "per_decision_needs_reward_to_go",
            "the total return has one ratio, that of the trajectory; take kind trajectory, or credit reward_to_go",
        )
    if importance.self_normalise and algorithm.trajectories < 2:
        raise SpecError(
            "/algorithm/importance/self_normalise",
            "self_normalise_needs_trajectories",
            "a single ratio divided by itself is 1, which is no weighting at all; take at least 2 trajectories",
        )
    if importance.behaviour.kind == "mixture" and isinstance(facts.action_space, BoxSpace):
        raise SpecError(
            "/algorithm/importance/behaviour",
            "mixture_needs_finite_actions",
            "the uniform distribution of a mixture needs a finite set of actions; take behaviour older or policy",
        )


def _stop(stop: StopSpec, facts: EnvironmentFacts, continues: bool) -> StopSpec:
    changes: dict[str, object] = {}
    without_limit = stop.updates is None and stop.env_steps is None and stop.seconds is None
    if without_limit:
        changes["updates"] = DEFAULT_UPDATES
    if "target_return" not in stop.model_fields_set:
        # who names a limit wants that much, and a policy that goes on may have passed the threshold long ago
        changes["target_return"] = facts.reward_threshold if without_limit and not continues else None
    return stop.model_copy(update=changes)
