"""Every estimator against the exact gradient, by enumerating all batches of small MDPs; the wrong ones must fail.

Nothing is random here: an estimator's expectation is a sum over all batches of K trajectories, and the label must say
what that sum is.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch

import pgengine
from pgengine.estimation import Estimator
from pgengine.estimators import BatchRows, StepWeights, batch_mean, reward_to_go, step_weights, total_return
from pgengine.exact import (
    EnumeratedRows,
    Trajectories,
    enumerate_trajectories,
    estimate_moments,
    exact_gradient,
    expected_estimate,
    log_policy,
    parameters_in_double,
    trajectory_probabilities,
)
from pgengine.rollout import Batch
from pgengine.spec import (
    AlgorithmSpec,
    LinearPolicySpec,
    LinearValueBaselineSpec,
    MovingAverageBaselineSpec,
    NoBaselineSpec,
    TabularSpec,
    TrainingSpec,
)
from tests.engine.worlds import algorithm, bandit, random_mdp, small_mdp, steady_mdp, table_policy

TOLERANCE = 1e-9
NOT_A_MULTIPLE = 1e-5  # share of the estimate that points elsewhere, by which a bias is told from rounding

WORLDS = {
    "varying": small_mdp(0),
    "varying_of_one_start": small_mdp(3, starts=1),
    "fixed": steady_mdp(1),
    "one_step": small_mdp(2, horizon=1),
    "ends_at_once": bandit(0.0, 1.0, 0.3).model_copy(update={"horizon": 5}),
    "ends_at_the_second": TabularSpec(
        transitions=[[[0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]], *[[[0.0, 0.0, 0.0, 1.0]] * 2] * 3],
        rewards=[[0.2, 1.0], [-1.0, 0.5], [2.0, -0.3], [0.0, 0.0]],
        initial=[1.0, 0.0, 0.0, 0.0],
        terminal=[3],
        horizon=5,
    ),
}
"""`ends_at_once` and `ends_at_the_second` are shorter than their horizon."""


@cache
def facts_of(world: str) -> pgengine.EnvironmentFacts:
    return pgengine.describe(WORLDS[world])


@cache
def policy_of(world: str, seed: int = 0) -> pgengine.Policy:
    return table_policy(WORLDS[world], seed)


@cache
def trajectories_of(world: str, survival: float = 1.0) -> Trajectories:
    return enumerate_trajectories(pgengine.TabularMDP(WORLDS[world]), survival=survival)


@cache
def gradient_of(world: str, gamma: float, entropy: float = 0.0) -> torch.Tensor:
    return exact_gradient(policy_of(world), pgengine.TabularMDP(WORLDS[world]), gamma=gamma, entropy=entropy)


@cache
def table_of(world: str, seed: int = 0) -> np.ndarray:
    policy = policy_of(world, seed)
    table: np.ndarray = log_policy(policy, parameters_in_double(policy)).detach().numpy()
    return table


def behaviour_of(world: str, a: AlgorithmSpec) -> np.ndarray:
    """Log-probabilities of whoever acts."""
    behaviour = a.importance.behaviour
    pi = np.exp(table_of(world))
    if behaviour.kind == "mixture":
        mixed: np.ndarray = np.log((1.0 - behaviour.epsilon) * pi + behaviour.epsilon / pi.shape[1])
        return mixed
    if behaviour.kind == "policy" or (behaviour.kind == "older" and behaviour.refresh_every > 1):
        return table_of(world, 7)
    return table_of(world)


def distance(estimate: torch.Tensor, exact: torch.Tensor) -> float:
    return float((estimate - exact).abs().max())


def expectation(
    world: str,
    weights: Callable[[EnumeratedRows], np.ndarray | tuple[np.ndarray, np.ndarray | None]],
    K: int,
    *,
    survival: float = 1.0,
    behaviour: np.ndarray | None = None,
) -> torch.Tensor:
    return expected_estimate(policy_of(world), trajectories_of(world, survival), weights, K=K, behaviour=behaviour)


# --- what a baseline with a memory says ------------------------------------------------------------------------------


def time_of(offsets: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(length) for length in np.diff(offsets)])


def predictions(rows: EnumeratedRows, given: BatchRows, a: AlgorithmSpec) -> np.ndarray | None:
    """Any function of earlier batches, which are held fixed; or what is fitted to the batch itself."""
    baseline, time = a.baseline, time_of(rows.offsets)
    past = np.random.default_rng(11).normal(size=(8, 6))  # of a state at a time
    if baseline.kind in ("linear_value", "neural_value") and baseline.fit == "after":
        return past[rows.states, time]
    credit = step_weights(given, a.model_copy(update={"baseline": NoBaselineSpec()})).credit
    if isinstance(baseline, MovingAverageBaselineSpec):
        per_trajectory = a.credit == "total_return"
        old = np.broadcast_to(past[0, np.zeros_like(time) if per_trajectory else time], credit.shape)
        if not baseline.includes_batch:
            return old.copy()
        mean = batch_mean(credit, rows.offsets, over="total" if per_trajectory else "time_step")
        return baseline.decay * old + (1.0 - baseline.decay) * mean
    if isinstance(baseline, LinearValueBaselineSpec):  # ridge regression on state and time, each batch its own
        features = np.stack([np.ones_like(credit), 0.7 * rows.states, np.broadcast_to(time, credit.shape)], axis=-1)
        normal = np.einsum("mbi,mbj->mij", features, features) + 0.1 * np.eye(3)
        fitted = np.linalg.solve(normal, np.einsum("mbi,mb->mi", features, credit)[..., None])
        fit: np.ndarray = (features @ fitted)[..., 0]
        return fit
    return None


def weights_of(a: AlgorithmSpec) -> Callable[[EnumeratedRows], tuple[np.ndarray, np.ndarray | None]]:
    """The weights of an algorithm, as training computes them."""

    def weights(rows: EnumeratedRows) -> tuple[np.ndarray, np.ndarray | None]:
        found = weigh(rows, a)
        return found.score, found.entropy

    return weights


def weigh(rows: EnumeratedRows, a: AlgorithmSpec) -> StepWeights:
    given = BatchRows(rows.rewards, rows.offsets, None, rows.entropies, rows.log_pi - rows.log_rho)
    predicted = predictions(rows, given, a)
    return step_weights(BatchRows(given.rewards, given.offsets, predicted, given.entropies, given.log_ratios), a)


# --- the label table -------------------------------------------------------------------------------------------------

CREDITS: list[dict[str, object]] = [
    {"credit": "total_return", "gamma": 1.0},
    {"credit": "total_return", "gamma": 0.8},
    {"credit": "total_return", "gamma": 0.0},
    {"credit": "reward_to_go", "gamma": 1.0},
    {"credit": "reward_to_go", "gamma": 0.8},
    {"credit": "reward_to_go", "gamma": 0.0},
    {"credit": "reward_to_go", "gamma": 0.8, "discount_weight": "none"},
    {"credit": "reward_to_go", "gamma": 0.0, "discount_weight": "none"},
    {"credit": "total_return", "gamma": 0.8, "discount": "termination"},
    {"credit": "reward_to_go", "gamma": 0.8, "discount": "termination"},
    {"credit": "reward_to_go", "gamma": 0.8, "discount": "termination", "discount_weight": "none"},
    {"credit": "reward_to_go", "gamma": 0.0, "discount": "termination"},
]
MEANS: list[dict[str, object]] = [{"mean_over": over} for over in ("trajectories", "all_steps", "own_steps")]
BASELINES: list[dict[str, object]] = [
    {"kind": "none"},
    {"kind": "constant", "value": 0.7},
    *[{"kind": "leave_one_out", "over": over} for over in ("time_step", "alive", "shrunk", "total", "all_steps")],
    *[{"kind": "batch_mean", "over": over} for over in ("time_step", "alive", "total", "all_steps")],
    {"kind": "moving_average"},
    {"kind": "moving_average", "includes_batch": True, "decay": 0.3},
    {"kind": "linear_value"},
    {"kind": "linear_value", "fit": "before"},
]
ENTROPIES: list[dict[str, object]] = [
    {},
    {"entropy": {"coefficient": 0.6}},
    {"entropy": {"coefficient": 0.6, "as": "bonus"}},
]
STANDARDS: list[dict[str, object]] = [
    {},
    {"standardise": "leave_one_out"},
    {"standardise": "batch"},
]
MIXTURE, OTHER = {"kind": "mixture", "epsilon": 0.5}, {"kind": "policy"}
RATIOS: list[dict[str, object]] = [
    {},
    *[
        {"importance": {"kind": kind, **settings}}
        for kind in ("trajectory", "per_decision")
        for settings in (
            {},
            {"clip": 1.2, "self_normalise": True},
            {"behaviour": {"kind": "older", "refresh_every": 1}, "clip": 1.2},
            {"behaviour": {"kind": "older"}},
            {"behaviour": MIXTURE},
            {"behaviour": MIXTURE, "clip": 8.0},
            {"behaviour": MIXTURE, "clip": 1.1},
            {"behaviour": OTHER},
            {"behaviour": OTHER, "clip": 1.2},
            {"behaviour": OTHER, "self_normalise": True},
        )
    ],
]
Settings = dict[str, object]


def joined(*parts: Settings) -> Settings:
    settings: Settings = {}
    for part in parts:
        settings |= {"baseline": part} if "kind" in part else part
    return settings


def named(settings: Settings) -> str:
    flat = str(settings)
    for noise in "{}'\" ":
        flat = flat.replace(noise, "")
    return flat


@cache
def asked_of(world: str) -> TrainingSpec:
    return TrainingSpec(environment=WORLDS[world], policy=LinearPolicySpec())


def resolved_of(world: str, settings: Settings, K: int) -> TrainingSpec | None:
    """The resolved spec, or None if resolve refuses it."""
    whole = AlgorithmSpec.model_validate({"trajectories": K, "baseline": {"kind": "none"}} | settings)
    asked = asked_of(world).model_copy(update={"algorithm": whole})
    try:
        return pgengine.resolve(asked, facts_of(world))
    except pgengine.SpecError:
        return None


def bias_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """What is left of the estimate when the best positive multiple of the gradient is taken away, as a share."""
    scale = max(0.0, float(found @ exact / (exact @ exact)))
    return distance(found, scale * exact) / max(distance(found, torch.zeros_like(found)), 1e-12)


def compare(world: str, settings: Settings, K: int) -> str | None:
    """What the label says if it is true, None if the settings are refused; fails if the label is not true."""
    resolved = resolved_of(world, settings, K)
    if resolved is None:
        return None
    a, said = resolved.algorithm, pgengine.label(resolved, facts_of(world))
    exact = gradient_of(world, a.gamma, said.objective.entropy)
    found = expectation(world, weights_of(a), K, survival=a.survival, behaviour=behaviour_of(world, a))
    what = f"{world}, K = {K}, {named(settings)}: labelled {said.kind} for {[r.code for r in said.reasons]}"
    if said.kind == "biased":
        assert said.factor is None, what
        assert bias_of(found, exact) > NOT_A_MULTIPLE, f"{what}, but it is a multiple of the gradient"
    elif said.kind == "scaled_unknown":
        assert said.factor is None, what
        scale = float(found @ exact / (exact @ exact))
        assert scale > 1e-3, what
        assert distance(found, scale * exact) < TOLERANCE, what
    else:
        assert said.factor is not None, what
        assert (said.kind == "exact") == (said.factor == 1.0), what
        assert distance(found, said.factor * exact) < TOLERANCE, what
    return said.kind


@pytest.mark.parametrize("baseline", BASELINES, ids=named)
@pytest.mark.parametrize("world", ["varying", "fixed"])
def test_the_label_says_what_enumeration_finds(world: str, baseline: Settings) -> None:
    """Credit, discount and mean with each baseline, two trajectories."""
    credits = CREDITS if world == "varying" else CREDITS[:7]  # termination makes lengths vary
    assert None not in [compare(world, joined(*parts, baseline), 2) for parts in product(credits, MEANS)]


def some_of(number: int, *choices: list[Settings]) -> list[Settings]:
    """Some of all combinations, the same ones each time, spread over all choices."""
    whole = list(product(*choices))
    chosen = np.random.default_rng(0).permutation(len(whole))[:number]
    return [joined(*whole[i]) for i in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("world", ["varying", "fixed", "one_step"])
def test_the_label_says_what_enumeration_finds_for_some_of_all_settings(world: str) -> None:
    some = some_of(60, CREDITS, MEANS, BASELINES, ENTROPIES, STANDARDS, RATIOS)
    kinds = [compare(world, settings, 2) for settings in some]
    assert sum(kind is not None for kind in kinds) > 20


@pytest.mark.slow
@pytest.mark.parametrize("world", ["varying", "fixed", "one_step"])
@pytest.mark.parametrize("credit", CREDITS, ids=named)
def test_the_label_says_what_enumeration_finds_for_more_of_all_settings(credit: Settings, world: str) -> None:
    some = some_of(400, [credit], MEANS, BASELINES, ENTROPIES, STANDARDS, RATIOS)
    assert sum(compare(world, settings, 2) is not None for settings in some) > 100


@pytest.mark.parametrize("settings", [
    {"credit": "total_return", "gamma": 0.8, "baseline": {"kind": "leave_one_out"}},
    {"credit": "reward_to_go", "gamma": 0.8, "baseline": {"kind": "leave_one_out", "over": "alive"}},
    {"credit": "reward_to_go", "gamma": 0.8, "baseline": {"kind": "leave_one_out", "over": "shrunk"}},
    {"credit": "reward_to_go", "gamma": 1.0, "baseline": {"kind": "batch_mean", "over": "total"}},
    {"credit": "total_return", "gamma": 0.8, "standardise": "leave_one_out", "baseline": {"kind": "leave_one_out"}},
    {"credit": "total_return", "gamma": 1.0, "standardise": "leave_one_out", "entropy": {"coefficient": 0.6}},
    {"credit": "total_return", "gamma": 0.8, "standardise": "leave_one_out", "baseline": {"kind": "batch_mean"}},
    {"gamma": 0.8, "entropy": {"coefficient": 0.6}, "importance": {"kind": "per_decision", "behaviour": OTHER},
     "baseline": {"kind": "leave_one_out"}},
    {"credit": "total_return", "standardise": "leave_one_out", "entropy": {"coefficient": 0.6},
     "importance": {"kind": "trajectory", "behaviour": OTHER, "self_normalise": True}},
], ids=named)  # fmt: skip
def test_not_biased_with_three_trajectories(settings: Settings) -> None:
    assert compare("varying_of_one_start", settings, 3) in ("exact", "scaled", "scaled_unknown")


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES, ids=named)
@pytest.mark.parametrize("world", ["varying_of_one_start", "fixed"])
def test_the_label_says_what_enumeration_finds_with_three_trajectories(world: str, baseline: Settings) -> None:
    standards = some_of(40, CREDITS, MEANS, [baseline], ENTROPIES, STANDARDS)
    ratios = some_of(40, CREDITS, MEANS[:1], [baseline], ENTROPIES[:2], STANDARDS[:2], RATIOS)
    assert sum(compare(world, settings, 3) is not None for settings in standards + ratios) > 30


@pytest.mark.parametrize(
    "baseline", [b for b in BASELINES if b["kind"] not in ("leave_one_out", "batch_mean")], ids=named
)
@pytest.mark.parametrize("world", ["varying", "fixed"])
def test_the_label_says_what_enumeration_finds_with_one_trajectory(world: str, baseline: Settings) -> None:
    for parts in product(CREDITS, MEANS[:2], ENTROPIES[:1] if world == "fixed" else ENTROPIES[1:2]):
        assert compare(world, joined(*parts, baseline), 1) is not None


@pytest.mark.parametrize("mean", MEANS, ids=named)
@pytest.mark.parametrize("world", ["ends_at_once", "ends_at_the_second"])
def test_episodes_that_are_shorter_than_the_horizon_are_known_to_be(world: str, mean: Settings) -> None:
    for credit, baseline in product(CREDITS[:7], BASELINES[:3]):
        assert compare(world, joined(credit, mean, baseline), 2) is not None


@pytest.mark.parametrize("settings", [
    {"credit": "total_return", "gamma": 0.8},
    {"credit": "total_return", "gamma": 1.0, "baseline": {"kind": "constant", "value": 0.7}},
    {"credit": "reward_to_go", "gamma": 0.8},
    {"credit": "reward_to_go", "gamma": 1.0, "baseline": {"kind": "constant", "value": 0.7}},
], ids=named)  # fmt: skip
def test_exact_with_one_trajectory_and_four_steps_of_a_dense_mdp(settings: Settings) -> None:
    spec = random_mdp(4, A=3, horizon=4)
    mdp, policy = pgengine.TabularMDP(spec), table_policy(spec)
    a = algorithm(spec, trajectories=1, **({"baseline": {"kind": "none"}} | settings))
    found = expected_estimate(policy, enumerate_trajectories(mdp), weights_of(a), K=1)
    assert distance(found, exact_gradient(policy, mdp, gamma=a.gamma)) < TOLERANCE


def test_mean_over_all_steps_with_one_trajectory_is_the_mean_over_its_own() -> None:
    spec = WORLDS["varying"]
    both = [
        pgengine.label(
            TrainingSpec(
                environment=spec,
                policy=LinearPolicySpec(),
                algorithm=algorithm(spec, trajectories=1, mean_over=mean, baseline={"kind": "none"}),
            ),
            pgengine.describe(spec),
        )
        for mean in ("all_steps", "own_steps")
    ]
    assert both[0] == both[1]


def test_every_leave_one_out_baseline_takes_variance_away_where_returns_have_a_level() -> None:
    """All but the total under reward-to-go, whose price design and label leave to the user: it is exact, too."""
    world = "varying"
    lifted = WORLDS[world].model_copy(
        update={"transition_rewards": (np.array(WORLDS[world].transition_rewards) + 5.0).tolist()}
    )
    trajectories = enumerate_trajectories(pgengine.TabularMDP(lifted))

    def variance(baseline: Settings) -> float:
        a = algorithm(lifted, trajectories=2, baseline=baseline)
        return estimate_moments(policy_of(world), trajectories, weights_of(a), K=2).variance_trace

    none = variance({"kind": "none"})
    for over in ("time_step", "alive", "shrunk", "all_steps"):
        assert variance({"kind": "leave_one_out", "over": over}) < none


@pytest.mark.parametrize("settings", [
    {"gamma": 0.8, "baseline": {"kind": "leave_one_out", "over": "alive"}, "entropy": {"coefficient": 0.6}},
    {"baseline": {"kind": "moving_average", "includes_batch": True}, "entropy": {"coefficient": 0.6, "as": "bonus"}},
    {"credit": "total_return", "gamma": 0.8, "baseline": {"kind": "moving_average", "includes_batch": True}},
    {"importance": {"kind": "per_decision", "behaviour": OTHER}, "baseline": {"kind": "leave_one_out"}},
], ids=named)  # fmt: skip
def test_training_weighs_a_batch_as_it_is_weighed_here(settings: Settings) -> None:
    """So what enumeration finds is true of the code that learns. Log-probabilities are float32 there."""
    world = "varying"
    resolved = resolved_of(world, settings, 2)
    assert resolved is not None
    a, compared = resolved.algorithm, 0

    def weights(rows: EnumeratedRows) -> np.ndarray:
        nonlocal compared
        past = BatchRows(rows.rewards, rows.offsets, None, rows.entropies, rows.log_pi - rows.log_rho)
        expected = step_weights(BatchRows(past.rewards, past.offsets, averages(past), *rest(past)), a)
        for m in range(0, len(rows.rewards), 40):
            batch = Batch(
                rows.states[m], rows.actions[m], rows.actions[m], rows.log_rho[m], rows.rewards[m], rows.offsets,
                np.ones(2, dtype=bool), np.zeros(2, dtype=bool), np.zeros(2, dtype=np.int64),
            )  # fmt: skip
            found = Estimator(a, facts_of(world), seed=0).weigh(policy_of(world), batch).weights
            assert np.allclose(found.score, expected.score[m], atol=1e-5)
            assert (found.entropy is None) == (expected.entropy is None)
            if found.entropy is not None and expected.entropy is not None:
                assert np.allclose(found.entropy, expected.entropy[m], atol=1e-5)
            compared += 1
        return expected.score

    def rest(given: BatchRows) -> tuple[np.ndarray | None, np.ndarray | None]:
        return given.entropies, given.log_ratios

    def averages(given: BatchRows) -> np.ndarray | None:
        """The first batch of a run: the average begins at zero."""
        if not isinstance(a.baseline, MovingAverageBaselineSpec):
            return None
        credit = step_weights(given, a.model_copy(update={"baseline": NoBaselineSpec()})).credit
        over: Literal["total", "time_step"] = "total" if a.credit == "total_return" else "time_step"
        return (1.0 - a.baseline.decay) * batch_mean(credit, given.offsets, over=over)

    expectation(world, weights, 2, behaviour=behaviour_of(world, a))
    assert compared > 40


# --- schedules: the parameters move ----------------------------------------------------------------------------------


def scores_at(theta: np.ndarray, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Gradient of log pi(a|s) of a softmax table, [B, S, A]."""
    pi = np.exp(theta - theta.max(axis=1, keepdims=True))
    pi /= pi.sum(axis=1, keepdims=True)
    scores = np.zeros((len(states), *theta.shape))
    scores[np.arange(len(states)), states] = -pi[states]
    scores[np.arange(len(states)), states, actions] += 1.0
    return scores


def movement(world: str, a: AlgorithmSpec, learning_rate: float) -> torch.Tensor:
    """Expected way of the parameters in one update with SGD, over the learning rate; K = 1."""
    theta = policy_of(world).parameters["theta"].astype(np.float64)
    trajectories = trajectories_of(world)
    p = trajectory_probabilities(trajectories, torch.as_tensor(table_of(world))).numpy()
    way = np.zeros_like(theta)
    for i, length in enumerate(trajectories.lengths):
        rows = (trajectories.states[i, :length], trajectories.actions[i, :length])
        weights = step_weights(BatchRows(trajectories.rewards[i, :length], np.array([0, length])), a).score
        moved = theta.copy()
        for _ in range(a.steps_per_batch):
            if a.within_episode == "moving":
                for t in range(length):
                    step = scores_at(moved, rows[0][t : t + 1], rows[1][t : t + 1])[0]
                    moved += learning_rate * weights[t] * step
            else:
                moved += learning_rate * np.einsum("b,bsa->sa", weights, scores_at(moved, *rows))
        way += p[i] * (moved - theta)
    return torch.as_tensor(way.reshape(-1) / learning_rate / a.steps_per_batch)


@pytest.mark.parametrize("settings", [
    {"within_episode": "moving", "credit": "total_return"},
    {"within_episode": "moving"},
    {"steps_per_batch": 2},
], ids=named)  # fmt: skip
def test_parameters_that_move_while_a_batch_is_used_are_biased_by_the_learning_rate(settings: Settings) -> None:
    """PG_v1 and REINFORCE as printed; and a second step on a batch that the first step has touched."""
    a = algorithm(WORLDS["varying"], trajectories=1, baseline={"kind": "none"}, optimizer={"kind": "sgd"}, **settings)
    said = pgengine.label(
        TrainingSpec(environment=WORLDS["varying"], policy=LinearPolicySpec(), algorithm=a), facts_of("varying")
    )
    assert said.kind == "biased"
    exact = gradient_of("varying", 1.0)
    far, near = (distance(movement("varying", a, rate), exact) for rate in (0.1, 0.05))
    assert far > 1e-3
    assert far / near == pytest.approx(2.0, rel=0.2)
    frozen = a.model_copy(update={"within_episode": "frozen", "steps_per_batch": 1})
    assert distance(movement("varying", frozen, 0.1), exact) < TOLERANCE


@pytest.mark.parametrize("settings", [{"gamma": 1.0}, {"gamma": 0.0}])
def test_parameters_that_move_after_the_only_step_that_counts_are_exact(settings: Settings) -> None:
    world = "one_step" if settings["gamma"] == 1.0 else "varying"
    a = algorithm(
        WORLDS[world], trajectories=1, baseline={"kind": "none"}, optimizer={"kind": "sgd"}, within_episode="moving",
        **settings,
    )  # fmt: skip
    resolved = TrainingSpec(environment=WORLDS[world], policy=LinearPolicySpec(), algorithm=a)
    assert pgengine.label(resolved, facts_of(world)).kind == "exact"
    assert distance(movement(world, a, 0.1), gradient_of(world, a.gamma)) < TOLERANCE


@pytest.mark.parametrize(("world", "gamma", "kind"), [
    ("varying", 0.8, "biased"), ("ends_at_the_second", 0.8, "exact"), ("varying", 0.0, "exact"),
])  # fmt: skip
def test_a_bootstrap_is_biased_where_episodes_are_cut(world: str, gamma: float, kind: str) -> None:
    a = algorithm(WORLDS[world], trajectories=1, gamma=gamma, horizon="bootstrap", baseline={"kind": "linear_value"})
    resolved = TrainingSpec(environment=WORLDS[world], policy=LinearPolicySpec(), algorithm=a)
    assert pgengine.label(resolved, facts_of(world)).kind == kind
    guess = np.random.default_rng(5).normal(size=8)  # what the value says after the last state that was acted in

    def weights(rows: EnumeratedRows) -> np.ndarray:
        rewards = rows.rewards.copy()
        cut = trajectories_of(world).truncated[rows.members[:, 0]]
        rewards[:, -1] += a.credit_gamma * a.survival * np.where(cut, guess[rows.states[:, -1]], 0.0)
        past = np.random.default_rng(11).normal(size=(8, 6))[rows.states, time_of(rows.offsets)]
        return step_weights(BatchRows(rewards, rows.offsets, past), a).score

    found, exact = expectation(world, weights, 1), gradient_of(world, gamma)
    assert bias_of(found, exact) > 1e-3 if kind == "biased" else distance(found, exact) < TOLERANCE


# --- the wrong ones --------------------------------------------------------------------------------------------------
# Each is an estimator that some library ships or shipped, or a slip that is easily made. gamma is 1 where discounting
# is not the defect, so that nothing else can catch it.

Mutant = Callable[[EnumeratedRows], np.ndarray]


def _episodes(values: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    return [values[..., a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def trajectories_in(rows: EnumeratedRows) -> int:
    return len(rows.offsets) - 1


def to_go(rows: EnumeratedRows) -> np.ndarray:
    return reward_to_go(rows.rewards, rows.offsets, gamma=1.0)


def gamma_ignored(rows: EnumeratedRows) -> np.ndarray:
    return to_go(rows) / trajectories_in(rows)


def gamma_power_dropped(rows: EnumeratedRows) -> np.ndarray:
    return reward_to_go(rows.rewards, rows.offsets, gamma=0.8) / trajectories_in(rows)


def total_return_times_gamma_power(rows: EnumeratedRows) -> np.ndarray:
    return total_return(rows.rewards, rows.offsets, gamma=0.8) * 0.8 ** time_of(rows.offsets) / trajectories_in(rows)


def mean_over_steps(rows: EnumeratedRows) -> np.ndarray:
    return to_go(rows) / rows.offsets[-1]


def mean_over_own_steps(rows: EnumeratedRows) -> np.ndarray:
    lengths = np.diff(rows.offsets)
    return to_go(rows) / np.repeat(lengths, lengths) / len(lengths)


def own_episode_mean(rows: EnumeratedRows) -> np.ndarray:
    parts = [G - G.mean(axis=-1, keepdims=True) for G in _episodes(to_go(rows), rows.offsets)]
    return np.concatenate(parts, axis=-1) / len(parts)


def own_episode_whitening(rows: EnumeratedRows) -> np.ndarray:
    parts = [
        (G - G.mean(axis=-1, keepdims=True)) / (G.std(axis=-1, keepdims=True) + 1e-8)
        for G in _episodes(to_go(rows), rows.offsets)
    ]
    return np.concatenate(parts, axis=-1) / len(parts)


def batch_step_mean(rows: EnumeratedRows) -> np.ndarray:
    return (to_go(rows) - to_go(rows).mean(axis=-1, keepdims=True)) / trajectories_in(rows)


def batch_step_whitening(rows: EnumeratedRows) -> np.ndarray:
    G = to_go(rows)
    return (G - G.mean(axis=-1, keepdims=True)) / (G.std(axis=-1, keepdims=True) + 1e-8) / rows.offsets[-1]


def alive_mean_own_included(rows: EnumeratedRows) -> np.ndarray:
    parts = _episodes(to_go(rows), rows.offsets)
    result = [part.copy() for part in parts]
    for t in range(max(part.shape[-1] for part in parts)):
        alive = [part[..., t] for part in parts if part.shape[-1] > t]
        mean = np.mean(alive, axis=0)
        for part in result:
            if part.shape[-1] > t:
                part[..., t] -= mean
    return np.concatenate(result, axis=-1) / len(parts)


def returns_off_by_one(rows: EnumeratedRows) -> np.ndarray:
    parts = []
    # the first reward never, the last one twice: [210, 200, 100] for 1, 10, 100
    for r in _episodes(rows.rewards, rows.offsets):
        shifted = np.concatenate([r[..., 1:], r[..., -1:]], axis=-1)
        parts.append(np.cumsum(shifted[..., ::-1], axis=-1)[..., ::-1])
    return np.concatenate(parts, axis=-1) / trajectories_in(rows)


def everything_credited_with_the_first_reward(rows: EnumeratedRows) -> np.ndarray:
    parts = [np.broadcast_to(r[..., :1], r.shape) for r in _episodes(rows.rewards, rows.offsets)]
    return np.concatenate(parts, axis=-1) / len(parts)


WRONG: list[tuple[Mutant, int, float]] = [
    (gamma_ignored, 1, 0.8),
    (gamma_power_dropped, 1, 0.8),
    (total_return_times_gamma_power, 1, 0.8),
    (mean_over_steps, 2, 1.0),
    (mean_over_own_steps, 1, 1.0),
    (own_episode_mean, 1, 1.0),
    (own_episode_whitening, 1, 1.0),
    (batch_step_mean, 2, 1.0),
    (batch_step_whitening, 2, 1.0),
    (alive_mean_own_included, 2, 1.0),
    (returns_off_by_one, 1, 1.0),
    (everything_credited_with_the_first_reward, 1, 1.0),
]


@pytest.mark.parametrize(("mutant", "K", "gamma"), WRONG, ids=[mutant.__name__ for mutant, _, _ in WRONG])
def test_a_wrong_estimator_is_caught(mutant: Mutant, K: int, gamma: float) -> None:
    exact, found = gradient_of("varying", gamma), expectation("varying", mutant, K)
    assert distance(found, exact) > 1e-3, "not caught"
    assert bias_of(found, exact) > 1e-3, "only scaled"


def test_truncated_episodes_thrown_away_is_caught() -> None:
    trajectories = trajectories_of("varying")
    p = trajectory_probabilities(trajectories, torch.as_tensor(table_of("varying"))).numpy()
    kept = 1.0 / p[~trajectories.truncated].sum()

    def weights(rows: EnumeratedRows) -> np.ndarray:
        return to_go(rows) * np.where(trajectories.truncated[rows.members[:, 0]], 0.0, kept)[:, None]

    assert bias_of(expectation("varying", weights, 1), gradient_of("varying", 1.0)) > 1e-3


def test_the_score_of_an_action_that_was_not_taken_is_caught() -> None:
    """A loss that asks the policy for its mode has the same gradient whatever was done."""
    policy, trajectories = policy_of("varying"), trajectories_of("varying")
    parameters = parameters_in_double(policy)
    log_pi = log_policy(policy, parameters)
    p = trajectory_probabilities(trajectories, log_pi).detach()
    taken = torch.as_tensor(trajectories.taken)
    G = torch.as_tensor(np.cumsum(trajectories.rewards[:, ::-1], axis=1)[:, ::-1].copy())
    mode = log_pi.argmax(dim=1)[trajectories.observations]
    surrogate = (p[:, None] * G * taken * log_pi[trajectories.observations, mode]).sum()
    found = torch.autograd.grad(surrogate, parameters["theta"])[0].reshape(-1)
    assert bias_of(found, gradient_of("varying", 1.0)) > 1e-3


# --- the wrong ones of importance weighting --------------------------------------------------------------------------

PER_DECISION = {"importance": {"kind": "per_decision", "behaviour": OTHER}}


def _prefixes(rows: EnumeratedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w_{0:t}, the ratio of step t alone, and the whole trajectory's ratio, K = 1."""
    steps = rows.log_pi - rows.log_rho
    prefix = np.exp(np.cumsum(steps, axis=1))
    return prefix, np.exp(steps), prefix[:, -1:]


def _fixed_baseline(rows: EnumeratedRows) -> np.ndarray:
    baseline: np.ndarray = np.random.default_rng(11).normal(1.0, 2.0, size=(8, 6))[rows.states, time_of(rows.offsets)]
    return baseline


def _weighted_to_go(rows: EnumeratedRows) -> np.ndarray:
    return reward_to_go(_prefixes(rows)[0] * rows.rewards, rows.offsets, gamma=1.0)


def right_per_decision(rows: EnumeratedRows) -> np.ndarray:
    return _weighted_to_go(rows) - _prefixes(rows)[0] * _fixed_baseline(rows)


def right_trajectory(rows: EnumeratedRows) -> np.ndarray:
    return _prefixes(rows)[2] * (to_go(rows) - _fixed_baseline(rows))


def baseline_without_its_ratio(rows: EnumeratedRows) -> np.ndarray:
    return _weighted_to_go(rows) - _fixed_baseline(rows)


def baseline_with_the_ratio_before(rows: EnumeratedRows) -> np.ndarray:
    prefix, step, _ = _prefixes(rows)
    return _weighted_to_go(rows) - prefix / step * _fixed_baseline(rows)


def suffix_alone(rows: EnumeratedRows) -> np.ndarray:
    prefix, step, _ = _prefixes(rows)
    return _weighted_to_go(rows) / (prefix / step)


def prefix_alone(rows: EnumeratedRows) -> np.ndarray:
    return _prefixes(rows)[0] * to_go(rows)


def ratio_of_the_step_alone(rows: EnumeratedRows) -> np.ndarray:
    return _prefixes(rows)[1] * to_go(rows)


def no_ratio_at_all(rows: EnumeratedRows) -> np.ndarray:
    return to_go(rows)


def ratio_upside_down(rows: EnumeratedRows) -> np.ndarray:
    return to_go(rows) / _prefixes(rows)[2]


@pytest.mark.parametrize("form", [right_per_decision, right_trajectory])
def test_the_right_forms_of_ratios_pass(form: Mutant) -> None:
    found = expectation("varying", form, 1, behaviour=table_of("varying", 7))
    assert distance(found, gradient_of("varying", 1.0)) < TOLERANCE


@pytest.mark.parametrize("mutant", [
    baseline_without_its_ratio, baseline_with_the_ratio_before, suffix_alone, prefix_alone, ratio_of_the_step_alone,
    no_ratio_at_all, ratio_upside_down,
])  # fmt: skip
def test_a_wrong_form_of_ratios_is_caught(mutant: Mutant) -> None:
    found = expectation("varying", mutant, 1, behaviour=table_of("varying", 7))
    assert bias_of(found, gradient_of("varying", 1.0)) > 1e-3


def test_redrawing_until_the_effective_sample_size_passes_is_caught() -> None:
    """Batches that pass are not like all batches. With the same weights, all batches give the gradient."""
    a = algorithm(WORLDS["varying"], trajectories=2, baseline={"kind": "none"}, **PER_DECISION)
    rho = table_of("varying", 7)
    p = trajectory_probabilities(trajectories_of("varying"), torch.as_tensor(rho)).numpy()
    passing = 0.0

    def all_batches(rows: EnumeratedRows) -> np.ndarray:
        nonlocal passing
        found = weigh(rows, a)
        passing += float(p[rows.members].prod(axis=1) @ (found.effective_sample_size >= 1.5))
        return found.score

    assert distance(expectation("varying", all_batches, 2, behaviour=rho), gradient_of("varying", 1.0)) < TOLERANCE
    assert 0.1 < passing < 0.9

    def passing_batches(rows: EnumeratedRows) -> np.ndarray:
        found = weigh(rows, a)
        kept: np.ndarray = found.score * (found.effective_sample_size >= 1.5)[:, None] / passing
        return kept

    assert bias_of(expectation("varying", passing_batches, 2, behaviour=rho), gradient_of("varying", 1.0)) > 1e-3


@pytest.mark.parametrize("kind", ["trajectory", "per_decision"])
def test_weights_of_one_give_the_same_bits(kind: str) -> None:
    settings: Settings = {"trajectories": 2, "gamma": 0.9, "entropy": {"coefficient": 0.3}}
    plain = algorithm(WORLDS["varying"], **settings)
    weighted = algorithm(WORLDS["varying"], **settings, importance={"kind": kind})

    def compared(rows: EnumeratedRows) -> np.ndarray:
        one, other = weigh(rows, plain), weigh(rows, weighted)
        assert np.array_equal(one.score, other.score)
        assert one.entropy is not None
        assert other.entropy is not None
        assert np.array_equal(one.entropy, other.entropy)
        assert np.all(other.effective_sample_size == 2.0)
        return one.score

    expectation("varying", compared, 2)


@pytest.mark.parametrize("kind", ["trajectory", "per_decision"])
def test_ratios_have_mean_one(kind: str) -> None:
    """E_rho[w] = 1, for whole trajectories and up to every step: the score weights of a constant reward add up."""
    trajectories, rho = trajectories_of("varying"), table_of("varying", 7)
    p = trajectory_probabilities(trajectories, torch.as_tensor(rho)).numpy()
    a = algorithm(WORLDS["varying"], trajectories=1, baseline={"kind": "none"}, importance={"kind": kind})
    means = np.zeros(3)
    for i, length in enumerate(trajectories.lengths):
        steps = (trajectories.observations[i, :length], trajectories.actions[i, :length])
        given = BatchRows(
            trajectories.rewards[i, :length],
            np.array([0, length]),
            log_ratios=table_of("varying")[steps] - rho[steps],
        )
        ratio = step_weights(given, a).ratio
        assert ratio is not None
        means += p[i] * np.concatenate([ratio, np.full(3 - length, ratio[-1])])
    assert np.allclose(means, 1.0, atol=1e-12)


# --- the wrong ones of entropy ---------------------------------------------------------------------------------------


def test_a_bonus_called_an_objective_is_caught() -> None:
    bonus = algorithm(
        WORLDS["varying"], trajectories=1, baseline={"kind": "none"}, entropy={"coefficient": 0.6, "as": "bonus"}
    )
    assert bias_of(expectation("varying", weights_of(bonus), 1), gradient_of("varying", 1.0, 0.6)) > 1e-3


@pytest.mark.parametrize("credit", ["total_return", "reward_to_go"])
def test_a_bonus_is_the_objective_where_the_first_step_alone_counts(credit: str) -> None:
    bonus = {"credit": credit, "entropy": {"coefficient": 0.6, "as": "bonus"}}
    assert compare("varying", bonus | {"gamma": 0.0}, 2) == "exact"
    assert compare("one_step", bonus, 2) == "exact"
    assert compare("varying", bonus | {"gamma": 0.8}, 2) == "biased"


def test_later_entropies_without_the_gradient_of_the_present_one_are_caught() -> None:
    """What `-mean(log pi)` as a loss gives: its expected gradient is zero."""
    a = algorithm(WORLDS["varying"], trajectories=1, baseline={"kind": "none"}, entropy={"coefficient": 0.6})
    found = expectation("varying", lambda rows: weigh(rows, a).score, 1)
    assert bias_of(found, gradient_of("varying", 1.0, 0.6)) > 1e-3


def test_entropy_without_the_power_of_gamma_is_caught() -> None:
    a = algorithm(WORLDS["varying"], trajectories=1, gamma=0.8, baseline={"kind": "none"}, entropy={"coefficient": 0.6})

    def weights(rows: EnumeratedRows) -> tuple[np.ndarray, np.ndarray]:
        found = weigh(rows, a)
        assert found.entropy is not None
        return found.score, found.entropy / 0.8 ** time_of(rows.offsets)

    assert bias_of(expectation("varying", weights, 1), gradient_of("varying", 0.8, 0.6)) > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_batch_mean_of_returns_own_included_only_scales(gamma: float) -> None:
    """Not wrong in direction: exactly 1 - 1/K of the gradient."""

    def weights(rows: EnumeratedRows) -> np.ndarray:
        R = total_return(rows.rewards, rows.offsets, gamma=gamma)
        mean = R[..., rows.offsets[:-1]].mean(axis=-1, keepdims=True)
        return (R - mean) / trajectories_in(rows)

    assert distance(expectation("varying", weights, 2), 0.5 * gradient_of("varying", gamma)) < TOLERANCE
