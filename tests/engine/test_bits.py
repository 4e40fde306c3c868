"""What a policy answers has the same bits alone and at every place of a batch, whatever kernel multiplies."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pgengine
from pgengine.distributions import Array
from pgengine.environments import EnvironmentFacts
from pgengine.noise import Noise
from pgengine.policies import Policy, rows_are_independent
from pgengine.policies.layers import PAD, product
from pgengine.policies.networks import Network
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiDiscreteSpace, Space
from pgengine.spec import (
    LinearPolicySpec,
    MlpPolicySpec,
    PolicySpec,
    PolynomialFeaturesSpec,
    ScorePolicySpec,
    TableFeaturesSpec,
    TileFeaturesSpec,
    TransformerPolicySpec,
)
from tests.engine.worlds import CARTPOLE

STATES, MOVES = DiscreteSpace(n=9, start=2), DiscreteSpace(n=3)


def box(size: int) -> BoxSpace:
    return BoxSpace(shape=[size], low=[None], high=[None], dtype="float32")


def table(actions: int) -> TableFeaturesSpec:
    return TableFeaturesSpec(values=np.random.default_rng(3).normal(size=(9, actions, 57)).tolist())


SHAPES: list[tuple[PolicySpec, Space, Space]] = [
    (MlpPolicySpec(), box(4), MOVES),
    (MlpPolicySpec(), box(3), box(1)),
    (MlpPolicySpec(hidden=[400, 300]), box(17), box(6)),
    (MlpPolicySpec(hidden=[328, 1, 5]), box(3), box(1)),
    (MlpPolicySpec(hidden=[32], activation="relu"), MultiDiscreteSpace(nvec=[3, 4]), MOVES),
    (LinearPolicySpec(), box(281), box(1)),
    (LinearPolicySpec(), box(347), box(1)),
    (LinearPolicySpec(features=PolynomialFeaturesSpec(degree=3)), box(4), MOVES),
    (LinearPolicySpec(features=TileFeaturesSpec(low=[-3.0] * 2, high=[3.0] * 2)), box(2), MOVES),
    (LinearPolicySpec(features=table(3)), STATES, MOVES),
    (LinearPolicySpec(features=table(1)), STATES, MOVES),
    (ScorePolicySpec(), box(4), DiscreteSpace(n=2)),
    (ScorePolicySpec(hidden=[64, 5]), STATES, DiscreteSpace(n=7)),
    (ScorePolicySpec(features=table(3)), STATES, MOVES),
    *(
        (TransformerPolicySpec(window=k, width=width, heads=heads, layers=2), space, actions)
        for k in (1, 3, 5, 8, 13)
        for width, heads, space, actions in ((4, 2, STATES, box(1)), (64, 4, box(2), MOVES))
    ),
]


def shape_name(shape: object) -> str:
    return f"{shape.kind}-{getattr(shape, 'window', '')}" if hasattr(shape, "kind") else "shape"


def made(spec: PolicySpec, observations: Space, actions: Space) -> Policy:
    """A policy with parameters that are large enough to matter."""
    facts = EnvironmentFacts(
        observation_space=observations, action_space=actions, max_episode_steps=10, limit_from="declared"
    )
    policy = pgengine.create_policy(spec, CARTPOLE, facts, seed=0)
    generator = np.random.default_rng(5)
    policy.parameters = {
        name: (generator.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in policy.shapes().items()
    }
    return policy


def seen_by(policy: Policy, N: int) -> np.ndarray:
    space, generator = policy.observation_space, np.random.default_rng(7)
    if isinstance(space, BoxSpace):
        rows = generator.normal(size=(N, *space.shape)).astype(np.float32)
    elif isinstance(space, DiscreteSpace):
        rows = space.start + generator.integers(space.n, size=N)
    else:
        assert isinstance(space, MultiDiscreteSpace)
        rows = generator.integers(space.nvec, size=(N, len(space.nvec)))
    return policy.windows(rows, np.append(np.arange(0, N, 20), N))


@pytest.mark.parametrize(("spec", "observations", "actions"), SHAPES, ids=shape_name)
def test_an_observation_has_the_same_bits_at_every_place_of_a_batch(
    spec: PolicySpec, observations: Space, actions: Space
) -> None:
    policy = made(spec, observations, actions)
    seen = seen_by(policy, 200)
    among = policy.outputs(seen)
    for row in range(0, 200, 3):  # 3 and 8 have no common factor: every place of a block is tried
        assert np.array_equal(policy.outputs(seen[row : row + 1])[0], among[row])
    assert rows_are_independent(policy)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_product_treats_every_place_alike(dtype: type) -> None:
    """Shapes of all sizes, single columns too, and rows that begin at any address."""
    generator = np.random.default_rng(0)
    for trial in range(60):
        K = int(2 ** generator.uniform(0, 10))
        width = 1 if trial % 3 == 0 else int(2 ** generator.uniform(1, 8))
        weight = generator.normal(size=(K, width)).astype(dtype)
        block = generator.normal(size=(2 * PAD * K + trial % 16,)).astype(dtype)[trial % 16 :].reshape(2, PAD, K)
        row = generator.normal(size=K).astype(dtype)
        found = []
        for place in range(PAD):
            mixed = block.copy()
            mixed[trial % 2, place] = row
            found.append(product(mixed, weight)[trial % 2, place])
        assert all(np.array_equal(one, found[0]) for one in found), (K, width)
        assert np.allclose(found[0], row @ weight, rtol=1e-3, atol=1e-3)


class Crooked:
    """A network that answers otherwise, by one last bit, in one place of the block."""

    def __init__(self, network: Network, place: int) -> None:
        self._network, self._place = network, place

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._network.shapes()

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        return self._network.initial(noise)

    def encode(self, observations: np.ndarray) -> np.ndarray:
        return self._network.encode(observations)

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        outputs = self._network.outputs(parameters, encoded).copy()
        outputs[..., self._place, -1] = np.nextafter(outputs[..., self._place, -1], np.float32(np.inf))
        return outputs


@pytest.mark.parametrize("place", range(PAD))
def test_the_self_test_finds_a_single_place_that_differs(place: int) -> None:
    policy = made(MlpPolicySpec(hidden=[8]), box(4), MOVES)
    assert pgengine.runtime_fingerprint(policy)["rows_are_independent"] is True
    policy.network = Crooked(policy.network, place)
    assert pgengine.runtime_fingerprint(policy)["rows_are_independent"] is False


# --- kernels ----------------------------------------------------------------------------------------------------------

HERE = Path(__file__)
OF_BITS = [
    f"{HERE}::test_an_observation_has_the_same_bits_at_every_place_of_a_batch",
    f"{HERE}::test_a_product_treats_every_place_alike",
    f"{HERE.with_name('test_transformer.py')}::test_a_window_has_the_same_bits_alone_and_among_hundreds",
    f"{HERE.with_name('test_transformer.py')}::test_nothing_is_seen_of_places_without_an_observation",
    f"{HERE.with_name('test_policies.py')}::test_a_row_has_the_same_bits_alone_and_among_thousands",
    f"{HERE.with_name('test_policies.py')}::test_a_row_has_the_same_answer_alone_and_in_a_batch",
    f"{HERE.with_name('test_rollout.py')}::test_an_episode_is_the_same_alone_and_among_others",
]


def kernels() -> list[str]:
    """Those of OpenBLAS that this processor can run."""
    able = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    needs = {
        "Prescott": "SSE3",
        "Nehalem": "SSE42",
        "Sandybridge": "AVX",
        "Haswell": "AVX2",  # of Zen, too
        "SkylakeX": "AVX512_SKX",
        "Sapphirerapids": "AVX512_SPR",
    }
    return [kernel for kernel, feature in needs.items() if able.get(feature)]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", kernels())
def test_the_bits_hold_under_each_kernel(kernel: str) -> None:
    # types are checked by the run that started this one
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *OF_BITS],
        env=os.environ | {"OPENBLAS_CORETYPE": kernel},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert " passed" in ended.stdout
