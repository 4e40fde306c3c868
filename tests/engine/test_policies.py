"""Policies are kept, read and asked."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pgengine
from pgengine.environments import EnvironmentFacts
from pgengine.policies import Policy
from pgengine.policies.memory import mark
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace, MultiDiscreteSpace, Space
from pgengine.spec import (
    FourierFeaturesSpec,
    GaussianSpec,
    GymnasiumSpec,
    JointFeaturesSpec,
    LinearPolicySpec,
    MlpPolicySpec,
    PolicySpec,
    PolynomialFeaturesSpec,
    RbfFeaturesSpec,
    ScorePolicySpec,
    SoftmaxSpec,
    TableFeaturesSpec,
    TabularSpec,
    TileFeaturesSpec,
    TransformerPolicySpec,
)
from tests.engine.worlds import CARTPOLE, PENDULUM, bandit, random_mdp


def between(observations: Space, actions: Space) -> EnvironmentFacts:
    return EnvironmentFacts(
        observation_space=observations, action_space=actions, max_episode_steps=10, limit_from="declared"
    )


FIELD = BoxSpace(shape=[2, 2], low=[-1.0], high=[1.0], dtype="float32")
TORQUE = BoxSpace(shape=[2], low=[-1.0], high=[1.0], dtype="float32")
MOVES = DiscreteSpace(n=3, start=-1)
DIALS = MultiDiscreteSpace(nvec=[2, 3], start=[0, -1])
LAMPS = MultiBinarySpace(n=3)
HEAD = GaussianSpec(sigma="head")
TABLE = [[[1.0], [2.0]], [[3.0], [0.0]], [[-1.0], [1.0]]]

KINDS: list[tuple[PolicySpec, GymnasiumSpec | TabularSpec | EnvironmentFacts]] = [
    (MlpPolicySpec(), CARTPOLE),
    (LinearPolicySpec(), CARTPOLE),
    (MlpPolicySpec(hidden=[8], activation="relu"), PENDULUM),
    (LinearPolicySpec(distribution=GaussianSpec(sigma="fixed", action_map="tanh")), PENDULUM),
    (LinearPolicySpec(), random_mdp(0)),
    (MlpPolicySpec(), random_mdp(0)),
    (LinearPolicySpec(distribution=HEAD), PENDULUM),
    (MlpPolicySpec(distribution=GaussianSpec(sigma="head", action_map="tanh"), hidden=[8]), PENDULUM),
    (MlpPolicySpec(normalise_observations=True), CARTPOLE),
    (LinearPolicySpec(features=PolynomialFeaturesSpec()), CARTPOLE),
    (LinearPolicySpec(features=JointFeaturesSpec(degree=2)), CARTPOLE),
    (LinearPolicySpec(features=FourierFeaturesSpec()), PENDULUM),
    (LinearPolicySpec(features=RbfFeaturesSpec(centres=3)), PENDULUM),
    (LinearPolicySpec(features=TileFeaturesSpec(tiles=3)), PENDULUM),
    (LinearPolicySpec(features=TableFeaturesSpec(values=TABLE)), random_mdp(0)),
    (ScorePolicySpec(hidden=[8]), CARTPOLE),
    (ScorePolicySpec(hidden=[8], features=TableFeaturesSpec(values=TABLE)), random_mdp(0)),
    (TransformerPolicySpec(window=4, width=8), CARTPOLE),
    (TransformerPolicySpec(window=4, width=8, distribution=HEAD, normalise_observations=True), PENDULUM),
    (TransformerPolicySpec(window=4, width=8), random_mdp(0)),
    (TransformerPolicySpec(window=1, width=8, layers=2), random_mdp(0)),
    (LinearPolicySpec(), between(FIELD, DIALS)),
    (MlpPolicySpec(), between(DIALS, LAMPS)),
    (LinearPolicySpec(), between(LAMPS, TORQUE)),
    (TransformerPolicySpec(window=3, width=8), between(DIALS, DIALS)),
    (TransformerPolicySpec(window=3, width=8), between(LAMPS, LAMPS)),
    (TransformerPolicySpec(window=3, width=8), between(FIELD, MOVES)),
]
"""Every network, every kind of features, every distribution, every space."""


def make(
    policy: PolicySpec,
    environment: GymnasiumSpec | TabularSpec | EnvironmentFacts,
    seed: int = 0,
    *,
    filled: bool = False,
) -> Policy:
    """A policy at update 0, or one with parameters that are large enough to matter."""
    if isinstance(environment, EnvironmentFacts):
        made = pgengine.create_policy(policy, CARTPOLE, environment, seed=seed)
    else:
        made = pgengine.create_policy(policy, environment, pgengine.describe(environment), seed=seed)
    if filled:
        generator = np.random.default_rng(1)
        for name, array in sorted(made.parameters.items()):
            made.parameters[name] = array + generator.normal(size=array.shape).astype(np.float32) / 2
        made.observe(3.0 * rows(made.observation_space, 50, seed=1))
    return made


def rows(space: Space, N: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if isinstance(space, DiscreteSpace):
        return space.start + generator.integers(0, space.n, size=N)
    if isinstance(space, BoxSpace):
        return generator.normal(size=(N, *space.shape)).astype(np.float32)
    if isinstance(space, MultiDiscreteSpace):
        return np.array(space.starts) + generator.integers(space.nvec, size=(N, len(space.nvec)))
    return generator.integers(2, size=(N, space.n))


def observations(policy: Policy, N: int) -> np.ndarray:
    """What a policy may see, also at the beginning of episodes."""
    return policy.windows(rows(policy.observation_space, N), np.unique([*range(0, N, 6), N]))


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_a_kept_policy_acts_the_same(spec: PolicySpec, environment: GymnasiumSpec) -> None:
    policy = make(spec, environment, filled=True)
    again = pgengine.load(policy.to_bytes())
    x = observations(policy, 13)
    for deterministic in (False, True):
        one, other = (p.answer(x, seed=5, deterministic=deterministic) for p in (policy, again))
        assert np.array_equal(one.actions, other.actions)
        assert np.array_equal(one.log_probs, other.log_probs)
    assert (again.updates, again.action_space, again.memory) == (0, policy.action_space, policy.memory)
    tables = {"features": TableFeaturesSpec()} if policy.features is not None else {}  # their values are in the arrays
    assert again.spec == policy.spec.model_copy(update=tables)
    assert again.to_bytes() == policy.to_bytes()


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_acting_and_learning_agree(spec: PolicySpec, environment: GymnasiumSpec) -> None:
    """What acting says of a sample in numpy is what the pure functions say in torch, in both precisions."""
    policy = make(spec, environment, filled=True)
    seen = observations(policy, 20)
    acted = policy.answer(seen, seed=3)
    encoded, samples = torch.as_tensor(policy.encode(seen)), torch.as_tensor(acted.samples)
    for dtype in (torch.float32, torch.float64):
        tensors = {name: torch.as_tensor(array).to(dtype) for name, array in policy.parameters.items()}
        x, u = (value.to(dtype) if value.is_floating_point() else value for value in (encoded, samples))
        found = policy.log_prob(tensors, x, u)
        assert found.dtype == dtype
        assert np.allclose(found, acted.log_probs, rtol=1e-3, atol=1e-3)
        entropy = policy.entropy(policy.parameters, policy.encode(seen))
        assert np.allclose(policy.entropy(tensors, x), entropy, rtol=1e-3, atol=1e-3)
        assert np.isfinite(entropy).all()


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_scores_of_single_rows_and_of_several_parameters_at_once(spec: PolicySpec, environment: GymnasiumSpec) -> None:
    """The functions may be mapped by torch.func over rows, with their gradient, and over parameters."""
    policy = make(spec, environment, filled=True)
    seen = observations(policy, 6)
    encoded, samples = torch.as_tensor(policy.encode(seen)), torch.as_tensor(policy.answer(seen, seed=0).samples)
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in policy.parameters.items()}
    log_prob = policy.log_prob(tensors, encoded, samples)
    twice = {name: torch.stack([2 * tensor, tensor]) for name, tensor in tensors.items()}
    found = torch.func.vmap(lambda p: policy.log_prob(p, encoded, samples))(twice)[1]
    assert np.allclose(found.detach(), log_prob.detach(), rtol=1e-4, atol=1e-4)

    def of_row(p: dict[str, torch.Tensor], x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(policy.log_prob(p, x[None], u[None])[0])

    scores = torch.func.vmap(torch.func.grad(of_row), in_dims=(None, 0, 0))(tensors, encoded, samples)
    log_prob.sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad is not None
        scale = float(tensor.grad.abs().max()) + 1.0
        assert np.allclose(scores[name].sum(dim=0).detach(), tensor.grad, rtol=1e-3, atol=1e-4 * scale), name


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_every_parameter_has_a_gradient(spec: PolicySpec, environment: GymnasiumSpec) -> None:
    """No parameter is left out of the function by mistake; a constant that cancels in a softmax is the exception."""
    policy = make(spec, environment, filled=True)
    seen = observations(policy, 200)
    acted = policy.answer(seen, seed=3)
    encoded, samples = torch.as_tensor(policy.encode(seen)), torch.as_tensor(acted.samples)
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in policy.parameters.items()}
    weights = torch.linspace(-1.0, 2.0, 200)
    (weights * policy.log_prob(tensors, encoded, samples)).sum().backward()
    for name, tensor in tensors.items():
        assert tensor.grad is not None, name
        cancels = isinstance(spec, ScorePolicySpec) and name == "layers.1.bias"
        # who is attended to does not matter where there is nothing to choose from
        cancels |= isinstance(spec, TransformerPolicySpec) and policy.memory == 1 and "query" in name
        cancels |= isinstance(spec, TransformerPolicySpec) and policy.memory == 1 and "key" in name
        assert cancels or float(tensor.grad.abs().max()) > 1e-6, name


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_a_row_has_the_same_answer_alone_and_in_a_batch(spec: PolicySpec, environment: GymnasiumSpec) -> None:
    policy = make(spec, environment, filled=True)
    x = observations(policy, 30)
    whole = policy.answer(x, deterministic=True)
    for row in range(30):
        assert np.array_equal(policy.answer(x[row : row + 1], deterministic=True).log_probs[0], whole.log_probs[row])
    assert np.array_equal(policy.answer(x[:1], seed=9).samples[0], policy.answer(x, seed=9).samples[0])


CHECKPOINTS = Path(__file__).parent / "checkpoints"


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_checkpoints_of_before_features_and_windows_are_read(path: Path) -> None:
    """Written by the version that knew linear and mlp policies of discrete and box spaces alone."""
    policy = pgengine.load(path.read_bytes())
    assert (policy.updates, policy.memory, policy.buffers, policy.uniform_share) == (7, 1, {}, 0.0)
    acted = policy.answer(rows(policy.observation_space, 5), seed=1)
    assert np.isfinite(acted.log_probs).all()
    again = pgengine.load(policy.to_bytes())
    assert np.array_equal(again.answer(rows(policy.observation_space, 5), seed=1).log_probs, acted.log_probs)
    if path.stem == "feature_table":
        expected = policy.features @ policy.parameters["theta"]  # type: ignore[operator]
        assert np.allclose(policy.outputs(np.array([0, 1])), expected)


def test_there_are_old_checkpoints_of_every_kind() -> None:
    assert len(list(CHECKPOINTS.glob("*.safetensors"))) == 7


def test_acting_describes_its_distribution() -> None:
    """Probabilities by action, by component, of a one; mean and sigma by row where the network gives both."""
    x = rows(FIELD, 4)
    one = make(MlpPolicySpec(), between(FIELD, MOVES), filled=True).answer(x, seed=0)
    assert isinstance(one.probabilities, np.ndarray)
    assert one.probabilities.shape == (4, 3)
    assert np.allclose(np.log(one.probabilities[np.arange(4), one.samples]), one.log_probs, atol=1e-5)
    several = make(MlpPolicySpec(), between(FIELD, DIALS), filled=True).answer(x, seed=0)
    assert isinstance(several.probabilities, list)
    assert [p.shape for p in several.probabilities] == [(4, 2), (4, 3)]
    picked = [p[np.arange(4), several.samples[:, i]] for i, p in enumerate(several.probabilities)]
    assert np.allclose(np.log(picked).sum(axis=0), several.log_probs, atol=1e-5)
    assert np.array_equal(several.actions, several.samples + np.array([0, -1]))
    coins = make(MlpPolicySpec(), between(FIELD, LAMPS), filled=True).answer(x, seed=0)
    assert isinstance(coins.probabilities, np.ndarray)
    taken = np.where(coins.samples == 1, coins.probabilities, 1 - coins.probabilities)
    assert np.allclose(np.log(taken).sum(axis=1), coins.log_probs, atol=1e-5)
    head = make(MlpPolicySpec(distribution=HEAD), between(FIELD, TORQUE), filled=True).answer(x, seed=0)
    assert head.mean is not None
    assert head.sigma is not None
    assert head.mean.shape == head.sigma.shape == (4, 2)
    assert np.ptp(head.sigma, axis=0).min() > 0
    assert head.probabilities is None


@pytest.mark.parametrize("actions", [MOVES, DIALS, LAMPS], ids=lambda space: space.kind)
@pytest.mark.parametrize("spec", [MlpPolicySpec(), TransformerPolicySpec(window=3, width=4)], ids=["mlp", "memory"])
def test_a_mixture_with_the_uniform_distribution(spec: PolicySpec, actions: Space) -> None:
    """It shares its policy's arrays, says its own log-probabilities, and is kept as what it is."""
    policy = make(spec, between(FIELD, actions), filled=True)
    policy.parameters = {name: 5 * array for name, array in policy.parameters.items()}
    mixed = policy.mixed_with_uniform(0.25)
    seen = observations(policy, 100)
    assert mixed.parameters is policy.parameters
    acted = mixed.answer(seen, seed=0)
    encoded = policy.encode(seen)
    log_pi = policy.log_prob(policy.parameters, encoded, acted.samples)
    log_rho = mixed.log_prob(mixed.parameters, encoded, acted.samples)
    assert np.allclose(log_rho, acted.log_probs, rtol=1e-5, atol=1e-5)
    components = 1 if actions is MOVES else len(acted.samples[0])
    assert (log_pi - log_rho).max() <= -components * np.log(0.75) + 1e-5
    assert (log_pi - log_rho).min() < -1.0  # some of the draws are the uniform ones
    again = pgengine.load(mixed.to_bytes())
    assert (again.uniform_share, policy.uniform_share) == (0.25, 0.0)
    assert np.array_equal(again.answer(seen, seed=0).log_probs, acted.log_probs)
    assert np.array_equal(mixed.copy().answer(seen, seed=0).log_probs, acted.log_probs)


def test_a_gaussian_is_not_mixed_with_the_uniform_distribution() -> None:
    with pytest.raises(pgengine.SpecError) as error:
        make(MlpPolicySpec(), PENDULUM).mixed_with_uniform(0.1)
    assert error.value.code == "mixture_needs_finite_actions"


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_initial_parameters_can_be_given_and_read_back(spec: PolicySpec, environment: GymnasiumSpec) -> None:
    wanted = make(spec, environment, filled=True).parameters
    given = {name: array.tolist() for name, array in wanted.items()}
    policy = make(spec.model_copy(update={"initial_parameters": given}), environment)
    assert {name: array.tolist() for name, array in policy.parameters.items()} == given


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_histories_and_observations_are_parsed_as_they_are_seen(spec: PolicySpec, environment: GymnasiumSpec) -> None:
    policy = make(spec, environment)
    space = policy.observation_space
    seen = observations(policy, 10)
    value = seen.tolist()
    if policy.memory > 1:
        there = ~np.isnan(seen) if isinstance(space, BoxSpace) else seen != mark(space)
        there = there.reshape(10, policy.memory, -1).all(axis=2)
        value = [window[kept].tolist() for window, kept in zip(seen, there, strict=True)]
    parsed = policy.parse(value, batch=True)
    assert parsed.dtype == seen.dtype
    assert np.array_equal(parsed, seen, equal_nan=isinstance(space, BoxSpace))
    assert np.array_equal(policy.parse(value[0], batch=False), parsed[:1], equal_nan=isinstance(space, BoxSpace))


def test_a_linear_policy_reads_the_features_of_a_finite_mdp() -> None:
    features = [[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]]
    world = bandit(0.0, 1.0).model_copy(update={"features": features})
    policy = make(LinearPolicySpec(initial_parameters={"theta": [0.5, 1.5]}), world)
    assert np.allclose(policy.outputs(np.array([0, 1])), [[0.5, 3.0], [0.0, 0.0]])
    assert np.array_equal(pgengine.load(policy.to_bytes()).outputs(np.array([0])), policy.outputs(np.array([0])))


@pytest.mark.parametrize(("spec", "environment", "pointer", "code"), [
    (MlpPolicySpec(distribution=SoftmaxSpec()), PENDULUM, "/distribution/kind", "action_family_mismatch"),
    (MlpPolicySpec(distribution=GaussianSpec()), CARTPOLE, "/distribution/kind", "action_family_mismatch"),
    (LinearPolicySpec(initial_parameters={"w": [1.0]}), CARTPOLE, "/initial_parameters/w", "unknown_parameter"),
    (LinearPolicySpec(initial_parameters={"theta": [[0.0, 0.0]] * 4}), CARTPOLE,
     "/initial_parameters/theta", "parameter_value"),
    (LinearPolicySpec(initial_parameters={"theta": [[0.0, "x"]] * 5}), CARTPOLE,
     "/initial_parameters/theta/0/1", "parameter_value"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_named(
    spec: MlpPolicySpec | LinearPolicySpec, environment: GymnasiumSpec, pointer: str, code: str
) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        make(spec, environment)
    assert (error.value.pointer, error.value.code) == (pointer, code)


@pytest.mark.parametrize(("value", "batch", "pointer", "code"), [
    ([0.0, 0.0, 0.0], False, "", "observation_shape"),
    (0.0, False, "", "observation_shape"),
    ([0.0, 0.0, 0.0, True], False, "/3", "observation_kind"),
    ([0.0, None, 0.0, 0.0], False, "/1", "observation_kind"),
    (["0", 0.0, 0.0, 0.0], False, "/0", "observation_kind"),
    ([1e39, 0.0, 0.0, 0.0], False, "", "observation_not_finite"),
    ([10**400, 0.0, 0.0, 0.0], False, "", "observation_not_finite"),
    ([[0.0] * 4, [0.0] * 5], True, "/1", "observation_shape"),
    ([], True, "", "observation_shape"),
])  # fmt: skip
def test_a_wrong_observation_is_named(value: object, batch: bool, pointer: str, code: str) -> None:
    with pytest.raises(pgengine.ObservationError) as error:
        make(MlpPolicySpec(), CARTPOLE).parse(value, batch=batch)
    assert (error.value.pointer, error.value.code) == (pointer, code)


@pytest.mark.parametrize("value", [3, -1, 1.0, True, "0", None, [0]])
def test_a_wrong_discrete_observation_is_named(value: object) -> None:
    with pytest.raises(pgengine.ObservationError, match="expected an integer from 0 to 2"):
        make(MlpPolicySpec(), random_mdp(0)).parse(value, batch=False)


def test_a_damaged_checkpoint_is_refused() -> None:
    data = make(MlpPolicySpec(), CARTPOLE).to_bytes()
    for damaged in (b"", b"nonsense", data[:100], data[:-5]):
        with pytest.raises(pgengine.CheckpointError):
            pgengine.load(damaged)
    policy = pgengine.load(data)
    policy.parameters["layers.1.weight"] = policy.parameters["layers.1.weight"][:, ::-1].copy()
    tampered = data.replace(
        pgengine.load(data).parameters["layers.1.weight"].tobytes(), policy.parameters["layers.1.weight"].tobytes()
    )
    with pytest.raises(pgengine.CheckpointError, match="other outputs"):
        pgengine.load(tampered)


DAMAGED = [
    make(LinearPolicySpec(), CARTPOLE),
    make(MlpPolicySpec(hidden=[2], normalise_observations=True), CARTPOLE, filled=True),
    make(LinearPolicySpec(features=FourierFeaturesSpec(order=1)), between(TORQUE, MOVES), filled=True),
    make(ScorePolicySpec(hidden=[2], features=TableFeaturesSpec(values=TABLE)), random_mdp(0), filled=True),
    make(TransformerPolicySpec(window=3, width=2), between(DIALS, LAMPS), filled=True),
]
DATA = [policy.to_bytes() for policy in DAMAGED]


@pytest.mark.parametrize("kind", range(len(DATA)))
@given(st.data())
def test_no_flipped_byte_gives_anything_but_a_policy_or_a_checkpoint_error(kind: int, data: st.DataObject) -> None:
    damaged = bytearray(DATA[kind])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        policy = pgengine.load(bytes(damaged))
    except pgengine.CheckpointError:
        return
    policy.answer(policy.begin_windows(rows(policy.observation_space, 1)))


def test_acting_imports_no_torch_and_no_server() -> None:
    program = """
import sys, numpy, pgengine
from pgengine.spec import GymnasiumSpec, MlpPolicySpec
environment = GymnasiumSpec(id="CartPole-v1")
policy = pgengine.create_policy(MlpPolicySpec(), environment, pgengine.describe(environment), seed=0)
pgengine.load(policy.to_bytes()).answer(policy.parse([0.0, 0.0, 0.0, 0.0], batch=False))
import json
print(json.dumps([name for name in ("torch", "fastapi", "sqlalchemy", "server") if name in sys.modules]))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


@pytest.mark.parametrize(("policy", "environment"), [
    (MlpPolicySpec(hidden=[400, 300]), CARTPOLE),
    (LinearPolicySpec(), PENDULUM),
    (MlpPolicySpec(), PENDULUM),
])  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_among_thousands(policy: MlpPolicySpec, environment: GymnasiumSpec) -> None:
    made = make(policy, environment)
    made.parameters = {name: array + np.float32(0.01) for name, array in made.parameters.items()}
    x = observations(made, 4096)
    among = made.outputs(x)
    for row in range(0, 4096, 311):
        assert np.array_equal(made.outputs(x[row : row + 1])[0], among[row])


def test_a_small_file_that_claims_a_large_network_is_refused_at_once() -> None:
    """What is compared are shapes; nothing of the claimed size is made."""
    data = make(LinearPolicySpec(), CARTPOLE).to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    claims = json.loads(header["__metadata__"]["pgengine"])
    for policy in ({"kind": "mlp", "hidden": [1024] * 8}, {"kind": "linear", "distribution": None}):
        claims["policy"] = {"distribution": {"kind": "softmax"}, **policy}
        header["__metadata__"]["pgengine"] = json.dumps(claims)
        forged = json.dumps(header).encode()
        with pytest.raises(pgengine.CheckpointError):
            pgengine.load(len(forged).to_bytes(8, "little") + forged + data[8 + length :])


def test_initial_parameters_are_kept_once() -> None:
    theta = np.random.default_rng(0).normal(size=(5, 2)).tolist()
    policy = make(LinearPolicySpec(initial_parameters={"theta": theta}), CARTPOLE)
    assert policy.spec.initial_parameters is not None
    assert pgengine.load(policy.to_bytes()).spec.initial_parameters is None
    assert np.array_equal(pgengine.load(policy.to_bytes()).parameters["theta"], np.float32(theta))


def test_too_large_a_policy_is_refused_before_anything_is_drawn() -> None:
    facts = pgengine.describe(CARTPOLE)
    with pytest.raises(pgengine.SpecError) as error:
        pgengine.create_policy(MlpPolicySpec(), CARTPOLE, facts, seed=0, max_parameters=4000)
    assert error.value.code == "policy_too_large"
    assert "4610" in error.value.message
