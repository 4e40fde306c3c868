"""Environments that others wrote: what they return, draw from, and are made with."""

from typing import Any

import gymnasium
import numpy as np
import pytest

import pgengine
from pgengine.environments.arguments import constructor_arguments
from pgengine.environments.gymnasium import GymnasiumEpisodes
from pgengine.environments.registry import near_ids
from pgengine.environments.returned import Returned, UnclearReturn
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace, Space
from pgengine.spec import (
    AlgorithmSpec,
    GaussianSpec,
    GymnasiumSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    StopSpec,
    TrainingSpec,
)
from tests.engine import foreign_environments
from tests.engine.worlds import CARTPOLE, PENDULUM

PAIR = BoxSpace(shape=[2], low=[-1.0], high=[1.0], dtype="float32")
ONE = BoxSpace(shape=[1], low=[None], high=[None], dtype="float32")
FIVE = DiscreteSpace(n=5, start=1)
SEEN = np.array([0.5, -0.5], np.float32)


def foreign(name: str, **arguments: Any) -> GymnasiumSpec:
    return GymnasiumSpec(id=f"foreign/{name}-v0", arguments=arguments)


# --- what reset and step return


@pytest.mark.parametrize(("space", "returned", "expected"), [
    (PAIR, (SEEN, {}), [0.5, -0.5]),
    (PAIR, (SEEN, None), [0.5, -0.5]),
    (PAIR, (SEEN, [1, 2]), [0.5, -0.5]),
    (PAIR, [SEEN, {}], [0.5, -0.5]),
    (PAIR, SEEN, [0.5, -0.5]),
    (PAIR, (0.5, -0.5), [0.5, -0.5]),
    (PAIR, [0.5, -0.5], [0.5, -0.5]),
    (PAIR, ([0.5, -0.5], {}), [0.5, -0.5]),
    (PAIR, (SEEN.astype(np.float64), {}), [0.5, -0.5]),
    (PAIR, (np.array([[1], [0]]), {}), [1.0, 0.0]),
    (PAIR, ([np.array(1.0), np.float32(0.0)], {}), [1.0, 0.0]),
    (ONE, (3, {}), [3.0]),
    (ONE, 3.5, [3.5]),
    (FIVE, (3, {}), 3),
    (FIVE, 3, 3),
    (FIVE, (np.array([3]), {}), 3),
    (FIVE, (np.float32(3.0), {}), 3),
    (FIVE, (True, {}), 1),
    (MultiBinarySpace(n=2), (np.array([1.0, 0.0]), {}), [1, 0]),
])  # fmt: skip
def test_an_observation_is_read_where_its_meaning_is_certain(space: Space, returned: Any, expected: Any) -> None:
    assert np.asarray(Returned(space).reset(returned)).tolist() == expected


@pytest.mark.parametrize(("space", "returned", "said"), [
    (PAIR, None, r"reset returned None; expected \(observation, info\)"),
    (PAIR, "ready", "reset returned str 'ready'; expected"),
    (PAIR, np.zeros(3), r"array of shape \(3,\) of type float64; .* an array of numbers of shape \(2,\)"),
    (PAIR, (np.zeros(3), {}), r"reset returned an array of shape \(3,\) .* as observation; expected"),
    (PAIR, (SEEN, {}, 0), r"a tuple of 3 \(an array .*, dict, int '0'\)"),
    (PAIR, ({"a": SEEN}, {}), "returned dict as observation"),
    (PAIR, (None, {}), "returned None as observation"),
    (PAIR, ([[1.0], [1.0, 2.0]], {}), "returned a list of 2"),
    (PAIR, (np.array(["a", "b"]), {}), "of type <U1"),
    (PAIR, (np.array([1j, 2j]), {}), "complex"),
    (FIVE, (3.5, {}), "float '3.5' as observation; expected a whole number from 1 to 5"),
    (FIVE, (float("nan"), {}), "float 'nan'"),
])  # fmt: skip
def test_an_observation_that_is_unclear_is_named(space: Space, returned: Any, said: str) -> None:
    with pytest.raises(UnclearReturn, match=said):
        Returned(space).reset(returned)


@pytest.mark.parametrize(("reward", "terminated", "truncated"), [
    (1, False, True), (np.array([1.0]), np.bool_(False), 1), (np.array(1.0), np.array([False]), np.int64(1)),
    (np.float32(1.0), 0.0, 1.0), (True, 0, np.array(True)), ([1.0], False, [1]),
])  # fmt: skip
def test_numbers_and_flags_are_read_in_every_usual_form(reward: Any, terminated: Any, truncated: Any) -> None:
    _, *read = Returned(PAIR).step((SEEN, reward, terminated, truncated, None))
    assert read == [1.0, False, True]
    assert [type(one) for one in read] == [float, bool, bool]


@pytest.mark.parametrize(("returned", "said"), [
    ((SEEN, 1.0, True, {}), r"step returned 4 values, as in old Gym.*expected \(observation, reward, term"),
    ((SEEN, 1.0, True), "step returned 3 values; expected"),
    (None, "step returned None; expected"),
    ((SEEN, None, False, False, {}), "step returned None as reward; expected a number"),
    ((SEEN, "1.0", False, False, {}), "str '1.0' as reward"),
    ((SEEN, np.zeros(2), False, False, {}), r"array of shape \(2,\) .* as reward"),
    ((SEEN, 1j, False, False, {}), "complex as reward"),
    ((SEEN, 1.0, "False", False, {}), "str 'False' as terminated; expected true or false"),
    ((SEEN, 1.0, False, None, {}), "None as truncated"),
    ((SEEN, 1.0, 2, False, {}), "int '2' as terminated"),
    ((SEEN, 1.0, float("nan"), False, {}), "float 'nan' as terminated"),
    ((np.zeros((2, 2)), 1.0, False, False, {}), r"step returned an array of shape \(2, 2\)"),
])  # fmt: skip
def test_a_step_that_is_unclear_is_named(returned: Any, said: str) -> None:
    with pytest.raises(UnclearReturn, match=said):
        Returned(PAIR).step(returned)


def says(space: gymnasium.Space[Any], reset: Any, step: Any) -> GymnasiumEpisodes:
    """An environment that returns these; JSON could not say them."""
    made = gymnasium.make("foreign/Says-v0", disable_env_checker=True, space=space, reset=reset, step=step)
    name = "foreign/Said-v0"
    gymnasium.registry.pop(name, None)
    gymnasium.register(name, lambda: made.unwrapped, max_episode_steps=3)
    return GymnasiumEpisodes(GymnasiumSpec(id=name))


def test_an_episode_in_another_form_is_played() -> None:
    episodes = says(foreign_environments.BOX, SEEN.tolist(), ([0.25, 0], np.array([2.0]), np.bool_(True), 0, None))
    assert episodes.begin(np.array([7], dtype=np.uint64)).tolist() == [[0.5, -0.5]]
    step = episodes.step(np.array([1]), None)
    assert (step.observations.tolist(), step.rewards.tolist()) == ([[0.25, 0.0]], [2.0])
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([True], [False])


@pytest.mark.parametrize(("reset", "step", "said"), [
    (None, None, r"foreign/Said-v0, step 0: reset returned None; expected \(observation, info\)"),
    ((SEEN, {}), (SEEN, 1.0, True, {}), "foreign/Said-v0, step 0: step returned 4 values"),
    ((SEEN, {}), (SEEN, float("nan"), False, False, {}), "a reward that is not finite in step 0: nan"),
    ((SEEN, {}), (SEEN * np.nan, 1.0, False, False, {}), "numbers that are not finite.*in step at step 0"),
    ((np.array([1e300, 0.0]), {}), None, "beyond 32-bit floats, in reset"),
])  # fmt: skip
def test_the_error_names_what_a_broken_environment_returned(reset: Any, step: Any, said: str) -> None:
    episodes = says(foreign_environments.BOX, reset, step)
    with pytest.raises(pgengine.EnvironmentFailure, match=said):
        episodes.begin(np.array([7], dtype=np.uint64))
        episodes.step(np.array([1]), None)


def test_a_reset_without_a_seed_is_told_what_is_missing() -> None:
    with pytest.raises(pgengine.EnvironmentFailure, match=r"expected reset\(\*, seed=None, options=None\)"):
        GymnasiumEpisodes(foreign("OldReset")).begin(np.array([7], dtype=np.uint64))


# --- seeds


@pytest.mark.parametrize(("name", "bits"), [("Drawing", 63), ("SeedingNumpy", 32), ("SeedingC", 31)])
def test_an_episode_gets_the_largest_seed_that_reset_takes(name: str, bits: int) -> None:
    words = np.array([2**64 - 1, 2**63 + 12345], dtype=np.uint64)
    episodes = GymnasiumEpisodes(foreign(name))
    first = episodes.begin(words)
    stepped = episodes.step(np.zeros(2, dtype=np.int64), None).observations
    again = GymnasiumEpisodes(foreign(name))
    assert np.array_equal(again.begin(words), first)
    assert np.array_equal(again.step(np.zeros(2, dtype=np.int64), None).observations, stepped)
    lone = gymnasium.make(f"foreign/{name}-v0").unwrapped
    lone.reset(seed=int(words[0]) >> 64 - bits)
    lone.reset(seed=int(words[1]) >> 64 - bits)  # what numpy.random keeps is that of the last one
    if name != "SeedingNumpy":
        assert lone.step(0)[0][0] == stepped[1, 0]


def test_seeds_of_neighbouring_episodes_stay_apart() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, size=64, dtype=np.uint64)
    shown = GymnasiumEpisodes(foreign("SeedingNumpy")).begin(words)
    assert len(set(shown.ravel().tolist())) == 64


def test_a_reset_that_fails_now_and_then_keeps_its_large_seeds() -> None:
    episodes = GymnasiumEpisodes(foreign("Flaky"))
    with pytest.raises(pgengine.EnvironmentFailure, match="the simulator was not ready"):
        episodes.begin(np.array([2**63], dtype=np.uint64))


def test_an_environment_that_sets_numpys_generator_is_trained() -> None:
    spec = TrainingSpec(
        environment=foreign("SeedingNumpy"), algorithm=AlgorithmSpec(trajectories=4), stop=StopSpec(updates=2)
    )
    runs = [[update.policy.to_bytes() for update in pgengine.train(spec)][-1] for _ in range(2)]
    assert runs[0] == runs[1]


# --- whether it can be repeated


@pytest.mark.parametrize(("name", "repeatable"), [
    ("Drawing", True), ("SeedingNumpy", True), ("Picture", True), ("OldReset", True),
    ("FromRandom", False), ("FromNumpy", False), ("FromConstructor", False),
    ("FromEarlierEpisodes", False),
    ("Rewarding", False), ("Ending", False),
])  # fmt: skip
def test_an_environment_that_cannot_be_repeated_is_found_out(name: str, repeatable: bool) -> None:
    # `Ending` shows nothing but when it ends: its episodes, 18 or so, are alike by chance with probability 3e-9
    facts = pgengine.describe(foreign(name))
    assert facts.repeatable is repeatable
    assert [notice.code for notice in pgengine.notices_of(facts)] == ([] if repeatable else ["not_repeatable"])


@pytest.mark.parametrize("spec", [CARTPOLE, PENDULUM, GymnasiumSpec(id="pgengine/ParticleContinuous-v0")])
def test_well_made_environments_are_repeatable(spec: GymnasiumSpec) -> None:
    assert pgengine.describe(spec).repeatable


# --- arguments


def game(name: str = "foreign/Game-v0") -> dict[str, Any]:
    return {key: one.schema for key, one in constructor_arguments(gymnasium.spec(name)).parameters.items()}


def test_arguments_have_a_schema_that_says_what_fits() -> None:
    schemas = game()
    assert schemas["game"] == {"type": "string", "default": "pong"}
    assert schemas["mode"] == {"type": ["integer", "null"], "default": None}
    assert schemas["obs_type"] == {"enum": ["rgb", "grayscale", "ram"], "type": "string", "default": "rgb"}
    assert [one["type"] for one in schemas["frameskip"]["anyOf"]] == ["array", "integer"]
    assert schemas["chance"] == {"type": "number", "minimum": 0.0, "maximum": 1.0, "default": 0.25}
    assert schemas["level"] == {"enum": ["easy", "hard"], "type": "string", "default": "easy"}
    assert schemas["rewards"]["anyOf"][0] == {"type": "object", "additionalProperties": {"type": "number"}}
    assert schemas["free"] == {"default": None}
    assert "hook" not in schemas
    # its annotation is there for type checkers alone, and says nothing here
    assert schemas["price"] == {"default": None}


@pytest.mark.parametrize(("name", "value", "given"), [
    ("obs_type", "ram", "ram"), ("frameskip", [2, 5], (2, 5)), ("frameskip", 3, 3), ("frameskip", 3.0, 3),
    ("mode", None, None), ("chance", 1, 1.0), ("sizes", [1, 2.0], [1, 2]), ("rewards", {"win": 1}, {"win": 1.0}),
    ("level", "hard", foreign_environments.Level.HARD), ("free", {"a": [1, None, "x"]}, {"a": [1, None, "x"]}),
])  # fmt: skip
def test_json_becomes_what_the_constructor_asks_for(name: str, value: Any, given: Any) -> None:
    made = GymnasiumEpisodes(foreign("Game", **{name: value})).instance
    assert (made.given[name], type(made.given[name])) == (given, type(given))


def test_a_list_becomes_an_array_where_one_is_asked_for() -> None:
    goal = GymnasiumEpisodes(foreign("Game", goal=[[1.0, 2.0]])).instance.given["goal"]
    assert (type(goal), goal.tolist()) == (np.ndarray, [[1.0, 2.0]])


@pytest.mark.parametrize(("name", "value", "code", "said"), [
    ("obs_type", "jpeg", "argument_value", "expected one of 'rgb', 'grayscale', 'ram'"),
    ("obs_type", 3, "argument_value", "expected one of 'rgb', 'grayscale', 'ram'"),
    ("frameskip", "4", "argument_type", "expected a whole number or a list of 2: a whole number, a whole number"),
    ("frameskip", [1, 2, 3], "argument_value", "expected a whole number or a list of 2"),
    ("mode", 1.5, "argument_type", "expected a whole number or null"),
    ("mode", True, "argument_type", "expected a whole number or null"),
    ("chance", 1.5, "argument_value", "expected a number from 0 to 1"),
    ("chance", "a", "argument_type", "expected a number from 0 to 1"),
    ("level", "EASY", "argument_value", "expected one of 'easy', 'hard'"),
    ("sizes", ["a"], "argument_type", "expected null or a list, each a whole number"),
    ("rewards", [1.0], "argument_type", "expected an object or null"),
    ("hook", "x", "unknown_argument", "takes no such argument; it takes: game, mode"),
    ("max_episode_steps", 10, "unknown_argument", "a field of its own beside arguments"),
])  # fmt: skip
def test_an_argument_that_does_not_fit_is_refused_in_words(name: str, value: Any, code: str, said: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        GymnasiumEpisodes(foreign("Game", **{name: value}))
    assert (error.value.pointer, error.value.code) == (f"/arguments/{name}", code)
    assert said in error.value.message


def test_a_constructor_that_takes_anything_gets_json_values() -> None:
    given = {"size": 3, "names": ["a", {"b": None}], "deep": {"x": [1.5]}}
    assert GymnasiumEpisodes(foreign("Open", **given)).instance.given == given
    for name in ("max_episode_steps", "id", "disable_env_checker"):
        with pytest.raises(pgengine.SpecError, match=f"/arguments/{name}"):
            GymnasiumEpisodes(foreign("Open", **{name: 1}))


@pytest.mark.parametrize("arguments", [{"a": list(range(10_001))}, {"a": [[[[[[[[[[1]]]]]]]]]] * 2000}])
def test_arguments_are_bounded(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at most 10000 values"):
        foreign("Open", **arguments)


@pytest.mark.parametrize(("id", "name", "inside", "outside"), [
    ("FrozenLake-v1", "success_rate", [0.0, 1.0], [-0.01, 1.01]),
    ("Taxi-v4", "rainy_probability", [0.0, 1.0], [-0.01, 1.01]),
])  # fmt: skip
def test_documented_ranges_are_those_in_which_gymnasium_has_probabilities(
    id: str, name: str, inside: list[float], outside: list[float]
) -> None:
    more = {"is_rainy": True} if id == "Taxi-v4" else {}

    def probabilities(value: float) -> np.ndarray:
        table = gymnasium.make(id, **more, **{name: value}).unwrapped.P  # type: ignore[attr-defined]
        return np.array([p for row in table.values() for moves in row.values() for p, *_ in moves])

    for value in inside:
        drawn = probabilities(value)
        assert ((drawn >= 0) & (drawn <= 1)).all()
        pgengine.open_environment(GymnasiumSpec(id=id, arguments=more | {name: value})).close()
    for value in outside:
        drawn = probabilities(value)
        assert not ((drawn >= 0) & (drawn <= 1)).all()
        with pytest.raises(pgengine.SpecError, match="expected a number from 0 to 1"):
            pgengine.open_environment(GymnasiumSpec(id=id, arguments=more | {name: value}))


def test_the_maps_of_frozen_lake_are_gymnasiums() -> None:
    from gymnasium.envs.toy_text.frozen_lake import MAPS

    assert game("FrozenLake-v1")["map_name"]["anyOf"][0]["enum"] == sorted(MAPS)


def test_a_map_of_ones_own_is_played_by_its_table() -> None:
    lake = pgengine.open_environment(
        GymnasiumSpec(id="FrozenLake-v1", arguments={"desc": ["SF", "HG"], "reward_schedule": [3, -1, 0]})
    )
    assert isinstance(lake, pgengine.TabularMDP)
    assert lake.transitions.shape == (4, 4, 4)


def test_a_constructor_that_fails_tells_why() -> None:
    with pytest.raises(pgengine.SpecError, match="could not be made: SystemExit: the licence has expired"):
        pgengine.describe(foreign("Refusing"))


# --- names and spaces


@pytest.mark.parametrize(("wrong", "near"), [
    ("Taxi-v3", ["Taxi-v4"]), ("taxi-v4", ["Taxi-v4"]), ("cartpole-v1", ["CartPole-v1"]),
    ("Cart-Pole", ["CartPole-v1"]),
    ("CartPol-v1", ["CartPole-v1"]), ("Bandit-v0", ["my/Bandit-v2"]), ("my/Bandit-v9", ["my/Bandit-v2"]), ("Zork", []),
])  # fmt: skip
def test_ids_that_may_have_been_meant_are_named(wrong: str, near: list[str]) -> None:
    known = ["Taxi-v4", "CartPole-v1", "CartPole-v0", "phys2d/CartPole-v1", "my/Bandit-v2", "my/Bandit-v1"]
    assert near_ids(wrong, known) == near


@pytest.mark.parametrize(("id", "said"), [
    ("Blackjack-v1", "observation space is Tuple; .*gymnasium.wrappers.FlattenObservation.* a Box of 45 numbers"),
    ("foreign/Composite-v0", "observation space is Dict; .*FlattenObservation.* a Box of 5 numbers"),
    ("foreign/TwoActions-v0", "action space is Tuple; .*gymnasium.ActionWrapper"),
])  # fmt: skip
def test_a_space_that_is_not_supported_names_the_wrapper(id: str, said: str) -> None:
    with pytest.raises(pgengine.SpecError, match=said):
        pgengine.describe(GymnasiumSpec(id=id))


def test_the_wrapper_that_is_named_for_blackjack_works() -> None:
    def flat_blackjack(**arguments: Any) -> gymnasium.Env[Any, Any]:
        return gymnasium.wrappers.FlattenObservation(gymnasium.make("Blackjack-v1", **arguments))

    if "foreign/Blackjack-v0" not in gymnasium.registry:
        gymnasium.register("foreign/Blackjack-v0", flat_blackjack, max_episode_steps=20)
    spec = TrainingSpec(
        environment=GymnasiumSpec(id="foreign/Blackjack-v0", arguments={"natural": True}),
        algorithm=AlgorithmSpec(trajectories=4),
        stop=StopSpec(updates=1),
    )
    assert [update.updates for update in pgengine.train(spec)] == [1]


def test_an_image_for_a_network_without_convolutions_is_said() -> None:
    facts = pgengine.describe(foreign("Picture"))
    (notice,) = pgengine.notices_of(facts, MlpPolicySpec())
    assert notice.code == "image_as_numbers"
    assert "84 x 84 x 3" in notice.message
    assert pgengine.notices_of(facts) == []
    assert pgengine.notices_of(pgengine.describe(CARTPOLE), MlpPolicySpec()) == []


# --- wide boxes


def started(policy: MlpPolicySpec | LinearPolicySpec, name: str) -> pgengine.Policy:
    spec = foreign(name)
    return pgengine.create_policy(policy, spec, pgengine.describe(spec), seed=3)


def test_a_wide_box_is_started_in_the_middle_with_a_deviation_in_proportion() -> None:
    """Null hypothesis: mean 45 and deviation 22.5 before clipping; 10,000 draws, false-alarm rate below 1e-9."""
    policy = started(LinearPolicySpec(), "Wide")
    assert policy.spec.distribution == GaussianSpec(unit="box")
    actions = policy.answer(np.ones((10_000, 2), np.float32), seed=1).actions
    assert actions.min() >= 0.0
    assert actions.max() <= 90.0
    assert abs(float(np.median(actions)) - 45.0) < 6.5 * 22.5 * 1.2533 / 100
    quartiles = np.quantile(actions, [0.25, 0.75])
    assert abs(float(quartiles[1] - quartiles[0]) - 2 * 0.6745 * 22.5) < 6.5 * 22.5 * 1.58 / 100


@pytest.mark.parametrize("given", [GaussianSpec(), GaussianSpec(sigma="fixed"), GaussianSpec(sigma="head"), None])
def test_a_gaussian_without_a_deviation_of_its_own_gets_the_fitting_unit(given: GaussianSpec | None) -> None:
    for name, unit in (("Wide", "box"), ("Usual", "action")):
        made = started(LinearPolicySpec(distribution=given), name).spec.distribution
        assert isinstance(made, GaussianSpec)
        assert (made.unit, made.initial_sigma) == (unit, 0.5)
        assert started(LinearPolicySpec(distribution=made), name).spec.distribution == made


def test_a_deviation_that_was_given_is_one_of_the_action() -> None:
    given = GaussianSpec.model_validate({"kind": "gaussian", "initial_sigma": 0.5})
    made = started(LinearPolicySpec(distribution=given), "Wide")
    assert made.spec.distribution == GaussianSpec(unit="action")
    assert float(made.answer(np.ones((100, 2), np.float32), seed=1).actions.max()) < 5.0


def test_a_policy_that_was_kept_without_a_unit_acts_as_it_did() -> None:
    policy = started(LinearPolicySpec(distribution=GaussianSpec(unit="action")), "Wide")
    data = policy.to_bytes()
    assert b'\\"unit\\":\\"action\\"' in data
    old = data.replace(b',\\"unit\\":\\"action\\"', b" " * len(b',\\"unit\\":\\"action\\"'))
    seen = np.ones((16, 2), np.float32)
    kept = pgengine.load(old)
    assert kept.spec.distribution == GaussianSpec(unit="action")
    assert np.array_equal(kept.answer(seen, seed=1).actions, policy.answer(seen, seed=1).actions)


def test_a_run_of_a_wide_box_that_began_before_there_was_a_unit_goes_on() -> None:
    old = GaussianSpec.model_validate({"kind": "gaussian", "initial_sigma": 0.5})
    environment, algorithm = foreign("Wide"), AlgorithmSpec(trajectories=4)
    before = TrainingSpec(
        environment=environment,
        policy=LinearPolicySpec(distribution=old),
        algorithm=algorithm,
        stop=StopSpec(updates=1),
    )
    state = [update.state() for update in pgengine.train(before)][-1]
    after = TrainingSpec(
        environment=environment, policy=LinearPolicySpec(), algorithm=algorithm, stop=StopSpec(updates=2)
    )
    (update,) = pgengine.train(after, resume_from=state)
    assert update.policy.spec.distribution == GaussianSpec(unit="action")


def test_whole_numbers_of_a_wide_box_have_equal_shares() -> None:
    space = BoxSpace(shape=[2], low=[0.0, -100.0], high=[9.0, 100.0], dtype="int64")
    d = pgengine.distributions.open_distribution(GaussianSpec(unit="box"), space)
    assert d.action(np.array([[0.0, 0.0], [-1.0, 1.0], [-5.0, 5.0]])).tolist() == [[4, 0], [0, 100], [0, 100]]


def test_a_number_without_two_bounds_is_measured_in_its_own() -> None:
    space = BoxSpace(shape=[3], low=[0.0, 0.0, None], high=[10.0, None, None], dtype="float32")
    d = pgengine.distributions.open_distribution(GaussianSpec(unit="box"), space)
    assert d.action(np.array([[0.0, 3.0, -3.0]], np.float32)).tolist() == [[5.0, 3.0, -3.0]]


def test_policies_whose_draws_mean_other_actions_are_not_compared() -> None:
    boxed, plain = (
        started(LinearPolicySpec(distribution=GaussianSpec(unit=unit)), "Wide") for unit in ("box", "action")
    )
    with pytest.raises(pgengine.SpecError, match="become actions in another way"):
        pgengine.policies.check_behaviour(AlgorithmSpec(), boxed, plain)
    pgengine.policies.check_behaviour(AlgorithmSpec(), boxed, boxed.copy())


@pytest.mark.slow
def test_the_default_gaussian_finds_a_reward_in_the_middle_of_a_wide_box() -> None:
    """From the corner, with a deviation of 0.5 of 90, nothing is ever paid; three seeds of the default learn it."""

    def learned(distribution: GaussianSpec | None, updates: int, seed: int) -> float:
        spec = TrainingSpec(
            environment=foreign("Narrow"),
            policy=MlpPolicySpec(distribution=distribution),
            algorithm=AlgorithmSpec(trajectories=64),
            stop=StopSpec(updates=updates),
            diagnostics_every=0,
            seed=seed,
        )
        *_, last = pgengine.train(spec)
        return last.metrics["mean_return"]

    assert learned(GaussianSpec(unit="action"), 50, seed=0) == 0.0
    for seed in range(3):
        assert learned(None, 1, seed) < 0.5
        assert learned(None, 150, seed) > 0.7
