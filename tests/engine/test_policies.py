"""Policies are kept, read and asked."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pgengine
from pgengine.policies import Policy
from pgengine.spec import GaussianSpec, GymnasiumSpec, LinearPolicySpec, MlpPolicySpec, SoftmaxSpec, TabularSpec
from tests.engine.worlds import CARTPOLE, PENDULUM, bandit, random_mdp

KINDS = [
    (MlpPolicySpec(), CARTPOLE),
    (LinearPolicySpec(), CARTPOLE),
    (MlpPolicySpec(hidden=[8], activation="relu"), PENDULUM),
    (LinearPolicySpec(distribution=GaussianSpec(sigma="fixed", action_map="tanh")), PENDULUM),
    (LinearPolicySpec(), random_mdp(0)),
    (MlpPolicySpec(), random_mdp(0)),
]


def make(policy: MlpPolicySpec | LinearPolicySpec, environment: GymnasiumSpec | TabularSpec, seed: int = 0) -> Policy:
    return pgengine.create_policy(policy, environment, pgengine.describe(environment), seed=seed)


def observations(policy: Policy, N: int) -> np.ndarray:
    space = policy.observation_space
    generator = np.random.default_rng(0)
    if space.kind == "discrete":
        return generator.integers(0, space.n, size=N)
    return generator.normal(size=(N, *space.shape)).astype(np.float32)


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_a_kept_policy_acts_the_same(spec: MlpPolicySpec | LinearPolicySpec, environment: GymnasiumSpec) -> None:
    policy = make(spec, environment)
    again = pgengine.load(policy.to_bytes())
    x = observations(policy, 13)
    for deterministic in (False, True):
        one, other = (p.act(x, seed=5, deterministic=deterministic) for p in (policy, again))
        assert np.array_equal(one.actions, other.actions)
        assert np.array_equal(one.log_probs, other.log_probs)
    assert (again.spec, again.updates, again.action_space) == (policy.spec, 0, policy.action_space)
    assert again.to_bytes() == policy.to_bytes()


@pytest.mark.parametrize(("spec", "environment"), KINDS)
def test_a_row_has_the_same_answer_alone_and_in_a_batch(
    spec: MlpPolicySpec | LinearPolicySpec, environment: GymnasiumSpec
) -> None:
    policy = make(spec, environment)
    x = observations(policy, 30)
    whole = policy.act(x, deterministic=True)
    for row in range(30):
        assert np.array_equal(policy.act(x[row : row + 1], deterministic=True).log_probs[0], whole.log_probs[row])
    assert np.array_equal(policy.act(x[:1], seed=9).samples[0], policy.act(x, seed=9).samples[0])


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


DATA = make(LinearPolicySpec(), CARTPOLE).to_bytes()


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_no_flipped_byte_gives_anything_but_a_policy_or_a_checkpoint_error(position: int, change: int) -> None:
    damaged = bytearray(DATA)
    damaged[position] ^= change
    try:
        pgengine.load(bytes(damaged)).act(np.zeros((1, 4), dtype=np.float32))
    except pgengine.CheckpointError:
        pass


def test_acting_imports_no_torch_and_no_server() -> None:
    program = """
import sys, numpy, pgengine
from pgengine.spec import GymnasiumSpec, MlpPolicySpec
environment = GymnasiumSpec(id="CartPole-v1")
policy = pgengine.create_policy(MlpPolicySpec(), environment, pgengine.describe(environment), seed=0)
pgengine.load(policy.to_bytes()).act(policy.parse([0.0, 0.0, 0.0, 0.0], batch=False))
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
