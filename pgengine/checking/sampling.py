"""Mode `sample`: batches that the real rollout plays and the real estimator weighs, in one pass.

Estimators that ask for the same number of trajectories from the same actor share their batches, so they differ by
what they are and not by luck. Baselines with a memory learn from `WARM_UP` batches and are then held: given what they
remember, the batches that are tested are independent and alike.

Many batches are played in one rollout. Where the policy is a table, an estimate is a product of the weights, summed
for each pair of observation and action, with the scores of all pairs, which are computed once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from pgengine.checking.moments import Moments
from pgengine.checking.subject import Candidate, Subject
from pgengine.checking.tails import Tails, tails_of
from pgengine.contributions import CELLS, Rows, contributions, moving_sums
from pgengine.environments import EpisodeEnvironment
from pgengine.environments.tabular import TabularMDP
from pgengine.estimation import Estimator
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.rollout import Batch, rollout
from pgengine.spec import AlgorithmSpec, GradientCheckSpec

__all__ = ["WARM_UP", "Sampled", "Scores", "estimates", "play", "sample", "warmed_up"]

WARM_UP = 20
"""Batches from which baselines with a memory learn before anything is tested."""
ENV_STEPS_AT_ONCE = 65_536  # about so many are played in one rollout
SPARSE = 0.1  # share of numbers that are not zero, below which only they are kept
DENSE = 20_000_000  # numbers in the scores of all pairs, above which they are computed row by row


@dataclass(frozen=True)
class Sampled:
    """Moments of one estimator's estimates.

    Attributes:
        estimates: Of the estimate itself. The others are gathered where the label's factor is not known.
        along: Of its multiple of the gradient, a single number.
        across: Of what is left of it when that part is taken away.
        tails: What the model says that the samples may not, on finite MDPs.
    """

    estimates: Moments
    along: Moments
    across: Moments
    tails: Tails | None


def sample(subject: Subject, spec: GradientCheckSpec) -> Iterator[tuple[float, list[Sampled]]]:
    """Plays the batches; yields the share of the work done and what has been gathered so far."""
    P = subject.policy.size
    scores = Scores(subject)
    gathered = [
        Sampled(Moments(P), Moments(1), Moments(P), tails_of(subject, candidate, *scores.of_pairs()))
        for candidate in subject.candidates
    ]
    groups = _groups(subject)
    done, total = 0, spec.batches * len(groups)
    for members in groups:
        # the same address for all groups: their actors meet the same luck
        for estimates_of_members in _batches(subject, spec, [subject.candidates[i] for i in members], scores):
            for index, found in zip(members, estimates_of_members, strict=True):
                _gather(gathered[index], found, subject.candidates[index])
            done += len(estimates_of_members[0])
            yield done / total, gathered


def _groups(subject: Subject) -> list[list[int]]:
    """Estimators that can learn from the same batches."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, candidate in enumerate(subject.candidates):
        algorithm = candidate.algorithm
        named = algorithm.importance.behaviour
        who = named.model_dump_json() if named.kind in ("mixture", "policy") else "current"
        groups.setdefault((algorithm.trajectories, algorithm.survival, who), []).append(index)
    return list(groups.values())


@np.errstate(over="ignore", invalid="ignore")  # whoever reports finds what is not finite
def _gather(sampled: Sampled, found: np.ndarray, candidate: Candidate) -> None:
    sampled.estimates.add(found)
    if candidate.label.kind == "scaled_unknown":
        square = float(candidate.gradient @ candidate.gradient)
        along = found @ candidate.gradient / (square or 1.0)
        sampled.along.add(along[:, None])
        sampled.across.add(found - np.outer(along, candidate.gradient))


def _batches(
    subject: Subject, spec: GradientCheckSpec, candidates: list[Candidate], scores: "Scores"
) -> Iterator[list[np.ndarray]]:
    algorithm = candidates[0].algorithm
    K, actor = algorithm.trajectories, subject.actor(algorithm)
    first = play(subject.environment, actor, spec.seed, 0, WARM_UP * K, algorithm.survival)
    estimators = [warmed_up(candidate.algorithm, subject, spec.seed, warm_up=first) for candidate in candidates]
    at_once = max(1, min(scores.at_once, int(ENV_STEPS_AT_ONCE / (K * first.lengths.mean()))))
    for number, start in enumerate(range(0, spec.batches, at_once), start=1):
        count = min(at_once, spec.batches - start)
        batch = play(subject.environment, actor, spec.seed, number, count * K, algorithm.survival)
        yield [estimates(estimator, subject.policy, batch, scores) for estimator in estimators]


def play(
    environment: EpisodeEnvironment, actor: Policy, seed: int, number: int, episodes: int, survival: float
) -> Batch:
    """Episodes at an address of the check's own."""
    return rollout(actor, environment, Noise(seed, "checking", number), episodes, survival=survival)


def warmed_up(algorithm: AlgorithmSpec, subject: Subject, seed: int, *, warm_up: Batch) -> Estimator:
    """An estimator whose memory is that of the warm-up batches."""
    estimator = Estimator(algorithm, subject.environment.facts, seed=seed)
    if estimator.arrays():
        for batch in _parts(warm_up, algorithm.trajectories):
            estimator.fit(batch, estimator.weigh(subject.policy, batch))
    return estimator


def _parts(batch: Batch, K: int) -> Iterator[Batch]:
    for first in range(0, len(batch.lengths), K):
        yield batch.episodes(first, first + K)


@np.errstate(over="ignore", invalid="ignore")  # whoever reports finds what is not finite
def estimates(estimator: Estimator, policy: Policy, batch: Batch, scores: "Scores") -> Float[np.ndarray, "n P"]:
    """The estimate that each K of the trajectories give.

    Args:
        estimator: Whose K decides where one batch ends and the next begins.
        policy: At whose parameters.
        batch: A multiple of K trajectories.
        scores: Of the policy.
    """
    algorithm = estimator.algorithm
    weighed = [estimator.weigh(policy, part).weights for part in _parts(batch, algorithm.trajectories)]
    score = np.concatenate([weights.score for weights in weighed])
    parts = [weights.entropy for weights in weighed if weights.entropy is not None]
    entropy = np.concatenate(parts) if parts else None
    if algorithm.within_episode == "moving":
        return moving_sums(Rows(policy, batch), score, entropy, rate=algorithm.optimizer.learning_rate)
    return scores.sums(batch, score, entropy, batch.offsets[:: algorithm.trajectories])


class Scores:
    """Sums of weighted scores over the rows of each batch."""

    def __init__(self, subject: Subject) -> None:
        """Computes the scores of all pairs of observation and action, if there are finitely many and not too many."""
        self._policy = subject.policy
        self._table: torch.Tensor | None = None
        widest = P = self._policy.size
        if isinstance(subject.environment, TabularMDP):
            O, A = int(subject.environment.observations.max()) + 1, subject.environment.transitions.shape[1]  # noqa: E741
            self._shape = O, A
            if (O * A + O) * P <= DENSE:
                self._table = _all_scores(self._policy, O, A)
                widest = max(P, O * A + O)
        self.at_once = max(1, CELLS // max(widest, 1))  # batches whose sums are held at a time

    def of_pairs(self) -> tuple[Float[np.ndarray, "O A P"], Float[np.ndarray, "O P"]] | tuple[None, None]:
        """Grad log pi of each observation and action, and grad H of each observation; None where they are not kept."""
        if self._table is None:
            return None, None
        table = self._table.to_dense().T.numpy()
        O, A = self._shape  # noqa: E741
        return table[: O * A].reshape(O, A, -1), table[O * A :]

    def sums(
        self, batch: Batch, score: np.ndarray, entropy: np.ndarray | None, starts: np.ndarray
    ) -> Float[np.ndarray, "n P"]:
        """The sum over the rows from each start to the next of weight * grad log pi (+ weight * grad H)."""
        if self._table is not None:
            return self._by_table(batch, score, entropy, starts)
        n = len(starts) - 1
        owner = np.repeat(np.arange(n), np.diff(starts))
        sums = np.zeros((n, self._policy.size))
        for part in contributions(Rows(self._policy, batch), score, entropy):
            np.add.at(sums, owner[part.rows], part.weighted)
        return sums

    def _by_table(self, batch: Batch, score: np.ndarray, entropy: np.ndarray | None, starts: np.ndarray) -> np.ndarray:
        assert self._table is not None
        O, A = self._shape  # noqa: E741
        n, width = len(starts) - 1, O * A + O
        first = width * np.repeat(np.arange(n), np.diff(starts))
        weights = np.bincount(first + batch.observations * A + batch.samples, score, n * width)
        if entropy is not None:
            weights += np.bincount(first + O * A + batch.observations, entropy, n * width)
        sums: np.ndarray = (self._table @ torch.from_numpy(weights.reshape(n, width).T)).T.numpy()
        return sums


def _all_scores(policy: Policy, O: int, A: int) -> torch.Tensor:  # noqa: E741
    """Grad log pi(a|o) of all pairs, then grad H of all observations, as columns [P, O * A + O]."""
    observations, actions = np.divmod(np.arange(O * A), A)
    ends = np.ones(O * A, dtype=bool)
    pairs = Batch(
        observations=observations,
        samples=actions,
        actions=actions,
        log_probs=np.zeros(O * A),
        rewards=np.zeros(O * A),
        offsets=np.arange(O * A + 1),
        terminated=ends,
        truncated=~ends,
        final_observations=observations,
    )
    ones = np.ones(O * A)
    parts = list(contributions(Rows(policy, pairs), ones, ones))
    scores = np.concatenate([part.scores for part in parts])
    entropies = np.concatenate([part.entropies for part in parts if part.entropies is not None])
    columns = torch.from_numpy(np.concatenate([scores, entropies[::A]]).T.copy())
    # with one number for each pair nearly all scores are zero
    sparse = int(torch.count_nonzero(columns)) < SPARSE * columns.numel()
    return columns.to_sparse() if sparse else columns
