"""Labels and weights where nothing can be told apart: equal rewards, one state, one action, fewest trajectories.

A label speaks of every environment of which its facts are true, so it must hold in these as well. Nothing is random
here: expectations are sums over all batches, and the worlds are drawn once.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgengine
from pgengine.estimators import BatchRows, step_weights
from pgengine.exact import enumerate_trajectories, exact_gradient, expected_estimate, log_policy, parameters_in_double
from pgengine.policies.normaliser import merged, new_buffers, normalised
from pgengine.spaces import BoxSpace
from pgengine.spec import AlgorithmSpec, LinearPolicySpec, TabularSpec, TrainingSpec
from tests.engine.test_oracle import (
    BASELINES,
    CREDITS,
    ENTROPIES,
    MEANS,
    OTHER,
    STANDARDS,
    TOLERANCE,
    Settings,
    joined,
    weights_of,
)
from tests.engine.worlds import algorithm, bandit, small_mdp, steady_mdp, table_policy

RATIOS: list[Settings] = [
    {},
    {"importance": {"kind": "trajectory", "behaviour": OTHER}},
    {"importance": {"kind": "per_decision", "behaviour": OTHER, "clip": 1.0}},
    {"importance": {"kind": "trajectory", "behaviour": OTHER, "self_normalise": True}},
]
SHARE_FOR_SIGN = 1e-6  # of the others' credits: below it no variation was meant


def one_path(horizon: int, reward: float, *, actions: int = 1) -> TabularSpec:
    """One state from which every action leads back to it, for the same reward."""
    return TabularSpec(
        transitions=[[[1.0]] * actions], rewards=[[reward] * actions], initial=[1.0], terminal=[], horizon=horizon
    )


def with_rewards(spec: TabularSpec, rewards: list[float], seed: int) -> TabularSpec:
    """The same transitions, with rewards of each action drawn from a short list."""
    shape = np.shape(spec.transitions)[:2]
    drawn = np.random.default_rng(seed).choice(rewards, size=shape).tolist()
    return spec.model_copy(update={"transition_rewards": None, "rewards": drawn})


def worlds() -> dict[str, TabularSpec]:
    """By name; the number of batches of three stays small."""
    found = {
        "one action": one_path(2, 0.1),
        "one state, two actions": one_path(2, 0.1, actions=2),
        "nothing paid": one_path(2, 0.0, actions=2),
        "arms that pay alike": bandit(1.0, 1.0),
        "arms that pay nothing": bandit(0.0, 0.0, 0.0),
        "arms that differ": bandit(0.0, 1.0),
    }
    for seed in range(3):
        short = small_mdp(seed, starts=1, horizon=2)
        found[f"lengths vary, few rewards {seed}"] = with_rewards(short, [0.0, 1.0], seed)
        found[f"lengths vary, all alike {seed}"] = with_rewards(short, [0.1 * seed], seed)
        found[f"length 2, few rewards {seed}"] = with_rewards(steady_mdp(seed), [0.0, 0.3, 0.3], seed)
    return found


WORLDS = worlds()


def holds(spec: TabularSpec, settings: Settings, K: int) -> str | None:
    """The kind of a label that is true; None if the settings are refused."""
    whole = AlgorithmSpec.model_validate({"trajectories": K, "baseline": {"kind": "none"}} | settings)
    facts = pgengine.describe(spec)
    try:
        resolved = pgengine.resolve(TrainingSpec(environment=spec, policy=LinearPolicySpec(), algorithm=whole), facts)
    except pgengine.SpecError:
        return None
    a, said = resolved.algorithm, pgengine.label(resolved, facts)
    policy, mdp = table_policy(spec), pgengine.TabularMDP(spec)
    other = table_policy(spec, 7) if a.importance.kind != "none" else policy
    rho = log_policy(other, parameters_in_double(other)).detach().numpy()
    exact = exact_gradient(policy, mdp, gamma=a.gamma, entropy=said.objective.entropy)
    trajectories = enumerate_trajectories(mdp, survival=a.survival)
    found = expected_estimate(policy, trajectories, weights_of(a), K=K, behaviour=rho)
    what = f"K = {K}, {settings}: labelled {said.kind} for {[reason.code for reason in said.reasons]}"
    if said.factor is not None:
        assert float((found - said.factor * exact).abs().max()) < TOLERANCE, what
    elif said.kind == "scaled_unknown":
        square = float(exact @ exact)
        scale = 0.0 if square < TOLERANCE**2 else float(found @ exact) / square
        assert float((found - scale * exact).abs().max()) < TOLERANCE, what
        assert scale >= 0.0, what
        if square > TOLERANCE**2 and others_differ(spec, a, trajectories):
            assert scale > 0.0, what
    return said.kind


def others_differ(spec: TabularSpec, a: AlgorithmSpec, trajectories: pgengine.exact.Trajectories) -> bool:
    """Whether two trajectories can be credited differently, from first principles: rewards, entropies and ratios."""
    policy, other = table_policy(spec), table_policy(spec, 7)
    pi = log_policy(policy, parameters_in_double(policy)).detach().numpy()
    rho = log_policy(other, parameters_in_double(other)).detach().numpy()
    entropies = -(np.exp(pi) * pi).sum(axis=1)
    paid = a.entropy is not None and a.entropy.as_ == "objective"
    credits = []
    for i, length in enumerate(trajectories.lengths):
        seen, did = trajectories.observations[i, :length], trajectories.actions[i, :length]
        credit = 0.0
        for t in range(length):
            later = entropies[seen[t + 1]] if paid and t + 1 < length else 0.0
            coefficient = a.entropy_coefficient * a.credit_gamma * later
            credit += a.credit_gamma**t * (trajectories.rewards[i, t] + coefficient)
        if a.importance.kind != "none":
            credit *= float(np.exp((pi[seen, did] - rho[seen, did]).sum()))
        credits.append(credit)
    return max(credits) - min(credits) > SHARE_FOR_SIGN * max(map(abs, credits))


STANDARDISED: list[Settings] = [
    {"credit": "total_return", "standardise": "leave_one_out", **entropy, **ratio}
    for entropy in ENTROPIES
    for ratio in (RATIOS[0], RATIOS[1], RATIOS[3])
]


@pytest.mark.parametrize("world", ["one action", "one state, two actions", "arms that pay alike", "arms that differ"])
def test_the_deviation_of_the_others_scales_by_what_is_never_negative(world: str) -> None:
    kinds = {holds(WORLDS[world], settings, 3) for settings in STANDARDISED}
    assert "scaled_unknown" in kinds


def test_where_the_returns_of_others_never_differ_every_estimate_is_zero_and_the_label_says_so() -> None:
    """A bandit whose arms pay alike: the entropy alone has a gradient, and its weight is zero with all others."""
    spec = bandit(1.0, 1.0)
    policy = pgengine.create_policy(
        LinearPolicySpec(initial_parameters={"theta": [[0.5, -0.5], [0.0, 0.0]]}), spec, pgengine.describe(spec), seed=0
    )
    a = algorithm(
        spec, trajectories=3, credit="total_return", baseline={"kind": "none"}, entropy={"coefficient": 0.5},
        standardise="leave_one_out",
    )  # fmt: skip
    report = pgengine.check_gradient(spec, policy, [a], mode="enumerate").estimators[0]
    assert report.gradient_norm == pytest.approx(0.139, abs=1e-3)
    assert (report.mean_norm, report.variance_trace, report.scale) == (0.0, 0.0, 0.0)
    assert (report.verdict, report.as_labelled, report.label.kind) == ("agrees", True, "scaled_unknown")
    assert "zero where the others' returns never differ" in report.label.reasons[0].message
    played = pgengine.check_gradient(spec, policy, [a], mode="sample", batches=200).estimators[0]
    assert (played.mean_norm, played.as_labelled) == (0.0, True)


def test_estimates_that_are_all_the_same_have_no_noise_to_compare_a_signal_with() -> None:
    """Arms that pay alike: what is left is the gradient of the entropy, which no sampling changes."""
    spec = bandit(0.1, 0.1, 0.1)
    a = algorithm(spec, trajectories=3, entropy={"coefficient": 0.3})
    for mode in ("enumerate", "sample"):
        report = pgengine.check_gradient(spec, table_policy(spec), [a], mode=mode, batches=50).estimators[0]  # type: ignore[arg-type]
        assert report.mean_norm > 0.01
        assert report.signal_to_noise is None
        assert report.as_labelled


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_the_label_holds_where_little_can_be_told_apart(world: str) -> None:
    """Some of all settings, with as few trajectories as they take; and with one more."""
    generator = np.random.default_rng(sum(map(ord, world)))
    checked = 0
    for _ in range(40):
        parts = [
            choices[generator.integers(len(choices))]
            for choices in (CREDITS, MEANS, BASELINES, ENTROPIES, STANDARDS, RATIOS)
        ]
        settings = joined(*parts)
        fewest = next((K for K in (1, 2, 3) if holds(WORLDS[world], settings, K) is not None), None)
        checked += fewest is not None
        if fewest in (1, 2):
            holds(WORLDS[world], settings, fewest + 1)
    assert checked > 12


# --- rounding is not variation ----------------------------------------------------------------------------------------


@st.composite
def alike(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """Episodes with the same rewards in other orders, some of which cancel: their sums differ by rounding alone."""
    number = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 2))
    rewards = draw(st.lists(number, min_size=1, max_size=12))
    if draw(st.booleans()):
        rewards += [-reward for reward in rewards]
    K = draw(st.integers(3, 7))
    lift = draw(st.sampled_from([1e-9, 1.0, 1e9]))
    orders = [draw(st.permutations(rewards)) for _ in range(K)]
    return lift * np.concatenate(orders), len(rewards) * np.arange(K + 1), lift


@given(alike(), st.sampled_from(["leave_one_out", "batch"]), st.sampled_from(BASELINES[:11]))
def test_returns_that_differ_by_rounding_alone_have_weights_of_exactly_zero(
    episodes: tuple[np.ndarray, np.ndarray, float], standardise: str, baseline: Settings
) -> None:
    rewards, offsets, _ = episodes
    a = AlgorithmSpec.model_validate(
        {"credit": "total_return", "standardise": standardise, "baseline": baseline, "trajectories": len(offsets) - 1}
    )
    assert not step_weights(BatchRows(rewards, offsets), a).score.any()


@given(
    st.floats(-10, 10, allow_nan=False), st.integers(1, 40), st.integers(2, 9), st.floats(0.0, 1.0),
    st.sampled_from(["none", "batch"]), st.sampled_from(["leave_one_out", "batch_mean"]),
    st.sampled_from(["time_step", "alive"]),
)  # fmt: skip
def test_a_single_path_has_weights_of_exactly_zero(
    reward: float, horizon: int, K: int, gamma: float, standardise: str, baseline: str, over: str
) -> None:
    """Reward-to-go against the mean at the same time: such as 0.1 seven times, with three trajectories."""
    a = AlgorithmSpec.model_validate({
        "trajectories": K, "gamma": gamma, "standardise": standardise, "baseline": {"kind": baseline, "over": over},
    })  # fmt: skip
    for paid in (reward, 0.1, 1e9 * reward):
        rows = BatchRows(np.full(K * horizon, paid), horizon * np.arange(K + 1))
        assert not step_weights(rows, a).score.any()


@pytest.mark.parametrize("standardise", ["none", "batch"])
def test_where_nothing_is_better_the_policy_stays_where_it_is(standardise: str) -> None:
    """Adam divides by the size of the gradient, so that rounding would move it by whole steps."""
    spec = TrainingSpec.model_validate({
        "environment": one_path(7, 1e8 + 0.1, actions=2), "policy": {"kind": "linear"}, "stop": {"updates": 20},
        "algorithm": {"trajectories": 3, "standardise": standardise, "optimizer": {"kind": "adam"}},
    })  # fmt: skip
    for update in pgengine.train(spec):
        assert update.metrics["gradient_norm"] == 0.0
        assert "signal_to_noise" not in update.metrics
    assert not update.policy.parameters["theta"].any()


def test_variation_that_is_small_but_real_is_kept() -> None:
    a = AlgorithmSpec.model_validate({"credit": "total_return", "standardise": "leave_one_out", "trajectories": 4})
    rewards = 1.0 + 1e-9 * np.array([1.0, 2.0, 4.0, 8.0])
    assert step_weights(BatchRows(rewards, np.arange(5)), a).score.all()


def test_entropies_in_32_bits_that_differ_by_rounding_are_no_variation() -> None:
    a = AlgorithmSpec.model_validate({
        "credit": "total_return", "standardise": "leave_one_out", "trajectories": 4, "entropy": {"coefficient": 0.5},
        "baseline": {"kind": "none"},
    })  # fmt: skip
    entropies = np.float32(1.0986123) + np.spacing(np.float32(1.0)) * np.arange(8, dtype=np.float32)
    rows = BatchRows(np.zeros(8), 2 * np.arange(5), entropies=entropies.astype(np.float64))
    weights = step_weights(rows, a)
    assert not weights.score.any()
    assert weights.entropy is not None
    assert not weights.entropy.any()


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, 1e12 + 0.1, -3e15 - 0.1])
def test_an_observation_that_never_varies_is_normalised_to_almost_nothing(value: float) -> None:
    space = BoxSpace(shape=[1], low=[None], high=[None], dtype="float64")
    buffers = new_buffers(space)
    for rows in (7, 100, 3):
        buffers = merged(buffers, np.full((rows, 1), value))
    assert np.abs(normalised(buffers, np.full((5, 1), value))).max() < 1e-3
