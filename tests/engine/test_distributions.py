"""Log-probabilities, entropies and samples against torch.distributions and closed forms."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical, Independent, Normal

from pgengine.distributions import Bernoulli, DiagonalGaussian, MultiSoftmax, Softmax, open_distribution
from pgengine.errors import SpecError
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace, MultiDiscreteSpace
from pgengine.spec import BernoulliSpec, GaussianSpec, SoftmaxSpec

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


# --- several components -----------------------------------------------------------------------------------------------

DIALS = MultiDiscreteSpace(nvec=[3, 2, 4], start=[0, -1, 5])
LAMPS = MultiBinarySpace(n=3)


def components(scores: np.ndarray) -> list[Categorical]:
    return [Categorical(logits=torch.as_tensor(part)) for part in np.split(scores, [3, 5], axis=1)]


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_a_softmax_for_each_component_agrees_with_torch(library: object) -> None:
    scores = generator.normal(size=(50, 9)) * 5
    sample = generator.integers([3, 2, 4], size=(50, 3))
    d, references = MultiSoftmax(DIALS), components(scores)
    log_prob = sum(r.log_prob(torch.as_tensor(sample[:, i])) for i, r in enumerate(references))
    entropy = sum(r.entropy() for r in references)
    assert (d.width, d.noise_kind, d.noise_width) == (9, "uniform", 3)
    assert np.allclose(d.log_prob({}, library(scores), library(sample)), log_prob, atol=1e-12)  # type: ignore[operator]
    assert np.allclose(d.entropy({}, library(scores)), entropy, atol=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_coins_agree_with_torch(library: object) -> None:
    logits = np.concatenate([generator.normal(size=(50, 3)) * 5, [[0.0, 800.0, -800.0]]])
    sample = generator.integers(2, size=(51, 3))
    reference = Independent(TorchBernoulli(logits=torch.as_tensor(logits)), 1)
    d = Bernoulli(LAMPS)
    log_prob = d.log_prob({}, library(logits), library(sample))  # type: ignore[operator]
    assert (d.width, d.noise_kind, d.noise_width) == (3, "uniform", 3)
    assert np.allclose(log_prob, reference.log_prob(torch.as_tensor(sample).double()), atol=1e-12)
    assert np.allclose(d.entropy({}, library(logits[:50])), reference.entropy()[:50], atol=1e-12)  # type: ignore[operator]
    assert d.entropy({}, np.array([[0.0, 800.0, -800.0]])).tolist() == [pytest.approx(np.log(2))]


def test_the_score_of_a_coin_is_the_closed_form() -> None:
    """sample - probability; also where linear policies begin, at log-odds of exactly zero."""
    logits = torch.tensor([[0.0, 1.5, -700.0]], dtype=torch.float64, requires_grad=True)
    Bernoulli(LAMPS).log_prob({}, logits, torch.tensor([[1, 0, 1]])).sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[0.5, -torch.sigmoid(torch.tensor(1.5)).item(), 1.0]]).double())  # type: ignore[arg-type]


def frequencies_agree(drawn: np.ndarray, p: np.ndarray) -> None:
    """Null: each value is drawn with its probability; a deviation of 6 standard errors has odds below 1e-8."""
    n = len(drawn)
    found = np.bincount(drawn, minlength=len(p)) / n
    assert (np.abs(found - p) < 6 * np.sqrt(p * (1 - p) / n) + 1e-12).all()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_components_are_drawn_independently_and_as_often_as_they_say(share: float) -> None:
    """Null: the joint frequencies of all 24 actions are the products; n = 200,000; odds below 24e-8."""
    n, scores = 200_000, np.array([[0.0, 1.0, -2.0, 0.5, 0.0, 3.0, 0.0, 1.0, -1.0]])
    d = MultiSoftmax(DIALS, share)
    drawn = d.sample({}, np.repeat(scores, n, axis=0), generator.random((n, 3)))
    parts = [(1 - share) * c.probs.numpy()[0] + share / c.probs.shape[1] for c in components(scores)]
    joint = np.einsum("a,b,c->abc", *parts).ravel()
    frequencies_agree(np.ravel_multi_index(tuple(drawn.T), (3, 2, 4)), joint)
    assert np.allclose(np.exp(d.log_prob({}, np.repeat(scores, n, axis=0), drawn)[:9]),
                       joint[np.ravel_multi_index(tuple(drawn[:9].T), (3, 2, 4))])  # fmt: skip
    assert d.action(drawn).min(axis=0).tolist() == [0, -1, 5]
    assert d.action(drawn).max(axis=0).tolist() == [2, 0, 8]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_coins_fall_independently_and_as_often_as_they_say(share: float) -> None:
    """Null: the joint frequencies of all 8 actions are the products; n = 200,000; odds below 8e-8."""
    n, logits = 200_000, np.array([[0.0, 2.0, -1.0]])
    d = Bernoulli(LAMPS, share)
    drawn = d.sample({}, np.repeat(logits, n, axis=0), generator.random((n, 3)))
    one = (1 - share) / (1 + np.exp(-logits[0])) + share / 2
    joint = np.einsum("a,b,c->abc", *np.stack([1 - one, one], axis=1)).ravel()
    frequencies_agree(np.ravel_multi_index(tuple(drawn.T), (2, 2, 2)), joint)
    assert np.allclose(d.log_probabilities(logits)[1], np.log(one))
    assert d.action(drawn).dtype == np.int8


def test_modes_of_components() -> None:
    assert MultiSoftmax(DIALS).mode(np.array([[0.0, 1.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 9.0]])).tolist() == [[1, 0, 3]]
    assert Bernoulli(LAMPS).mode(np.array([[0.0, 0.1, -0.1]])).tolist() == [[0, 1, 0]]


def test_the_edge_of_the_noise_gives_no_component_that_does_not_exist() -> None:
    below_one = np.nextafter(1.0, 0.0)
    certain = np.float32([[40.0, -2000.0, 2000.0]])
    assert Bernoulli(LAMPS).sample({}, certain, np.full((1, 3), below_one)).tolist() == [[1, 0, 1]]
    assert Bernoulli(LAMPS).sample({}, certain, np.zeros((1, 3))).tolist() == [[0, 0, 1]]
    scores = np.float32([[0.1, 0.7, -2000.0, -2000.0, 0.0, 5.0, -3000.0, -3000.0, -3000.0]])
    assert MultiSoftmax(DIALS).sample({}, scores, np.full((1, 3), below_one)).tolist() == [[1, 1, 0]]
    assert MultiSoftmax(DIALS).sample({}, scores, np.zeros((1, 3))).tolist() == [[0, 1, 0]]


# --- mixed with the uniform distribution ------------------------------------------------------------------------------

MIXED = [
    (Softmax, DiscreteSpace(n=3), [(0,), (1,), (2,)]),
    (MultiSoftmax, MultiDiscreteSpace(nvec=[3, 2]), list(product(range(3), range(2)))),
    (Bernoulli, MultiBinarySpace(n=2), list(product(range(2), range(2)))),
]


@pytest.mark.parametrize(("family", "space", "actions"), MIXED, ids=["softmax", "multi", "coins"])
def test_a_mixture_is_a_distribution_with_a_floor_and_a_bounded_ratio(
    family: Any, space: Any, actions: list[tuple[int, ...]]
) -> None:
    """Probabilities of all actions sum to 1, also where those of the policy underflow; none is below its floor."""
    share, one, mixed = 0.2, family(space), family(space, 0.2)
    C = len(actions[0])
    for scale in (1.0, 50.0, 5000.0):
        outputs = scale * generator.normal(size=(20, one.width))
        for row in outputs:
            every = np.repeat(row[None], len(actions), axis=0)
            samples = np.array(actions) if family is not Softmax else np.array(actions)[:, 0]
            log_p, log_q = one.log_prob({}, every, samples), mixed.log_prob({}, every, samples)
            assert np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-12)
            assert np.exp(log_q).min() >= share**C / len(actions) * (1 - 1e-12)
            assert (log_p - log_q).max() <= -C * np.log(1 - share) + 1e-12
            entropy = -(np.exp(log_q) * log_q).sum()
            assert mixed.entropy({}, row[None]).tolist() == [pytest.approx(entropy, abs=1e-12)]


def test_a_mixture_by_hand() -> None:
    d = Softmax(DiscreteSpace(n=4), 0.2)
    scores = np.log(np.array([[0.4, 0.3, 0.2, 0.1]]))
    assert np.allclose(np.exp(d.log_probabilities(scores)), [[0.37, 0.29, 0.21, 0.13]])
    n = 200_000
    frequencies_agree(
        d.sample({}, np.repeat(scores, n, axis=0), generator.random(n)), np.array([0.37, 0.29, 0.21, 0.13])
    )
    assert d.mode(scores).tolist() == [0]


def test_a_box_is_not_mixed() -> None:
    with pytest.raises(SpecError) as error:
        open_distribution(GaussianSpec(), BOUNDED, uniform_share=0.1)
    assert (error.value.pointer, error.value.code) == ("/distribution/kind", "mixture_needs_finite_actions")


@pytest.mark.parametrize(("spec", "space", "expected"), [
    (SoftmaxSpec(), BOX, "gaussian"),
    (SoftmaxSpec(), LAMPS, "bernoulli"),
    (BernoulliSpec(), DIALS, "softmax"),
    (BernoulliSpec(), DiscreteSpace(n=2), "softmax"),
    (GaussianSpec(), LAMPS, "bernoulli"),
    (GaussianSpec(action_map="tanh"), DiscreteSpace(n=2), "softmax"),
])  # fmt: skip
def test_a_family_that_does_not_fit_is_named_with_the_one_that_does(spec: Any, space: Any, expected: str) -> None:
    with pytest.raises(SpecError, match=f"expected {expected}") as error:
        open_distribution(spec, space)
    assert (error.value.pointer, error.value.code) == ("/distribution/kind", "action_family_mismatch")


# --- a deviation that the network gives -------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
def test_a_head_agrees_with_torch(library: object) -> None:
    """Outputs are the mean and what is added to log(initial_sigma)."""
    d = DiagonalGaussian(GaussianSpec(sigma="head", initial_sigma=0.7), BOX)
    outputs, sample = generator.normal(size=(20, 6)), generator.normal(size=(20, 3))
    scale = torch.as_tensor(0.7 * np.exp(outputs[:, 3:]))
    reference = Independent(Normal(torch.as_tensor(outputs[:, :3]), scale), 1)
    assert (d.width, d.noise_width, d.initial()) == (6, 3, {})
    log_prob = d.log_prob({}, library(outputs), library(sample))  # type: ignore[operator]
    assert np.allclose(log_prob, reference.log_prob(torch.as_tensor(sample)), atol=1e-6)
    assert np.allclose(d.entropy({}, library(outputs)), reference.entropy(), atol=1e-6)  # type: ignore[operator]
    assert d.mode(outputs).tolist() == outputs[:, :3].tolist()


def test_the_density_of_a_head_integrates_to_one_and_has_its_entropy() -> None:
    """By the midpoint rule over 12 deviations around the mean, in two dimensions."""
    d = DiagonalGaussian(GaussianSpec(sigma="head"), BOUNDED)
    outputs = np.array([[0.3, -1.0, 0.4, -0.7]])
    sigma = 0.5 * np.exp(outputs[0, 2:])
    axes = [mean + s * (np.arange(400) + 0.5 - 200) * 0.03 for mean, s in zip(outputs[0], sigma, strict=False)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    log_p = d.log_prob({}, np.repeat(outputs, len(points), axis=0), points)
    cell = np.prod(sigma * 0.03)
    assert np.exp(log_p).sum() * cell == pytest.approx(1.0, abs=1e-6)
    entropy = -(np.exp(log_p) * log_p).sum() * cell
    assert d.entropy({}, outputs).tolist() == [pytest.approx(entropy, abs=1e-6)]


def test_the_score_of_a_head_is_the_closed_form() -> None:
    """(a - mu) / sigma^2 by the mean, ((a - mu) / sigma)^2 - 1 by the output that log sigma is made from."""
    d = DiagonalGaussian(GaussianSpec(sigma="head"), BOUNDED)
    outputs = torch.tensor([[0.2, -0.4, 0.3, -0.6]], dtype=torch.float64, requires_grad=True)
    sample = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    d.log_prob({}, outputs, sample).sum().backward()
    sigma = 0.5 * np.exp(np.array([0.3, -0.6]))
    z = (sample.numpy()[0] - np.array([0.2, -0.4])) / sigma
    assert np.allclose(outputs.grad, np.concatenate([z / sigma, z**2 - 1])[None], rtol=1e-6)  # type: ignore[arg-type]


def test_samples_of_a_head_have_its_deviation() -> None:
    """Null: N(mu, sigma^2) row by row. n = 200,000 in 2 dimensions; 6 standard errors have odds below 1e-8."""
    d, n = DiagonalGaussian(GaussianSpec(sigma="head"), BOUNDED), 200_000
    outputs = np.array([[0.3, -1.0, 0.4, -0.7]])
    drawn = d.sample({}, np.repeat(outputs, n, axis=0), generator.normal(size=(n, 2)))
    sigma = 0.5 * np.exp(outputs[0, 2:])
    assert (np.abs(drawn.mean(axis=0) - outputs[0, :2]) < 6 * sigma / np.sqrt(n)).all()
    assert (np.abs(drawn.std(axis=0) - sigma) < 6 * sigma / np.sqrt(2 * n)).all()
