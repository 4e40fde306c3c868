"""Evaluation is honest: fresh episodes, an interval that covers, the mode apart."""

import numpy as np
import pytest

import pgengine
from pgengine.evaluation import student_quantile
from pgengine.exact import exact_return
from tests.engine.worlds import CARTPOLE, random_mdp, table_policy

# Two-sided 95% points of Student's t from a printed table.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 99: 1.984}


@pytest.mark.parametrize(("degrees", "value"), TABLE.items())
def test_student_quantiles(degrees: int, value: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(value, abs=0.01 if degrees == 3 else 0.002)


@pytest.mark.slow
def test_the_interval_covers_the_exact_return_as_often_as_it_says() -> None:
    """Null: 95% of intervals hold J. Of 400, fewer than 350 or all of them have odds below 1e-6."""
    spec = random_mdp(1, horizon=4)
    policy = table_policy(spec)
    J = exact_return(policy, pgengine.TabularMDP(spec), gamma=1.0)
    evaluations = [
        pgengine.evaluate(policy, spec, episodes=60, seed=seed, deterministic_episodes=0) for seed in range(400)
    ]
    covered = sum(e.confidence_interval[0] <= J <= e.confidence_interval[1] for e in evaluations)
    assert 350 <= covered < 400


def test_it_is_repeatable_and_fresh() -> None:
    policy = pgengine.create_policy(pgengine.MlpPolicySpec(), CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    one, same, other = (pgengine.evaluate(policy, CARTPOLE, episodes=10, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.mean_return != other.mean_return
    assert one.deterministic_mean_return is not None


def test_more_episodes_than_one_wave_are_all_played() -> None:
    spec = random_mdp(1, horizon=4)
    result = pgengine.evaluate(table_policy(spec), spec, episodes=2500, seed=0)
    half = (result.confidence_interval[1] - result.confidence_interval[0]) / 2
    few = pgengine.evaluate(table_policy(spec), spec, episodes=100, seed=0)
    wide = (few.confidence_interval[1] - few.confidence_interval[0]) / 2
    assert result.episodes == 2500
    assert np.isclose(half, wide / 5, rtol=0.3)


def test_a_policy_of_another_environment_is_refused() -> None:
    with pytest.raises(pgengine.SpecError, match="observation space"):
        pgengine.evaluate(table_policy(random_mdp(0)), CARTPOLE)


def test_episodes_that_may_never_end_are_refused_unless_the_discount_ends_them() -> None:
    """One action stays for ever, so that the mode of this policy would never end."""
    spec = pgengine.TabularSpec(
        transitions=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0]] * 2],
        rewards=[[1.0, 0.0], [0.0, 0.0]],
        initial=[1.0, 0.0],
        terminal=[1],
    )
    policy = pgengine.LinearPolicySpec(initial_parameters={"theta": [[1.0, 0.0], [0.0, 0.0]]})
    made = pgengine.create_policy(policy, spec, pgengine.describe(spec), seed=0)
    for environment in (spec, pgengine.open_environment(spec)):
        with pytest.raises(pgengine.SpecError) as error:
            pgengine.evaluate(made, environment)
        assert (error.value.pointer, error.value.code) == ("/horizon", "no_certain_end")
    result = pgengine.evaluate(made, spec, episodes=20, survival=0.5)
    assert result.deterministic_mean_return is not None
