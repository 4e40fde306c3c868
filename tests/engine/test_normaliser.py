"""Observations are brought to mean 0 and deviation 1 by figures that move only when they are told to."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import pgengine
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.policies.normaliser import COUNT, MEAN, SQUARES, merged, new_buffers, normalised
from pgengine.rollout import rollout
from pgengine.spaces import BoxSpace
from pgengine.spec import (
    FourierFeaturesSpec,
    JointFeaturesSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    PolicySpec,
    ScorePolicySpec,
    TransformerPolicySpec,
)
from tests.engine.worlds import CARTPOLE, PENDULUM, random_mdp

BOX = BoxSpace(shape=[3], low=[None], high=[None], dtype="float32")
SPECS: list[PolicySpec] = [
    LinearPolicySpec(normalise_observations=True),
    LinearPolicySpec(normalise_observations=True, features=JointFeaturesSpec(degree=2)),
    MlpPolicySpec(normalise_observations=True, hidden=[4]),
    ScorePolicySpec(normalise_observations=True, hidden=[4]),
    TransformerPolicySpec(normalise_observations=True, window=3, width=4),
]


def make(spec: PolicySpec) -> Policy:
    policy = pgengine.create_policy(spec, CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    generator = np.random.default_rng(0)
    policy.parameters = {n: generator.normal(size=s).astype(np.float32) for n, s in sorted(policy.shapes().items())}
    return policy


def observations(N: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(N, 4)) * [3.0, 0.1, 1.0, 50.0] + [5.0, 0.0, -1.0, 100.0]).astype(np.float32)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_figures_of_parts_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    """Against mean and deviation of all rows at once, far from zero, where sums of squares would lose them."""
    x = np.random.default_rng(seed).normal(size=(sum(sizes), 3)) * [1.0, 1e-3, 100.0] + [0.0, 1e5, -3.0]
    buffers = new_buffers(BOX)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        buffers = merged(buffers, part)
    assert buffers[COUNT] == len(x)
    assert np.allclose(buffers[MEAN], x.mean(axis=0), rtol=1e-12)
    assert np.allclose(np.sqrt(buffers[SQUARES] / len(x)), x.std(axis=0), rtol=1e-5, atol=1e-9)
    assert all(array.dtype == np.float64 for array in buffers.values())


def test_rows_become_mean_zero_and_deviation_one() -> None:
    x = observations(10_000)
    buffers = merged(new_buffers(BoxSpace(shape=[4], low=[None], high=[None], dtype="float32")), x)
    found = normalised(buffers, x)
    assert found.dtype == np.float32
    assert np.allclose(found.mean(axis=0), 0.0, atol=1e-4)
    assert np.allclose(found.std(axis=0), 1.0, atol=1e-3)


def test_normalised_by_hand() -> None:
    """Mean 2, variance 4 of the first number; the second never varies; the third is far away."""
    buffers = merged(new_buffers(BOX), np.array([[0.0, 7.0, 0.0], [4.0, 7.0, 2.0]]))
    assert normalised(buffers, np.float32([[6.0, 7.0, 1e6], [2.0, 7.0, -1e6]])).tolist() == [
        [pytest.approx(2.0), 0.0, 10.0],
        [0.0, 0.0, -10.0],
    ]
    assert np.isnan(normalised(buffers, np.full((1, 3), np.nan, dtype=np.float32))).all()


def test_before_the_first_observation_numbers_are_only_cut() -> None:
    found = normalised(new_buffers(BOX), np.float32([[0.5, -30.0, 30.0]]))
    assert found.tolist() == [[0.5, -10.0, 10.0]]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_policy_reads_normalised_observations(spec: PolicySpec) -> None:
    """It gives what the same policy without a normaliser gives for observations that were normalised by hand."""
    policy = make(spec)
    policy.observe(observations(500))
    plain = make(spec.model_copy(update={"normalise_observations": False}))
    assert plain.buffers == {}
    x, offsets = observations(20, seed=1), np.array([0, 4, 20])
    by_hand = normalised(policy.buffers, x)
    found = policy.outputs(policy.windows(x, offsets))
    assert np.array_equal(found, plain.outputs(plain.windows(by_hand, offsets)))
    assert not np.allclose(found, plain.outputs(plain.windows(x, offsets)), atol=1e-2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_figures_are_kept_with_the_policy(spec: PolicySpec) -> None:
    policy = make(spec)
    policy.observe(observations(500))
    policy.observe(observations(7, seed=2))
    again, copied = pgengine.load(policy.to_bytes()), policy.copy()
    assert again.to_bytes() == policy.to_bytes() == copied.to_bytes()
    for other in (again, copied):
        assert {n: a.tolist() for n, a in other.buffers.items()} == {n: a.tolist() for n, a in policy.buffers.items()}
    seen = policy.begin_windows(observations(3))
    before = copied.outputs(seen)
    policy.observe(1000.0 * observations(50))
    assert np.array_equal(copied.outputs(seen), before)
    assert not np.array_equal(policy.outputs(seen), before)


def test_nothing_but_observe_moves_the_figures() -> None:
    policy = make(SPECS[2])
    policy.observe(observations(100))
    before = {name: array.tobytes() for name, array in policy.buffers.items()}
    policy.answer(observations(50, seed=1), seed=0)
    policy.log_prob(policy.parameters, policy.encode(observations(2)), np.array([0, 1]))
    opened = pgengine.open_environment(CARTPOLE)
    rollout(policy, opened, Noise(0, "training", 0), 3)
    opened.close()
    policy.to_bytes()
    assert {name: array.tobytes() for name, array in policy.buffers.items()} == before


def test_a_policy_without_a_normaliser_observes_nothing() -> None:
    policy = make(MlpPolicySpec())
    policy.observe(observations(10))
    assert policy.buffers == {}
    assert "buffers." not in " ".join(safetensors.numpy.load(policy.to_bytes()))


def test_a_mixture_moves_with_its_policy() -> None:
    policy = make(SPECS[2])
    mixed = policy.mixed_with_uniform(0.1)
    policy.observe(observations(100))
    assert np.array_equal(mixed.outputs(observations(3)), policy.outputs(observations(3)))


@pytest.mark.parametrize(("spec", "world", "code"), [
    (MlpPolicySpec(normalise_observations=True), random_mdp(0), "normalise_needs_box"),
    (TransformerPolicySpec(normalise_observations=True), random_mdp(0), "normalise_needs_box"),
    (LinearPolicySpec(normalise_observations=True, features=FourierFeaturesSpec()), PENDULUM, "scaled_twice"),
])  # fmt: skip
def test_a_normaliser_that_does_not_fit_is_named(spec: PolicySpec, world: object, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.create_policy(spec, world, pgengine.describe(world), seed=0)  # type: ignore[arg-type]
    assert (error.value.pointer, error.value.code) == ("/normalise_observations", code)


@pytest.mark.parametrize("change", [
    {f"buffers.{COUNT}": np.array(-1.0)},
    {f"buffers.{COUNT}": np.array([1.0])},
    {f"buffers.{MEAN}": np.full(4, np.nan)},
    {f"buffers.{MEAN}": np.zeros(4, dtype=np.float32)},
    {f"buffers.{MEAN}": np.zeros(3)},
    {f"buffers.{SQUARES}": np.full(4, -1.0)},
    {"buffers.other": np.zeros(1)},
], ids=str)  # fmt: skip
def test_a_checkpoint_with_other_figures_is_refused(change: dict[str, np.ndarray]) -> None:
    data = make(SPECS[2]).to_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    forged = safetensors.numpy.save(safetensors.numpy.load(data) | change, metadata)
    with pytest.raises(pgengine.CheckpointError, match="buffers"):
        pgengine.load(forged)


def test_a_checkpoint_without_its_figures_is_refused() -> None:
    data = make(SPECS[2]).to_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = {name: array for name, array in safetensors.numpy.load(data).items() if MEAN not in name}
    with pytest.raises(pgengine.CheckpointError, match="buffers"):
        pgengine.load(safetensors.numpy.save(tensors, metadata))
