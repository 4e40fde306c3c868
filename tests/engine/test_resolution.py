"""Defaults are written out, and settings that contradict each other are refused with the way out."""

import numpy as np
import pytest
from pydantic import ValidationError

import pgengine
from pgengine.resolution import check_ratio_variance
from pgengine.spaces import DiscreteSpace
from pgengine.spec import (
    AlgorithmSpec,
    EnvironmentSpec,
    GymnasiumSpec,
    ImportanceSpec,
    MlpPolicySpec,
    PolicySpec,
    StopSpec,
    TrainingSpec,
)
from tests.engine.worlds import CARTPOLE, PENDULUM, random_mdp, small_mdp

FACTS = pgengine.describe(CARTPOLE)


def resolve(**fields: object) -> TrainingSpec:
    return pgengine.resolve(TrainingSpec.model_validate({"environment": CARTPOLE.model_dump(), **fields}), FACTS)


def test_the_shortest_spec_is_exact_and_has_a_target() -> None:
    resolved = resolve()
    assert (resolved.stop.updates, resolved.stop.target_return) == (500, 475.0)
    assert resolved.algorithm.discount_weight == "gamma_power"
    assert pgengine.label(resolved, FACTS).kind == "exact"
    assert pgengine.resolve(resolved, FACTS) == resolved


def test_a_target_can_be_switched_off_and_a_limit_replaces_the_default() -> None:
    assert resolve(stop={"target_return": None}).stop.target_return is None
    assert resolve(stop={"env_steps": 10}).stop.updates is None
    assert resolve(stop={"updates": 10, "target_return": 475.0}).stop.target_return == 475.0
    assert pgengine.resolve(TrainingSpec(environment=random_mdp(0)), pgengine.describe(random_mdp(0))).stop == StopSpec(
        updates=500, target_return=None
    )


@pytest.mark.parametrize("limit", [{"updates": 20}, {"env_steps": 1000}, {"seconds": 5.0}])
def test_who_names_a_limit_gets_no_target_that_was_not_named(limit: dict[str, object]) -> None:
    assert resolve(stop=limit).stop.target_return is None
    nulls = {"updates": None, "env_steps": None, "seconds": None}
    assert resolve(stop=nulls).stop == StopSpec(updates=500, target_return=475.0)


def test_who_goes_on_with_a_policy_gets_no_target_that_was_not_named() -> None:
    asked = TrainingSpec(environment=CARTPOLE)
    assert pgengine.resolve(asked, FACTS, continues=True).stop == StopSpec(updates=500, target_return=None)
    named = TrainingSpec(environment=CARTPOLE, stop=StopSpec(target_return=480.0))
    assert pgengine.resolve(named, FACTS, continues=True).stop.target_return == 480.0
    stored = resolve()  # of a spec in which all was written out, nothing is left to a default
    assert pgengine.resolve(stored, FACTS, continues=True) == stored


LAKE = GymnasiumSpec(id="FrozenLake-v1")


def test_an_id_with_a_table_gets_a_table_of_parameters_where_the_policy_is_left_out() -> None:
    facts = pgengine.describe(LAKE)
    filled = pgengine.resolve(TrainingSpec(environment=LAKE), facts)
    assert (filled.policy.kind, filled.algorithm.trajectories) == ("linear", 128)
    assert filled.algorithm.optimizer.learning_rate == 0.05
    assert pgengine.label(filled, facts).kind == "exact"
    assert pgengine.resolve(filled, facts) == filled
    some = TrainingSpec(environment=LAKE, algorithm=AlgorithmSpec(gamma=0.9, trajectories=7))
    assert pgengine.resolve(some, facts).algorithm == filled.algorithm.model_copy(
        update={"gamma": 0.9, "trajectories": 7}
    )


@pytest.mark.parametrize(("environment", "continues", "fields"), [
    (LAKE, False, {"policy": MlpPolicySpec()}), (LAKE, True, {}), (CARTPOLE, False, {}), (random_mdp(0), False, {}),
])  # fmt: skip
def test_what_is_named_or_goes_on_or_has_no_table_keeps_the_defaults_of_the_fields(
    environment: EnvironmentSpec, continues: bool, fields: dict[str, PolicySpec]
) -> None:
    asked = TrainingSpec(environment=environment, **fields)
    found = pgengine.resolve(asked, pgengine.describe(environment), continues=continues)
    assert (found.policy.kind, found.algorithm.trajectories) == ("mlp", 16)
    assert found.algorithm.optimizer.learning_rate == 0.01


def test_the_discount_weight_follows_the_credit() -> None:
    assert resolve(algorithm={"credit": "total_return"}).algorithm.discount_weight == "none"


MOVING = {
    "within_episode": "moving", "trajectories": 1, "optimizer": {"kind": "sgd"}, "baseline": {"kind": "none"},
}  # fmt: skip
OTHER = {"kind": "policy"}


@pytest.mark.parametrize(("algorithm", "pointer", "code"), [
    ({"credit": "total_return", "discount_weight": "gamma_power"},
     "/algorithm/discount_weight", "discount_counted_twice"),
    ({"discount": "termination"}, "/algorithm/discount", "termination_needs_gamma"),
    ({"trajectories": 1}, "/algorithm/baseline", "baseline_needs_trajectories"),
    ({"trajectories": 1, "baseline": {"kind": "batch_mean"}}, "/algorithm/baseline", "baseline_needs_trajectories"),
    ({"trajectories": 1, "baseline": {"kind": "moving_average", "includes_batch": True, "decay": 0.0}},
     "/algorithm/baseline", "baseline_needs_trajectories"),
    ({"horizon": "bootstrap"}, "/algorithm/baseline", "bootstrap_needs_value_baseline"),
    ({"horizon": "bootstrap", "credit": "total_return", "baseline": {"kind": "linear_value"}},
     "/algorithm/credit", "bootstrap_needs_reward_to_go"),
    ({"standardise": "leave_one_out"}, "/algorithm/standardise", "standardise_needs_total_return"),
    ({"standardise": "leave_one_out", "credit": "total_return", "trajectories": 2},
     "/algorithm/standardise", "standardise_needs_trajectories"),
    ({"standardise": "batch", "credit": "total_return", "trajectories": 1, "baseline": {"kind": "none"}},
     "/algorithm/standardise", "standardise_needs_trajectories"),
    (MOVING | {"trajectories": 2}, "/algorithm/within_episode", "moving_needs_one_trajectory"),
    (MOVING | {"optimizer": {"kind": "adam"}}, "/algorithm/within_episode", "moving_needs_sgd"),
    (MOVING | {"steps_per_batch": 2}, "/algorithm/within_episode", "moving_needs_one_pass"),
    (MOVING | {"baseline": {"kind": "leave_one_out"}}, "/algorithm/within_episode", "moving_needs_another_baseline"),
    (MOVING | {"importance": {"kind": "per_decision", "behaviour": OTHER}},
     "/algorithm/within_episode", "moving_needs_no_importance"),
    ({"importance": {"behaviour": OTHER}}, "/algorithm/importance/kind", "behaviour_needs_importance"),
    ({"importance": {"behaviour": {"kind": "mixture"}}}, "/algorithm/importance/kind", "behaviour_needs_importance"),
    ({"importance": {"clip": 2.0}}, "/algorithm/importance/clip", "ratio_setting_needs_importance"),
    ({"importance": {"self_normalise": True}},
     "/algorithm/importance/self_normalise", "ratio_setting_needs_importance"),
    ({"importance": {"kind": "per_decision"}, "credit": "total_return"},
     "/algorithm/importance/kind", "per_decision_needs_reward_to_go"),
    ({"importance": {"kind": "trajectory", "self_normalise": True}, "trajectories": 1, "baseline": {"kind": "none"}},
     "/algorithm/importance/self_normalise", "self_normalise_needs_trajectories"),
])  # fmt: skip
def test_contradictions_are_named(algorithm: dict[str, object], pointer: str, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        resolve(algorithm=algorithm)
    assert (error.value.pointer, error.value.code) == (pointer, code)


@pytest.mark.parametrize("algorithm", [
    MOVING,
    MOVING | {"baseline": {"kind": "moving_average"}},
    MOVING | {"baseline": {"kind": "linear_value"}, "horizon": "bootstrap"},
    {"discount": "termination", "gamma": 0.9},
    {"standardise": "leave_one_out", "credit": "total_return", "trajectories": 3},
    {"standardise": "batch", "trajectories": 1, "baseline": {"kind": "none"}},
    {"trajectories": 1, "baseline": {"kind": "moving_average", "includes_batch": True}},
    {"importance": {"kind": "per_decision", "behaviour": {"kind": "mixture"}, "clip": 2.0, "self_normalise": True}},
    {"importance": {"kind": "trajectory", "behaviour": {"kind": "older"}}, "credit": "total_return"},
    {"importance": {"kind": "per_decision"}, "steps_per_batch": 4},
])  # fmt: skip
def test_what_fits_together_is_taken(algorithm: dict[str, object]) -> None:
    resolved = resolve(algorithm=algorithm)
    assert pgengine.resolve(resolved, FACTS) == resolved


def test_the_entropy_of_squashed_actions_is_refused() -> None:
    def resolve_pendulum(action_map: str) -> TrainingSpec:
        distribution = {"kind": "gaussian", "action_map": action_map}
        fields = {
            "environment": PENDULUM.model_dump(),
            "policy": {"kind": "mlp", "distribution": distribution},
            "algorithm": {"entropy": {"coefficient": 0.1}},
        }
        return pgengine.resolve(TrainingSpec.model_validate(fields), pgengine.describe(PENDULUM))

    assert resolve_pendulum("clip").algorithm.entropy is not None
    with pytest.raises(pgengine.SpecError) as error:
        resolve_pendulum("tanh")
    assert (error.value.pointer, error.value.code) == ("/algorithm/entropy", "entropy_of_squashed")


def test_a_box_of_actions_has_no_mixture_with_the_uniform_distribution() -> None:
    importance = {"kind": "per_decision", "behaviour": {"kind": "mixture"}}
    asked = {"environment": PENDULUM.model_dump(), "algorithm": {"importance": importance}}
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.resolve(TrainingSpec.model_validate(asked), pgengine.describe(PENDULUM))
    assert (error.value.pointer, error.value.code) == (
        "/algorithm/importance/behaviour",
        "mixture_needs_finite_actions",
    )


def test_one_trajectory_of_one_step_has_nothing_to_standardise() -> None:
    asked = {"trajectories": 1, "baseline": {"kind": "none"}, "standardise": "batch"}
    spec = small_mdp(0, horizon=1)
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.resolve(TrainingSpec(environment=spec, algorithm=AlgorithmSpec(**asked)), pgengine.describe(spec))
    assert error.value.code == "standardise_needs_trajectories"


def test_episodes_that_may_never_end_need_a_horizon_or_termination() -> None:
    endless = random_mdp(0, terminal=False).model_copy(update={"horizon": None})
    facts = FACTS.model_copy(
        update={
            "limit_from": "none", "ends_for_certain": False, "limit_cuts": False, "max_episode_steps": 1_000_000,
            "observation_space": DiscreteSpace(n=3), "action_space": DiscreteSpace(n=2),
        }
    )  # fmt: skip

    def resolve_endless(facts: pgengine.EnvironmentFacts, **algorithm: object) -> TrainingSpec:
        fields = TrainingSpec(environment=endless, algorithm=AlgorithmSpec.model_validate(algorithm))
        return pgengine.resolve(fields, facts)

    for algorithm in ({}, {"gamma": 0.9}):
        with pytest.raises(pgengine.SpecError) as error:
            resolve_endless(facts, **algorithm)
        assert (error.value.pointer, error.value.code) == ("/environment/horizon", "no_certain_end")
    resolve_endless(facts, gamma=0.9, discount="termination")
    resolve_endless(facts.model_copy(update={"ends_for_certain": True}))


@pytest.mark.parametrize(("sigma", "behaviour", "refused"), [
    ([1.0, 1.0], [1.0, 1.0], False), ([1.0, 1.41], [1.0, 1.0], False), ([1.0, 1.42], [1.0, 1.0], True),
    ([0.1], [100.0], False), ([2.0**0.5], [1.0], True),
])  # fmt: skip
def test_gaussian_ratios_of_infinite_variance_are_refused(
    sigma: list[float], behaviour: list[float], refused: bool
) -> None:
    """The integral of pi^2 / rho is finite if and only if sigma^2 < 2 * sigma_rho^2."""
    weighted = AlgorithmSpec(importance={"kind": "per_decision", "behaviour": OTHER})
    both = (np.array(sigma), np.array(behaviour))
    for harmless in (AlgorithmSpec(), AlgorithmSpec(importance=ImportanceSpec(kind="per_decision", clip=2.0))):
        check_ratio_variance(harmless, *both)
    if not refused:
        return check_ratio_variance(weighted, *both)
    with pytest.raises(pgengine.SpecError) as error:
        check_ratio_variance(weighted, *both)
    assert error.value.code == "ratio_variance_unbounded"
    return None


def test_the_bound_on_sigma_is_where_the_integral_stops_being_finite() -> None:
    """E_rho[(pi / rho)^2] over a growing interval: it settles below the bound and grows above it."""

    def second_moment(sigma: float, edge: float) -> float:
        x, step = np.linspace(-edge, edge, 200_001, retstep=True)
        log_pi = -0.5 * ((x - 0.3) / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2.0 * np.pi)
        log_rho = -0.5 * x**2 - 0.5 * np.log(2.0 * np.pi)
        return float(np.exp(2.0 * log_pi - log_rho).sum() * step)

    assert second_moment(1.3, 60.0) == pytest.approx(second_moment(1.3, 30.0), rel=1e-6)
    assert second_moment(1.5, 60.0) > 2.0 * second_moment(1.5, 30.0)


@pytest.mark.parametrize("fields", [
    {"algorithm": {"gamma": 1.1}}, {"algorithm": {"gamma": True}}, {"algorithm": {"gamma": "0.9"}},
    {"algorithm": {"gamma": float("nan")}}, {"algorithm": {"lambda": 0.9}}, {"algorithm": {"trajectories": 0}},
    {"algorithm": {"trajectories": 2.0}}, {"algorithm": {"optimizer": {"kind": "rmsprop"}}},
    {"algorithm": {"optimizer": {"kind": "sgd", "learning_rate": float("inf")}}}, {"seed": -1}, {"seed": 2**53},
    {"policy": {"kind": "mlp", "hidden": []}}, {"policy": {"kind": "cnn"}}, {"stop": {"updates": 0}},
    {"evaluation": {"episodes": 1}}, {"version": 2}, {"unknown": 1},
])  # fmt: skip
def test_values_out_of_bounds_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        resolve(**fields)
