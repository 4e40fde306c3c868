"""Gradient of an expectation over a distribution that the parameters shape: score function and pathwise.

    parameters = {"mean": torch.zeros(2), "log_sigma": torch.zeros(2)}
    make = lambda p: Independent(Normal(p["mean"], p["log_sigma"].exp()), 1)
    x = draw_samples(make(parameters), 1000, seed=0)
    estimate = score_function_gradient(make, lambda x, p: -x.square().sum(-1).floor(), parameters, x)

The policy gradient is the case in which x is a trajectory; here x is anything that torch.distributions can draw and f
may be a black box. Nothing in the estimators draws: samples come from outside, so that an estimate can be repeated, and
its expectation found by going through all samples. This file knows nothing of policies and environments.

Source: Sun, Policy Gradient, "Warm up: computing gradient using importance weighting"; Log-derivative page, score
function estimator.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.distributions import (
    Beta,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Independent,
    MultivariateNormal,
    Normal,
    Poisson,
    TransformedDistribution,
    constraints,
)
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    IndependentTransform,
    SigmoidTransform,
    Transform,
)

from pgengine.errors import ShapeMismatch, SpecError

__all__ = [
    "GradientEstimate",
    "draw_samples",
    "pathwise_gradient",
    "score_function_gradient",
    "score_function_surrogate",
    "weight_second_moment",
]

BLOCK = 32  # rows that are differentiated together: of 16 to 256 the quickest at 8,192 samples of a 20-d Gaussian

Parameters = Mapping[str, Tensor]
MakeDistribution = Callable[[Parameters], Distribution]
Objective = Callable[[Tensor, Parameters], Tensor]
Baseline = Literal["none", "leave_one_out"] | float


@dataclass(frozen=True)
class GradientEstimate:
    """An estimate of grad E[f] from n independent samples, and how sure it is.

    Attributes:
        value: Mean of w f, the estimate of E[f] itself.
        value_error: Standard error of the value.
        gradient: The mean contribution to each parameter, in its shape; the direction of ascent.
        standard_error: Deviation of the contributions (ddof 1) over sqrt(n); NaN with one sample. With the
            leave-one-out baseline contributions share samples, and the figure holds up to a factor 1 + O(1/n).
        effective_sample_size: (sum w)^2 / sum w^2, in samples; n without importance weights.
    """

    value: float
    value_error: float
    gradient: dict[str, Tensor]
    standard_error: dict[str, Tensor]
    effective_sample_size: float


def draw_samples(
    distribution: Distribution, n: int, *, seed: int, device: torch.device | str = "cpu"
) -> Shaped[Tensor, "n *event"]:
    """Draws n independent samples, without gradient; the same seed gives the same samples.

    torch.distributions draw from torch's global generator. Its state is put back afterwards, but threads that draw at
    the same time disturb each other.

    Args:
        distribution: What to draw from.
        n: How many samples.
        seed: Makes the draws repeatable.
        device: Where the distribution's tensors are: whose generator is seeded.
    """
    with _seeded(seed, torch.device(device)):
        return distribution.sample(torch.Size([n]))


def score_function_gradient(
    distribution: MakeDistribution,
    f: Objective,
    parameters: Parameters,
    samples: Shaped[Tensor, "n *event"],
    *,
    sampling: Distribution | None = None,
    baseline: Baseline = "leave_one_out",
) -> GradientEstimate:
    """Estimates the gradient of E_{x ~ P_theta}[f(x; theta)] from samples of P_theta or of another distribution rho.

        g = 1/n sum_i w_i [(f_i - b_i) grad log P_theta(x_i) + grad f(x_i; theta)],   w_i = P_theta(x_i) / rho(x_i)

    f may be a black box: where its values carry no gradient, the second term is zero. Where f depends on theta, as the
    ELBO does, leaving the term out is right only if its expectation is zero. Expected value: the gradient, exactly, for
    every baseline offered, as long as derivative and integral can change places: the support of P_theta must not move
    with theta, and rho must be positive wherever P_theta is.

    Args:
        distribution: Makes P_theta from the parameters, without batch dimensions (wrap components in `Independent`).
            It must reach the parameters through its argument; use torch.func.functional_call for a module.
        f: Values [B] of samples [B, *event], each row from its own sample alone.
        parameters: theta by name, floating point; neither changed nor given gradients.
        samples: Independent draws x_1 … x_n, from `sampling` if that is given, else from P at these parameters.
        sampling: rho; its parameters are constants. None: the samples come from P_theta, all weights are 1.
        baseline: What is subtracted from f: nothing, a number of the unit of f that does not depend on these samples,
            or the mean of w f over the other samples.

    Returns:
        The estimate, with a standard error for every number of it.

    Raises:
        SpecError: `baseline_needs_samples` (leave_one_out with one sample), `support_moves`, `unbounded_weights` (the
            variance of the weights is infinite, or rho misses what P_theta gives; known for the pairs of
            `weight_second_moment`, others are not refused: look at the effective sample size).
        ShapeMismatch: if the distribution has batch dimensions, there are no samples, or f does not give one number for
            each.
        ValueError: from torch, if a sample lies outside the support of P_theta.

    Source: Sun, Policy Gradient, grad J = E_rho[grad P_theta / rho f] and rho = P_theta0; Log-derivative page, table of
    applications; leave-one-out: Kool, van Hoof and Welling, Buy 4 REINFORCE samples, get a baseline for free (2019).
    """
    leaves = _leaves(parameters)
    rows = _rows(distribution, f, leaves, samples, sampling, baseline)
    return _estimate(rows, leaves)


def score_function_surrogate(
    distribution: MakeDistribution,
    f: Objective,
    parameters: Parameters,
    samples: Shaped[Tensor, "n *event"],
    *,
    sampling: Distribution | None = None,
    baseline: Baseline = "leave_one_out",
) -> Float[Tensor, ""]:
    """A number whose gradient is the estimate of `score_function_gradient`; its own value means nothing.

    For loops of one's own: minimise its negative with a torch optimizer to make f large.

    Args:
        distribution: As in `score_function_gradient`.
        f: As in `score_function_gradient`.
        parameters: theta by name, tensors that take gradients.
        samples: As in `score_function_gradient`.
        sampling: As in `score_function_gradient`.
        baseline: As in `score_function_gradient`.

    Raises:
        SpecError: As in `score_function_gradient`.
        ShapeMismatch: As in `score_function_gradient`.

    Source: Sun, Policy Gradient, grad J(theta_0) = E[grad ln P_theta0(x) f(x)].
    """
    rows = _rows(distribution, f, parameters, samples, sampling, baseline)
    return torch.stack([block.sum() for block in rows.blocks]).sum() / len(samples)


def pathwise_gradient(
    distribution: MakeDistribution, f: Objective, parameters: Parameters, *, n: int, seed: int
) -> GradientEstimate:
    """Estimates the same gradient by differentiating f through the samples, where both allow it.

        g = 1/n sum_i grad f(x(theta, e_i); theta)

    Usually of far lower variance than the score function, and wrong without a sign of it where f jumps: a step function
    has derivative zero almost everywhere, its expectation does not.

    Args:
        distribution: Makes P_theta; its samples must be differentiable functions of noise (`has_rsample`).
        f: Values [B] of samples [B, *event], continuous in the samples and differentiable almost everywhere.
        parameters: theta by name, floating point; neither changed nor given gradients.
        n: How many samples.
        seed: Makes the draws repeatable.

    Raises:
        SpecError: `no_pathwise` if the distribution's samples do not carry gradients.
        ShapeMismatch: As in `score_function_gradient`.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2013), the reparameterised estimator.
    """
    leaves = _leaves(parameters)
    made = distribution(leaves)
    _check_no_batch(made)
    if not made.has_rsample:
        raise SpecError(
            "/distribution",
            "no_pathwise",
            "its samples carry no gradient; use score_function_gradient, which needs none",
        )
    blocks, values = [], []
    with _seeded(seed, next(iter(leaves.values())).device):
        for start in range(0, n, BLOCK):
            x = made.rsample(torch.Size([min(BLOCK, n - start)]))
            blocks.append(_values(f, x, leaves))
            values.append(blocks[-1].detach().double())
    if not blocks:
        raise ShapeMismatch("expected at least one sample")
    f_all = torch.cat(values)
    return _estimate(_Rows(blocks, f_all, torch.ones_like(f_all)), leaves)


def weight_second_moment(distribution: Distribution, sampling: Distribution) -> float | None:
    """E_rho[(P/rho)^2]: how much the weights P/rho scatter; infinity where no number of samples makes up for it.

    1 for equal distributions; n samples of rho are worth about n over this number. A bounded ratio is sufficient for
    a finite value but not necessary: of two Gaussians only a wider rho bounds the ratio, but the value is finite as
    long as var(P) < 2 var(rho).

    Args:
        distribution: P.
        sampling: rho.

    Returns:
        The moment, for pairs of Normal, MultivariateNormal, Exponential, Gamma, Beta, Dirichlet, Poisson, whatever can
        list its support, and `Independent` ones of these; None for other pairs, of which nothing is known.

    Raises:
        ShapeMismatch: if a distribution has batch dimensions.

    Source: Sun, Policy Gradient, the condition max P_theta(x) / rho(x) < infinity.
    """
    _check_no_batch(distribution)
    _check_no_batch(sampling)
    with torch.no_grad():
        log_moment = _log_second_moment(distribution, sampling)
        return None if log_moment is None else float(log_moment.double().exp())


# --- rows: one differentiable number for each sample ------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Numbers whose gradients are the samples' contributions, in blocks, and what they were made from."""

    blocks: list[Tensor]
    f: Tensor
    weights: Tensor


def _rows(
    distribution: MakeDistribution,
    f: Objective,
    parameters: Parameters,
    samples: Tensor,
    sampling: Distribution | None,
    baseline: Baseline,
) -> _Rows:
    made = distribution(parameters)
    _check_no_batch(made)
    if len(samples) == 0:
        raise ShapeMismatch("expected at least one sample")
    if isinstance(baseline, str) and baseline not in ("none", "leave_one_out"):
        raise SpecError("/baseline", "literal_error", "expected none, leave_one_out or a number")
    if baseline == "leave_one_out" and len(samples) < 2:
        raise SpecError(
            "/baseline", "baseline_needs_samples", "leave_one_out needs two samples; use none or a number with one"
        )
    if _support_moves(_support_of(made)) or _transform_moves(made, list(parameters.values())):
        raise SpecError(
            "/distribution",
            "support_moves",
            "what it can draw depends on the parameters, and the score function leaves that out; "
            "draw from a fixed distribution and put the parameters into f",
        )
    if sampling is not None and weight_second_moment(made, sampling) == torch.inf:
        raise SpecError(
            "/sampling",
            "unbounded_weights",
            "the weights have infinite variance or outcomes are missed; choose a wider distribution to sample from",
        )
    x = samples.detach()
    values, log_probs, log_ratios = [], [], []
    for block in torch.split(x, BLOCK):
        log_prob = made.log_prob(block)
        values.append(_values(f, block, parameters))
        log_probs.append(log_prob)
        before = log_prob.detach() if sampling is None else sampling.log_prob(block).detach()
        log_ratios.append(log_prob.detach().double() - before.double())
    weights = torch.cat(log_ratios).exp()
    f_all = torch.cat([block.detach().double() for block in values])
    centred = weights * (f_all - _subtracted(baseline, weights * f_all))
    blocks = [
        # in the dtype of the log-probabilities: the sums are float64 again
        coefficient.to(log_prob.dtype) * log_prob + weight.to(value.dtype) * (value - value.detach())
        for coefficient, log_prob, weight, value in zip(
            torch.split(centred, BLOCK), log_probs, torch.split(weights, BLOCK), values, strict=True
        )
    ]
    return _Rows(blocks, f_all, weights)


def _values(f: Objective, x: Tensor, parameters: Parameters) -> Tensor:
    value = f(x, parameters)
    if value.shape != (len(x),):
        raise ShapeMismatch(f"f must give one number for each of {len(x)} samples, not shape {list(value.shape)}")
    return value if value.is_floating_point() else value.double()


def _subtracted(baseline: Baseline, credits: Tensor) -> Tensor:
    if baseline == "leave_one_out":
        return (credits.sum() - credits) / (len(credits) - 1)
    return torch.full_like(credits, 0.0 if baseline == "none" else float(baseline))


def _check_no_batch(distribution: Distribution) -> None:
    if distribution.batch_shape:
        raise ShapeMismatch(
            f"the distribution has batch dimensions {list(distribution.batch_shape)}; "
            "wrap it in torch.distributions.Independent"
        )


def _support_of(distribution: Distribution) -> Any:
    try:
        return distribution.support
    except NotImplementedError:  # a distribution of one's own need not say
        return None


def _support_moves(support: Any) -> bool:
    """Whether a bound of the support is differentiable in the parameters, as that of Uniform(0, theta) is."""
    bounds = vars(support).values() if support is not None else ()
    return any(
        value.requires_grad
        if isinstance(value, Tensor)
        else _support_moves(value)
        if isinstance(value, constraints.Constraint)
        else False
        for value in bounds
    )


def _transform_moves(distribution: Distribution, parameters: list[Tensor]) -> bool:
    """Whether a transformation moves a bound of what it transforms, as loc + scale * Uniform(0, 1) does.

    Classes with a name of their own, such as Gumbel and Weibull, say what they can draw.
    """
    if isinstance(distribution, Independent):
        return _transform_moves(distribution.base_dist, parameters)
    if type(distribution) is not TransformedDistribution:
        return False
    base = distribution.base_dist
    if _transform_moves(base, parameters):
        return True
    bounds = _bounds(_support_of(base))
    for transform in _flattened(distribution.transforms):
        each_number = isinstance(transform, AffineTransform) or isinstance(transform.inv, AffineTransform)
        if bounds and transform.domain.event_dim and not each_number:
            # not number by number: no bound can be followed, but constants move none
            return any(bound.requires_grad for bound in bounds) or _has_gradient(transform)
        bounds = [image for bound in bounds for image in _image(transform, bound)]
    return any(_depends(bound, parameters) for bound in bounds)


def _bounds(support: Any) -> list[Tensor]:
    """Finite bounds of the numbers that a support holds."""
    while hasattr(support, "base_constraint"):  # of Independent
        support = support.base_constraint
    if support is constraints.boolean or isinstance(support, type(constraints.simplex)):
        return [torch.tensor(0.0), torch.tensor(1.0)]
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    return [
        torch.as_tensor(end, dtype=None if isinstance(end, Tensor) else torch.float64)
        for end in ends
        if end is not None
    ]


def _flattened(transforms: list[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flattened(transform.parts)
        elif isinstance(transform, IndependentTransform):
            yield from _flattened([transform.base_transform])
        else:
            yield transform


def _image(transform: Transform, bound: Tensor) -> list[Tensor]:
    """Where a bound comes to lie; nothing if that is infinitely far away, where it can no longer move."""
    inverse = transform.inv
    if isinstance(inverse, SigmoidTransform) and bool(((bound == 0.0) | (bound == 1.0)).all()):
        return []  # torch stops just before
    try:
        image: Tensor = transform(bound)
    except (RuntimeError, ValueError):
        return [bound]
    return [image] if bool(torch.isfinite(image).any()) else []


def _has_gradient(transform: Transform) -> bool:
    values = [*vars(transform).values(), *vars(transform.inv).values()]
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _depends(bound: Tensor, parameters: list[Tensor]) -> bool:
    """Whether the bound changes with a parameter: 0 * scale does not."""
    if not bound.requires_grad:
        return False
    leaves = [parameter for parameter in parameters if parameter.requires_grad]
    for number in bound[torch.isfinite(bound)].reshape(-1):
        slopes = torch.autograd.grad(number, leaves, retain_graph=True, allow_unused=True)
        if any(slope is not None and bool((slope != 0.0).any()) for slope in slopes):
            return True
    return False


# --- from rows to gradients -------------------------------------------------------------------------------------------


def _leaves(parameters: Parameters) -> dict[str, Tensor]:
    if not parameters:
        raise ShapeMismatch("expected at least one parameter")
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def _estimate(rows: _Rows, leaves: dict[str, Tensor]) -> GradientEstimate:
    parts = [_jacobian(block, leaves) for block in rows.blocks]
    gradient, error = {}, {}
    for name, leaf in leaves.items():
        contributions = torch.cat([part[name] for part in parts])
        mean, standard_error = _mean_and_error(contributions)
        gradient[name], error[name] = mean.to(leaf.dtype), standard_error.to(leaf.dtype)
    value, value_error = _mean_and_error(rows.weights * rows.f)
    size = rows.weights.sum() ** 2 / rows.weights.square().sum()
    return GradientEstimate(float(value), float(value_error), gradient, error, float(size))


def _jacobian(block: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient [c, *shape] of each row, in float64."""
    c = len(block)
    if not block.requires_grad:
        return {name: leaf.new_zeros((c, *leaf.shape), dtype=torch.float64) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        block,
        list(leaves.values()),
        torch.eye(c, dtype=block.dtype, device=block.device),
        is_grads_batched=True,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return {name: gradient.double() for name, gradient in zip(leaves, found, strict=True)}


def _mean_and_error(contributions: Tensor) -> tuple[Tensor, Tensor]:
    n = len(contributions)
    if n == 1:
        return contributions[0], torch.full_like(contributions[0], torch.nan)
    return contributions.mean(dim=0), contributions.std(dim=0) / n**0.5


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


# --- how much weights scatter -----------------------------------------------------------------------------------------


def _log_second_moment(p: Distribution, q: Distribution) -> Tensor | None:
    """Logarithm of E_q[(p/q)^2] for each batch entry; infinity where it does not exist, None where it is not known."""
    if isinstance(p, Independent) and isinstance(q, Independent):
        k = p.reinterpreted_batch_ndims
        inner = _log_second_moment(p.base_dist, q.base_dist) if k == q.reinterpreted_batch_ndims else None
        return inner if inner is None or k == 0 else inner.flatten(inner.dim() - k).sum(-1)
    if type(p) is not type(q) or p.event_shape != q.event_shape:
        return None
    formula = _SECOND_MOMENTS.get(type(p))
    if formula is not None:
        return formula(p, q)
    return _listed(p, q) if p.has_enumerate_support else None


def _listed(p: Distribution, q: Distribution) -> Tensor | None:
    support, other = p.enumerate_support(), q.enumerate_support()
    if support.shape != other.shape or not torch.equal(support, other):
        return None
    log_p, log_q = p.log_prob(support), q.log_prob(support)
    # torch holds log-probabilities of what cannot happen at that of the machine's precision
    possible = log_p.exp() > 2 * torch.finfo(log_p.dtype).eps
    missed = (possible & (log_q.exp() <= 2 * torch.finfo(log_q.dtype).eps)).any(dim=0)
    terms = torch.where(possible, 2 * log_p - log_q, -torch.inf)
    return torch.where(missed, torch.inf, torch.logsumexp(terms, dim=0))


def _normal(p: Normal, q: Normal) -> Tensor:
    spread = 2 * q.variance - p.variance
    safe = torch.where(spread > 0, spread, 1.0)
    log_moment = q.variance.log() - p.scale.log() - 0.5 * safe.log() + (p.loc - q.loc).square() / safe
    return torch.where(spread > 0, log_moment, torch.inf)


def _multivariate_normal(p: MultivariateNormal, q: MultivariateNormal) -> Tensor:
    spread = 2 * q.covariance_matrix - p.covariance_matrix
    factor, failed = torch.linalg.cholesky_ex(spread)
    safe = torch.where((failed == 0)[..., None, None], factor, torch.eye(factor.shape[-1]).to(factor))
    difference = (p.loc - q.loc)[..., None]
    distance = torch.linalg.solve_triangular(safe, difference, upper=False).square().sum((-2, -1))
    log_moment = 2 * _half_log_det(q.scale_tril) - _half_log_det(p.scale_tril) - _half_log_det(safe) + distance
    return torch.where(failed == 0, log_moment, torch.inf)


def _half_log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _exponential(p: Exponential, q: Exponential) -> Tensor:
    rate = 2 * p.rate - q.rate
    safe = torch.where(rate > 0, rate, 1.0)
    return torch.where(rate > 0, 2 * p.rate.log() - q.rate.log() - safe.log(), torch.inf)


def _gamma(p: Gamma, q: Gamma) -> Tensor:
    shape, rate = 2 * p.concentration - q.concentration, 2 * p.rate - q.rate
    finite = (shape > 0) & (rate > 0)
    safe = _gamma_norm(torch.where(finite, shape, 1.0), torch.where(finite, rate, 1.0))
    both = 2 * _gamma_norm(p.concentration, p.rate) - _gamma_norm(q.concentration, q.rate)
    return torch.where(finite, both - safe, torch.inf)


def _gamma_norm(concentration: Tensor, rate: Tensor) -> Tensor:
    return concentration * rate.log() - concentration.lgamma()


def _dirichlet(p: Dirichlet, q: Dirichlet) -> Tensor:
    return _concentrations(p.concentration, q.concentration)


def _beta(p: Beta, q: Beta) -> Tensor:
    stacked = [torch.stack([d.concentration1, d.concentration0], dim=-1) for d in (p, q)]
    return _concentrations(*stacked)


def _concentrations(p: Tensor, q: Tensor) -> Tensor:
    c = 2 * p - q
    finite = (c > 0).all(-1)
    safe = _dirichlet_norm(torch.where(finite[..., None], c, 1.0))
    return torch.where(finite, 2 * _dirichlet_norm(p) - _dirichlet_norm(q) - safe, torch.inf)


def _dirichlet_norm(concentration: Tensor) -> Tensor:
    return concentration.sum(-1).lgamma() - concentration.lgamma().sum(-1)


def _poisson(p: Poisson, q: Poisson) -> Tensor:
    return p.rate.square() / q.rate - 2 * p.rate + q.rate


_SECOND_MOMENTS: dict[type[Distribution], Callable[[Any, Any], Tensor]] = {
    Normal: _normal,
    MultivariateNormal: _multivariate_normal,
    Exponential: _exponential,
    Gamma: _gamma,
    Dirichlet: _dirichlet,
    Beta: _beta,
    Poisson: _poisson,
}
