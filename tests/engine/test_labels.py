"""What a label says of settings and facts that no small MDP can show; enumeration is in test_oracle."""

import math
from typing import get_args

import pytest

import pgengine
from pgengine.labels import Label, ReasonCode
from pgengine.spaces import BoxSpace, MultiDiscreteSpace
from pgengine.spec import AlgorithmSpec, LinearPolicySpec, TabularSpec, TrainingSpec
from tests.engine.worlds import CARTPOLE, PENDULUM, bandit, small_mdp

VARYING = pgengine.describe(CARTPOLE)
FIXED = pgengine.describe(PENDULUM)
ENDLESS = VARYING.model_copy(
    update={"limit_from": "none", "limit_cuts": False, "max_episode_steps": 1_000_000, "ends_for_certain": True}
)
OTHER = {"kind": "policy"}


def label(
    facts: pgengine.EnvironmentFacts = VARYING, policy: dict[str, object] | None = None, **algorithm: object
) -> Label:
    asked = {"environment": CARTPOLE.model_dump(), "algorithm": algorithm, "policy": policy or {"kind": "mlp"}}
    return pgengine.label(pgengine.resolve(TrainingSpec.model_validate(asked), facts), facts)


def codes(found: Label) -> list[str]:
    return [reason.code for reason in found.reasons]


def test_the_default_is_exact_and_says_that_the_limit_is_not_seen() -> None:
    found = label()
    assert (found.kind, found.factor, codes(found)) == ("exact", 1.0, ["time_limit_not_observed"])
    assert found.objective.text == (
        "expected undiscounted return over at most 500 steps (the registered limit is part of the task)"
    )


@pytest.mark.parametrize(("settings", "kind", "code"), [
    ({"gamma": 0.9, "discount_weight": "none"}, "biased", "discount_dropped"),
    ({"mean_over": "all_steps"}, "biased", "mean_over_all_steps"),
    ({"mean_over": "all_steps", "trajectories": 1, "baseline": {"kind": "none"}}, "biased", "mean_over_own_steps"),
    ({"baseline": {"kind": "batch_mean"}}, "scaled", "baseline_includes_own"),
    ({"baseline": {"kind": "batch_mean", "over": "alive"}}, "biased", "baseline_knows_own_actions"),
    ({"baseline": {"kind": "linear_value", "fit": "before"}}, "biased", "baseline_knows_own_actions"),
    ({"baseline": {"kind": "neural_value", "fit": "before"}}, "biased", "baseline_knows_own_actions"),
    ({"baseline": {"kind": "neural_value"}}, "exact", "given_the_past"),
    ({"baseline": {"kind": "moving_average"}}, "exact", "given_the_past"),
    ({"entropy": {"coefficient": 0.1, "as": "bonus"}}, "biased", "entropy_bonus"),
    ({"entropy": {"coefficient": 0.1}, "baseline": {"kind": "batch_mean"}}, "biased", "baseline_includes_own"),
    ({"credit": "total_return", "standardise": "leave_one_out"}, "scaled_unknown", "standardised_by_others"),
    ({"standardise": "batch"}, "biased", "standardised_by_batch"),
    ({"importance": {"kind": "per_decision", "behaviour": {"kind": "older"}}}, "exact", "given_the_past"),
    ({"importance": {"kind": "per_decision", "behaviour": OTHER, "clip": 2.0}}, "biased", "ratios_clipped"),
    ({"importance": {"kind": "trajectory", "behaviour": OTHER, "self_normalise": True}}, "biased",
     "ratios_self_normalised"),
    ({"importance": {"kind": "trajectory", "behaviour": OTHER}, "baseline": {"kind": "batch_mean"}}, "biased",
     "baseline_knows_own_actions"),
    ({"steps_per_batch": 2}, "biased", "batch_reused"),
    ({"steps_per_batch": 2, "importance": {"kind": "per_decision"}}, "biased", "batch_reused"),
    ({"within_episode": "moving", "trajectories": 1, "optimizer": {"kind": "sgd"}, "baseline": {"kind": "none"}},
     "biased", "parameters_move_within_episode"),
    ({"horizon": "bootstrap", "baseline": {"kind": "neural_value"}}, "biased", "bootstrapped"),
])  # fmt: skip
def test_each_choice_has_its_reason(settings: dict[str, object], kind: str, code: str) -> None:
    found = label(**settings)
    assert (found.kind, codes(found)[0]) == (kind, code)
    assert (found.factor is None) == (kind in ("biased", "scaled_unknown"))


def test_equally_long_episodes_scale_by_their_length_and_by_the_baseline() -> None:
    found = label(FIXED, mean_over="all_steps", baseline={"kind": "batch_mean"}, trajectories=4)
    assert found.kind == "scaled"
    assert found.factor == pytest.approx(0.75 / 200)
    moving = label(FIXED, baseline={"kind": "moving_average", "decay": 0.9, "includes_batch": True}, trajectories=4)
    assert moving.factor == pytest.approx(1.0 - 0.1 / 4)


def test_termination_makes_lengths_vary() -> None:
    assert label(FIXED, mean_over="all_steps", gamma=0.9).kind == "scaled"
    assert label(FIXED, mean_over="all_steps", gamma=0.9, discount="termination").kind == "biased"
    at_once = label(FIXED, mean_over="all_steps", gamma=0.0, discount="termination")
    assert (at_once.kind, codes(at_once)) == ("exact", [])


def test_the_objective_says_all_that_is_maximised() -> None:
    found = label(gamma=0.9, discount="termination", entropy={"coefficient": 0.5}).objective
    assert (found.gamma, found.discount, found.entropy, found.limit_from) == (0.9, "termination", 0.5, "id")
    assert found.text == (
        "expected return of episodes that end with probability 0.1 after each step, undiscounted, plus 0.5 for each "
        "nat of entropy over at most 500 steps (the registered limit is part of the task)"
    )
    endless = label(ENDLESS, gamma=0.9)
    assert endless.objective.text == "expected return discounted by 0.9 a step until the episode ends by itself"
    assert codes(endless) == []


def test_a_bootstrap_of_episodes_that_are_never_cut_is_exact() -> None:
    found = label(ENDLESS, horizon="bootstrap", baseline={"kind": "neural_value"})
    assert (found.kind, codes(found)) == ("exact", ["given_the_past"])


def test_a_normaliser_that_moves_between_updates_is_exact() -> None:
    found = label(policy={"kind": "mlp", "normalise_observations": True})
    assert (found.kind, codes(found)) == ("exact", ["observations_normalised", "time_limit_not_observed"])


def test_a_clip_that_no_ratio_of_the_mixture_reaches_is_exact() -> None:
    """A step's ratio is at most 1 / (1 - epsilon) for each component of the action."""
    settings = {"kind": "per_decision", "behaviour": {"kind": "mixture", "epsilon": 0.1}}
    short = VARYING.model_copy(update={"max_episode_steps": 5})
    two = short.model_copy(update={"action_space": MultiDiscreteSpace(nvec=[3, 3])})
    for facts, bound in ((short, 0.9**-5), (two, 0.9**-10)):
        assert label(facts, importance={**settings, "clip": bound * 1.01}).kind == "exact"
        assert label(facts, importance={**settings, "clip": bound * 0.99}).kind == "biased"
    assert label(VARYING, importance={**settings, "clip": 1e12}).kind == "biased"


def test_an_acting_policy_that_is_always_up_to_date_needs_no_weights() -> None:
    """Its ratios are 1, so cutting or normalising them changes nothing, and a batch mean scales as ever."""
    importance = {"kind": "trajectory", "behaviour": {"kind": "older", "refresh_every": 1}, "clip": 1.0}
    assert label(importance=importance).kind == "exact"
    assert label(importance=importance, baseline={"kind": "batch_mean"}).kind == "scaled"


def test_every_reason_can_be_given() -> None:
    settings: list[dict[str, object]] = [
        dict(gamma=0.9, discount_weight="none", mean_over="all_steps", standardise="batch", steps_per_batch=2),
        dict(mean_over="own_steps", entropy={"coefficient": 0.1, "as": "bonus"}, baseline={"kind": "batch_mean"}),
        dict(credit="total_return", standardise="leave_one_out", baseline={"kind": "linear_value", "fit": "before"}),
        dict(importance={"kind": "trajectory", "behaviour": OTHER, "clip": 2.0, "self_normalise": True}),
        dict(horizon="bootstrap", baseline={"kind": "linear_value"}),
        dict(within_episode="moving", trajectories=1, optimizer={"kind": "sgd"}, baseline={"kind": "none"}),
    ]
    normalised = {"kind": "mlp", "normalise_observations": True}
    found = {code for given in settings for code in codes(label(VARYING, normalised, **given))}
    found |= set(codes(label(FIXED, mean_over="all_steps")))
    assert found == set(get_args(ReasonCode))


def test_a_box_of_actions_has_the_same_labels() -> None:
    assert isinstance(FIXED.action_space, BoxSpace)
    assert label(FIXED).kind == "exact"


def test_a_label_that_was_stored_before_objectives_had_entropy_is_still_read() -> None:
    stored = label().model_dump(mode="json")
    for later in ("entropy", "discount"):
        del stored["objective"][later]
    assert Label.model_validate(stored) == label()


def test_episodes_of_an_mdp_without_a_horizon_are_not_said_to_be_cut() -> None:
    """It ends by itself with probability 1/2 after each step, and nothing else is part of the task."""
    spec = TabularSpec(
        transitions=[[[0.5, 0.5]] * 2, [[0.0, 1.0]] * 2],
        rewards=[[1.0, 0.0], [0.0, 0.0]],
        initial=[1.0, 0.0],
        terminal=[1],
    )
    facts = pgengine.describe(spec)
    for algorithm in ({}, {"gamma": 0.9, "discount": "termination"}):
        asked = TrainingSpec.model_validate({"environment": spec, "algorithm": algorithm})
        found = pgengine.label(pgengine.resolve(asked, facts), facts)
        assert (found.kind, codes(found)) == ("exact", [])
        assert found.objective.text.endswith(" until the episode ends by itself")
    bootstrap = {"horizon": "bootstrap", "baseline": {"kind": "neural_value"}}
    asked = TrainingSpec.model_validate({"environment": spec, "algorithm": bootstrap})
    found = pgengine.label(pgengine.resolve(asked, facts), facts)
    assert (found.kind, codes(found)) == ("exact", ["given_the_past"])


def test_a_tabular_horizon_is_named() -> None:
    spec = small_mdp(0)
    facts = pgengine.describe(spec)
    found = pgengine.label(pgengine.resolve(TrainingSpec(environment=spec), facts), facts)
    assert found.objective.text.endswith("over at most 3 steps (the horizon is part of the task)")


def test_the_worked_examples_of_the_documentation_are_true() -> None:
    """docs/engine/labels.md, one example of each kind; all policies take each action with probability 1/2."""

    def enumerated(spec: TabularSpec, theta: list[float], **algorithm: object) -> pgengine.checking.EstimatorReport:
        rest = [[0.0, 0.0]] * (len(spec.transitions) - 1)
        policy = pgengine.create_policy(
            LinearPolicySpec(initial_parameters={"theta": [theta, *rest]}), spec, pgengine.describe(spec), seed=0
        )
        asked = AlgorithmSpec.model_validate(algorithm)
        return pgengine.check_gradient(spec, policy, [asked], mode="enumerate").estimators[0]

    arms, alike, even = bandit(1.0, 0.0), bandit(1.0, 1.0), [0.0, 0.0]
    total = {"credit": "total_return", "trajectories": 2}
    exact = enumerated(arms, even, **total)
    assert (exact.label.kind, exact.scale) == ("exact", pytest.approx(1.0))
    assert exact.mean == pytest.approx([0.25, -0.25, 0.0, 0.0])
    scaled = enumerated(arms, even, **total, baseline={"kind": "batch_mean"})
    assert (scaled.label.kind, scaled.label.factor, scaled.scale) == ("scaled", 0.5, pytest.approx(0.5))
    by_others = {**total, "trajectories": 3, "standardise": "leave_one_out", "baseline": {"kind": "none"}}
    for theta, factor in ((even, 0.5 * math.sqrt(2.0)), ([math.log(3.0), 0.0], 6.0 / 16.0 * math.sqrt(2.0))):
        unknown = enumerated(arms, theta, **by_others)
        assert (unknown.label.kind, unknown.scale) == ("scaled_unknown", pytest.approx(factor))
    nothing = enumerated(alike, [0.5, -0.5], **by_others, entropy={"coefficient": 0.5})
    assert (nothing.label.kind, nothing.scale) == ("scaled_unknown", 0.0)
    assert nothing.gradient_norm > 0.1
    longer = TabularSpec(
        transitions=[[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2],
        rewards=[[1.0, 0.0], [1.5, 1.5], [0.0, 0.0]],
        initial=[1.0, 0.0, 0.0],
        terminal=[2],
        horizon=2,
    )
    own = {"trajectories": 1, "baseline": {"kind": "none"}, "credit": "total_return"}
    right = enumerated(longer, even, **own)
    assert right.mean == pytest.approx([-0.125, 0.125, 0.0, 0.0, 0.0, 0.0])
    wrong = enumerated(longer, even, **own, mean_over="own_steps")
    assert (wrong.label.kind, wrong.verdict) == ("biased", "differs")
    assert wrong.mean == pytest.approx([0.0625, -0.0625, 0.0, 0.0, 0.0, 0.0])
