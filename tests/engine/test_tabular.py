"""Finite MDPs: random rewards, states that look alike, names, and episodes that nothing limits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgengine
from pgengine.environments import EnvironmentFacts, TabularMDP
from pgengine.environments.draws import normals, uniforms_of_words
from pgengine.noise import Noise
from pgengine.rollout import rollout
from pgengine.spec import TabularSpec
from tests.engine.worlds import bandit, random_mdp, table_policy

EDGE = np.nextafter(1.0, 0.0)


def change(spec: TabularSpec, **fields: object) -> TabularSpec:
    return TabularSpec.model_validate({**spec.model_dump(), **fields})


def lottery(**fields: object) -> TabularSpec:
    """Two arms that pay -1, 0 or 4."""
    drawn = {
        "rewards": None,
        "reward_values": [-1.0, 0.0, 4.0],
        "reward_probabilities": [[[0.25, 0.5, 0.25], [0.0, 0.75, 0.25]], [[0.0, 0.0, 0.0]] * 2],
    }
    return change(bandit(0.0, 0.0), **{**drawn, **fields})


# --- random rewards ---------------------------------------------------------------------------------------------------


def test_rewards_are_drawn_from_their_list() -> None:
    mdp = TabularMDP(lottery())
    assert mdp.uniforms == 2
    assert mdp.rewards[0, :, 0].tolist() == mdp.rewards[0, :, 1].tolist() == [0.75, 1.0]
    assert mdp.reward_values is not None
    assert mdp.reward_probabilities is not None
    assert mdp.reward_values.shape == mdp.reward_probabilities.shape == (2, 2, 3)
    for action, at, reward in [
        (0, 0.0, -1.0), (0, np.nextafter(0.25, 0), -1.0), (0, 0.25, 0.0), (0, 0.75, 4.0), (0, EDGE, 4.0),
        (1, 0.0, 0.0), (1, np.nextafter(0.75, 0), 0.0), (1, 0.75, 4.0), (1, EDGE, 4.0),
    ]:  # fmt: skip
        mdp.begin(np.zeros(1, dtype=np.uint64))
        assert mdp.step(np.array([action]), np.array([[0.5, at]])).rewards.tolist() == [reward]


def test_an_impossible_reward_is_not_drawn_at_the_edge_of_the_noise() -> None:
    mdp = TabularMDP(lottery(reward_probabilities=[[[0.5, 0.5, 0.0]] * 2, [[1.0, 0.0, 0.0]] * 2]))
    mdp.begin(np.zeros(1, dtype=np.uint64))
    assert mdp.step(np.array([0]), np.array([[EDGE, EDGE]])).rewards.tolist() == [0.0]


def test_gaussian_noise_is_added_to_the_reward() -> None:
    """On a midpoint grid of both numbers the noise has mean 0, variance 1 and the moments of a normal number."""
    mdp = TabularMDP(change(bandit(3.0, -1.0), reward_deviation=[[0.5, 0.0], [0.0, 0.0]]))
    assert mdp.uniforms == 3
    side = (np.arange(400) + 0.5) / 400
    grid = np.stack([np.full(160_000, 0.5), *(axis.ravel() for axis in np.meshgrid(side, side))], axis=1)
    for action, mean, deviation in [(0, 3.0, 0.5), (1, -1.0, 0.0)]:
        mdp.begin(np.zeros(len(grid), dtype=np.uint64))
        rewards = mdp.step(np.full(len(grid), action), grid).rewards
        assert rewards.mean() == pytest.approx(mean, abs=1e-9)
        assert rewards.std() == pytest.approx(deviation, rel=5e-3, abs=1e-12)
        if deviation:
            z = (rewards - mean) / deviation
            assert (z**4).mean() == pytest.approx(3.0, rel=0.03)
            assert (z < 1.0).mean() == pytest.approx(0.841345, abs=2e-3)
    assert np.isfinite(normals(np.array([[0.0, 0.0], [EDGE, EDGE]]), 2)).all()


def test_both_kinds_of_random_rewards_use_numbers_of_their_own() -> None:
    mdp = TabularMDP(lottery(reward_deviation=[[1.0, 1.0], [0.0, 0.0]]))
    assert mdp.uniforms == 4
    mdp.begin(np.zeros(3, dtype=np.uint64))
    rewards = mdp.step(
        np.zeros(3, dtype=np.int64), np.array([[0.5, 0.9, 0.0, 0.3], [0.5, 0.1, 0.0, 0.3], [0.5, 0.9, 0.6, 0.0]])
    )
    assert rewards.rewards == pytest.approx([4.0, -1.0, 4.0 + np.sqrt(-2 * np.log(0.4))])


def test_deviations_of_zero_are_no_noise() -> None:
    mdp = TabularMDP(change(bandit(3.0), reward_deviation=[[0.0], [0.0]]))
    assert mdp.reward_deviation is None
    assert mdp.uniforms == 1


def test_random_rewards_leave_the_states_where_they_were() -> None:
    spec = random_mdp(3, horizon=9, terminal=False)
    noisy = change(spec, reward_deviation=[[1.0, 2.0]] * 3)
    plain, other = TabularMDP(spec), TabularMDP(noisy)
    words = np.random.default_rng(0).integers(0, 2**64, size=50, dtype=np.uint64)
    assert np.array_equal(plain.begin(words), other.begin(words))
    for t in range(9):
        noise = np.random.default_rng(t).random((50, 3))
        actions = np.random.default_rng(100 + t).integers(0, 2, size=50)
        one, two = plain.step(actions, noise[:, :1]), other.step(actions, noise)
        assert np.array_equal(one.observations, two.observations)
        assert not np.array_equal(one.rewards, two.rewards)


def test_rollouts_of_random_rewards_have_the_mean_of_expected_ones() -> None:
    """Null: the mean return of 40,000 episodes is J of the MDP with the expected rewards. 6 standard errors: 1e-8."""
    spec = random_mdp(6, horizon=6)
    generator = np.random.default_rng(1)
    drawn = change(
        spec,
        transition_rewards=None,
        reward_values=[-3.0, 1.0, 2.0],
        reward_probabilities=generator.dirichlet(np.ones(3), size=(3, 2)).tolist(),
        reward_deviation=[[0.5, 1.0]] * 3,
    )
    mdp, policy = TabularMDP(drawn), table_policy(drawn)
    batch = rollout(policy, mdp, Noise(5, "training", 0), 40_000)
    pi = np.exp(policy.outputs(np.arange(3)))
    pi /= pi.sum(axis=1, keepdims=True)
    v = np.zeros(3)
    for _ in range(6):
        v = np.where(mdp.terminal, 0.0, (pi[:, :, None] * mdp.transitions * (mdp.rewards + v)).sum(axis=(1, 2)))
    assert abs(batch.returns.mean() - mdp.initial @ v) < 6 * batch.returns.std() / np.sqrt(40_000)


# --- states that look alike, names ------------------------------------------------------------------------------------


def corridor(**fields: object) -> TabularSpec:
    """Three cells that look alike and a goal; left and right are switched in the middle one."""
    ways = [(0, 1), (2, 0), (1, 3), (3, 3)]
    base = {
        "transitions": [[[float(after == s) for s in range(4)] for after in pair] for pair in ways],
        "rewards": [[-1.0, -1.0]] * 3 + [[0.0, 0.0]],
        "initial": [1.0, 0.0, 0.0, 0.0],
        "terminal": [3],
        "horizon": 50,
        "observations": [0, 0, 0, 1],
    }
    return TabularSpec.model_validate({**base, **fields})


def test_a_policy_sees_what_the_states_look_like() -> None:
    mdp = TabularMDP(corridor())
    assert mdp.begin(np.zeros(2, dtype=np.uint64)).tolist() == [0, 0]
    seen = [mdp.step(np.array([a, 1]), np.array([[0.5], [0.5]])) for a in (1, 0, 1)]
    assert [step.observations.tolist() for step in seen] == [[0, 0], [0, 0], [1, 0]]
    assert [step.terminated.tolist() for step in seen] == [[False, False], [False, False], [True, False]]
    mdp.keep(np.array([False, True]))
    assert mdp.step(np.array([1]), np.array([[0.5]])).observations.tolist() == [0]
    assert mdp.facts.observation_space.n == 2  # type: ignore[union-attr]
    assert mdp.observations.tolist() == [0, 0, 0, 1]


def test_names_are_kept_and_states_that_look_alike_share_theirs() -> None:
    names = {"state_names": ["a", "b", "b", "goal"], "action_names": ["left", "right"]}
    facts = pgengine.describe(corridor(**names))
    assert (facts.state_names, facts.action_names) == (["a | b", "goal"], ["left", "right"])
    apart = pgengine.describe(corridor(**names, observations=None))
    assert apart.state_names == ["a", "b", "b", "goal"]
    assert pgengine.describe(corridor(**names, observations=[0, 0, 0, 2])).state_names == ["a | b", "1", "goal"]


def test_features_have_a_row_for_each_observation() -> None:
    table = [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]
    features = TabularMDP(corridor(features=table)).features
    assert features is not None
    assert features.tolist() == table
    with pytest.raises(pgengine.SpecError) as error:
        TabularMDP(corridor(features=table * 2))
    assert (error.value.pointer, error.value.code) == ("/features", "shape")


# --- how episodes end -------------------------------------------------------------------------------------------------


def endless(**fields: object) -> EnvironmentFacts:
    return pgengine.describe(corridor(horizon=None, **fields))


def test_without_a_horizon_nothing_limits_an_episode() -> None:
    mdp = TabularMDP(corridor(horizon=None))
    assert mdp.horizon is None
    assert (mdp.facts.limit_from, mdp.facts.max_episode_steps) == ("none", 1_000_000)
    assert (mdp.facts.fixed_steps, mdp.facts.limit_cuts, mdp.facts.ends_for_certain) == (None, False, False)
    mdp.begin(np.zeros(1, dtype=np.uint64))
    for _ in range(2_000):
        step = mdp.step(np.array([0]), np.array([[0.5]]))
        assert not step.terminated.any()
        assert not step.truncated.any()


def test_an_episode_that_nothing_limits_fails_and_is_not_cut() -> None:
    mdp, left, noise = TabularMDP(corridor(horizon=None)), np.array([0]), np.array([[0.5]])
    mdp.begin(np.zeros(1, dtype=np.uint64))
    mdp._steps = 999_998  # as if they had been played, which takes a minute under the checks of types
    step = mdp.step(left, noise)
    assert not step.terminated.any()
    assert not step.truncated.any()
    with pytest.raises(pgengine.EnvironmentFailure, match="no end within 1,000,000 steps; declare a horizon"):
        mdp.step(left, noise)


def test_an_end_in_the_last_step_is_an_end() -> None:
    mdp, noise = TabularMDP(corridor(horizon=None)), np.array([[0.5]])
    mdp.begin(np.zeros(1, dtype=np.uint64))
    mdp._steps = 999_997
    steps = [mdp.step(np.array([a]), noise) for a in (1, 0, 1)]
    assert steps[-1].terminated.all()


def test_only_a_horizon_cuts() -> None:
    """The same MDP with a horizon of as many steps is cut, and says so."""
    facts = pgengine.describe(corridor(horizon=1_000_000))
    assert (facts.limit_from, facts.max_episode_steps, facts.limit_cuts) == ("horizon", 1_000_000, True)
    assert not endless().limit_cuts
    assert not endless(terminal=[]).limit_cuts


def test_an_end_that_comes_whoever_acts_is_known() -> None:
    quarter = [[[0.75, 0.0, 0.0, 0.25]] * 2] * 4
    assert endless(transitions=quarter).ends_for_certain
    one_way_out = [[[0.75, 0.0, 0.0, 0.25], [1.0, 0.0, 0.0, 0.0]]] * 4
    assert not endless(transitions=one_way_out).ends_for_certain
    line = [[[float(after == min(s + 1, 3)) for after in range(4)]] * 2 for s in range(4)]
    facts = endless(transitions=line)
    assert (facts.ends_for_certain, facts.fixed_steps, facts.limit_cuts) == (True, 3, False)
    nobody_gets_there = [line[0], [[0.0, 0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0, 0.0]] * 2, line[3]]
    assert endless(transitions=nobody_gets_there).ends_for_certain
    assert not endless(transitions=nobody_gets_there, initial=[0.5, 0.0, 0.5, 0.0]).ends_for_certain
    assert not endless(terminal=[]).ends_for_certain


supports = st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=3), min_size=8, max_size=8)


@given(supports)
def test_the_certain_end_is_that_of_every_deterministic_policy(support: list[set[int]]) -> None:
    """If an episode can go on for ever at all, then under a deterministic policy; all 8 of them are tried."""
    rows = [[(s in after) / len(after) for s in range(4)] for after in support]
    transitions = [rows[2 * s : 2 * s + 2] for s in range(4)]
    mdp = TabularMDP(corridor(transitions=transitions, horizon=None))
    certain = True
    for choice in itertools.product(range(2), repeat=3):
        P = np.zeros((4, 4))
        for s in range(3):
            P[s] = mdp.transitions[s, choice[s]]
        P[3, 3] = 1.0
        reach = np.linalg.matrix_power((np.eye(4) + P > 0).astype(float), 4) > 0
        certain &= bool(reach[reach[0], 3].all())
    assert mdp.facts.ends_for_certain == certain


@given(supports, st.sets(st.integers(1, 3)), st.integers(1, 9))
def test_lengths_are_those_of_all_paths(support: list[set[int]], terminal: set[int], horizon: int) -> None:
    rows = [[(s in after) / len(after) for s in range(4)] for after in support]
    transitions = [rows[2 * s : 2 * s + 2] for s in range(4)]
    facts = pgengine.describe(corridor(transitions=transitions, terminal=sorted(terminal), horizon=horizon))
    lengths, paths, unfinished = set(), {0}, False
    for t in range(1, horizon + 1):
        after = {s for before in paths for s in support[2 * before] | support[2 * before + 1]}
        lengths |= {t} if after & terminal else set()
        paths = after - terminal
        if t == horizon and paths:
            lengths.add(t)
            unfinished = True
    assert facts.limit_cuts == unfinished
    assert facts.fixed_steps == (lengths.pop() if len(lengths) == 1 else None)


# --- errors -----------------------------------------------------------------------------------------------------------


STAY = [[1.0, 0.0, 0.0, 0.0]]


def chances(row: list[float]) -> TabularSpec:
    return lottery(reward_probabilities=[[[0.5, 0.5, 0.0], row]] * 2)


@pytest.mark.parametrize(("spec", "pointer", "code"), [
    (lambda: lottery(rewards=[[1.0, 1.0]] * 2), "/rewards", "one_of"),
    (lambda: lottery(reward_values=None, reward_probabilities=None), "/rewards", "one_of"),
    (lambda: lottery(reward_probabilities=None), "/reward_probabilities", "missing"),
    (lambda: lottery(reward_values=None), "/reward_values", "missing"),
    (lambda: chances([0.5, 0.4, 0.0]), "/reward_probabilities/0/1", "probabilities_sum"),
    (lambda: chances([1.5, -0.5, 0.0]), "/reward_probabilities/0/1/0", "probability_range"),
    (lambda: chances([1.0, 0.0]), "/reward_probabilities/0/1", "shape"),
    (lambda: lottery(reward_deviation=[[0.0, -0.1], [0.0, 0.0]]), "/reward_deviation/0/1", "negative_deviation"),
    (lambda: lottery(reward_deviation=[[0.0, 0.1]]), "/reward_deviation", "shape"),
    (lambda: corridor(observations=[0, 0, 0]), "/observations", "shape"),
    (lambda: corridor(features=[[[1.0], [1.0]], [[1.0]]]), "/features/1", "shape"),
    (lambda: corridor(features=[[[1.0], [1.0, 2.0]]] * 2), "/features/0/1", "shape"),
    (lambda: corridor(features=[]), "/features", "shape"),
    (lambda: corridor(state_names=["a"]), "/state_names", "shape"),
    (lambda: corridor(action_names=["a", "b", "c"]), "/action_names", "shape"),
    (lambda: corridor(transitions=[STAY * 2] * 3 + [STAY]), "/transitions/3", "shape"),
    (lambda: corridor(transitions=[[[0.999, 0.0, 0.0, 0.0]] * 2] * 4), "/transitions/0/0", "probabilities_sum"),
])  # fmt: skip
def test_a_wrong_table_is_named_at_its_cell(spec: object, pointer: str, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        TabularMDP(spec())  # type: ignore[operator]
    assert (error.value.pointer, error.value.code) == (pointer, code)


def test_rows_of_terminal_states_may_hold_anything() -> None:
    mdp = TabularMDP(corridor(transitions=[*corridor().transitions[:3], [[0.0, 0.0, 0.0, 0.0]] * 2]))
    mdp.begin(np.zeros(1, dtype=np.uint64))
    assert mdp.step(np.array([1]), np.array([[0.0]])).observations.tolist() == [0]


# --- draws ------------------------------------------------------------------------------------------------------------


def test_words_are_seeds_of_splitmix64() -> None:
    """The first outputs of the reference implementation for the seeds 0 and 1234567."""
    known = [[0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], [6457827717110365317, 3203168211198807973]]
    found = uniforms_of_words(np.array([0, 1234567], dtype=np.uint64), 2)
    assert found.tolist() == [[(word >> 11) * 2.0**-53 for word in row] for row in known]
