"""Returns and baselines against their definitions."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgengine.errors import ShapeMismatch
from pgengine.estimators import BatchRows, batch_mean, leave_one_out, reward_to_go, step_weights, total_return
from pgengine.spec import AlgorithmSpec


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


@given(ragged(), st.sampled_from(["time_step", "alive", "shrunk", "total", "all_steps"]))
def test_leave_one_out_knows_nothing_of_the_own_trajectory(
    episodes: tuple[np.ndarray, np.ndarray], over: Literal["time_step", "alive", "shrunk", "total", "all_steps"]
) -> None:
    values, offsets = episodes
    own = slice(offsets[0], offsets[1])
    changed = values.copy()
    changed[own] = 17.0
    before, after = (leave_one_out(v, offsets, over=over)[own] for v in (values, changed))
    assert np.allclose(before, after, atol=1e-9)


@given(ragged(), st.sampled_from(["time_step", "alive", "total", "all_steps"]))
def test_the_mean_of_the_batch_is_made_of_the_own_value_and_the_others(
    episodes: tuple[np.ndarray, np.ndarray], over: Literal["time_step", "alive", "total", "all_steps"]
) -> None:
    values, offsets = episodes
    K, lengths = len(offsets) - 1, np.diff(offsets)
    episode = np.repeat(np.arange(K), lengths)
    time = np.arange(len(values)) - offsets[:-1][episode]
    alive = np.array([(lengths > t).sum() for t in time])
    sums = np.add.reduceat(values, offsets[:-1])
    whole, others, own = {
        "time_step": (np.full(len(values), K), np.full(len(values), K - 1), values),
        "alive": (alive, alive - 1, values),
        "total": (np.full(len(values), K), np.full(len(values), K - 1), values[offsets[:-1]][episode]),
        "all_steps": (np.full(len(values), len(values)), len(values) - lengths[episode], sums[episode]),
    }[over]
    expected = (own + leave_one_out(values, offsets, over=over) * others) / whole
    assert np.allclose(batch_mean(values, offsets, over=over), expected, atol=1e-9)


@pytest.mark.parametrize("settings", [
    {}, {"standardise": "batch"}, {"credit": "total_return", "standardise": "leave_one_out"},
    {"baseline": {"kind": "batch_mean"}}, {"baseline": {"kind": "linear_value"}},
    {"importance": {"kind": "per_decision", "self_normalise": True}, "entropy": {"coefficient": 0.5}},
    {"importance": {"kind": "trajectory", "clip": 1.5}, "entropy": {"coefficient": 0.5, "as": "bonus"}},
])  # fmt: skip
def test_leading_dimensions_are_independent(settings: dict[str, object]) -> None:
    columns, offsets = np.random.default_rng(0).normal(size=(4, 4, 5, 9)), np.array([0, 2, 8, 9])
    a = AlgorithmSpec.model_validate({"gamma": 0.9, **settings})
    rewards, *others = columns
    whole = step_weights(BatchRows(rewards, offsets, *others), a)
    for index in np.ndindex(4, 5):
        one = step_weights(BatchRows(rewards[index], offsets, *(column[index] for column in others)), a)
        for field in ("credit", "baseline", "score", "entropy", "ratio", "effective_sample_size"):
            found, expected = getattr(whole, field), getattr(one, field)
            assert (found is None) == (expected is None)
            assert found is None or np.allclose(found[index], expected, rtol=1e-13, atol=1e-14), field


def test_offsets_that_do_not_cover_the_rows_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="last offset"):
        reward_to_go(np.zeros(3), np.array([0, 2]), gamma=1.0)
    with pytest.raises(ShapeMismatch, match="begin at 0"):
        reward_to_go(np.zeros(3), np.array([1, 3]), gamma=1.0)
    with pytest.raises(ShapeMismatch, match="has a step"):
        reward_to_go(np.zeros(3), np.array([0, 2, 2, 3]), gamma=1.0)
    with pytest.raises(ShapeMismatch, match="two trajectories"):
        leave_one_out(np.zeros(3), np.array([0, 3]))
