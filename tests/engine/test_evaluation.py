"""Evaluation is honest: fresh episodes, an interval that covers, the mode apart."""

import numpy as np
import pytest

import pgengine
from pgengine.exact import exact_return
from pgengine.intervals import ReturnRange
from tests.engine.worlds import CARTPOLE, Played, paying, random_mdp, table_policy


def test_an_evaluation_has_the_exact_mean_return_where_it_is_known() -> None:
    spec = random_mdp(1, horizon=4)
    policy = table_policy(spec)
    result = pgengine.evaluate(policy, spec, episodes=50, seed=1)
    assert result.exact_mean_return == pytest.approx(exact_return(policy, pgengine.TabularMDP(spec), gamma=1.0))
    assert result.exact_absent is None
    assert result.mean_return != pytest.approx(result.exact_mean_return, abs=1e-6)
    played = pgengine.evaluate(policy, Played(spec), episodes=50, seed=1)
    assert (played.mean_return, played.exact_mean_return) == (result.mean_return, None)
    assert played.exact_absent is not None
    assert played.exact_absent.code == "exact_needs_a_model"


def test_returns_that_are_all_alike_prove_nothing_beyond_what_is_known() -> None:
    """A world that pays 1 with probability 0.999: most samples of 20 are all alike."""
    spec = paying(0.999, 0.999)
    policy = table_policy(spec)
    found = {
        known.facts.return_range: pgengine.evaluate(policy, known, episodes=20, seed=0)
        for known in (
            pgengine.TabularMDP(spec),
            Played(spec, return_range=ReturnRange(low=0.0, high=1.0)),
            Played(spec),
        )
    }
    assert [result.mean_return for result in found.values()] == [1.0] * 3
    assert [result.method for result in found.values()] == ["clopper_pearson", "betting", "t"]
    (low, high), (bet_low, bet_high), nothing = (result.confidence_interval for result in found.values())
    assert nothing == [None, None]
    assert low is not None
    assert bet_low is not None
    assert 0.7 < bet_low < low < 0.999 < high == bet_high == 1.0


def test_it_is_repeatable_and_fresh() -> None:
    policy = pgengine.create_policy(pgengine.MlpPolicySpec(), CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    one, same, other = (pgengine.evaluate(policy, CARTPOLE, episodes=10, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.mean_return != other.mean_return
    assert one.deterministic_mean_return is not None


def test_more_episodes_than_one_wave_are_all_played() -> None:
    spec = random_mdp(1, horizon=4)
    result = pgengine.evaluate(table_policy(spec), Played(spec), episodes=2500, seed=0)
    few = pgengine.evaluate(table_policy(spec), Played(spec), episodes=100, seed=0)
    half, wide = (np.diff(np.array(one.confidence_interval, dtype=float)) for one in (result, few))
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
