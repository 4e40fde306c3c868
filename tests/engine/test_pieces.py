"""Large requests are computed in pieces: memory does not grow with rows times activations, and no bit changes."""

import subprocess
import sys

import numpy as np
import pytest

import pgengine
from pgengine.contributions import CELLS, Rows, contributions
from pgengine.estimation import BYTES_AT_ONCE, gradient, gradients, tensors_of
from pgengine.estimators import StepWeights
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.rollout import Batch, rollout
from pgengine.spec import (
    LinearPolicySpec,
    MlpPolicySpec,
    PolicySpec,
    PolynomialFeaturesSpec,
    ScorePolicySpec,
    TransformerPolicySpec,
)
from tests.engine.worlds import CARTPOLE

LARGE: dict[str, PolicySpec] = {
    "windows": TransformerPolicySpec(window=128, width=32, heads=16, layers=2),
    "wide layers": MlpPolicySpec(hidden=[1024, 1024]),
    "many actions": ScorePolicySpec(hidden=[64, 64]),
    "features": LinearPolicySpec(features=PolynomialFeaturesSpec(degree=6)),
}

PROGRAM = """
import resource, sys
import numpy as np
from pgengine.environments import EnvironmentFacts
from pgengine.policies import create_policy
from pgengine.policies.probes import probes
from pgengine.spaces import BoxSpace, DiscreteSpace
from pgengine.spec import GymnasiumSpec, Spec, PolicySpec
from pydantic import TypeAdapter

spec = TypeAdapter(PolicySpec).validate_json(sys.argv[1])
box = BoxSpace(shape=[6], low=[None], high=[None], dtype="float32")
facts = EnvironmentFacts(
    observation_space=box, action_space=DiscreteSpace(n=int(sys.argv[2])), max_episode_steps=1, limit_from="declared"
)
policy = create_policy(spec, GymnasiumSpec(id="CartPole-v1"), facts, seed=0)
seen = probes(box, policy.memory, int(sys.argv[3]))
np.ones((8, 8), dtype=np.float32) @ np.ones((8, 8), dtype=np.float32)  # the library takes room of its own
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
policy.answer(seen, seed=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives the largest size in kilobytes")
@pytest.mark.parametrize(("name", "actions", "rows"), [
    ("windows", 2, 128), ("wide layers", 2, 16384), ("many actions", 500, 512), ("features", 2, 16384),
])  # fmt: skip
def test_acting_takes_less_than_a_hundred_megabytes(name: str, actions: int, rows: int) -> None:
    """Activations of all rows together would be several hundred."""
    command = [sys.executable, "-c", PROGRAM, LARGE[name].model_dump_json(), str(actions), str(rows)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 100 * 1024


def with_batch(spec: PolicySpec, episodes: int = 6) -> tuple[Policy, Batch, StepWeights]:
    policy = pgengine.create_policy(spec, CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    generator = np.random.default_rng(3)
    policy.parameters = {
        name: (generator.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in policy.shapes().items()
    }
    opened = pgengine.open_environment(CARTPOLE)
    batch = rollout(policy, opened, Noise(0, "training", 0), episodes)
    opened.close()
    B = len(batch.rewards)
    return policy, batch, StepWeights(np.ones(B), np.zeros(B), generator.normal(size=B), None, None, np.array(6.0))


PIECES = LARGE | {"windows": TransformerPolicySpec(window=64, width=8, heads=8, layers=2)}


@pytest.mark.parametrize("spec", PIECES.values(), ids=PIECES)
def test_no_bit_depends_on_the_pieces(spec: PolicySpec) -> None:
    policy, batch, _ = with_batch(spec)
    seen = policy.windows(batch.observations, batch.offsets)
    outputs = policy.outputs(seen)
    assert np.array_equal(policy.outputs_along(batch.observations, batch.offsets), outputs)
    rows = np.array([len(seen) - 1, 3, 0, 3])
    assert np.array_equal(policy.windows(batch.observations, batch.offsets, rows), seen[rows], equal_nan=True)
    for row in range(0, len(seen), 17):
        assert np.array_equal(policy.outputs(seen[row : row + 1])[0], outputs[row])


@pytest.mark.slow
def test_a_gradient_in_pieces_is_the_sum_of_its_steps() -> None:
    """A network of which only some steps fit at a time, against one step after the other."""
    policy, batch, weights = with_batch(LARGE["windows"], episodes=3)
    B = len(batch.rewards)
    assert policy.rows_at_once(BYTES_AT_ONCE // 8) < B
    tensors = tensors_of(policy)
    steps = [gradients(policy, tensors, batch, weights, row=row)[0] for row in range(B)]
    total = np.concatenate([sum(parts).numpy().reshape(-1) for parts in zip(*steps, strict=True)])
    assert np.allclose(gradient(policy, batch, weights), total, rtol=1e-9, atol=1e-9)
    first = next(contributions(Rows(policy, batch), weights.score, None))
    assert len(first.weighted) == policy.rows_at_once(CELLS) < B
