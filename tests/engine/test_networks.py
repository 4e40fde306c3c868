"""Networks against numpy written by hand, spaces that do not start at zero, and the Gaussian's own parameters."""

import gymnasium
import numpy as np
import pytest
import torch

import pgengine
from pgengine.distributions import DiagonalGaussian
from pgengine.environments import EnvironmentFacts
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.policies.networks import open_network
from pgengine.rollout import rollout
from pgengine.spaces import BoxSpace, DiscreteSpace, Space
from pgengine.spec import (
    GaussianSpec,
    GymnasiumSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    PolynomialFeaturesSpec,
    TableFeaturesSpec,
)
from tests.engine.worlds import CARTPOLE, PENDULUM

SHIFTED = DiscreteSpace(n=3, start=2)
PLANE = BoxSpace(shape=[2], low=[None], high=[None], dtype="float32")


def filled(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random values in the place of zeros and small ones."""
    generator = np.random.default_rng(5)
    return {name: generator.normal(size=array.shape).astype(np.float32) for name, array in parameters.items()}


def forward(parameters: dict[str, np.ndarray], x: np.ndarray, activation: str) -> np.ndarray:
    """A fully connected network with one unit after the other."""
    layers = len(parameters) // 2
    for layer in range(layers):
        weight, bias = (parameters[f"layers.{layer}.{name}"].astype(np.float64) for name in ("weight", "bias"))
        x = np.array([[sum(row * weight[:, j]) + bias[j] for j in range(len(bias))] for row in x])
        if layer < layers - 1:
            x = np.tanh(x) if activation == "tanh" else np.maximum(x, 0.0)
    return x


def test_a_table_begins_at_the_start_of_its_space() -> None:
    network = open_network(LinearPolicySpec(), SHIFTED, 2, None)
    parameters = filled(network.initial(Noise(0, "training", 0)))
    found = network.outputs(parameters, network.encode(np.array([2, 4, 3, 2])))
    assert np.array_equal(found, parameters["theta"][[0, 2, 1, 0]])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_network_reads_a_discrete_observation_as_one_hot(activation: str) -> None:
    network = open_network(MlpPolicySpec(hidden=[4], activation=activation), SHIFTED, 2, None)
    parameters = filled(network.initial(Noise(0, "training", 0)))
    found = network.outputs(parameters, network.encode(np.array([2, 4, 3])))
    assert np.allclose(found, forward(parameters, np.eye(3)[[0, 2, 1]], activation), atol=1e-5)


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_network_is_its_formula(activation: str, library: object) -> None:
    network = open_network(MlpPolicySpec(hidden=[5, 4], activation=activation), PLANE, 3, None)
    parameters = filled(network.initial(Noise(0, "training", 0)))
    x = np.random.default_rng(1).normal(size=(20, 2)).astype(np.float32)
    bound = {name: library(array) for name, array in parameters.items()}  # type: ignore[operator]
    found = np.asarray(network.outputs(bound, library(network.encode(x))))  # type: ignore[operator]
    assert np.allclose(found, forward(parameters, x, activation), atol=1e-5)


def test_the_last_row_of_a_linear_policy_is_the_constant() -> None:
    network = open_network(LinearPolicySpec(), PLANE, 2, None)
    theta = np.float32([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    x = np.float32([[0.0, 0.0], [1.0, 0.0], [0.5, -1.0]])
    assert network.initial(Noise(0, "training", 0))["theta"].shape == theta.shape
    assert network.outputs({"theta": theta}, network.encode(x)).tolist() == [
        [100.0, 200.0], [101.0, 202.0], [90.5, 181.0]
    ]  # fmt: skip


class Shifted(gymnasium.Env[int, int]):
    """States 2, 3, 4 and actions 5, 6, both numbered from elsewhere; pays the number of the action."""

    observation_space = gymnasium.spaces.Discrete(3, start=2)
    action_space = gymnasium.spaces.Discrete(2, start=5)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[int, dict[str, object]]:
        super().reset(seed=seed)
        return int(self.np_random.integers(2, 5)), {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, object]]:
        assert self.action_space.contains(action)
        return int(self.np_random.integers(2, 5)), float(action), False, False, {}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    gymnasium.register("tests/Shifted-v0", entry_point=Shifted, max_episode_steps=20)


@pytest.mark.parametrize("spec", [LinearPolicySpec(), MlpPolicySpec(hidden=[4])], ids=["table", "one-hot"])
def test_spaces_that_begin_elsewhere_are_played(spec: LinearPolicySpec | MlpPolicySpec) -> None:
    shifted = GymnasiumSpec(id="tests/Shifted-v0")
    policy = pgengine.create_policy(spec, shifted, pgengine.describe(shifted), seed=0)
    policy.parameters = filled(policy.parameters)
    batch = rollout(policy, pgengine.open_environment(shifted), Noise(0, "training", 0), 10)
    assert set(batch.observations) == {2, 3, 4}
    assert set(batch.samples) == {0, 1}
    assert np.array_equal(batch.actions, batch.samples + 5)
    assert np.array_equal(batch.rewards, batch.actions)
    every = policy.answer(policy.parse([2, 3, 4], batch=True), deterministic=True)
    one_hot = np.eye(3)
    scores = policy.parameters["theta"] if "theta" in policy.parameters else forward(policy.parameters, one_hot, "tanh")
    assert np.array_equal(every.actions, scores.argmax(axis=1) + 5)


OVERFLOWING = [
    LinearPolicySpec(),
    MlpPolicySpec(activation="relu"),
]


@pytest.mark.parametrize("spec", OVERFLOWING, ids=["linear", "relu"])
def test_acting_refuses_the_row_whose_outputs_overflow(spec: LinearPolicySpec | MlpPolicySpec) -> None:
    policy = pgengine.create_policy(spec, CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    policy.parameters = {name: 1e5 * array for name, array in filled(policy.parameters).items()}
    x = policy.parse([[0.0] * 4, [1.0] * 4, [3e38, -3e38, 3e38, -3e38]], batch=True)
    for deterministic in (False, True):
        with pytest.raises(pgengine.ObservationError) as error:
            policy.answer(x, seed=0, deterministic=deterministic)
        assert (error.value.pointer, error.value.code) == ("/2", "observation_too_large")
    assert np.isfinite(policy.answer(x[:2], seed=0).log_probs).all()


# --- the Gaussian's own parameters ------------------------------------------------------------------------------------

LOG_SIGMA = np.float32([-1.0, 0.5, 2.0])
MEAN = np.float32([1.0, -2.0, 0.5])


def check_moments(samples: np.ndarray, mean: np.ndarray, sigma: np.ndarray) -> None:
    n = len(samples)
    assert (np.abs(samples.mean(axis=0) - mean) < 6 * sigma / np.sqrt(n)).all()
    assert (np.abs(samples.std(axis=0) - sigma) < 6 * sigma / np.sqrt(2 * n)).all()


def test_the_mode_of_a_gaussian_is_its_mean() -> None:
    d = DiagonalGaussian(GaussianSpec(), BoxSpace(shape=[3], low=[None], high=[None], dtype="float32"))
    assert np.array_equal(d.mode(MEAN[None]), MEAN[None])


def test_samples_of_a_gaussian_have_the_deviation_that_was_learned() -> None:
    """Null: mean and deviation are those of the parameters, not of the start.

    n = 200,000 in each of 3 dimensions; a deviation of 6 standard errors in any has odds below 1e-7.
    """
    d = DiagonalGaussian(GaussianSpec(), BoxSpace(shape=[3], low=[None], high=[None], dtype="float32"))
    normal = np.random.default_rng(2).normal(size=(200_000, 3))
    check_moments(
        d.sample({"log_sigma": LOG_SIGMA}, np.tile(MEAN, (len(normal), 1)), normal).astype(np.float64),
        MEAN,
        np.exp(LOG_SIGMA),
    )


def swinging() -> Policy:
    """A mean that is 0.75 everywhere and a deviation of e^-2."""
    policy = pgengine.create_policy(LinearPolicySpec(), PENDULUM, pgengine.describe(PENDULUM), seed=0)
    policy.parameters = {"theta": np.float32([[0.0], [0.0], [0.0], [0.75]]), "log_sigma": np.float32([-2.0])}
    return policy


def test_acting_draws_with_the_deviation_that_was_learned() -> None:
    """Null: mean and deviation are those of the parameters. n = 100,000; 6 standard errors have odds below 1e-8."""
    acted = swinging().answer(np.zeros((100_000, 3), dtype=np.float32), seed=1)
    assert acted.mean is not None
    assert acted.sigma is not None
    assert acted.sigma.tolist() == pytest.approx([np.exp(-2.0)])
    assert (acted.mean == 0.75).all()
    check_moments(acted.samples.astype(np.float64), np.array([0.75]), np.exp(np.array([-2.0])))


def test_acting_with_the_mode_gives_the_mean() -> None:
    acted = swinging().answer(np.zeros((4, 3), dtype=np.float32), deterministic=True)
    assert acted.samples.tolist() == acted.actions.tolist() == [[0.75]] * 4
    assert acted.log_probs.tolist() == pytest.approx([2.0 - 0.5 * np.log(2 * np.pi)] * 4)


# --- scores in closed form --------------------------------------------------------------------------------------------


def score(policy: Policy, x: np.ndarray, sample: np.ndarray) -> dict[str, np.ndarray]:
    """Gradient of the log-probability of one sample, by torch in float64."""
    tensors = {n: torch.tensor(a, dtype=torch.float64, requires_grad=True) for n, a in policy.parameters.items()}
    encoded, raw = torch.as_tensor(policy.encode(x)), torch.as_tensor(sample)
    encoded = encoded.double() if encoded.is_floating_point() else encoded
    policy.log_prob(tensors, encoded, raw.double() if raw.is_floating_point() else raw).sum().backward()
    return {name: np.asarray(tensor.grad) for name, tensor in tensors.items()}


def policy_of(spec: LinearPolicySpec, observations: Space, actions: Space) -> Policy:
    facts = EnvironmentFacts(
        observation_space=observations, action_space=actions, max_episode_steps=10, limit_from="declared"
    )
    policy = pgengine.create_policy(spec, CARTPOLE, facts, seed=0)
    policy.parameters = filled(policy.parameters)
    return policy


def test_the_score_of_a_linear_gaussian_in_the_plane_is_the_closed_form() -> None:
    """x(s) (a - theta' x(s))' / sigma^2 by theta, ((a - mu) / sigma)^2 - 1 by log sigma.

    Source: Bereyhi, chapter 5, Gaussian policy N(theta' x(s), sigma^2).
    """
    policy = policy_of(LinearPolicySpec(), PLANE, PLANE)
    x, a = np.float32([[0.7, -1.2]]), np.float32([[0.4, 2.0]])
    theta, log_sigma = policy.parameters["theta"].astype(float), policy.parameters["log_sigma"].astype(float)
    features = np.array([*x[0].astype(float), 1.0])
    z = (a[0] - features @ theta) / np.exp(log_sigma)
    found = score(policy, x, a)
    assert np.allclose(found["theta"], np.outer(features, z / np.exp(log_sigma)), rtol=1e-9)
    assert np.allclose(found["log_sigma"], z**2 - 1, rtol=1e-9)


def test_the_score_of_a_linear_softmax_is_the_feature_less_its_mean() -> None:
    """x(s, a) - sum_b pi(b|s) x(s, b). Source: Bereyhi, chapter 5, linear softmax."""
    space, actions = DiscreteSpace(n=2), DiscreteSpace(n=3)
    table = np.random.default_rng(8).normal(size=(2, 3, 4))
    policy = policy_of(LinearPolicySpec(features=TableFeaturesSpec(values=table.tolist())), space, actions)
    features = table.astype(np.float32).astype(float)[1]
    scores = features @ policy.parameters["theta"].astype(float)
    pi = np.exp(scores) / np.exp(scores).sum()
    for a in range(3):
        expected = features[a] - pi @ features
        assert np.allclose(score(policy, np.array([1]), np.array([a]))["theta"], expected, rtol=1e-9)


def test_the_score_of_a_crossed_softmax_is_the_feature_times_the_surprise() -> None:
    """x(s) (1{a = b} - pi(b|s)) in column b. Source: Bereyhi, chapter 5, softmax policy."""
    policy = policy_of(LinearPolicySpec(features=PolynomialFeaturesSpec(degree=2)), PLANE, DiscreteSpace(n=3))
    x = np.float32([[0.5, -1.0]])
    features = np.array([1.0, 0.5, -1.0, 0.25, -0.5, 1.0])
    scores = features @ policy.parameters["theta"].astype(float)
    pi = np.exp(scores) / np.exp(scores).sum()
    found = score(policy, x, np.array([2]))["theta"]
    assert np.allclose(found, np.outer(features, np.eye(3)[2] - pi), rtol=1e-9)
