"""What each step of a trajectory adds to the estimate, in float64: weight * grad log pi (+ weight * grad H).

The estimate is the sum over steps; here the summands are kept apart. This file knows rows and weights; it does not
know what becomes of the sums.

Source: Bereyhi, chapter 5, the update of PG_v1 at each step; Lin, sum of r(tau) * grad log pi over the steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from pgengine.estimation import tensors_of
from pgengine.policies import Policy
from pgengine.rollout import Batch

__all__ = ["CELLS", "Contributions", "Rows", "contributions", "moving_sums"]

CELLS = 4_000_000
"""Numbers of rows times parameters, or times activations, that are held at a time."""


class Rows:
    """The steps of a batch as a policy reads them, ready for gradients of single steps."""

    def __init__(self, policy: Policy, batch: Batch) -> None:
        """Keeps the batch; observations are encoded when they are asked for.

        Args:
            policy: Whose functions and parameters.
            batch: Complete trajectories.
        """
        self.policy = policy
        self.offsets = batch.offsets
        self._observations = batch.observations
        self._samples = batch.samples

    def __len__(self) -> int:
        return len(self._samples)

    def encoded(self, rows: np.ndarray | slice) -> torch.Tensor:
        """What the network reads."""
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        return _double(self.policy.encode(self.policy.windows(self._observations, self.offsets, rows)))

    @property
    def at_once(self) -> int:
        """How many steps are taken side by side: neither their gradients nor their activations shall be too many."""
        return max(1, min(CELLS // max(self.policy.size, 1), self.policy.rows_at_once(CELLS)))

    def samples(self, rows: np.ndarray | slice) -> torch.Tensor:
        """Raw draws."""
        return _double(self._samples[rows])

    def log_prob(
        self, parameters: dict[str, torch.Tensor], encoded: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Log pi(a|s) of a single step, as a function of the parameters."""
        outputs = self.policy.network.outputs(parameters, encoded[None])
        value: torch.Tensor = self.policy.distribution.log_prob(parameters, outputs, sample[None])[0]
        return value

    def entropy(self, parameters: dict[str, torch.Tensor], encoded: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """H(pi(.|s)) of a single step, which does not look at the sample."""
        outputs = self.policy.network.outputs(parameters, encoded[None])
        value: torch.Tensor = self.policy.distribution.entropy(parameters, outputs)[0]
        return value


@dataclass(frozen=True)
class Contributions:
    """The gradients of some steps, flat in the order of the parameters' names.

    Attributes:
        rows: Which steps of the batch.
        scores: [n, P] grad log pi of each.
        entropies: [n, P] grad H of each, where a weight was given for it.
        weighted: [n, P] what each adds to the estimate.
    """

    rows: slice
    scores: Float[np.ndarray, "n P"]
    entropies: Float[np.ndarray, "n P"] | None
    weighted: Float[np.ndarray, "n P"]


def contributions(
    rows: Rows,
    score: Float[np.ndarray, "B"],
    entropy: Float[np.ndarray, "B"] | None,
    *,
    moving: float | None = None,
) -> Iterator[Contributions]:
    """What each step adds to the estimate, some steps at a time.

    Args:
        rows: The steps.
        score: Weight of each step's score.
        entropy: Weight of the gradient of each step's entropy, or None.
        moving: Learning rate at which the parameters move by each contribution before the next one is taken, along a
            single trajectory. None: they stay.
    """
    theta = {name: tensor.detach() for name, tensor in tensors_of(rows.policy).items()}
    chunk = 1 if moving is not None else rows.at_once
    of_score, of_entropy = (
        torch.func.vmap(torch.func.grad(f), in_dims=(None, 0, 0)) for f in (rows.log_prob, rows.entropy)
    )
    for start in range(0, len(score), chunk):
        part = slice(start, min(start + chunk, len(score)))
        encoded, samples = rows.encoded(part), rows.samples(part)
        scores = _flat(of_score(theta, encoded, samples))
        weighted, entropies = score[part, None] * scores, None
        if entropy is not None:
            entropies = _flat(of_entropy(theta, encoded, samples))
            weighted = weighted + entropy[part, None] * entropies
        yield Contributions(part, scores, entropies, weighted)
        if moving is not None:
            theta = _moved(theta, moving * weighted[0])


def _moved(theta: dict[str, torch.Tensor], step: np.ndarray) -> dict[str, torch.Tensor]:
    moved, start = {}, 0
    for name in sorted(theta):
        size = theta[name].numel()
        moved[name] = theta[name] + torch.from_numpy(step[start : start + size]).reshape(theta[name].shape)
        start += size
    return moved


def moving_sums(
    rows: Rows, score: Float[np.ndarray, "B"], entropy: Float[np.ndarray, "B"] | None, *, rate: float
) -> Float[np.ndarray, "K P"]:
    """The step that each trajectory makes if the parameters move after each of its steps, over the learning rate.

        theta <- theta + rate * (weight_t * grad log pi_theta(a_t|s_t)),   step = (theta at the end - theta) / rate

    All trajectories begin at the policy's parameters; none sees the others.

    Args:
        rows: The steps of K trajectories.
        score: Weight of each step's score.
        entropy: Weight of the gradient of each step's entropy, or None.
        rate: Learning rate.

    Source: Bereyhi, chapter 5, the inner loops of PG_v1 and REINFORCE; Lin, an online iterative update approach.
    """
    # one trajectory after the other would be simpler and take a hundred times as long
    K, chunk = len(rows.offsets) - 1, rows.at_once
    sums = [
        _moving(rows, score, entropy, np.arange(first, min(first + chunk, K)), rate) for first in range(0, K, chunk)
    ]
    return np.concatenate(sums)


def _moving(rows: Rows, score: np.ndarray, entropy: np.ndarray | None, who: np.ndarray, rate: float) -> np.ndarray:
    first, lengths = rows.offsets[who], np.diff(rows.offsets)[who]
    theta = {
        name: tensor.detach().expand(len(who), *tensor.shape).clone()
        for name, tensor in tensors_of(rows.policy).items()
    }
    begin = {name: tensor.clone() for name, tensor in theta.items()}

    def weighted(
        parameters: dict[str, torch.Tensor], encoded: torch.Tensor, sample: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        value = weights[0] * rows.log_prob(parameters, encoded, sample)
        return value if entropy is None else value + weights[1] * rows.entropy(parameters, encoded, sample)

    each = torch.func.vmap(torch.func.grad(weighted))
    weights = torch.from_numpy(np.stack([score, np.zeros_like(score) if entropy is None else entropy], axis=1))
    for time in range(int(lengths.max())):
        live = np.flatnonzero(lengths > time)
        at, lanes = first[live] + time, torch.from_numpy(live)
        now = {name: tensor[lanes] for name, tensor in theta.items()}
        parts = each(now, rows.encoded(at), rows.samples(at), weights[torch.from_numpy(at)])
        for name, part in parts.items():
            theta[name][lanes] += rate * part
    return _flat({name: (tensor - begin[name]) / rate for name, tensor in theta.items()})


def _flat(parts: dict[str, torch.Tensor]) -> np.ndarray:
    """[n, P] in the order of the parameters' names."""
    joined: np.ndarray = torch.cat([parts[name].flatten(1) for name in sorted(parts)], dim=1).numpy()
    return joined


def _double(rows: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(rows))
    return tensor.double() if tensor.is_floating_point() else tensor
