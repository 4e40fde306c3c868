"""The estimate of the gradient that a batch gives: one path for training, for checks and for explanations.

    Batch ─► rows (predicted baseline, entropies, ratios) ─► weights ─► sum of weight * grad log pi (+ weight * grad H)

An `Estimator` holds what an algorithm remembers between batches; `weigh` looks, `fit` learns. Weights are float64 data;
gradients are taken in the precision of the tensors that are handed in.

Source: Sun, Policy Gradient Algorithm, form the stochastic gradient; Lin, update after a sequence of N trajectories.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from pgengine.baselines import Baseline, ValueBaseline, open_baseline
from pgengine.environments import EnvironmentFacts
from pgengine.estimators import BatchRows, StepWeights, step_weights
from pgengine.policies import Policy
from pgengine.rollout import Batch
from pgengine.spec import AlgorithmSpec, NoBaselineSpec

__all__ = ["Estimator", "Weighed", "gradient", "gradients", "tensors_of"]

ROWS_AT_ONCE = 8192  # activations of so many rows stay in cache
BYTES_AT_ONCE = 2**28  # of activations, which are kept until the gradient is taken: large networks take fewer rows


@dataclass(frozen=True)
class Weighed:
    """A batch with the weights of its steps.

    Attributes:
        rows: What the weights were computed from.
        weights: The weights.
    """

    rows: BatchRows
    weights: StepWeights


class Estimator:
    """Turns batches into weights of scores, as an algorithm says."""

    def __init__(self, algorithm: AlgorithmSpec, facts: EnvironmentFacts, *, seed: int) -> None:
        """Begins without any memory.

        Args:
            algorithm: Resolved.
            facts: Of the environment.
            seed: First parameters of a neural value are drawn from it.
        """
        self.algorithm = algorithm
        self._baseline: Baseline | None = open_baseline(algorithm, facts, seed)
        self._without_baseline = algorithm.model_copy(update={"baseline": NoBaselineSpec()})

    def weigh(self, policy: Policy, batch: Batch) -> Weighed:
        """The weights of a batch at the policy's present parameters. Changes nothing.

        Args:
            policy: At whose parameters the gradient is wanted; not necessarily the one that acted.
            batch: Complete trajectories with the log-probabilities of those who acted.
        """
        rows = self._rows(policy, batch)
        return Weighed(rows, step_weights(rows, self.algorithm))

    def _rows(self, policy: Policy, batch: Batch) -> BatchRows:
        wants_ratios = self.algorithm.importance.kind != "none"
        entropies = log_ratios = None
        if wants_ratios or self.algorithm.entropy is not None:
            outputs = policy.outputs_along(batch.observations, batch.offsets)
            if wants_ratios:
                # the same code as in the rollout: where nothing has moved, the ratio is 1 to the bit
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                    now = policy.distribution.log_prob(policy.parameters, outputs, batch.samples)
                log_ratios = now.astype(np.float64) - batch.log_probs.astype(np.float64)
            if self.algorithm.entropy is not None:
                entropies = policy.distribution.entropy(policy.parameters, outputs).astype(np.float64)
        rows = BatchRows(self._rewards(batch), batch.offsets, None, entropies, log_ratios)
        if self._baseline is None:
            return rows
        predicted = self._baseline.predict(batch, step_weights(rows, self._without_baseline).credit)
        return BatchRows(rows.rewards, rows.offsets, predicted, entropies, log_ratios)

    def _rewards(self, batch: Batch) -> np.ndarray:
        """The rewards; with a bootstrap, the last one of a cut episode and what its last observation promises."""
        if self.algorithm.horizon == "episode" or not batch.truncated.any():
            return batch.rewards
        assert isinstance(self._baseline, ValueBaseline), "resolve has refused others"
        rewards = batch.rewards.copy()
        # where episodes end by the discount, only survivors are cut: they have paid for going on already
        promised = self.algorithm.credit_gamma * self._baseline.final_values(batch)
        rewards[batch.offsets[1:][batch.truncated] - 1] += promised[batch.truncated]
        return rewards

    def fit(self, batch: Batch, weighed: Weighed) -> None:
        """Lets the baseline learn from a batch whose gradient has been taken."""
        if self._baseline is not None:
            self._baseline.fit(batch, weighed.weights.credit)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it remembers."""
        return {} if self._baseline is None else self._baseline.arrays()

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Puts back what `arrays` gave."""
        if self._baseline is not None and arrays:
            self._baseline.restore(arrays)


def gradients(
    policy: Policy, tensors: dict[str, torch.Tensor], batch: Batch, weights: StepWeights, *, row: int | None = None
) -> tuple[list[torch.Tensor], float]:
    """The estimate, one tensor for each parameter in the order of their names, and the mean entropy of the batch.

    Rows are taken in chunks that stay in cache, fewer of large networks. The sum over a batch is one number: what is
    replayed is the whole update.

    Args:
        policy: Whose functions; its parameters are not looked at.
        tensors: Parameters as leaves that take gradients, in the precision wanted.
        batch: Trajectories.
        weights: Of their steps.
        row: The part of this one step alone.

    Source: Lin, sum of r(tau) * grad log pi over steps and trajectories; Bereyhi, chapter 5, estimate via Monte Carlo.
    """
    leaves = [tensors[name] for name in sorted(tensors)]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    first, last = (0, len(batch.rewards)) if row is None else (row, row + 1)
    entropy = 0.0
    size = leaves[0].element_size()
    at_once = min(ROWS_AT_ONCE, policy.rows_at_once(BYTES_AT_ONCE // size))
    for start in range(first, last, at_once):
        rows = slice(start, min(start + at_once, last))
        seen = policy.windows(batch.observations, batch.offsets, np.arange(rows.start, rows.stop))
        surrogate, entropies = _surrogate(policy, tensors, seen, batch.samples[rows], weights, rows)
        parts = torch.autograd.grad(surrogate, leaves, allow_unused=True)
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part
        entropy += float(entropies.detach().sum())
    return sums, entropy / (last - first)


def _surrogate(
    policy: Policy,
    tensors: dict[str, torch.Tensor],
    seen: np.ndarray,
    samples: np.ndarray,
    weights: StepWeights,
    rows: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A number whose gradient is the part of these rows in the estimate; and their entropies."""
    like = next(iter(tensors.values()))
    outputs = policy.network.outputs(tensors, _tensor(policy.encode(seen), like))
    log_prob = policy.distribution.log_prob(tensors, outputs, _tensor(samples, like))
    surrogate = (_tensor(weights.score[rows], like) * log_prob).sum()
    if weights.entropy is None:
        with torch.no_grad():
            return surrogate, policy.distribution.entropy(tensors, outputs)
    entropies = policy.distribution.entropy(tensors, outputs)
    return surrogate + (_tensor(weights.entropy[rows], like) * entropies).sum(), entropies


def gradient(
    policy: Policy, batch: Batch, weights: StepWeights, *, dtype: torch.dtype = torch.float64
) -> Float[np.ndarray, "P"]:
    """The estimate as one flat vector, in the order of the parameters' names, float64."""
    sums, _ = gradients(policy, tensors_of(policy, dtype), batch, weights)
    flat: np.ndarray = torch.cat([total.reshape(-1) for total in sums]).double().numpy()
    return flat


def tensors_of(policy: Policy, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Copies of a policy's parameters as leaves that take gradients."""
    return {
        name: torch.tensor(policy.parameters[name], dtype=dtype, requires_grad=True)
        for name in sorted(policy.parameters)
    }


def _tensor(rows: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(rows)).to(like.device)
    return tensor.to(like.dtype) if tensor.is_floating_point() else tensor
