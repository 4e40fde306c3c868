"""Baselines with a memory: what they predict, what they learn, and that they are put back to the bit."""

import numpy as np
import pytest

import pgengine
from pgengine.baselines import Baseline, ValueBaseline, open_baseline
from pgengine.noise import Noise
from pgengine.rollout import Batch, rollout
from pgengine.spec import AlgorithmSpec
from tests.engine.worlds import CARTPOLE, random_mdp, table_policy

WORLD = random_mdp(0, horizon=6)
KINDS = ["moving_average", "linear_value", "neural_value"]


def batch(update: int = 0, episodes: int = 40) -> Batch:
    return rollout(table_policy(WORLD), pgengine.open_environment(WORLD), Noise(3, "training", update), episodes)


def opened(kind: str, *, credit: str = "reward_to_go", **settings: object) -> Baseline:
    algorithm = AlgorithmSpec(credit=credit, baseline={"kind": kind, **settings})  # type: ignore[arg-type]
    found = open_baseline(algorithm, pgengine.describe(WORLD), seed=5)
    assert found is not None
    return found


def credits(played: Batch) -> np.ndarray:
    """Rewards to go, written by hand."""
    parts = [
        np.cumsum(played.rewards[a:b][::-1])[::-1] for a, b in zip(played.offsets[:-1], played.offsets[1:], strict=True)
    ]
    return np.concatenate(parts)


def times(played: Batch) -> np.ndarray:
    return np.concatenate([np.arange(length) for length in played.lengths])


def test_a_moving_average_is_its_formula_for_each_time_step() -> None:
    baseline = opened("moving_average", decay=0.75)
    first, second = batch(0), batch(1)
    assert not baseline.predict(first, credits(first)).any()
    baseline.fit(first, credits(first))
    by_time = [credits(first)[times(first) == t].sum() / 40 for t in range(6)]
    expected = 0.25 * np.array(by_time)[times(second)]
    assert np.allclose(baseline.predict(second, credits(second)), expected, atol=1e-12)
    baseline.fit(second, credits(second))
    at_zero = 0.75 * 0.25 * by_time[0] + 0.25 * credits(second)[times(second) == 0].mean()
    assert baseline.predict(first, credits(first))[0] == pytest.approx(at_zero)


def test_a_moving_average_of_total_returns_is_one_number() -> None:
    baseline = opened("moving_average", credit="total_return", decay=0.5)
    played = batch()
    totals = np.repeat(played.returns, played.lengths)
    baseline.fit(played, totals)
    assert np.allclose(baseline.predict(batch(1), np.zeros(len(batch(1).rewards))), 0.5 * played.returns.mean())


def test_an_average_that_includes_the_batch_looks_at_it_and_forgets_it() -> None:
    baseline = opened("moving_average", decay=0.9, includes_batch=True)
    played = batch()
    seen = baseline.predict(played, credits(played))
    assert seen[0] == pytest.approx(0.1 * credits(played)[times(played) == 0].mean())
    assert not baseline.arrays()["average"].any()


def test_a_longer_episode_than_ever_begins_at_zero() -> None:
    baseline = opened("moving_average")
    short = batch().episodes(0, 3)
    baseline.fit(short, credits(short))
    known = int(short.lengths.max())
    longer = batch(1)
    late = times(longer) >= known
    assert late.any()
    assert not baseline.predict(longer, credits(longer))[late].any()


@pytest.mark.parametrize("kind", ["linear_value", "neural_value"])
def test_a_value_explains_what_the_state_tells_of_the_credit(kind: str) -> None:
    settings = {"ridge": 1e-6} if kind == "linear_value" else {"steps": 300, "hidden": [16]}
    baseline = opened(kind, **settings)
    played = batch(0, 200)
    target = np.array([1.0, -2.0, 0.5])[played.observations] + 0.1 * times(played)
    baseline.fit(played, target)
    error = baseline.predict(played, target) - target
    assert np.sqrt((error**2).mean()) < 0.05 * target.std()


@pytest.mark.parametrize("kind", ["linear_value", "neural_value"])
def test_a_value_that_is_fitted_before_has_seen_the_batch_and_one_fitted_after_has_not(kind: str) -> None:
    played = batch(0, 60)
    credit = credits(played)
    settings = {"steps": 100} if kind == "neural_value" else {}
    before, after = opened(kind, fit="before", **settings), opened(kind, fit="after", **settings)
    error = [float(((b.predict(played, credit) - credit) ** 2).mean()) for b in (before, after)]
    assert error[0] < 0.9 * error[1]
    again = before.predict(played, credit)
    assert np.array_equal(again, before.predict(played, credit)), "a prediction must not learn"


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_remembers_is_put_back_to_the_bit(kind: str) -> None:
    one, other = opened(kind), opened(kind)
    for update in range(2):
        one.fit(batch(update), credits(batch(update)))
    other.restore(one.arrays())
    for update in (2, 3):
        played = batch(update)
        assert np.array_equal(one.predict(played, credits(played)), other.predict(played, credits(played)))
        one.fit(played, credits(played))
        other.fit(played, credits(played))


@pytest.mark.parametrize("kind", ["linear_value", "neural_value"])
def test_the_last_observation_of_an_episode_has_a_value(kind: str) -> None:
    baseline = opened(kind)
    assert isinstance(baseline, ValueBaseline)
    played = batch()
    baseline.fit(played, credits(played))
    following = Batch(
        played.final_observations,
        played.samples[:40],
        played.actions[:40],
        played.log_probs[:40],
        np.zeros(40),
        np.arange(41),
        played.terminated,
        played.truncated,
        played.final_observations,
    )
    # the same observations at time 0 differ by what the time adds
    at_zero, at_the_end = baseline.predict(following, np.zeros(40)), baseline.final_values(played)
    assert at_zero.shape == at_the_end.shape == (40,)
    assert not np.allclose(at_zero, at_the_end)


def test_baselines_within_a_batch_have_no_memory() -> None:
    for kind in ("none", "leave_one_out", "batch_mean"):
        algorithm = AlgorithmSpec(baseline={"kind": kind})  # type: ignore[arg-type]
        assert open_baseline(algorithm, pgengine.describe(WORLD), seed=0) is None


@pytest.mark.parametrize("kind", ["linear_value", "neural_value"])
def test_boxes_are_read_too(kind: str) -> None:
    facts = pgengine.describe(CARTPOLE)
    algorithm = AlgorithmSpec(baseline={"kind": kind})  # type: ignore[arg-type]
    baseline = open_baseline(algorithm, facts, seed=0)
    assert baseline is not None
    policy = pgengine.create_policy(pgengine.MlpPolicySpec(), CARTPOLE, facts, seed=0)
    played = rollout(policy, pgengine.open_environment(CARTPOLE), Noise(0, "training", 0), 20)
    credit = credits(played)
    baseline.fit(played, credit)
    explained = 1 - ((baseline.predict(played, credit) - credit) ** 2).mean() / credit.var()
    assert explained > 0.3
