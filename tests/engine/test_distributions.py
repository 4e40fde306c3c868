"""Log-probabilities, entropies and samples against torch.distributions and closed forms."""

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from pgengine.distributions import DiagonalGaussian, Softmax
from pgengine.errors import SpecError
from pgengine.spaces import BoxSpace, DiscreteSpace
from pgengine.spec import GaussianSpec

generator = np.random.default_rng(0)
BOX = BoxSpace(shape=[3], low=[-1.0, -2.0, None], high=[1.0, 2.0, None], dtype="float32")
BOUNDED = BoxSpace(shape=[2], low=[-1.0, 0.0], high=[1.0, 4.0], dtype="float32")


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_softmax_agrees_with_torch(library: object) -> None:
    scores, actions = generator.normal(size=(50, 4)) * 5, generator.integers(0, 4, size=50)
    d, reference = Softmax(DiscreteSpace(n=4)), Categorical(logits=torch.as_tensor(scores))
    found = d.log_prob({}, library(scores), library(actions))  # type: ignore[operator]
    assert np.allclose(found, reference.log_prob(torch.as_tensor(actions)), atol=1e-12)
    assert np.allclose(d.entropy({}, library(scores)), reference.entropy(), atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("sigma", ["fixed", "learned"])
def test_gaussian_agrees_with_torch(library: object, sigma: str) -> None:
    d = DiagonalGaussian(GaussianSpec(sigma=sigma, initial_sigma=0.7), BOX)  # type: ignore[arg-type]
    parameters = {name: library(array.astype(np.float64)) for name, array in d.initial().items()}  # type: ignore[operator]
    mean, sample = generator.normal(size=(20, 3)), generator.normal(size=(20, 3))
    scale = torch.full((20, 3), float(np.exp(np.float32(np.log(0.7)))), dtype=torch.float64)
    reference = Independent(Normal(torch.as_tensor(mean), scale), 1)
    found = d.log_prob(parameters, library(mean), library(sample))  # type: ignore[operator]
    assert np.allclose(found, reference.log_prob(torch.as_tensor(sample)), atol=1e-6)
    assert np.allclose(d.entropy(parameters, library(mean)), reference.entropy(), atol=1e-6)  # type: ignore[operator]


def test_gaussian_score_is_the_closed_form() -> None:
    """(a - mu) / sigma^2 by mu, ((a - mu) / sigma)^2 - 1 by log sigma. Source: Bereyhi, N(theta' x(s), sigma^2)."""
    d = DiagonalGaussian(GaussianSpec(), BOX)
    log_sigma = torch.tensor([-0.3, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
    mean = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    sample = torch.tensor([[0.4, -1.0, 2.0]], dtype=torch.float64)
    d.log_prob({"log_sigma": log_sigma}, mean, sample).sum().backward()
    z = ((sample - mean) / log_sigma.exp()).detach()
    assert torch.allclose(mean.grad, z / log_sigma.exp())  # type: ignore[arg-type]
    assert torch.allclose(log_sigma.grad, z[0] ** 2 - 1)  # type: ignore[arg-type]


def test_softmax_draws_each_action_as_often_as_it_says() -> None:
    """Null: frequencies are the probabilities. n = 200,000; a deviation of 6 standard errors has odds below 1e-8."""
    scores = np.array([[0.0, 1.0, -2.0, 3.0]])
    d, n = Softmax(DiscreteSpace(n=4, start=5)), 200_000
    drawn = d.sample({}, np.repeat(scores, n, axis=0), generator.random(n))
    p = np.exp(scores[0]) / np.exp(scores[0]).sum()
    frequencies = np.bincount(drawn, minlength=4) / n
    assert (np.abs(frequencies - p) < 6 * np.sqrt(p * (1 - p) / n)).all()
    assert set(d.action(drawn)) <= {5, 6, 7, 8}


def test_the_edge_of_the_noise_never_gives_an_action_that_does_not_exist() -> None:
    d = Softmax(DiscreteSpace(n=3))
    scores = np.float32([[0.1, 0.7, -2000.0], [-2000.0, 0.0, 0.0], [5.0, -3000.0, -3000.0]])
    below_one = np.nextafter(1.0, 0.0)
    assert d.sample({}, scores, np.full(3, below_one)).tolist() == [1, 2, 0]
    assert d.sample({}, scores, np.zeros(3)).tolist() == [0, 1, 0]


def test_actions_lie_in_the_box_and_the_sample_stays_raw() -> None:
    samples = np.array([[5.0, 5.0], [-5.0, 0.5]])
    clip, tanh = (DiagonalGaussian(GaussianSpec(action_map=m), BOUNDED) for m in ("clip", "tanh"))  # type: ignore[arg-type]
    assert clip.action(samples).tolist() == [[1.0, 4.0], [-1.0, 0.5]]
    squashed = tanh.action(samples)
    assert np.allclose(squashed, [[np.tanh(5), 2 + 2 * np.tanh(5)], [-np.tanh(5), 2 + 2 * np.tanh(0.5)]])
    assert squashed.dtype == np.float32


def test_tanh_needs_bounds() -> None:
    with pytest.raises(SpecError) as error:
        DiagonalGaussian(GaussianSpec(action_map="tanh"), BOX)
    assert (error.value.pointer, error.value.code) == ("/distribution/action_map", "unbounded_action")


def test_entropy_of_a_certain_action_is_zero_and_finite() -> None:
    d = Softmax(DiscreteSpace(n=2))
    assert d.entropy({}, np.array([[0.0, -2000.0]])).tolist() == [0.0]


@pytest.mark.parametrize("action_map", ["clip", "tanh"])
def test_every_whole_number_of_an_integer_box_can_be_reached(action_map: str) -> None:
    box = BoxSpace(shape=[1], low=[0.0], high=[3.0], dtype="int64")
    d = DiagonalGaussian(GaussianSpec(action_map=action_map), box)  # type: ignore[arg-type]
    actions = d.action(np.linspace(-5, 5, 10_001)[:, None])
    assert actions.dtype == np.int64
    assert sorted(set(actions[:, 0].tolist())) == [0, 1, 2, 3]
