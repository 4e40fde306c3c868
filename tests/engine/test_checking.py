"""Gradient checks: the test has the odds it states, and says of estimators what enumeration and theory say."""

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Literal

import numpy as np
import pytest

import pgengine
from pgengine.checking import Moments, bias_test, check_steps, refuse
from pgengine.checking.enumerating import enumerated
from pgengine.checking.running import _of_enumerated, _of_sampled
from pgengine.checking.sampling import Sampled, Scores, estimates, play, sample, warmed_up
from pgengine.checking.subject import Subject, open_subject
from pgengine.checking.tails import tails_of
from pgengine.contributions import Rows, moving_sums
from pgengine.estimation import Estimator, gradient
from pgengine.intervals import student_quantile
from pgengine.spec import (
    AlgorithmSpec,
    GradientCheckSpec,
    ImportanceSpec,
    LinearPolicySpec,
    LqrSpec,
    StopSpec,
    TabularSpec,
    TrainingSpec,
)
from tests.engine.worlds import CARTPOLE, bandit, random_mdp, table_policy

MDP = random_mdp(0)
LQR = LqrSpec(
    dynamics=[[0.9, 0.2], [0.0, 0.8]],
    control=[[0.0], [1.0]],
    state_cost=[[1.0, 0.0], [0.0, 1.0]],
    action_cost=[[0.1]],
    noise_deviation=[0.1, 0.1],
    horizon=4,
)
GAINS = LinearPolicySpec(initial_parameters={"theta": [[-0.1], [-0.3], [0.05]]})


def estimator(**settings: object) -> AlgorithmSpec:
    return AlgorithmSpec.model_validate({"gamma": 0.9, "trajectories": 2, **settings})


PLAIN = {"baseline": {"kind": "none"}}
EXACT = {
    "leave-one-out": estimator(),
    "total return": estimator(credit="total_return"),
    "no baseline": estimator(**PLAIN),
    "moving average": estimator(baseline={"kind": "moving_average"}),
    "linear value": estimator(baseline={"kind": "linear_value"}),
    "neural value": estimator(baseline={"kind": "neural_value", "hidden": [8]}),
    "entropy": estimator(entropy={"coefficient": 0.3}),
    "per decision": estimator(importance={"kind": "per_decision", "behaviour": {"kind": "mixture", "epsilon": 0.5}}),
    "trajectory": estimator(importance={"kind": "trajectory", "behaviour": {"kind": "mixture", "epsilon": 0.5}}),
    "older": estimator(importance={"kind": "trajectory", "behaviour": {"kind": "older"}}),
    "termination": estimator(discount="termination"),
    "batch mean": estimator(gamma=1.0, credit="total_return", baseline={"kind": "batch_mean"}),
}
BIASED = {
    "discount dropped": estimator(gamma=0.5, discount_weight="none"),
    "own steps": estimator(mean_over="own_steps"),
    "bonus": estimator(entropy={"coefficient": 0.5, "as": "bonus"}),
    "clipped": estimator(
        importance={"kind": "trajectory", "behaviour": {"kind": "mixture", "epsilon": 0.9}, "clip": 1.0}
    ),
    "moving": estimator(
        trajectories=1, within_episode="moving", optimizer={"kind": "sgd", "learning_rate": 2.0}, **PLAIN
    ),
}


def subject_of(spec: GradientCheckSpec, policy: pgengine.Policy | None = None) -> Subject:
    return open_subject(spec, pgengine.open_environment(spec.environment), policy, None)


def last(subject: Subject, spec: GradientCheckSpec) -> Sampled:
    """What the first estimator gathered in the end."""
    gathered: list[Sampled] = []
    for _, so_far in sample(subject, spec):
        gathered = so_far
    return gathered[0]


# --- the test ---------------------------------------------------------------------------------------------------------


def test_moments_in_chunks_are_those_of_the_whole() -> None:
    samples = np.random.default_rng(0).gamma(0.5, size=(1000, 3)) * [1.0, 1e-3, 1e4] + [0.0, 5.0, -1e5]
    moments = Moments(3)
    for part in np.split(samples, [1, 2, 10, 500, 501]):
        moments.add(part)
    centred = samples - samples.mean(axis=0)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(samples.mean(axis=0), rel=1e-12)
    assert moments.variance == pytest.approx(samples.var(axis=0, ddof=1), rel=1e-9)
    assert moments.skewness == pytest.approx((centred**3).mean(axis=0) / samples.std(axis=0) ** 3, rel=1e-6)
    assert moments.largest == np.abs(samples).max()


def of_coin(count: int, n: int) -> Moments:
    moments = Moments(1)
    for value, times in ((1.0, count), (0.0, n - count)):
        if times:
            moments.add(np.full((times, 1), value))
    return moments


@pytest.mark.parametrize("false_alarm", [1e-3, 1e-6])
@pytest.mark.parametrize("n", [8, 200, 2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_odds_of_a_false_alarm_are_at_most_those_stated(n: int, false_alarm: float) -> None:
    """Exactly, by summing over all counts of a coin of known odds; rare events, where the normal fails, included."""
    for p in (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.5):
        odds = 0.0
        for count in range(n + 1):
            log_chance = (
                math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
                + count * math.log(p) + (n - count) * math.log1p(-p)
            )  # fmt: skip
            if log_chance > math.log(1e-13):
                alarm = bias_test(of_coin(count, n), np.array([p]), false_alarm=false_alarm).seen
                odds += alarm * math.exp(log_chance)
        assert odds <= 1.1 * false_alarm


def test_the_threshold_is_shared_by_all_parameters() -> None:
    moments = Moments(5)
    moments.add(np.random.default_rng(0).normal(size=(400, 5)) * [1.0, 2.0, 0.0, 3.0, 0.0])
    test = bias_test(moments, np.zeros(5), false_alarm=1e-3)
    assert test.tested.tolist() == [True, True, False, True, False]
    assert test.threshold == pytest.approx(student_quantile(1 - 1e-3 / 6, 399))
    assert test.threshold == pytest.approx(NormalDist().inv_cdf(1 - 1e-3 / 6), rel=0.02)
    worst = np.argmax(np.abs(moments.mean[[0, 1, 3]]) / np.sqrt(moments.variance[[0, 1, 3]]))
    assert test.worst == [0, 1, 3][int(worst)]


def test_a_bias_of_the_smallest_detectable_size_is_seen_with_the_stated_power() -> None:
    """400 independent tests of 300 normal samples; the odds of each to see the bias are 95%.

    Binomial(400, 0.95) is below 355 or above 398 with odds below 1e-6.
    """
    generator = np.random.default_rng(1)
    seen = 0
    for _ in range(400):
        samples = generator.normal(size=(300, 4)) * [1.0, 0.5, 0.1, 0.7]
        moments = Moments(4)
        moments.add(samples)
        size = bias_test(moments, np.zeros(4), false_alarm=1e-4).smallest_detectable
        biased = Moments(4)
        biased.add(samples + np.array([size, 0.0, 0.0, 0.0]))  # where the noise is largest
        seen += bias_test(biased, np.zeros(4), false_alarm=1e-4).seen
    assert 355 <= seen <= 398


def test_a_coordinate_that_never_moves_is_accused_only_if_its_target_is_large() -> None:
    moments = Moments(2)
    moments.add(np.stack([np.random.default_rng(0).normal(size=2000), np.zeros(2000)], axis=1))
    assert not bias_test(moments, np.array([0.0, 1e-3]), false_alarm=1e-6).seen  # too rare to be seen, perhaps
    test = bias_test(moments, np.array([0.0, 1.0]), false_alarm=1e-6)
    assert test.seen
    assert test.worst == 1
    assert not test.by_quantile[1]


def test_where_nothing_moved_nothing_is_told() -> None:
    moments = Moments(2)
    moments.add(np.zeros((500, 2)))
    test = bias_test(moments, np.array([0.1, 0.2]), false_alarm=1e-6)
    assert (test.seen, test.worst, test.smallest_detectable) == (False, None, None)


@pytest.mark.parametrize("n", [100, 200, 2000])
def test_with_what_is_known_of_a_rare_event_the_odds_hold(n: int) -> None:
    """-1, and 499 with odds of 0.002, five times over: expectation 0, skewness 22.3. False alarms at 1e-3.

    Exactly for each coordinate by itself, at the odds of five, summed over all counts of the event.
    """
    odds = 0.0
    for count in range(n + 1):
        log_chance = (
            math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
            + count * math.log(0.002) + (n - count) * math.log1p(-0.002)
        )  # fmt: skip
        if log_chance > math.log(1e-13):
            moments = Moments(5)
            for value, times in ((499.0, count), (-1.0, n - count)):
                if times:
                    moments.add(np.full((times, 5), value))
            test = bias_test(
                moments, np.zeros(5), false_alarm=1e-3, bounds=np.full(5, 499.0), skewness=np.full(5, 22.3)
            )
            odds += 5 * test.seen * math.exp(log_chance)
    assert odds <= 1e-3


def test_of_what_is_skew_and_without_bounds_nothing_is_told() -> None:
    moments = Moments(2)
    moments.add(np.random.default_rng(0).normal(size=(2000, 2)))
    bounds, skewness = np.full(2, math.inf), np.array([0.0, 1e3])
    test = bias_test(moments, np.array([0.0, 5.0]), false_alarm=1e-6, bounds=bounds, skewness=skewness)
    assert (test.seen, test.smallest_detectable, test.by_quantile.tolist()) == (False, None, [True, False])
    assert bias_test(moments, np.array([5.0, 0.0]), false_alarm=1e-6, bounds=bounds, skewness=skewness).seen


# --- enumerated -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exact_estimators_agree_and_biased_ones_differ_over_all_batches() -> None:
    report = pgengine.check_gradient(MDP, table_policy(MDP), [*EXACT.values(), *BIASED.values()], mode="enumerate")
    verdicts = {name: e.verdict for name, e in zip([*EXACT, *BIASED], report.estimators, strict=True)}
    assert verdicts == dict.fromkeys(EXACT, "agrees") | dict.fromkeys(BIASED, "differs")
    assert all(e.as_labelled for e in report.estimators)
    of_mean = report.estimators[len(EXACT) - 1]
    assert of_mean.scale == pytest.approx(0.5, abs=1e-9)  # 1 - 1/K
    assert of_mean.angle_degrees == pytest.approx(0.0, abs=1e-5)
    assert report.gradient == pytest.approx(report.estimators[0].mean, abs=1e-12)


@pytest.mark.slow
def test_enumeration_of_random_rewards_and_aliased_observations() -> None:
    spec = TabularSpec(
        transitions=[[[0.5, 0.5, 0.0], [0.0, 0.3, 0.7]], [[0.2, 0.4, 0.4], [0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]] * 2],
        reward_values=[-1.0, 0.5, 2.0],
        reward_probabilities=[[[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], [[0.0, 0.5, 0.5], [0.1, 0.1, 0.8]], [[0, 0, 1]] * 2],
        initial=[0.7, 0.3, 0.0],
        terminal=[2],
        horizon=3,
        observations=[0, 0, 1],
    )
    report = pgengine.check_gradient(spec, None, estimator(baseline={"kind": "linear_value"}), mode="enumerate")
    assert report.estimators[0].verdict == "agrees"
    assert report.gradient_norm > 0.0


@pytest.mark.slow
def test_a_wrong_label_is_contradicted_by_enumeration() -> None:
    spec = GradientCheckSpec(
        environment=MDP, estimators=[estimator(), *BIASED.values(), EXACT["batch mean"]], mode="enumerate"
    )
    subject = subject_of(spec, table_policy(MDP))
    exact = subject.candidates[0].label
    for candidate in subject.candidates[1:]:
        report = _of_enumerated(replace(candidate, label=exact), enumerated(subject, candidate, 0), subject.policy, 0)
        assert (report.verdict, report.as_labelled) == ("differs", False)


def test_an_unknown_factor_must_be_positive_and_leave_the_direction_alone() -> None:
    """Standardised by the deviation of the others: along the gradient, but nobody knows how long."""
    spec = GradientCheckSpec(
        environment=random_mdp(1, horizon=2),
        estimators=[estimator(credit="total_return", standardise="leave_one_out", trajectories=3)],
        mode="enumerate",
    )
    subject = subject_of(spec, table_policy(random_mdp(1, horizon=2)))
    (candidate,) = subject.candidates
    moments = enumerated(subject, candidate, 0)
    report = _of_enumerated(candidate, moments, subject.policy, 0)
    assert candidate.label.kind == "scaled_unknown"
    assert report.verdict == "agrees"
    assert report.scale is not None
    assert report.scale > 0.0
    assert _of_enumerated(candidate, replace(moments, mean=-moments.mean), subject.policy, 0).verdict == "differs"
    assert (
        _of_enumerated(candidate, replace(moments, mean=moments.mean + 0.1 * np.arange(6)), subject.policy, 0).verdict
        == "differs"
    )


def test_a_unit_signal_to_noise_ratio_needs_as_many_trajectories_whatever_the_batch() -> None:
    """Without a baseline the estimate is a mean of independent ones: its variance is that of one over K."""
    one, two = pgengine.check_gradient(
        MDP, table_policy(MDP), [estimator(trajectories=1, **PLAIN), estimator(**PLAIN)], mode="enumerate"
    ).estimators
    assert two.variance_trace == pytest.approx(one.variance_trace / 2, rel=1e-9)
    assert one.signal_to_noise == pytest.approx(one.gradient_norm**2 / one.variance_trace, rel=1e-9)
    assert one.trajectories_for_unit_signal_to_noise == pytest.approx(1 / one.signal_to_noise, rel=1e-9)
    assert two.trajectories_for_unit_signal_to_noise == pytest.approx(1 / one.signal_to_noise, rel=1e-9)


# --- sampled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_estimates_in_bulk_are_those_of_training() -> None:
    policy = table_policy(MDP)
    algorithms = [*EXACT.values(), estimator(mean_over="own_steps"), estimator(trajectories=5)]
    spec = GradientCheckSpec(environment=MDP, estimators=algorithms)
    subject = subject_of(spec, policy)
    for candidate in subject.candidates:
        K, survival = candidate.algorithm.trajectories, candidate.algorithm.survival
        batch = play(subject.environment, subject.actor(candidate.algorithm), 3, 1, 4 * K, survival)
        used = warmed_up(candidate.algorithm, subject, 3, warm_up=batch)
        found = estimates(used, policy, batch, Scores(subject))
        for number in range(4):
            part = batch.episodes(number * K, (number + 1) * K)
            alone = gradient(policy, part, used.weigh(policy, part).weights)
            assert np.allclose(found[number], alone, rtol=0, atol=1e-12)


def test_estimates_row_by_row_are_those_of_training() -> None:
    spec = GradientCheckSpec(environment=LQR, policy=GAINS, estimators=[estimator(entropy={"coefficient": 0.1})])
    subject = subject_of(spec)
    (candidate,) = subject.candidates
    batch = play(subject.environment, subject.policy, 0, 1, 6, 1.0)
    used = Estimator(candidate.algorithm, subject.environment.facts, seed=0)
    found = estimates(used, subject.policy, batch, Scores(subject))
    for number in range(3):
        part = batch.episodes(2 * number, 2 * number + 2)
        alone = gradient(subject.policy, part, used.weigh(subject.policy, part).weights)
        assert np.allclose(found[number], alone, rtol=0, atol=1e-9)


def test_a_moving_step_is_the_one_that_training_makes() -> None:
    training = TrainingSpec(environment=MDP, policy=LinearPolicySpec(), algorithm=BIASED["moving"], seed=5)
    for update in pgengine.train(training.model_copy(update={"stop": StopSpec(updates=5, target_return=None)})):
        record = update.record
        weights = record.weighed.weights
        (moved,) = moving_sums(Rows(record.before, record.batch), weights.score, weights.entropy, rate=2.0)
        made = update.policy.parameters["theta"].astype(np.float64) - record.before.parameters["theta"]
        made /= 2.0
        assert np.allclose(moved, made.ravel(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_sampling_agrees_with_enumeration() -> None:
    """400 batches, false alarms at 1e-6 for the means; the trace of the variance is within 40%, ten standard errors."""
    names = ("leave-one-out", "entropy", "per decision", "termination", "moving average")
    algorithms = [EXACT[name] for name in names]
    sampled = pgengine.check_gradient(MDP, table_policy(MDP), algorithms, batches=400)
    every = pgengine.check_gradient(MDP, table_policy(MDP), algorithms, mode="enumerate")
    for found, exact in zip(sampled.estimators, every.estimators, strict=True):
        assert (found.verdict, found.as_labelled) == ("no_bias_seen", True)
        assert found.variance_trace == pytest.approx(exact.variance_trace, rel=0.4)
        assert found.statistic is not None
        assert found.threshold is not None
        assert found.statistic < found.threshold
        assert found.standard_error == pytest.approx(math.sqrt(found.variance_trace / 400))


@pytest.mark.slow
def test_exact_estimators_pass_and_biased_ones_are_seen_in_many_batches() -> None:
    """3,000 batches; an exact estimator is called biased with odds of 1e-6. The biases are those of enumeration."""
    exact = {name: EXACT[name] for name in ("total return", "per decision", "termination")}
    report = pgengine.check_gradient(MDP, table_policy(MDP), [*exact.values(), *BIASED.values()], batches=3000)
    verdicts = {name: e.verdict for name, e in zip([*exact, *BIASED], report.estimators, strict=True)}
    assert verdicts == dict.fromkeys(exact, "no_bias_seen") | dict.fromkeys(BIASED, "bias_seen")
    assert all(e.as_labelled for e in report.estimators)


@pytest.mark.slow
def test_gaussian_policies_are_checked_on_a_linear_system() -> None:
    """2,000 batches of 8; false alarms at 1e-6. Without gamma^t the credit of late steps is too large."""
    settings: list[dict[str, object]] = [
        {},
        {"entropy": {"coefficient": 0.5}},
        {"gamma": 0.5, "discount_weight": "none"},
    ]
    algorithms = [estimator(trajectories=8, **changed) for changed in settings]
    longer = LQR.model_copy(update={"horizon": 10})
    report = pgengine.check_gradient(longer, GAINS, algorithms, batches=2000)
    assert [e.verdict for e in report.estimators] == ["no_bias_seen", "no_bias_seen", "bias_seen"]
    assert report.parameters == 4
    assert report.parameter_names == ["log_sigma[0]", "theta[0,0]", "theta[1,0]", "theta[2,0]"]


def test_a_known_bias_is_seen() -> None:
    """Estimates of an exact estimator, moved by twice the smallest detectable bias in one parameter at a time.

    They are then missed with odds below 1e-15, if the statement of power is right.
    """
    spec = GradientCheckSpec(environment=MDP, estimators=[estimator()], batches=500)
    policy = table_policy(MDP)
    subject = subject_of(spec, policy)
    (candidate,) = subject.candidates
    gathered = last(subject, spec)
    clean = _of_sampled(candidate, gathered, policy, spec.false_alarm, 0)
    assert (clean.verdict, clean.as_labelled) == ("no_bias_seen", True)
    assert clean.smallest_detectable_bias is not None
    for index in range(4):  # of the terminal state nothing is ever seen
        moved = candidate.gradient.copy()
        moved[index] += 2 * clean.smallest_detectable_bias
        report = _of_sampled(replace(candidate, gradient=moved), gathered, policy, spec.false_alarm, 0)
        assert (report.verdict, report.as_labelled) == ("bias_seen", False)
        assert report.worst_parameter == f"theta[{index // 2},{index % 2}]"


@pytest.mark.slow
def test_a_wrong_factor_is_seen() -> None:
    """1,000 batches of a batch mean that is said to be exact: it is half the gradient."""
    spec = GradientCheckSpec(environment=bandit(0.0, 1.0), estimators=[EXACT["batch mean"], estimator()], batches=1000)
    subject = subject_of(spec)
    candidate = subject.candidates[0]
    gathered = last(subject, spec)
    assert _of_sampled(candidate, gathered, subject.policy, 1e-6, 0).as_labelled
    wrong = replace(candidate, label=subject.candidates[1].label)
    assert not _of_sampled(wrong, gathered, subject.policy, 1e-6, 0).as_labelled


@pytest.mark.slow
def test_the_direction_of_an_unknown_factor_is_tested() -> None:
    """500 batches: along the gradient nothing is seen; turned round, or moved aside, it is."""
    spec = GradientCheckSpec(
        environment=bandit(0.0, 1.0, 0.3),
        estimators=[estimator(credit="total_return", standardise="leave_one_out", trajectories=8)],
        batches=500,
    )
    subject = subject_of(spec)
    (candidate,) = subject.candidates
    sampled = last(subject, spec)
    assert candidate.label.kind == "scaled_unknown"
    assert _of_sampled(candidate, sampled, subject.policy, 1e-6, 0).verdict == "no_bias_seen"
    turned = last(replace(subject, candidates=[replace(candidate, gradient=-candidate.gradient)]), spec)
    assert _of_sampled(candidate, turned, subject.policy, 1e-6, 0).verdict == "bias_seen"
    aside = candidate.gradient + np.array([0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    off = last(replace(subject, candidates=[replace(candidate, gradient=aside)]), spec)
    assert _of_sampled(candidate, off, subject.policy, 1e-6, 0).verdict == "bias_seen"


def test_a_check_is_a_function_of_its_seed() -> None:
    first, again, other = (
        pgengine.check_gradient(MDP, None, [estimator()], batches=50, seed=seed).estimators[0] for seed in (1, 1, 2)
    )
    assert first == again
    assert first.mean != other.mean


def test_progress_rises_and_ends_with_the_result() -> None:
    spec = GradientCheckSpec(environment=MDP, estimators=[estimator(), estimator(trajectories=200)], batches=300)
    steps = list(check_steps(spec))
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert len(fractions) > 2
    assert [step.result is None for step in steps] == [True] * (len(steps) - 1) + [False]
    assert steps[-1].fraction == 1.0
    result = steps[-1].result
    assert result is not None
    assert pgengine.GradientCheck.model_validate_json(result.model_dump_json()) == result


def test_exact_values_and_optima_are_told_on_request() -> None:
    policy, mdp = table_policy(MDP), pgengine.TabularMDP(MDP)
    plain = pgengine.check_gradient(MDP, policy, [estimator()], mode="enumerate")
    assert plain.values is None
    told = pgengine.check_gradient(MDP, policy, [estimator()], mode="enumerate", values=True).values
    exact = pgengine.exact_values(policy, mdp, gamma=0.9)
    assert told is not None
    assert np.allclose(np.array(told.v, dtype=float), exact.v)
    assert np.allclose(np.array(told.q, dtype=float), exact.q)
    assert np.allclose(np.array(told.d, dtype=float), exact.d)
    assert told.mass == pytest.approx(exact.mass)
    assert told.optimum_with_clock == pytest.approx(pgengine.optimal_plan(mdp, gamma=0.9).J)
    assert told.optimum_without_limit == pytest.approx(pgengine.optimal_values(mdp, gamma=0.9).J)
    assert told.best_stationary is not None
    assert exact.J < told.best_stationary <= told.optimum_with_clock + 1e-9
    linear = pgengine.check_gradient(LQR, GAINS, [estimator()], batches=8, values=True)
    assert linear.values is not None
    assert linear.values.v is None
    assert linear.values.best_stationary is not None
    assert linear.values.optimum_with_clock is not None
    assert linear.expected_return < linear.values.best_stationary < linear.values.optimum_with_clock


def rows_of_the_label_table() -> list[AlgorithmSpec]:
    rows = []
    for credit in ("total_return", "reward_to_go"):
        for gamma in (1.0, 0.8):
            for mean_over in ("trajectories", "all_steps", "own_steps"):
                for baseline in (
                    {"kind": "none"},
                    {"kind": "constant", "value": 0.7},
                    {"kind": "moving_average"},
                    {"kind": "leave_one_out"},
                    {"kind": "leave_one_out", "over": "shrunk"},
                    {"kind": "leave_one_out", "over": "total"},
                    {"kind": "batch_mean", "over": "time_step"},
                    {"kind": "batch_mean", "over": "alive"},
                    {"kind": "linear_value"},
                ):
                    fields = dict(credit=credit, gamma=gamma, mean_over=mean_over, baseline=baseline, trajectories=3)
                    rows.append(AlgorithmSpec.model_validate(fields))
    ratios = {"kind": "trajectory", "behaviour": {"kind": "mixture", "epsilon": 0.4}}
    rows += [row.model_copy(update={"importance": ImportanceSpec.model_validate(ratios)}) for row in rows[:8]]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("part", range(0, len(rows_of_the_label_table()), 29))
def test_the_label_table_holds_for_batches_that_are_played(part: int) -> None:
    """Null: every estimator is what its label says. 600 batches for each; all false alarms together below 1e-6."""
    rows = rows_of_the_label_table()
    report = pgengine.check_gradient(MDP, table_policy(MDP), rows[part : part + 29], batches=600, false_alarm=5e-9)
    for each in report.estimators:
        assert each.as_labelled, each.algorithm


def test_another_policy_can_act() -> None:
    weighted = estimator(importance={"kind": "per_decision", "behaviour": {"kind": "policy"}})
    report = pgengine.check_gradient(
        MDP, table_policy(MDP, seed=1), weighted, mode="enumerate", behaviour=table_policy(MDP, seed=2)
    )
    assert report.estimators[0].verdict == "agrees"


# --- what samples miss ------------------------------------------------------------------------------------------------

RARE = 1e-5
HERE, LEFT, RIGHT, OVER = np.eye(4).tolist()


def jackpot(*, drawn: bool) -> TabularSpec:
    """Arm 0 pays 1; arm 1 pays 0, and with odds of 1e-5 a million: by a draw, or by a rare transition."""
    if drawn:
        return TabularSpec(
            transitions=[[OVER, OVER]] * 4,
            reward_values=[1.0, 0.0, 1e6],
            reward_probabilities=[[[1.0, 0.0, 0.0], [0.0, 1.0 - RARE, RARE]]] * 4,
            initial=HERE,
            terminal=[3],
            horizon=1,
        )
    return TabularSpec(
        transitions=[[OVER, [0.0, 0.0, RARE, 1.0 - RARE]], *[[OVER, OVER]] * 3],
        rewards=[[1.0, 0.0], [0.0, 0.0], [1e6, 1e6], [0.0, 0.0]],
        initial=HERE,
        terminal=[3],
        horizon=2,
    )


def doubled_noise() -> TabularSpec:
    """Half of the episodes begin where rewards are a million or minus that, the others at the two arms."""
    rare = jackpot(drawn=True)
    assert rare.reward_probabilities is not None
    loud = [[0.0, 0.0, 0.5, 0.5]] * 2
    quiet = [[*row, 0.0] for row in rare.reward_probabilities[0]]
    return rare.model_copy(
        update={
            "reward_values": [1.0, 0.0, 1e6, -1e6],
            "reward_probabilities": [quiet, loud, quiet, quiet],
            "initial": [0.5, 0.5, 0.0, 0.0],
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [jackpot(drawn=True), jackpot(drawn=False), doubled_noise()], ids=["drawn", "moved", "loud"]
)
def test_what_is_too_rare_to_be_played_accuses_nobody(environment: TabularSpec) -> None:
    """Null: both estimators are exact, as enumeration proves. 300 batches by 5 seeds, false alarms at 1e-6 each."""
    algorithms = [estimator(gamma=1.0, **PLAIN), estimator(gamma=1.0)]
    for seed in range(5):
        for each in pgengine.check_gradient(environment, None, algorithms, batches=300, seed=seed).estimators:
            assert (each.verdict, each.as_labelled) == ("no_bias_seen", True)
            assert each.smallest_detectable_bias is not None
            assert each.smallest_detectable_bias > each.bias_norm


def test_a_rare_action_that_pays_accuses_nobody() -> None:
    """The policy takes the second arm, which pays a million, in one of 100,000 episodes. 500 batches at 1e-6."""
    policy = {"kind": "linear", "initial_parameters": {"theta": [[0.0, math.log(RARE)]] * 2}}
    for baseline in ({"kind": "none"}, {"kind": "linear_value"}):
        report = pgengine.check_gradient(
            bandit(1.0, 1e6), policy, estimator(baseline=baseline), batches=500  # type: ignore[arg-type]
        )  # fmt: skip
        assert report.estimators[0].verdict == "no_bias_seen"
        # what a value baseline subtracts has no bound, so of that one nothing is told
        known = report.estimators[0].smallest_detectable_bias
        assert (known is None) == (baseline["kind"] == "linear_value")


@pytest.mark.parametrize(
    "settings",
    [
        {"trajectories": 1, **PLAIN},
        {"trajectories": 2},
        {"trajectories": 2, "mean_over": "own_steps"},
        {"trajectories": 2, "entropy": {"coefficient": 0.7}},
        {"trajectories": 2, "credit": "total_return", "baseline": {"kind": "constant", "value": 3.0}},
        {"trajectories": 2, "importance": {"kind": "trajectory", "behaviour": {"kind": "mixture", "epsilon": 0.5}}},
    ],
    ids=str,
)
def test_no_estimate_is_larger_than_its_bound(settings: dict[str, object]) -> None:
    """All estimates of 2,000 trajectories, and the bound is not absurdly large: within a factor of 100."""
    spec = GradientCheckSpec(environment=MDP, estimators=[estimator(**settings)])
    subject = subject_of(spec, table_policy(MDP))
    (candidate,) = subject.candidates
    scores = Scores(subject)
    tails = tails_of(subject, candidate, *scores.of_pairs())
    assert tails is not None
    batch = play(subject.environment, subject.actor(candidate.algorithm), 0, 1, 2000, 1.0)
    used = Estimator(candidate.algorithm, subject.environment.facts, seed=0)
    largest = np.abs(estimates(used, subject.policy, batch, scores)).max(axis=0)
    assert np.all(largest <= tails.bounds + 1e-12)
    assert tails.bounds.max() <= 100 * largest.max()


def test_the_skewness_of_one_step_is_that_of_its_advantage() -> None:
    """One state, two equally likely arms: scores are 1/2 in size, surprises are what each arm pays, less the mean."""
    environment = jackpot(drawn=True)
    subject = subject_of(GradientCheckSpec(environment=environment, estimators=[estimator(gamma=1.0, **PLAIN)]))
    tails = tails_of(subject, subject.candidates[0], *Scores(subject).of_pairs())
    assert tails is not None
    mean = 0.5 + 0.5 * RARE * 1e6
    pays, odds = np.array([1.0, 0.0, 1e6]), np.array([0.5, 0.5 * (1 - RARE), 0.5 * RARE])
    second, third = (odds @ np.abs(pays - mean) ** k for k in (2, 3))
    assert tails.skewness[:2] == pytest.approx(third / second**1.5, rel=1e-9)
    assert tails.skewness[2:] == pytest.approx(0.0)


@pytest.mark.parametrize("mode", ["sample", "enumerate"])
@pytest.mark.parametrize("size", [1e160, 1e300])
def test_figures_beyond_every_float_end_a_check(mode: Literal["sample", "enumerate"], size: float) -> None:
    with pytest.raises(pgengine.DivergedError):
        pgengine.check_gradient(bandit(size, -size), None, estimator(), mode=mode, batches=20)


def test_estimates_that_run_away_end_a_check() -> None:
    """Parameters that move within an episode, by an entropy that is worth a million."""
    runaway = estimator(
        trajectories=1,
        within_episode="moving",
        entropy={"coefficient": 1e6},
        optimizer={"kind": "sgd", "learning_rate": 1.0},
        **PLAIN,
    )
    with pytest.raises(pgengine.DivergedError):
        pgengine.check_gradient(LQR, GAINS, runaway, batches=20)


# --- refused ----------------------------------------------------------------------------------------------------------

NOISY = MDP.model_copy(update={"reward_deviation": [[1.0, 1.0]] * 3})


@pytest.mark.parametrize(("fields", "pointer", "code"), [
    ({"environment": CARTPOLE}, "/environment", "exact_needs_a_model"),
    ({"policy": {"kind": "transformer", "window": 2}}, "/policy", "exact_needs_no_memory"),
    ({"environment": LQR, "policy": GAINS, "mode": "enumerate"}, "/mode", "enumerate_needs_a_finite_mdp"),
    ({"estimators": [estimator(), estimator(trajectories=1)]}, "/estimators/1/baseline", "baseline_needs_trajectories"),
    (
        {"estimators": [estimator(credit="total_return", discount_weight="gamma_power")]},
        "/estimators/0/discount_weight",
        "discount_counted_twice",
    ),
    (
        {"estimators": [estimator(importance={"kind": "trajectory", "behaviour": {"kind": "policy"}})]},
        "/estimators/0/importance/behaviour",
        "behaviour_missing",
    ),
    (
        {"mode": "enumerate", "estimators": [estimator(trajectories=9)]},
        "/estimators/0/trajectories",
        "too_many_batches",
    ),
    ({"mode": "enumerate", "environment": random_mdp(0, horizon=20)}, "/environment/horizon", "too_many_trajectories"),
    ({"mode": "enumerate", "environment": NOISY}, "/environment/reward_deviation", "rewards_not_countable"),
    (
        {"mode": "enumerate", "estimators": [estimator(baseline={"kind": "linear_value", "fit": "before"})]},
        "/estimators/0/baseline",
        "baseline_not_enumerable",
    ),
    (
        {
            "mode": "enumerate",
            "estimators": [estimator(horizon="bootstrap", baseline={"kind": "linear_value"})],
        },
        "/estimators/0/horizon",
        "bootstrap_not_enumerable",
    ),
    (
        {"policy": {"kind": "linear", "initial_parameters": {"beta": 1}}},
        "/policy/initial_parameters/beta",
        "unknown_parameter",
    ),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused_with_the_way_out(fields: dict[str, object], pointer: str, code: str) -> None:
    spec = GradientCheckSpec.model_validate({"environment": MDP, **fields})
    with pytest.raises(pgengine.SpecError) as refused:
        refuse(spec, pgengine.describe(spec.environment))
    assert (refused.value.pointer, refused.value.code) == (pointer, code)
    with pytest.raises(pgengine.SpecError) as stopped:
        next(check_steps(spec))
    assert (stopped.value.pointer, stopped.value.code) == (pointer, code)


@pytest.mark.parametrize("policy", [{"kind": "mlp"}, {"kind": "linear", "features": {"kind": "polynomial"}}])
def test_only_linear_gaussian_policies_have_an_exact_gradient_on_a_linear_system(policy: dict[str, object]) -> None:
    spec = GradientCheckSpec.model_validate({"environment": LQR, "policy": policy})
    with pytest.raises(pgengine.SpecError) as refused:
        refuse(spec, pgengine.describe(LQR))
    assert refused.value.pointer.startswith("/policy")


def test_what_fits_together_depends_on_the_policy_that_is_given() -> None:
    """A policy that is given stands in the place of the one that the spec describes."""
    spec = GradientCheckSpec(environment=MDP, policy={"kind": "transformer", "window": 2})  # type: ignore[arg-type]
    refuse(spec, pgengine.describe(MDP), table_policy(MDP))
    memory = pgengine.create_policy(spec.policy, MDP, pgengine.describe(MDP), seed=0)
    with pytest.raises(pgengine.SpecError) as refused:
        refuse(GradientCheckSpec(environment=MDP), pgengine.describe(MDP), memory)
    assert refused.value.code == "exact_needs_no_memory"


def test_a_policy_of_another_environment_is_refused() -> None:
    with pytest.raises(pgengine.SpecError) as refused:
        pgengine.check_gradient(MDP, table_policy(random_mdp(0, S=4)))
    assert refused.value.code == "policy_does_not_fit"
