"""Feature maps against rows computed by hand, and the policies that read them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pgengine
from pgengine.environments import EnvironmentFacts
from pgengine.features import (
    MAX_FEATURES,
    fourier_features,
    joint_features,
    one_hot,
    polynomial_features,
    radial_features,
    scaled_to_bounds,
    state_numbers,
    tile_indices,
)
from pgengine.policies import Policy
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace, MultiDiscreteSpace, Space
from pgengine.spec import (
    FeaturesSpec,
    FourierFeaturesSpec,
    GymnasiumSpec,
    JointFeaturesSpec,
    LinearPolicySpec,
    OneHotFeaturesSpec,
    PlainFeaturesSpec,
    PolynomialFeaturesSpec,
    RbfFeaturesSpec,
    ScorePolicySpec,
    TableFeaturesSpec,
    TabularSpec,
    TileFeaturesSpec,
)
from tests.engine.worlds import CARTPOLE, bandit, random_mdp

FIELD = BoxSpace(shape=[2], low=[-1.0, 0.0], high=[1.0, 4.0], dtype="float32")
OPEN = BoxSpace(shape=[2], low=[-1.0, None], high=[None, 1.0], dtype="float32")
MOVES = DiscreteSpace(n=3, start=-1)
TORQUE = BoxSpace(shape=[2], low=[-1.0], high=[1.0], dtype="float32")


def facts(observations: Space, actions: Space) -> EnvironmentFacts:
    return EnvironmentFacts(
        observation_space=observations, action_space=actions, max_episode_steps=10, limit_from="declared"
    )


def linear(features: FeaturesSpec | None, observations: Space = FIELD, actions: Space = MOVES) -> Policy:
    """A linear policy with random parameters."""
    spec = LinearPolicySpec(features=features)
    policy = pgengine.create_policy(spec, CARTPOLE, facts(observations, actions), seed=0)
    generator = np.random.default_rng(3)
    policy.parameters["theta"] = generator.normal(size=policy.shapes()["theta"]).astype(np.float32)
    return policy


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_polynomials_by_hand() -> None:
    assert polynomial_features(np.array([[2.0, 3.0]]), 1).tolist() == [[1.0, 2.0, 3.0]]
    assert polynomial_features(np.array([[2.0, 3.0]]), 3).tolist() == [
        [1, 2, 3, 4, 6, 9, 8, 12, 18, 27]
    ]  # fmt: skip
    assert polynomial_features(np.zeros((5, 4)), 6).shape == (5, math.comb(10, 6))


def test_joint_features_by_hand() -> None:
    """Source: Bereyhi, chapter 5, x(s, a) = [x, y, a]."""
    x = np.array([[2.0, 5.0], [1.0, 0.0]])
    assert joint_features(x, np.array([-1, 3]), 1).tolist() == [[[2, 5, -1], [2, 5, 3]], [[1, 0, -1], [1, 0, 3]]]
    assert joint_features(x[:1], np.array([3]), 2).tolist() == [[[2, 5, 3, 4, 10, 6, 25, 15, 9]]]


def test_fourier_features_by_hand() -> None:
    """c = (0, 0), (0, 1), (1, 0), (1, 1) at x = (1/2, 1): cos 0, cos pi, cos pi/2, cos 3pi/2."""
    assert np.allclose(fourier_features(np.array([[0.5, 1.0]]), 1), [[1.0, -1.0, 0.0, 0.0]], atol=1e-15)
    assert np.allclose(fourier_features(np.array([[1 / 3]]), 3), [[1.0, 0.5, -0.5, -1.0]], atol=1e-15)


def test_radial_features_by_hand() -> None:
    e = math.exp
    assert np.allclose(radial_features(np.array([[0.25]]), 3, None), [[e(-0.125), e(-0.125), e(-1.125), 1.0]])
    assert np.allclose(radial_features(np.array([[0.25]]), 3, 0.25), [[e(-0.5), e(-0.5), e(-4.5), 1.0]])
    assert np.allclose(radial_features(np.array([[0.0]]), 1, None), [[e(-0.125), 1.0]])
    # centres (0, 0), (0, 1), (1, 0), (1, 1), width 1
    near = np.array([[0.0, 0.5]])
    assert np.allclose(radial_features(near, 2, None), [[e(-0.125), e(-0.125), e(-0.625), e(-0.625), 1.0]])


def test_tiles_by_hand() -> None:
    """Two grids of two tiles, the second shifted by half a tile; each has three tiles, which is one more."""
    x = np.array([[0.0], [0.2], [0.3], [0.5], [0.8], [1.0]])
    assert tile_indices(x, 2, 2).tolist() == [[0, 3], [0, 3], [0, 4], [1, 4], [1, 5], [2, 5]]
    # grid 1 of 4 is shifted by (1/4, 3/4) of a tile; its tiles begin at 9 and the second axis moves fastest
    assert tile_indices(np.array([[0.3, 0.3]]), 4, 2)[0, :2].tolist() == [0, 9 + 0 * 3 + 1]
    assert tile_indices(np.array([[0.4, 0.1]]), 4, 2)[0, :2].tolist() == [0, 9 + 1 * 3 + 0]


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_one_tile_of_each_grid_is_active(D: int, tilings: int, tiles: int, seed: int) -> None:
    x = np.random.default_rng(seed).random((20, D))
    x[0], x[1] = 0.0, 1.0
    grids = tile_indices(x, tilings, tiles) // (tiles + 1) ** D
    assert (grids == np.arange(tilings)).all()


def test_tiles_generalise_to_neighbours_and_no_farther() -> None:
    """Points less than 1/tilings of a tile apart differ in at most one grid along an axis; a tile apart, in all."""
    x = np.linspace(0.0, 1.0, 4 * 8 + 1)[:, None] + 1e-9
    indices = tile_indices(x[:-1], 8, 4)
    assert ((indices[1:] != indices[:-1]).sum(axis=1) == 1).all()
    assert (indices[8:] != indices[:-8]).all()


def test_scaling_takes_what_lies_outside_to_the_bound() -> None:
    x = np.array([[-1.0, 0.0], [0.0, 3.0], [5.0, -9.0]])
    assert scaled_to_bounds(x, np.array([-1.0, 0.0]), np.array([1.0, 4.0])).tolist() == [
        [0.0, 0.0], [0.5, 0.75], [1.0, 0.0]
    ]  # fmt: skip


def test_one_hot_of_several_components() -> None:
    space = MultiDiscreteSpace(nvec=[2, 3], start=[0, -1])
    assert one_hot(space, np.array([[1, -1], [0, 1]])).tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert one_hot(DiscreteSpace(n=3, start=4), np.array([6, 4])).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_numbers_of_an_observation() -> None:
    assert state_numbers(np.array([3, 4])).tolist() == [[3.0], [4.0]]
    assert state_numbers(np.ones((2, 2, 2), dtype=np.float32)).tolist() == [[1.0] * 4] * 2


# --- policies that read them ------------------------------------------------------------------------------------------

STATE_FEATURES: list[tuple[FeaturesSpec, np.ndarray]] = [
    (PlainFeaturesSpec(), np.array([[0.0, 3.0, 1.0]])),
    (PolynomialFeaturesSpec(degree=2), np.array([[1.0, 0.0, 3.0, 0.0, 0.0, 9.0]])),
    (FourierFeaturesSpec(order=2), fourier_features(np.array([[0.5, 0.75]]), 2)),
    (RbfFeaturesSpec(centres=3, width=0.3), radial_features(np.array([[0.5, 0.75]]), 3, 0.3)),
    (RbfFeaturesSpec(centres=3, low=[-2.0, 0.0], high=[2.0, 6.0]), radial_features(np.array([[0.5, 0.5]]), 3, None)),
]


@pytest.mark.parametrize(("features", "row"), STATE_FEATURES, ids=lambda value: getattr(value, "kind", ""))
@pytest.mark.parametrize("actions", [MOVES, TORQUE], ids=["softmax", "gaussian"])
def test_features_of_the_state_are_crossed_with_the_outputs(
    features: FeaturesSpec, row: np.ndarray, actions: Space
) -> None:
    policy = linear(features, FIELD, actions)
    width = 3 if actions is MOVES else 2
    assert policy.shapes()["theta"] == (row.shape[1], width)
    assert np.allclose(policy.outputs(np.float32([[0.0, 3.0]])), row @ policy.parameters["theta"], atol=1e-5)


def test_tiles_are_summed_over_the_grids() -> None:
    policy = linear(TileFeaturesSpec(tilings=4, tiles=2))
    theta = policy.parameters["theta"]
    assert theta.shape == (4 * 9, 3)
    x = np.float32([[0.0, 3.0], [-1.0, 0.0]])
    active = tile_indices(np.array([[0.5, 0.75], [0.0, 0.0]]), 4, 2)
    assert np.allclose(policy.outputs(x), theta[active].sum(axis=1), atol=1e-6)
    tensor = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    outputs = policy.network.outputs({"theta": tensor}, torch.as_tensor(policy.encode(x)))
    assert np.allclose(outputs.detach(), theta[active].sum(axis=1), atol=1e-6)
    outputs.sum().backward()
    assert tensor.grad is not None
    assert tensor.grad[:, 0].nonzero()[:, 0].tolist() == sorted(set(active.ravel().tolist()))


def test_joint_features_give_one_score_for_each_action() -> None:
    policy = linear(JointFeaturesSpec(degree=2))
    x = np.float32([[0.5, 2.0]])
    rows = joint_features(x.astype(np.float64), np.array([-1, 0, 1]), 2)
    assert policy.shapes()["theta"] == (9,)
    assert np.allclose(policy.outputs(x), rows @ policy.parameters["theta"], atol=1e-5)


def probabilities(policy: Policy) -> np.ndarray:
    x = np.random.default_rng(0).uniform(-1, 1, size=(50, 2)).astype(np.float32)
    found = policy.answer(x).probabilities
    assert isinstance(found, np.ndarray)
    return found


def test_the_state_cancels_in_a_softmax_of_joint_features_of_degree_one() -> None:
    """Of x(s, a) = [x, y, a] the part that belongs to s is the same for all actions; products cure it.

    Source: Bereyhi, chapter 5, the moving particle.
    """
    ignores, sees = (probabilities(linear(JointFeaturesSpec(degree=degree))) for degree in (1, 2))
    assert np.ptp(ignores, axis=0).max() < 1e-6
    assert np.ptp(ignores[0]) > 0.1  # it is not uniform: the number of the action counts
    assert np.ptp(sees, axis=0).max() > 0.1


def test_crossed_features_of_degree_one_tell_states_apart() -> None:
    assert np.ptp(probabilities(linear(PlainFeaturesSpec())), axis=0).max() > 0.1


SPACES: list[tuple[Space, str, int]] = [
    (FIELD, "plain", 3),
    (DiscreteSpace(n=4, start=1), "one_hot", 4),
    (MultiDiscreteSpace(nvec=[2, 3]), "one_hot", 5),
    (MultiBinarySpace(n=3), "plain", 4),
]


@pytest.mark.parametrize(("space", "kind", "count"), SPACES, ids=lambda value: getattr(value, "kind", ""))
def test_features_are_written_out(space: Space, kind: str, count: int) -> None:
    policy = linear(None, space)
    assert isinstance(policy.spec, LinearPolicySpec)
    assert policy.spec.features is not None
    assert policy.spec.features.kind == kind
    assert policy.shapes()["theta"] == (count, 3)


def test_integers_are_numbers_to_other_features() -> None:
    line = DiscreteSpace(n=5, start=2)
    fourier = linear(FourierFeaturesSpec(order=1), line)
    assert np.allclose(fourier.encode(np.array([2, 4, 6])), [[1, 1], [1, 0], [1, -1]], atol=1e-6)
    assert linear(PolynomialFeaturesSpec(degree=2), line).encode(np.array([3])).tolist() == [[1, 3, 9]]
    lamps = linear(RbfFeaturesSpec(centres=2), MultiBinarySpace(n=2))
    assert lamps.encode(np.array([[0, 1]])).argmax() == 1


# --- tables -----------------------------------------------------------------------------------------------------------

PAIRS = [[[1.0, 0.0], [0.0, 2.0]], [[0.5, 0.0], [0.0, -0.5]]]
WORLD = bandit(0.0, 1.0)


def make(spec: LinearPolicySpec | ScorePolicySpec, world: TabularSpec = WORLD) -> Policy:
    return pgengine.create_policy(spec, world, pgengine.describe(world), seed=0)


def test_a_table_of_pairs_is_read_from_the_policy_or_from_the_world() -> None:
    with_features = WORLD.model_copy(update={"features": [[[9.0], [9.0]], [[9.0], [9.0]]]})
    own = LinearPolicySpec(features=TableFeaturesSpec(values=PAIRS), initial_parameters={"theta": [0.5, 1.5]})
    for world in (WORLD, with_features):
        assert make(own, world).outputs(np.array([0, 1])).tolist() == [[0.5, 3.0], [0.25, -0.75]]
    theirs = make(LinearPolicySpec(), with_features)
    assert isinstance(theirs.spec, LinearPolicySpec)
    assert theirs.spec.features == TableFeaturesSpec()
    assert theirs.shapes()["theta"] == (1,)


def test_a_table_of_states_is_crossed_with_the_actions() -> None:
    theta = [[1.0, -1.0], [0.0, 3.0]]
    values = [[[1.0, 2.0]], [[0.0, 1.0]]]
    spec = LinearPolicySpec(features=TableFeaturesSpec(values=values), initial_parameters={"theta": theta})
    assert make(spec).outputs(np.array([0, 1])).tolist() == [[1.0, 5.0], [0.0, 3.0]]


def test_a_table_is_kept_in_the_arrays_once() -> None:
    policy = make(LinearPolicySpec(features=TableFeaturesSpec(values=PAIRS)))
    again = pgengine.load(policy.to_bytes())
    assert isinstance(again.spec, LinearPolicySpec)
    assert again.spec.features == TableFeaturesSpec()
    assert again.features is not None
    assert again.features.tolist() == PAIRS
    assert again.to_bytes() == policy.to_bytes()


# --- what does not fit ------------------------------------------------------------------------------------------------

WIDE = BoxSpace(shape=[40], low=[0.0], high=[1.0], dtype="float32")


@pytest.mark.parametrize(("features", "observations", "actions", "pointer", "code"), [
    (FourierFeaturesSpec(), OPEN, MOVES, "/features/low", "bounds_missing"),
    (RbfFeaturesSpec(low=[0.0, 0.0]), OPEN, MOVES, "/features/high", "bounds_missing"),
    (TileFeaturesSpec(low=[0.0], high=[1.0]), OPEN, MOVES, "/features/low", "shape"),
    (TileFeaturesSpec(high=[1.0, 1.0, 1.0]), FIELD, MOVES, "/features/high", "shape"),
    (FourierFeaturesSpec(low=[0.0, 5.0]), FIELD, MOVES, "/features/high", "bounds_order"),
    (OneHotFeaturesSpec(), FIELD, MOVES, "/features/kind", "features_do_not_fit"),
    (OneHotFeaturesSpec(), MultiBinarySpace(n=2), MOVES, "/features/kind", "features_do_not_fit"),
    (TableFeaturesSpec(values=PAIRS), FIELD, MOVES, "/features/kind", "features_do_not_fit"),
    (JointFeaturesSpec(), FIELD, TORQUE, "/features/kind", "features_do_not_fit"),
    (FourierFeaturesSpec(order=1), WIDE, MOVES, "/features", "too_many_features"),
    (RbfFeaturesSpec(), WIDE, MOVES, "/features", "too_many_features"),
    (TileFeaturesSpec(), WIDE, MOVES, "/features", "too_many_features"),
    (PolynomialFeaturesSpec(degree=3), WIDE, MOVES, "/features", "too_many_features"),
    (JointFeaturesSpec(degree=2), WIDE, DiscreteSpace(n=50), "/features", "too_many_features"),
    (TableFeaturesSpec(values=PAIRS), DiscreteSpace(n=3), DiscreteSpace(n=2), "/features/values", "shape"),
    (TableFeaturesSpec(values=PAIRS), DiscreteSpace(n=2), MOVES, "/features/values", "shape"),
    (TableFeaturesSpec(values=PAIRS), DiscreteSpace(n=2), TORQUE, "/features/values", "shape"),
    (TableFeaturesSpec(values=[[[1.0], [2.0]], [[1.0]]]), DiscreteSpace(n=2), DiscreteSpace(n=2),
     "/features/values/1", "shape"),
    (TableFeaturesSpec(values=[[[1.0], [2.0]], [[1.0], []]]), DiscreteSpace(n=2), DiscreteSpace(n=2),
     "/features/values/1/1", "shape"),
    (TableFeaturesSpec(values=[]), DiscreteSpace(n=2), DiscreteSpace(n=2), "/features/values", "shape"),
    (TableFeaturesSpec(), DiscreteSpace(n=2), DiscreteSpace(n=2), "/features/values", "features_missing"),
])  # fmt: skip
def test_features_that_do_not_fit_are_named(
    features: FeaturesSpec, observations: Space, actions: Space, pointer: str, code: str
) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        linear(features, observations, actions)
    assert (error.value.pointer, error.value.code) == (pointer, code)


def test_wrong_features_of_a_training_spec_are_named_from_its_root() -> None:
    spec = pgengine.TrainingSpec(
        environment=CARTPOLE, policy=LinearPolicySpec(features=FourierFeaturesSpec())
    )  # fmt: skip
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.resolve(spec, pgengine.describe(CARTPOLE))
    assert (error.value.pointer, error.value.code) == ("/policy/features/low", "bounds_missing")
    assert "number 1" in error.value.message


def test_the_largest_number_of_features_is_allowed() -> None:
    features = FourierFeaturesSpec(order=7)
    assert MAX_FEATURES == 8**4
    four = BoxSpace(shape=[4], low=[0.0], high=[1.0], dtype="float32")
    assert linear(features, four).shapes()["theta"] == (MAX_FEATURES, 3)


def test_numbers_that_overflow_are_refused_when_acting() -> None:
    policy = linear(PolynomialFeaturesSpec(degree=3))
    with pytest.raises(pgengine.ObservationError) as error:
        policy.answer(np.float32([[0.0, 0.0], [3e38, 3e38]]))
    assert (error.value.pointer, error.value.code) == ("/1", "observation_too_large")


# --- a score for each pair --------------------------------------------------------------------------------------------


def test_a_score_network_is_a_network_of_pairs() -> None:
    """The same numbers as a network that gets [s, one-hot a] for each action, written out."""
    policy = pgengine.create_policy(
        ScorePolicySpec(hidden=[5, 4], activation="relu"), CARTPOLE, facts(FIELD, MOVES), seed=0
    )
    generator = np.random.default_rng(7)
    policy.parameters = {n: generator.normal(size=s).astype(np.float32) for n, s in policy.shapes().items()}
    x = generator.normal(size=(9, 2)).astype(np.float32)
    expected = np.zeros((9, 3))
    for a in range(3):
        pairs = np.concatenate([x, np.tile(np.eye(3)[a], (9, 1))], axis=1)
        for layer in range(3):
            weight, bias = (policy.parameters[f"layers.{layer}.{name}"] for name in ("weight", "bias"))
            pairs = pairs @ weight + bias
            pairs = np.maximum(pairs, 0.0) if layer < 2 else pairs
        expected[:, a] = pairs[:, 0]
    assert policy.parameters["layers.0.weight"].shape == (2 + 3, 5)
    assert np.allclose(policy.outputs(x), expected, atol=1e-4)
    tensors = {name: torch.as_tensor(array).double() for name, array in policy.parameters.items()}
    assert np.allclose(policy.network.outputs(tensors, torch.as_tensor(policy.encode(x)).double()), expected, atol=1e-5)


def test_a_score_network_reads_a_table_of_pairs() -> None:
    world = WORLD.model_copy(update={"features": PAIRS})
    policy = make(ScorePolicySpec(hidden=[4]), world)
    assert policy.parameters["layers.0.weight"].shape == (2, 4)
    p = policy.parameters
    hidden = np.tanh(np.array(PAIRS) @ p["layers.0.weight"] + p["layers.0.bias"])
    expected = (hidden @ p["layers.1.weight"] + p["layers.1.bias"])[:, :, 0]
    assert np.allclose(policy.outputs(np.array([0, 1])), expected, atol=1e-6)
    assert np.array_equal(pgengine.load(policy.to_bytes()).outputs(np.array([1])), policy.outputs(np.array([1])))


def test_a_score_network_needs_a_finite_set_of_actions() -> None:
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.create_policy(ScorePolicySpec(), CARTPOLE, facts(FIELD, TORQUE), seed=0)
    assert (error.value.pointer, error.value.code) == ("/kind", "score_needs_discrete_actions")


def test_a_score_network_needs_features_of_pairs() -> None:
    spec = ScorePolicySpec(features=TableFeaturesSpec(values=[[[1.0]], [[2.0]]]))
    with pytest.raises(pgengine.SpecError) as error:
        make(spec)
    assert (error.value.pointer, error.value.code) == ("/features/values", "shape")


@pytest.mark.parametrize("spec", [LinearPolicySpec(), ScorePolicySpec(hidden=[4])], ids=["linear", "score"])
def test_a_registered_environment_without_a_table_is_read_as_it_is(spec: LinearPolicySpec | ScorePolicySpec) -> None:
    policy = pgengine.create_policy(spec, CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    assert policy.features is None
    world = random_mdp(0)
    assert pgengine.create_policy(spec, world, pgengine.describe(world), seed=0).features is None


def test_mountain_car_has_bounds_of_its_own() -> None:
    environment = GymnasiumSpec(id="MountainCar-v0")
    spec = LinearPolicySpec(features=TileFeaturesSpec())
    policy = pgengine.create_policy(spec, environment, pgengine.describe(environment), seed=0)
    assert policy.shapes()["theta"] == (8 * 81, 3)
