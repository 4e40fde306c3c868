"""The score-function estimator: exact by going through all samples, right in two worked applications."""

import math
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    HalfNormal,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Pareto,
    Poisson,
    TransformedDistribution,
    Uniform,
    Weibull,
)
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    PowerTransform,
    SigmoidTransform,
    TanhTransform,
    Transform,
)

from pgengine import score_function
from pgengine.errors import ShapeMismatch, SpecError
from pgengine.score_function import (
    BLOCK,
    GradientEstimate,
    draw_samples,
    pathwise_gradient,
    score_function_gradient,
    score_function_surrogate,
    weight_second_moment,
)

Parameters = Mapping[str, Tensor]
Z = 6.0  # a standard normal is farther out with probability 2e-9, so 100 comparisons fail by chance with 2e-7


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- exactly, over three outcomes: every batch of n samples has a probability -----------------------------------------

LOGITS = {"logits": tensor(0.3, -0.8, 0.5), "scale": tensor(0.7)}
TABLE = tensor(1.0, -2.0, 4.0)


def categorical(p: Parameters) -> Distribution:
    return Categorical(logits=p["logits"])


def fixed(x: Tensor, p: Parameters) -> Tensor:
    return TABLE[x]


def moving(x: Tensor, p: Parameters) -> Tensor:
    """Depends on theta by itself and through log P, as the ELBO does."""
    return TABLE[x] * p["scale"].exp() + 0.4 * categorical(p).log_prob(x) ** 2


def exact(f: Callable[[Tensor, Parameters], Tensor]) -> dict[str, Tensor]:
    p = {name: value.clone().requires_grad_() for name, value in LOGITS.items()}
    J = (categorical(p).log_prob(torch.arange(3)).exp() * f(torch.arange(3), p)).sum()
    found = torch.autograd.grad(J, list(p.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(p, found, strict=True))


def expected(
    estimate: Callable[[Tensor], dict[str, Tensor]], n: int, sampling: Distribution | None = None
) -> dict[str, Tensor]:
    rho = (sampling or categorical(LOGITS)).log_prob(torch.arange(3)).exp()
    total = {name: torch.zeros_like(value) for name, value in LOGITS.items()}
    for batch in product(range(3), repeat=n):
        x = torch.tensor(batch)
        for name, gradient in estimate(x).items():
            total[name] += rho[x].prod() * gradient
    return total


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("f", [fixed, moving])
@pytest.mark.parametrize("sampling", [None, Categorical(probs=tensor(0.2, 0.5, 0.3))])
@pytest.mark.parametrize(
    ("n", "baseline"), [(1, "none"), (1, 1.3), (2, "none"), (2, 1.3), (2, "leave_one_out"), (3, "leave_one_out")]
)
def test_the_expected_estimate_is_the_gradient(
    f: Callable[[Tensor, Parameters], Tensor], sampling: Distribution | None, n: int, baseline: str | float
) -> None:
    def estimate(x: Tensor) -> dict[str, Tensor]:
        return score_function_gradient(categorical, f, LOGITS, x, sampling=sampling, baseline=baseline).gradient

    assert distance(expected(estimate, n, sampling), exact(f)) < 1e-12


def test_leaving_out_the_gradient_of_f_gives_another_answer() -> None:
    without = lambda x, p: moving(x, p).detach()  # noqa: E731
    estimate = lambda x: score_function_gradient(categorical, without, LOGITS, x, baseline="none").gradient  # noqa: E731
    assert distance(expected(estimate, 1), exact(moving)) > 0.1


def test_the_term_of_log_p_vanishes_in_expectation_as_in_the_elbo() -> None:
    elbo = lambda x, p: TABLE[x] - categorical(p).log_prob(x)  # noqa: E731
    dropped = lambda x, p: elbo(x, p).detach()  # noqa: E731
    for f in (elbo, dropped):
        estimates = partial(score_function_gradient, categorical, f, LOGITS, baseline="none")
        assert distance(expected(lambda x, e=estimates: e(x).gradient, 1), exact(elbo)) < 1e-12


def by_hand(
    weights: Callable[[Tensor, Tensor, Tensor], Tensor], rho: Distribution
) -> Callable[[Tensor], dict[str, Tensor]]:
    """An estimate whose sample i weighs its score with weights(w, f, x)[i]: for variants that must be caught."""

    def estimate(x: Tensor) -> dict[str, Tensor]:
        p = {name: value.clone().requires_grad_() for name, value in LOGITS.items()}
        log_p = categorical(p).log_prob(x)
        w = (log_p - rho.log_prob(x)).exp().detach()
        loss = (weights(w, TABLE[x], x) * log_p).mean()
        return dict(
            zip(p, torch.autograd.grad(loss, list(p.values()), allow_unused=True, materialize_grads=True), strict=True)
        )

    return estimate


RHO = Categorical(probs=tensor(0.2, 0.5, 0.3))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda w, f, x: w * (f - (w * f).mean()), id="mean of the samples, own included"),
        pytest.param(lambda w, f, x: w * f - 1.3, id="baseline without the weight"),
        pytest.param(lambda w, f, x: f - 1.3, id="no weights"),
        pytest.param(lambda w, f, x: w / w.sum() * len(x) * f, id="self-normalised weights"),
        pytest.param(lambda w, f, x: w.clamp(max=1.0) * f, id="clipped weights"),
        pytest.param(lambda w, f, x: w**2 * f, id="squared weights"),
        pytest.param(lambda w, f, x: f / w, id="inverted weights"),
    ],
)
def test_wrong_weights_are_caught(wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert distance(expected(by_hand(wrong, RHO), 2, RHO), exact(fixed)) > 1e-2


def test_the_right_weights_by_hand_are_not_caught() -> None:
    right = lambda w, f, x: w * (f - 1.3)  # noqa: E731
    assert distance(expected(by_hand(right, RHO), 2, RHO), exact(fixed)) < 1e-12


def test_own_mean_as_a_baseline_scales_the_gradient_by_1_minus_1_over_n() -> None:
    P = categorical(LOGITS)
    for n in (2, 3):
        found = expected(by_hand(lambda w, f, x: f - f.mean(), P), n)
        scaled = {name: (1 - 1 / n) * value for name, value in exact(fixed).items()}
        assert distance(found, scaled) < 1e-12


def test_weights_of_one_give_the_same_bits() -> None:
    p = {"mean": torch.tensor([0.1, -0.4]), "log_sigma": torch.tensor([0.2, 0.0])}
    make = lambda p: Independent(Normal(p["mean"], p["log_sigma"].exp()), 1)  # noqa: E731
    x = draw_samples(make(p), 77, seed=3)
    f = lambda x, p: x.square().sum(-1) * p["log_sigma"].sum()  # noqa: E731
    plain = score_function_gradient(make, f, p, x)
    weighted = score_function_gradient(make, f, p, x, sampling=make(p))
    assert weighted.effective_sample_size == plain.effective_sample_size == 77.0
    assert weighted.value == plain.value
    for name in p:
        assert torch.equal(plain.gradient[name], weighted.gradient[name])
        assert torch.equal(plain.standard_error[name], weighted.standard_error[name])


def test_the_expected_weight_is_one_and_its_square_is_the_second_moment() -> None:
    P = categorical(LOGITS)
    rho, w = RHO.probs, (P.log_prob(torch.arange(3)) - RHO.log_prob(torch.arange(3))).exp()
    assert float((rho * w).sum()) == pytest.approx(1.0, abs=1e-12)
    assert weight_second_moment(P, RHO) == pytest.approx(float((rho * w**2).sum()), abs=1e-12)


# --- the same numbers in every form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [None, RHO])
@pytest.mark.parametrize("baseline", ["none", 0.4, "leave_one_out"])
def test_the_gradient_of_the_surrogate_is_the_estimate(sampling: Distribution | None, baseline: str | float) -> None:
    x = draw_samples(sampling or categorical(LOGITS), 2 * BLOCK + 5, seed=0)
    p = {name: value.clone().requires_grad_() for name, value in LOGITS.items()}
    score_function_surrogate(categorical, moving, p, x, sampling=sampling, baseline=baseline).backward()
    estimate = score_function_gradient(categorical, moving, LOGITS, x, sampling=sampling, baseline=baseline)
    for name in p:
        assert torch.allclose(p[name].grad, estimate.gradient[name], rtol=0, atol=1e-13)


def test_blocks_do_not_change_the_estimate_nor_the_parameters() -> None:
    x = draw_samples(categorical(LOGITS), 3 * BLOCK + 1, seed=1)
    before = {name: value.clone() for name, value in LOGITS.items()}
    whole = score_function_gradient(categorical, moving, LOGITS, x, baseline=0.3)
    each = [score_function_gradient(categorical, moving, LOGITS, x[i : i + 1], baseline=0.3) for i in range(len(x))]
    for name in LOGITS:
        rows = torch.stack([one.gradient[name] for one in each])
        assert torch.allclose(rows.mean(0), whole.gradient[name], rtol=0, atol=1e-13)
        assert torch.allclose(rows.std(0) / math.sqrt(len(x)), whole.standard_error[name], rtol=0, atol=1e-13)
        assert torch.isnan(each[0].standard_error[name]).all()
        assert torch.equal(before[name], LOGITS[name])
        assert LOGITS[name].grad is None
        assert not LOGITS[name].requires_grad


def test_per_sample_scores_are_the_closed_form_of_a_gaussian() -> None:
    p = {"mean": tensor(0.4, -1.0), "sigma": tensor(0.5, 2.0)}
    make = lambda p: Independent(Normal(p["mean"], p["sigma"]), 1)  # noqa: E731
    x = tensor([1.0, 3.0])
    estimate = score_function_gradient(make, lambda x, p: 2.0 + 0.0 * x[:, 0], p, x, baseline="none")
    z = (x[0] - p["mean"]) / p["sigma"]
    assert torch.allclose(estimate.gradient["mean"], 2 * z / p["sigma"], rtol=0, atol=1e-14)
    assert torch.allclose(estimate.gradient["sigma"], 2 * (z**2 - 1) / p["sigma"], rtol=0, atol=1e-14)


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator_alone() -> None:
    P = Normal(tensor(0.0)[0], tensor(1.0)[0])
    torch.manual_seed(5)
    after = torch.rand(3)
    torch.manual_seed(5)
    x = draw_samples(P, 10, seed=1)
    pathwise_gradient(lambda p: Normal(p["m"], 1.0), lambda x, p: x, {"m": tensor(0.0)[0]}, n=10, seed=1)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(x, draw_samples(P, 10, seed=1))
    assert not torch.equal(x, draw_samples(P, 10, seed=2))


@pytest.mark.slow
def test_the_mixed_objective_by_a_closed_form() -> None:
    """J = E_{x ~ N(theta, 1)}[theta x^2] = theta (theta^2 + 1), so J' = 3 theta^2 + 1, E[grad f] included.

    Null: the estimate is J' with its stated error; n = 40,000; |z| < 6 is exceeded with probability 2e-9.
    """
    p = {"theta": tensor(0.8)[0]}
    make = lambda p: Normal(p["theta"], 1.0)  # noqa: E731
    x = draw_samples(make(p), 40_000, seed=0)
    estimate = score_function_gradient(make, lambda x, p: p["theta"] * x**2, p, x)
    error = float(estimate.standard_error["theta"])
    assert abs(float(estimate.gradient["theta"]) - (3 * 0.8**2 + 1)) < Z * error
    assert error < 0.05
    assert abs(estimate.value - 0.8 * (0.8**2 + 1)) < Z * estimate.value_error


@pytest.mark.slow
def test_the_standard_error_is_the_scatter_of_repeated_estimates() -> None:
    """Null: 1,000 estimates scatter as the mean square of their standard errors says; the ratio of the two variances
    has a deviation of about 0.06 for these nearly Gaussian estimates, and must be within 6 deviations."""
    p = {"theta": tensor(0.8)[0]}
    make = lambda p: Normal(p["theta"], 1.0)  # noqa: E731
    f = lambda x, p: p["theta"] * torch.sin(x)  # noqa: E731
    for baseline in ("none", "leave_one_out"):
        runs = [
            score_function_gradient(make, f, p, draw_samples(make(p), 64, seed=seed), baseline=baseline)
            for seed in range(1000)
        ]
        scatter = torch.stack([run.gradient["theta"] for run in runs]).var()
        stated = torch.stack([run.standard_error["theta"] ** 2 for run in runs]).mean()
        assert abs(float(scatter / stated) - 1) < 0.36


FAMILIES: dict[str, Callable[[Tensor], Distribution]] = {
    "Normal": lambda p: Independent(Normal(p, p.exp()), 1),
    "MultivariateNormal": lambda p: MultivariateNormal(p, scale_tril=torch.diag(p.exp())),
    "Categorical": lambda p: Categorical(logits=p),
    "Bernoulli": lambda p: Independent(Bernoulli(logits=p), 1),
    "Beta": lambda p: Independent(Beta(p.exp(), 1 + p.exp()), 1),
    "Dirichlet": lambda p: Dirichlet(p.exp()),
    "Gamma": lambda p: Independent(Gamma(p.exp(), 1 + p.exp()), 1),
    "Poisson": lambda p: Independent(Poisson(p.exp()), 1),
    "Laplace": lambda p: Independent(Laplace(p, p.exp()), 1),
    "mixture": lambda p: MixtureSameFamily(Categorical(logits=p), Normal(p, p.exp())),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_distribution_gives_the_scores_that_autograd_gives_one_by_one(family: str) -> None:
    make = lambda p: FAMILIES[family](p["p"])  # noqa: E731
    p = {"p": tensor(0.1, -0.3, 0.5)}
    x = draw_samples(make(p), BLOCK + 3, seed=0)
    f = lambda x, p: x.double().reshape(len(x), -1).sum(-1)  # noqa: E731
    estimate = score_function_gradient(make, f, p, x, baseline="none")
    leaf = p["p"].clone().requires_grad_()
    rows = torch.stack(
        [torch.autograd.grad(make({"p": leaf}).log_prob(x)[i] * f(x, p)[i], leaf)[0] for i in range(len(x))]
    )
    assert torch.allclose(estimate.gradient["p"], rows.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(estimate.standard_error["p"], rows.std(0) / math.sqrt(len(x)), rtol=0, atol=1e-12)


class TwoPoints(Distribution):
    """A distribution of one's own, without a word on its support: 1 with probability p, else -1."""

    arg_constraints = {}

    def __init__(self, p: Tensor) -> None:
        self.p = p
        super().__init__(validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value > 0, self.p, 1 - self.p).log()


def test_a_distribution_of_ones_own_need_only_have_log_probabilities() -> None:
    x, one = tensor(1.0, -1.0, 1.0), {"p": tensor(0.3)[0]}
    estimate = score_function_gradient(lambda p: TwoPoints(p["p"]), lambda x, p: x, one, x, baseline="none")
    assert float(estimate.gradient["p"]) == pytest.approx((1 / 0.3 + 1 / 0.7 + 1 / 0.3) / 3)


# --- weights ----------------------------------------------------------------------------------------------------------

GRID = torch.linspace(-60.0, 60.0, 400_001, dtype=torch.float64)
POSITIVE = torch.linspace(1e-7, 200.0, 2_000_001, dtype=torch.float64)
UNIT = torch.linspace(1e-6, 1 - 1e-6, 1_000_001, dtype=torch.float64)
PAIRS = [
    (Normal(tensor(0.5)[0], 1.2), Normal(tensor(-0.2)[0], 1.0), GRID),
    (Normal(tensor(0.5)[0], 0.7), Normal(tensor(-0.2)[0], 1.0), GRID),
    (Exponential(tensor(1.0)[0]), Exponential(tensor(1.6)[0]), POSITIVE),
    (Gamma(tensor(3.0)[0], tensor(2.0)[0]), Gamma(tensor(3.5)[0], tensor(1.0)[0]), POSITIVE),
    (Beta(tensor(3.0)[0], tensor(4.0)[0]), Beta(tensor(3.5)[0], tensor(2.0)[0]), UNIT),
]


@pytest.mark.parametrize(("p", "q", "grid"), PAIRS)
def test_the_second_moment_of_the_weights_agrees_with_numeric_integration(
    p: Distribution, q: Distribution, grid: Tensor
) -> None:
    integral = torch.trapezoid((2 * p.log_prob(grid) - q.log_prob(grid)).exp(), grid)
    assert weight_second_moment(p, q) == pytest.approx(float(integral), rel=1e-5)
    assert weight_second_moment(p, p) == pytest.approx(1.0, rel=1e-12)


def test_second_moments_of_several_dimensions_multiply() -> None:
    mean, sigma = tensor(0.3, -0.1), tensor(1.1, 0.6)
    p = Independent(Normal(mean, sigma), 1)
    q = Independent(Normal(tensor(0.0, 0.0), tensor(1.0, 1.0)), 1)
    one_by_one = [
        weight_second_moment(Normal(mean[i], sigma[i]), Normal(tensor(0.0)[0], tensor(1.0)[0])) for i in range(2)
    ]
    assert weight_second_moment(p, q) == pytest.approx(one_by_one[0] * one_by_one[1], rel=1e-12)
    full_p = MultivariateNormal(mean, scale_tril=torch.diag(sigma))
    full_q = MultivariateNormal(tensor(0.0, 0.0), torch.eye(2, dtype=torch.float64))
    assert weight_second_moment(full_p, full_q) == pytest.approx(one_by_one[0] * one_by_one[1], rel=1e-12)
    turned = MultivariateNormal(mean, covariance_matrix=tensor([1.5, 0.9], [0.9, 1.5]))
    assert weight_second_moment(turned, full_q) == math.inf  # an eigenvalue of 2.4, beyond twice rho's
    coins = [Independent(Bernoulli(probs=tensor(*v)), 1) for v in ((0.2, 0.7), (0.5, 0.4))]
    by_hand = (0.04 / 0.5 + 0.64 / 0.5) * (0.49 / 0.4 + 0.09 / 0.6)
    assert weight_second_moment(*coins) == pytest.approx(by_hand, rel=1e-12)
    rates = [Poisson(tensor(value)[0]) for value in (2.0, 3.0)]
    k = torch.arange(200, dtype=torch.float64)
    summed = (2 * rates[0].log_prob(k) - rates[1].log_prob(k)).exp().sum()
    assert weight_second_moment(*rates) == pytest.approx(float(summed), rel=1e-12)
    c = [Dirichlet(tensor(*v)) for v in ((3.0, 4.0), (3.5, 2.0))]
    as_beta = [Beta(tensor(*v)[0], tensor(*v)[1]) for v in ((3.0, 4.0), (3.5, 2.0))]
    assert weight_second_moment(*c) == pytest.approx(weight_second_moment(*as_beta), rel=1e-12)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (Normal(0.0, 1.415), Normal(0.0, 1.0)),
        (Normal(3.0, 2.0), Normal(0.0, 1.0)),
        (Exponential(torch.tensor(1.0)), Exponential(torch.tensor(2.0))),
        (Gamma(torch.tensor(1.0), torch.tensor(1.0)), Gamma(torch.tensor(2.0), torch.tensor(1.0))),
        (Beta(torch.tensor(1.0), torch.tensor(1.0)), Beta(torch.tensor(1.0), torch.tensor(2.0))),
        (Categorical(probs=torch.tensor([0.5, 0.5])), Categorical(probs=torch.tensor([1.0, 0.0]))),
    ],
)
def test_a_second_moment_that_does_not_exist_is_infinite(p: Distribution, q: Distribution) -> None:
    assert weight_second_moment(p, q) == math.inf


def test_a_gaussian_ratio_is_unbounded_for_any_shift_of_the_mean_and_yet_of_finite_variance() -> None:
    p, q = Normal(0.1, 1.0), Normal(0.0, 1.0)
    far = torch.tensor([10.0, 100.0, 400.0])
    ratio = p.log_prob(far) - q.log_prob(far)
    assert torch.all(ratio.diff() > 5)  # grows for ever
    assert weight_second_moment(p, q) == pytest.approx(math.exp(0.01), rel=1e-6)


def test_pairs_of_which_nothing_is_known_are_not_refused() -> None:
    assert weight_second_moment(Laplace(0.0, 1.0), Normal(0.0, 1.0)) is None
    p = {"mean": tensor(0.0)[0]}
    x = draw_samples(Laplace(tensor(0.0)[0], 1.0), 50, seed=0)
    estimate = score_function_gradient(
        lambda p: Normal(p["mean"], 1.0), lambda x, p: x, p, x, sampling=Laplace(tensor(0.0)[0], 1.0)
    )
    w = (Normal(0.0, 1.0).log_prob(x) - Laplace(0.0, 1.0).log_prob(x)).exp()
    assert estimate.effective_sample_size == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))


# --- refusals ---------------------------------------------------------------------------------------------------------


def code(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(SpecError) as caught:
        call()
    return caught.value.pointer, caught.value.code


def test_what_cannot_be_right_is_refused_with_the_way_out() -> None:
    one = {"theta": tensor(1.0)[0]}
    f = lambda x, p: x  # noqa: E731
    x = tensor(0.5, 0.7)
    normal = lambda p: Normal(p["theta"], 1.0)  # noqa: E731
    assert code(lambda: score_function_gradient(normal, f, one, x[:1])) == ("/baseline", "baseline_needs_samples")
    for moving_support in (
        lambda p: Uniform(0.0 * p["theta"], p["theta"]),
        lambda p: Pareto(p["theta"] * 0.1, 1.0),
        lambda p: Independent(Uniform(torch.zeros(1), p["theta"].expand(1)), 1),
    ):
        batch = x[:, None] if moving_support(one).event_shape else x
        refused = code(lambda m=moving_support, b=batch: score_function_gradient(m, lambda x, p: x.reshape(-1), one, b))
        assert refused == ("/distribution", "support_moves")
    narrow = lambda: score_function_gradient(normal, f, one, x, sampling=Normal(0.0, 0.5))  # noqa: E731
    assert code(narrow) == ("/sampling", "unbounded_weights")
    discrete = lambda: pathwise_gradient(  # noqa: E731
        lambda p: Bernoulli(p["theta"] * 0.5), f, one, n=4, seed=0
    )
    assert code(discrete) == ("/distribution", "no_pathwise")


MOVING = {
    "scaled": lambda t: transformed(Uniform(0.0, 1.0), AffineTransform(0.0, t)),
    "shifted": lambda t: transformed(Uniform(0.0, 1.0), AffineTransform(t, 1.0)),
    "shifted half-line": lambda t: transformed(Exponential(1.0), AffineTransform(t, 1.0)),
    "inside others": lambda t: transformed(
        Uniform(0.0, 1.0), ExpTransform(), ComposeTransform([AffineTransform(0, t)])
    ),
    "base": lambda t: transformed(Uniform(0.0, t), ExpTransform()),
    "nested": lambda t: transformed(transformed(Uniform(0.0, 1.0), AffineTransform(t, 1.0)), ExpTransform()),
    "independent": lambda t: Independent(transformed(Uniform(torch.zeros(2), 1.0), AffineTransform(0.0, t)), 1),
    "of independent": lambda t: transformed(
        Independent(Uniform(torch.zeros(2), 1.0), 1), AffineTransform(0.0, t, event_dim=1)
    ),
    "inverse": lambda t: transformed(
        Independent(Uniform(torch.zeros(2), 1.0), 1), AffineTransform(0.0, t, event_dim=1).inv
    ),
    "discrete": lambda t: transformed(Bernoulli(0.5), AffineTransform(0.0, t)),
}
STANDING = {
    "real": lambda t: transformed(Normal(0.0, 1.0), AffineTransform(t, t)),
    "log-normal": lambda t: transformed(Normal(t, 1.0), ExpTransform()),
    "scaled half-line": lambda t: transformed(Exponential(1.0), AffineTransform(0.0, t)),
    "logistic": lambda t: transformed(Uniform(0.0, 1.0), SigmoidTransform().inv, AffineTransform(t, t)),
    "constants": lambda t: transformed(Uniform(0.0, 1.0), AffineTransform(1.0, 2.0)),
    "base only": lambda t: transformed(Beta(t, 1.0), AffineTransform(1.0, 2.0)),
    "power": lambda t: transformed(Exponential(1.0), PowerTransform(t)),
    "squashed": lambda t: transformed(Normal(t, 1.0), TanhTransform()),
    "gumbel": lambda t: Gumbel(t, t),
    "weibull": lambda t: Weibull(t, t),
    "half-normal": lambda t: HalfNormal(t),
}


def transformed(base: Distribution, *transforms: Transform) -> Distribution:
    return TransformedDistribution(base, list(transforms))


@pytest.mark.parametrize("name", MOVING)
def test_a_support_that_moves_inside_a_transformation_is_refused(name: str) -> None:
    theta = {"theta": torch.tensor(0.7)}
    x = draw_samples(MOVING[name](theta["theta"]), 4, seed=0)
    make = lambda p: MOVING[name](p["theta"])  # noqa: E731
    with pytest.raises(SpecError) as refused:
        score_function_gradient(make, lambda x, p: x.reshape(len(x), -1).sum(-1), theta, x)
    assert (refused.value.pointer, refused.value.code) == ("/distribution", "support_moves")


@pytest.mark.parametrize("name", STANDING)
def test_a_transformation_that_moves_no_bound_is_not_refused(name: str) -> None:
    theta = {"theta": torch.tensor(0.7)}
    x = draw_samples(STANDING[name](theta["theta"]), 4, seed=0)
    make = lambda p: STANDING[name](p["theta"])  # noqa: E731
    found = score_function_gradient(make, lambda x, p: x, theta, x)
    assert torch.isfinite(found.gradient["theta"])


def test_the_gradient_that_a_moving_support_would_give_is_wrong() -> None:
    """E[x] of Uniform(0, theta) is theta / 2 with slope 1/2; the score is always -1/theta, which gives -1/2."""
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(1e-9, 2.0 - 1e-9, 10_001, dtype=torch.float64)
    (wrong,) = torch.autograd.grad((x * Uniform(torch.zeros_like(theta), theta).log_prob(x)).mean(), theta)
    assert float(wrong) == pytest.approx(-0.5, abs=1e-6)
    right = pathwise_gradient(
        lambda p: Uniform(0.0 * p["theta"], p["theta"]), lambda x, p: x, {"theta": theta.detach()}, n=4000, seed=0
    )
    assert abs(float(right.gradient["theta"]) - 0.5) < Z * float(right.standard_error["theta"])


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    p = {"mean": tensor(0.0, 1.0)}
    batched, joint = lambda p: Normal(p["mean"], 1.0), lambda p: Independent(Normal(p["mean"], 1.0), 1)
    x = draw_samples(joint(p), 4, seed=0)
    for call in (
        lambda: score_function_gradient(batched, lambda x, p: x[:, 0], p, x),
        lambda: score_function_gradient(joint, lambda x, p: x, p, x),
        lambda: score_function_gradient(joint, lambda x, p: x[:, 0], p, x[:0]),
        lambda: score_function_gradient(joint, lambda x, p: x[:, 0], {}, x),
        lambda: pathwise_gradient(joint, lambda x, p: x[:, 0], p, n=0, seed=0),
        lambda: pathwise_gradient(batched, lambda x, p: x[:, 0], p, n=2, seed=0),
        lambda: weight_second_moment(batched(p), batched(p)),
    ):
        with pytest.raises(ShapeMismatch):
            call()


# --- worked: a black box ----------------------------------------------------------------------------------------------


def stairs(x: Tensor, p: Parameters) -> Tensor:
    """A price list: whole steps down with the distance from 3; its derivative is zero wherever it exists."""
    return -torch.floor((x - 3.0).abs())


def gaussian(p: Parameters) -> Distribution:
    return Normal(p["mean"], p["log_sigma"].exp())


def smoothed(mean: float, log_sigma: float) -> dict[str, float]:
    """Gradient of E[stairs] by numeric differentiation of the exact sum over the steps."""

    def value(m: float, s: float) -> float:
        P = Normal(tensor(m)[0], math.exp(s))
        k = torch.arange(0, 60, dtype=torch.float64)  # |x - 3| in [k, k + 1)
        inside = P.cdf(3 + k + 1) - P.cdf(3 + k) + P.cdf(3 - k) - P.cdf(3 - k - 1)
        return float(-(k * inside).sum())

    h = 1e-5
    return {
        "mean": (value(mean + h, log_sigma) - value(mean - h, log_sigma)) / (2 * h),
        "log_sigma": (value(mean, log_sigma + h) - value(mean, log_sigma - h)) / (2 * h),
    }


@pytest.mark.slow
def test_the_gradient_through_a_black_box_is_right_where_the_pathwise_one_is_zero() -> None:
    """Null: both numbers are those of the smoothed stairs; n = 40,000; |z| < 6 each."""
    p = {"mean": tensor(0.5)[0], "log_sigma": tensor(0.3)[0]}
    x = draw_samples(gaussian(p), 40_000, seed=0)
    estimate = score_function_gradient(gaussian, stairs, p, x)
    for name, right in smoothed(0.5, 0.3).items():
        assert abs(float(estimate.gradient[name]) - right) < Z * float(estimate.standard_error[name])
        assert abs(right) > 10 * float(estimate.standard_error[name])  # so zero would be seen
    assert all(
        not gradient.any() for gradient in pathwise_gradient(gaussian, stairs, p, n=100, seed=0).gradient.values()
    )


def test_a_black_box_is_climbed() -> None:
    """From the mean -2, five stairs below the top, 300 steps bring the mean onto the top stair (2, 4)."""
    p = {"mean": torch.tensor(-2.0, requires_grad=True), "log_sigma": torch.tensor(0.5, requires_grad=True)}
    optimizer = torch.optim.Adam(p.values(), lr=0.05)
    for step in range(300):
        x = draw_samples(gaussian(p), 32, seed=step)
        optimizer.zero_grad()
        (-score_function_surrogate(gaussian, stairs, p, x)).backward()
        optimizer.step()
    assert 2.0 < float(p["mean"].detach()) < 4.0
    assert float(-stairs(draw_samples(gaussian(p), 4000, seed=0), p).mean()) < 0.2


def test_the_best_set_of_coins_is_found() -> None:
    """A knapsack of 8 things, all 256 sets tried: coins for each end on the best set, or within 5% of its worth."""
    values = tensor(6, 5, 8, 9, 6, 7, 3, 2).double()
    weights = tensor(2, 3, 6, 7, 5, 9, 4, 1).double()
    worth = lambda x: torch.where((x @ weights) <= 15, x @ values, 15 - x @ weights)  # noqa: E731
    every = torch.cartesian_prod(*[tensor(0.0, 1.0)] * 8)
    best = float(worth(every).max())
    make = lambda p: Independent(Bernoulli(logits=p["logits"]), 1)  # noqa: E731
    p = {"logits": torch.zeros(8, dtype=torch.float64, requires_grad=True)}
    optimizer = torch.optim.Adam(p.values(), lr=0.1)
    for step in range(250):
        x = draw_samples(make(p), 64, seed=step)
        optimizer.zero_grad()
        (-score_function_surrogate(make, lambda x, p: worth(x), p, x)).backward()
        optimizer.step()
    found = (p["logits"].detach() > 0).double()
    assert float(worth(found[None])[0]) >= 0.95 * best


# --- worked: variational inference with a known posterior -------------------------------------------------------------

DATA = tensor(1.2, 0.4, 2.1, 1.6)
NOISE, PRIOR = 0.8, 1.5
PRECISION = 1 / PRIOR**2 + len(DATA) / NOISE**2
POSTERIOR = Normal(DATA.sum() / NOISE**2 / PRECISION, tensor(PRECISION**-0.5)[0])


def log_joint(z: Tensor) -> Tensor:
    """Log p(z) + sum_i log p(y_i|z): z ~ N(0, 1.5^2), y_i ~ N(z, 0.8^2)."""
    prior = Normal(tensor(0.0)[0], PRIOR).log_prob(z)
    likelihood = Normal(z[:, None], NOISE).log_prob(DATA).sum(-1)
    return prior + likelihood


def elbo(z: Tensor, p: Parameters) -> Tensor:
    return log_joint(z) - gaussian(p).log_prob(z)


def log_evidence() -> float:
    z = POSTERIOR.mean[None]
    return float(log_joint(z) - POSTERIOR.log_prob(z))


def exact_elbo_gradient(mean: float, log_sigma: float) -> dict[str, float]:
    """ELBO = log evidence - KL(q || posterior), in closed form."""
    m0, v0 = float(POSTERIOR.mean), float(POSTERIOR.variance)
    return {"mean": -(mean - m0) / v0, "log_sigma": 1 - math.exp(2 * log_sigma) / v0}


def check_against(estimate: GradientEstimate, right: dict[str, float]) -> None:
    for name, value in right.items():
        assert abs(float(estimate.gradient[name]) - value) < Z * float(estimate.standard_error[name]), name


@pytest.mark.slow
def test_both_gradients_of_the_elbo_are_those_of_the_closed_form() -> None:
    """Null: the closed form, for two estimators of two numbers; n = 8,000; |z| < 6 each, so 8e-9 in all."""
    p = {"mean": tensor(0.2)[0], "log_sigma": tensor(-0.4)[0]}
    right = exact_elbo_gradient(0.2, -0.4)
    score = score_function_gradient(gaussian, elbo, p, draw_samples(gaussian(p), 8_000, seed=1))
    path = pathwise_gradient(gaussian, elbo, p, n=8_000, seed=2)
    check_against(score, right)
    check_against(path, right)
    value = log_evidence() - float(torch.distributions.kl_divergence(gaussian(p), POSTERIOR))
    assert abs(score.value - value) < Z * score.value_error
    assert abs(path.value - value) < Z * path.value_error
    # the reason to prefer it where it exists: here less than half of the error
    assert float(path.standard_error["mean"]) < float(score.standard_error["mean"]) / 2


def test_at_the_posterior_the_elbo_is_the_evidence_of_every_sample() -> None:
    p = {"mean": POSTERIOR.mean, "log_sigma": POSTERIOR.stddev.log()}
    x = draw_samples(gaussian(p), 200, seed=0)
    assert torch.allclose(elbo(x, p), tensor(log_evidence())[0], rtol=0, atol=1e-12)
    constant = lambda x, p: elbo(x, p).detach()  # noqa: E731
    centred = score_function_gradient(gaussian, constant, p, x)
    plain = score_function_gradient(gaussian, constant, p, x, baseline="none")
    # f is constant: subtracting the other samples' mean leaves nothing, subtracting nothing leaves noise
    assert all(float(error) < 1e-12 for error in centred.standard_error.values())
    assert all(float(error) > 0.05 for error in plain.standard_error.values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["score", "pathwise"])
def test_ascent_on_the_elbo_finds_the_posterior(way: str) -> None:
    """Robbins-Monro steps from (-1, 0.5); the iterates after 300 steps are within 0.05 of the known posterior."""
    p = {"mean": tensor(-1.0)[0], "log_sigma": tensor(0.5)[0]}
    for step in range(300):
        if way == "score":
            estimate = score_function_gradient(gaussian, elbo, p, draw_samples(gaussian(p), 64, seed=step))
        else:
            estimate = pathwise_gradient(gaussian, elbo, p, n=64, seed=step)
        rate = 0.05 / (1 + step / 50)
        p = {name: value + rate * estimate.gradient[name].clamp(-5, 5) for name, value in p.items()}
    assert float(p["mean"]) == pytest.approx(float(POSTERIOR.mean), abs=0.05)
    assert float(p["log_sigma"].exp()) == pytest.approx(float(POSTERIOR.stddev), abs=0.05)


# --- the page ---------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "engine" / "score_function.md").read_text()


@pytest.mark.slow
def test_the_examples_of_the_page_run_and_give_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, flags=re.MULTILINE)]
    code = [block for block in blocks if "def make" in block]
    assert len(code) == 2
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, "score_function.md", "exec"), names)
    printed = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    (picture,) = (
        [line.split()[:4] for line in block.split("\n") if "#" in line] for block in blocks if "####" in block
    )
    assert len(picture) == 6
    for seen, told in zip(printed, picture, strict=True):
        # the last figures may differ between machines, whose sums are rounded in another order
        assert [float(number) for number in seen] == pytest.approx([float(number) for number in told], abs=0.05)


def test_the_page_names_every_function() -> None:
    named = re.findall(r"^\| `([a-z_]+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(named) == sorted(name for name in score_function.__all__ if name != "GradientEstimate")
