"""Returns and baselines against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgengine.errors import ShapeMismatch
from pgengine.estimators import leave_one_out, reward_to_go, step_weights, total_return
from tests.engine.worlds import algorithm, random_mdp


@st.composite
def ragged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    lengths = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    number = st.floats(-100, 100, allow_nan=False)
    return np.array(draw(st.lists(number, min_size=int(offsets[-1]), max_size=int(offsets[-1])))), offsets


@given(ragged(), st.floats(0.0, 1.0))
def test_returns_are_their_definition(episodes: tuple[np.ndarray, np.ndarray], gamma: float) -> None:
    rewards, offsets = episodes
    G, R = reward_to_go(rewards, offsets, gamma=gamma), total_return(rewards, offsets, gamma=gamma)
    for a, b in zip(offsets[:-1], offsets[1:], strict=True):
        whole = sum(gamma**k * rewards[a + k] for k in range(b - a))
        for t in range(a, b):
            assert G[t] == pytest.approx(sum(gamma ** (k - t) * rewards[k] for k in range(t, b)), abs=1e-9)
            assert R[t] == pytest.approx(whole, abs=1e-9)


@given(ragged())
def test_leave_one_out_is_its_definition(episodes: tuple[np.ndarray, np.ndarray]) -> None:
    values, offsets = episodes
    parts = [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    found = leave_one_out(values, offsets)
    for i, (start, part) in enumerate(zip(offsets[:-1], parts, strict=True)):
        for t in range(len(part)):
            others = [other[t] if t < len(other) else 0.0 for j, other in enumerate(parts) if j != i]
            assert found[start + t] == pytest.approx(np.mean(others), abs=1e-9)


def test_distinct_rewards_of_one_episode() -> None:
    rewards, offsets = np.array([1.0, 10.0, 100.0]), np.array([0, 3])
    assert reward_to_go(rewards, offsets, gamma=1.0).tolist() == [111.0, 110.0, 100.0]
    assert total_return(rewards, offsets, gamma=1.0).tolist() == [111.0, 111.0, 111.0]
    assert reward_to_go(rewards, offsets, gamma=0.5).tolist() == [31.0, 60.0, 100.0]


def test_leading_dimensions_are_independent() -> None:
    rewards, offsets = np.random.default_rng(0).normal(size=(4, 5, 9)), np.array([0, 2, 9])
    settings = algorithm(random_mdp(0), trajectories=2, gamma=0.9)
    whole = step_weights(rewards, offsets, settings)
    for index in np.ndindex(4, 5):
        assert np.array_equal(whole[index], step_weights(rewards[index], offsets, settings))


def test_offsets_that_do_not_cover_the_rows_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="last offset"):
        reward_to_go(np.zeros(3), np.array([0, 2]), gamma=1.0)
    with pytest.raises(ShapeMismatch, match="two trajectories"):
        leave_one_out(np.zeros(3), np.array([0, 3]))
