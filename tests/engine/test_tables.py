"""Environments that publish their table are the finite MDPs that are read from it."""

import gymnasium
import numpy as np
import pytest

import pgengine
from pgengine.environments import TabularMDP, read_table, register_own_ids
from pgengine.environments.gymnasium import GymnasiumEpisodes
from pgengine.spaces import DiscreteSpace
from pgengine.spec import GymnasiumSpec


def toy(id: str, **arguments: bool | int | float | str | None) -> GymnasiumSpec:
    return GymnasiumSpec(id=id, arguments=arguments, max_episode_steps=50)


def opened(spec: GymnasiumSpec) -> TabularMDP:
    environment = pgengine.open_environment(spec)
    assert isinstance(environment, TabularMDP)
    return environment


def live_states(mdp: TabularMDP) -> list[int]:
    """States in which an episode may be going on."""
    found = mdp.initial > 0
    while True:
        grown = found | (np.any(mdp.transitions[found] > 0, axis=(0, 1)) & ~mdp.terminal)
        if (grown == found).all():
            return np.flatnonzero(found).tolist()
        found = grown


Outcome = tuple[int, float, bool]


def outcomes(mdp: TabularMDP, s: int, a: int) -> dict[Outcome, float]:
    """Probability of each (observation, reward, terminated)."""
    found: dict[Outcome, float] = {}
    for after in np.flatnonzero(mdp.transitions[s, a]):
        key = (int(mdp.observations[after]), float(mdp.rewards[s, a, after]), bool(mdp.terminal[after]))
        found[key] = found.get(key, 0.0) + float(mdp.transitions[s, a, after])
    return found


WORLDS = [
    (toy("FrozenLake-v1", is_slippery=False), 1),
    (toy("FrozenLake-v1"), 300),
    (toy("FrozenLake-v1", success_rate=0.8), 300),
    (toy("FrozenLake8x8-v1"), 100),
    (toy("CliffWalking-v1"), 1),
    (toy("CliffWalkingSlippery-v1"), 100),
    (toy("Taxi-v4"), 1),
    (toy("pgengine/Bandit-v0"), 2_000),
    (toy("pgengine/Chain-v0", slip=0.3), 2_000),
    (toy("pgengine/GridWorld-v0", rows=3, columns=5, slip=0.4), 500),
    (toy("pgengine/Aliased-v0"), 1),
    (toy("pgengine/TMaze-v0", length=3), 1),
    pytest.param(toy("Taxi-v4", is_rainy=True, rainy_probability=0.6), 60, marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "draws"), WORLDS, ids=lambda value: getattr(value, "id", None))
def test_every_step_of_the_environment_is_one_of_the_table(spec: GymnasiumSpec, draws: int) -> None:
    """Each action is taken in each live state of the environment itself: what comes is possible, and as often as said.

    Null: the outcomes have the probabilities of the table. The sum of Pearson's statistics over all (s, a), `draws`
    each, is then distributed as chi-square; by the cube root of Wilson and Hilferty it is compared with 6 standard
    deviations of a normal, whose odds are 1e-9. Without randomness one step of each pair decides.
    """
    register_own_ids()
    mdp = opened(spec)
    environment = gymnasium.make(spec.id, **spec.arguments).unwrapped
    environment.reset(seed=17)
    statistic, freedom = 0.0, 0
    states = live_states(mdp)
    where = getattr(environment, "observed_as", None)
    for s in states:
        for a in range(mdp.transitions.shape[1]):
            expected = outcomes(mdp, s, a)
            counts = dict.fromkeys(expected, 0)
            for _ in range(draws):
                environment.s = s if where is not None else int(mdp.observations[s])  # type: ignore[attr-defined]
                seen, reward, terminated, truncated, _ = environment.step(np.int64(a))
                assert not truncated
                counts[int(seen), float(reward), bool(terminated)] += 1  # an impossible outcome is a KeyError
            p = np.array(list(expected.values()))
            observed = np.array([counts[key] for key in expected])
            statistic += float(((observed - draws * p) ** 2 / (draws * p)).sum())
            freedom += len(p) - 1
    assert (freedom > 0) == (draws > 1), "a random table needs more than one draw"
    if freedom:
        spread = 2 / (9 * freedom)
        assert (statistic / freedom) ** (1 / 3) < 1 - spread + 6 * np.sqrt(spread)
    environment.close()


@pytest.mark.parametrize("id", ["FrozenLake-v1", "CliffWalkingSlippery-v1", "Taxi-v4", "pgengine/TMaze-v0"])
def test_episodes_begin_where_the_environment_begins_them(id: str) -> None:
    mdp = opened(toy(id))
    environment = gymnasium.make(id).unwrapped
    published = environment.initial_state_distrib  # type: ignore[attr-defined]
    assert np.array_equal(mdp.initial[: len(published)], published)
    assert not mdp.initial[len(published) :].any()
    begun = {int(mdp.observations[s]) for s in np.flatnonzero(mdp.initial)}
    assert {int(environment.reset(seed=seed)[0]) for seed in range(200)} <= begun


def test_a_state_that_is_entered_in_several_ways_becomes_several_that_look_alike() -> None:
    """Slipping off the cliff and stepping on the spot both lead from the start to the start, with -100 and with -1."""
    mdp = opened(toy("CliffWalkingSlippery-v1"))
    assert mdp.transitions.shape == (49, 4, 49)
    assert mdp.facts.observation_space == DiscreteSpace(n=48)
    assert mdp.observations[[36, 48]].tolist() == [36, 36]
    assert np.array_equal(mdp.transitions[36], mdp.transitions[48])
    right = {float(mdp.rewards[36, 1, after]) for after in (36, 48)}
    assert right == {-100.0, -1.0}
    assert mdp.transitions[36, 1, [36, 48, 24]] == pytest.approx([1 / 3] * 3)
    assert read_table(toy("CliffWalking-v1")).observations is None  # type: ignore[union-attr]


class Ending(gymnasium.Env[np.int64, np.int64]):
    """State 1 is entered in the middle of an episode by action 0, and at its end by action 1."""

    P = [[[(1.0, 1, 0.0, False)], [(1.0, 1, 5.0, True)]], [[(0.5, 0, 1.0, False), (0.5, 0, 3.0, False)]] * 2]
    initial_state_distrib = np.array([1.0, 0.0])
    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)


class Declared(Ending):
    """Says that its step follows the table."""

    steps_by_table = True
    observed_as = [1, 0]
    state_names = ["here", "there"]


class Doubling(gymnasium.RewardWrapper[np.int64, np.int64]):
    """Pays twice."""

    def __init__(self, env: gymnasium.Env[np.int64, np.int64]) -> None:
        super().__init__(env)

    def reward(self, reward: object) -> float:
        return 2.0 * float(reward)  # type: ignore[arg-type]


gymnasium.register("Declared-v0", entry_point=Declared, max_episode_steps=9, reward_threshold=3.0)
gymnasium.register("Undeclared-v0", entry_point=Ending, max_episode_steps=9)
gymnasium.register("Wrapped-v0", entry_point=lambda: Doubling(Declared()), max_episode_steps=9)


def test_a_class_of_ones_own_is_read_if_it_says_that_its_table_is_all() -> None:
    mdp = opened(GymnasiumSpec(id="Declared-v0"))
    # state 0 is entered with two rewards by one move, state 1 both in the middle of an episode and at its end
    assert mdp.observations.tolist() == [1, 0, 1, 0]
    assert mdp.terminal.tolist() == [False, False, False, True]
    assert mdp.rewards[0, [0, 1], [1, 3]].tolist() == [0.0, 5.0]
    assert mdp.rewards[1, 0, [0, 2]].tolist() == [1.0, 3.0]
    assert (mdp.facts.limit_from, mdp.facts.max_episode_steps, mdp.facts.reward_threshold) == ("id", 9, 3.0)
    assert mdp.facts.state_names == ["there", "here"]


@pytest.mark.parametrize("spec", [
    GymnasiumSpec(id="Undeclared-v0"),
    GymnasiumSpec(id="Wrapped-v0"),
    GymnasiumSpec(id="CartPole-v1"),
    toy("Taxi-v4", fickle_passenger=True),
    toy("FrozenLake-v1", map_name=None),
], ids=lambda spec: spec.id)  # fmt: skip
def test_what_does_more_than_its_table_is_played_by_gymnasium(spec: GymnasiumSpec) -> None:
    assert read_table(spec) is None
    environment = pgengine.open_environment(spec)
    assert isinstance(environment, GymnasiumEpisodes)
    assert environment.facts.exact is None
    environment.close()


def test_facts_of_a_table_keep_who_set_the_limit() -> None:
    lake = pgengine.describe(GymnasiumSpec(id="FrozenLake-v1"))
    assert (lake.limit_from, lake.max_episode_steps, lake.reward_threshold) == ("id", 100, 0.7)
    assert (lake.exact, lake.action_names) == ("finite_mdp", ["left", "down", "right", "up"])
    cliff = pgengine.describe(GymnasiumSpec(id="CliffWalking-v1", max_episode_steps=33))
    assert (cliff.limit_from, cliff.max_episode_steps, cliff.reward_threshold) == ("declared", 33, None)
    with pytest.raises(pgengine.SpecError) as error:
        read_table(GymnasiumSpec(id="CliffWalking-v1"))
    assert (error.value.pointer, error.value.code) == ("/max_episode_steps", "episode_limit_missing")


def test_arguments_change_the_table() -> None:
    slippery, dry = opened(toy("FrozenLake-v1")), opened(toy("FrozenLake-v1", is_slippery=False))
    assert slippery.transitions[0, 1].max() == pytest.approx(1 / 3)
    assert (dry.transitions.max(axis=2) == 1.0).all()
    assert opened(toy("FrozenLake-v1", map_name="8x8")).transitions.shape == (64, 4, 64)
