"""Training: sample K complete trajectories, estimate the gradient, make a step; again.

    for update in pgengine.train(spec):
        update.metrics, update.policy, update.state()

A generator without callbacks, loggers or stop tokens: whoever iterates decides what to keep and when to stop. An
update is a pure function of (parameters, optimizer, baseline, normaliser, retained trajectories, seed, update number),
so a run that is stopped anywhere and resumed from a state ends with the bits of an uninterrupted one (same machine,
device and number of threads).

Acting is done in numpy, learning in torch; on the CPU both see the same memory.

Source: Sun, Policy Gradient Algorithm (sample K trajectories, form the stochastic gradient, ascend); Lin, update
after a sequence of N trajectories; Bereyhi, chapter 5, PG_v1 and REINFORCE (`within_episode: moving`).
"""

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import numpy as np
import torch

from pgengine.diagnostics import exact_figures, gradient_figures, return_figures, saturated_fraction
from pgengine.environments import EpisodeEnvironment, open_environment
from pgengine.errors import CheckpointError, DivergedError, SpecError
from pgengine.estimation import Estimator, Weighed, gradients
from pgengine.evaluation import SELECTION_ERROR, Evaluation, Selection, reaches, select
from pgengine.exactness import exact_budget
from pgengine.findings import Finding, Watch
from pgengine.noise import NOISE_VERSION, Noise
from pgengine.optimizers import (
    learning_rate,
    open_optimizer,
    optimizer_arrays,
    restore_optimizer,
    set_learning_rate,
)
from pgengine.policies import FORWARD_VERSION, Policy, check_behaviour, create_policy, rows_are_independent
from pgengine.resolution import resolve
from pgengine.rollout import Batch, rollout
from pgengine.spec import (
    AlgorithmSpec,
    GaussianSpec,
    MixtureBehaviourSpec,
    OlderBehaviourSpec,
    PolicyBehaviourSpec,
    TrainingSpec,
)
from pgengine.states import Progress, RunState, StoppedBy, spec_hash

__all__ = ["StepRecord", "Update", "runtime_fingerprint", "train"]

SELECTION_PAUSE = 5  # updates after a look at the policy that missed the target


@dataclass(frozen=True)
class StepRecord:
    """What the last step was made from.

    Attributes:
        batch: The trajectories.
        weighed: The weights of their steps.
        before: The policy before the step.
        learning_rate: Step size of the optimizer.
    """

    batch: Batch
    weighed: Weighed
    before: Policy
    learning_rate: float


@dataclass(frozen=True)
class Update:
    """One update of a run that is going on.

    Attributes:
        updates: Updates that the policy has had, earlier runs counted in.
        metrics: Figures of this update, documented in docs/engine/metrics.md.
        policy: Live: the next update changes it. `policy.copy()` or `policy.to_bytes()` keeps it.
        progress: How far the run has come.
        selection: What was seen of the policy after this update to decide whether the target is reached, or None. Not
            to be reported: `pgengine.evaluate` plays episodes that decided nothing.
        stopped_by: Why this update is the last one, or None.
    """

    updates: int
    metrics: dict[str, float]
    policy: Policy
    progress: Progress
    selection: Selection | None
    stopped_by: StoppedBy | None
    _run: "_Run"

    @property
    def record(self) -> StepRecord:
        """What this update's step was made from; of a finished run that was resumed there is none.

        Raises:
            RuntimeError: if the run has gone on already, or has made no step yet.
        """
        return self._run.record_of(self)

    def findings(self, evaluation: Evaluation | None = None) -> list[Finding]:
        """What the run should be told of, such as that it learned nothing; see docs/engine/findings.md.

        Args:
            evaluation: Of the policy after the last update, on fresh episodes; without one the returns of training
                say how it ended.

        Raises:
            RuntimeError: if the run has gone on already.
        """
        return self._run.findings(self, evaluation)

    def state(self) -> bytes:
        """Bytes from which `train(…, resume_from=…)` goes on to the bit.

        Raises:
            RuntimeError: if the run has gone on already.
        """
        return self._run.state(self)


def train(
    spec: TrainingSpec,
    *,
    environment: EpisodeEnvironment | None = None,
    policy: Policy | None = None,
    behaviour: Policy | None = None,
    resume_from: bytes | None = None,
) -> Iterator[Update]:
    """Trains a policy by policy gradient.

    Args:
        spec: Environment, policy, algorithm, limits and seed; see `pgengine.TrainingSpec`.
        environment: One of your own, in the place of the one that the spec names; it is left open.
        policy: What to start from; its updates are counted on, and no target return is taken from the environment.
            Default: made from the spec and its seed.
        behaviour: Who acts, where `algorithm.importance.behaviour` is of kind `policy`.
        resume_from: An earlier `Update.state()` of the same spec. A finished run gives its last update again.

    Yields:
        One `Update` after each update.

    Raises:
        SpecError: before the first update, if the spec cannot be carried out.
        CheckpointError: if `resume_from` is not a state of this engine.
        EnvironmentFailure: if the environment raised in the middle.
        DivergedError: if a gradient or a parameter is no longer finite.
    """
    opened = environment or open_environment(spec.environment)
    try:
        run = _Run(spec, opened, policy, behaviour, resume_from)
        yield from run.updates()
    finally:
        if environment is None:
            opened.close()


def runtime_fingerprint(policy: Policy | None = None) -> dict[str, str | int]:
    """What the bits of a run depend on besides its spec: another machine is an event, not a promise.

    Args:
        policy: With it a self-test tells whether what it answers to an observation has the same bits alone and at every
            place of a batch. Where it has not, an episode can be played again only together with its whole batch.
    """
    fingerprint: dict[str, str | int] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "noise_version": NOISE_VERSION,
        "forward_version": FORWARD_VERSION,
    }
    return fingerprint if policy is None else fingerprint | {"rows_are_independent": rows_are_independent(policy)}


class _Run:
    """State of a run between two updates: parameters, optimizer, baseline, counters, trajectories to use again."""

    def __init__(
        self,
        spec: TrainingSpec,
        environment: EpisodeEnvironment,
        policy: Policy | None,
        behaviour: Policy | None,
        resume_from: bytes | None,
    ) -> None:
        self.last = None if resume_from is None else RunState.from_bytes(resume_from)
        self.continues = policy is not None if self.last is None else self.last.continues
        spec = self.spec = resolve(spec, environment.facts, continues=self.continues)
        self.algorithm = spec.algorithm
        self.environment = environment
        self.device = _device(spec.device)
        # a default that has changed since the state was made does not part it from its run
        kept = None if self.last is None else _as_kept(spec, self.last.policy)
        if self.last is not None and self.last.spec_hash not in (None, spec_hash(spec), spec_hash(kept or spec)):
            raise CheckpointError("the state belongs to a run with another spec; only stop may differ")
        start = self.last.policy if self.last is not None else policy
        start = start or create_policy(spec.policy, spec.environment, environment.facts, seed=spec.seed)
        start.fits(environment.facts)
        self.policy = start.copy()
        self.names = sorted(self.policy.parameters)
        self.tensors = self._bind()
        self.optimizer = open_optimizer(self.algorithm.optimizer, [self.tensors[name] for name in self.names])
        self.estimator = Estimator(self.algorithm, environment.facts, seed=spec.seed)
        self.behaviour = _given(self.algorithm, behaviour, environment, self.policy)
        self.behaviour_hash = None if self.behaviour is None else sha256(self.behaviour.to_bytes()).hexdigest()
        self.progress = Progress()
        self.selected_at: int | None = None
        self.selections = 0
        self.watch = Watch()
        self.refreshed_at: int | None = None
        self.batch: Batch | None = None
        self.batch_uses = 0
        self.record: StepRecord | None = None
        self._fresh_env_steps = 0
        self._whole = True  # not in the middle of a step
        if self.last is not None:
            self._restore(self.last)

    def _restore(self, state: RunState) -> None:
        if state.behaviour_hash != self.behaviour_hash:
            raise CheckpointError("the state belongs to a run in which another policy acted")
        self.progress, self.selected_at, self.selections = state.progress, state.selected_at, state.selections
        self.batch, self.batch_uses, self.watch = state.batch, state.batch_uses, state.watch
        if state.behaviour is not None:
            self.behaviour, self.refreshed_at = state.behaviour, state.refreshed_at
        restore_optimizer(self.optimizer, state.optimizer)
        self.estimator.restore(state.baseline)

    def _bind(self) -> dict[str, torch.Tensor]:
        """Parameters as torch tensors; on the CPU they share memory with the policy's arrays."""
        return {
            name: torch.from_numpy(self.policy.parameters[name]).to(self.device).requires_grad_(True)
            for name in self.names
        }

    def updates(self) -> Iterator[Update]:
        if self.last is not None and self.last.stopped_by is not None:
            metrics = {name: math.nan if value is None else value for name, value in self.last.metrics.items()}
            yield self._update(metrics, self.last.selection, self.last.stopped_by)
            return
        stopped_by = None
        while stopped_by is None:
            began = time.perf_counter()
            metrics, unusable = self._step()
            selection = None if unusable else self._select(metrics["mean_return"])
            self._advance(metrics, time.perf_counter() - began)
            self.watch = self.watch.after(metrics, self.algorithm, self.policy.updates)
            stopped_by = unusable or self._stopped_by(selection)
            yield self._update(metrics, selection, stopped_by)

    def _update(self, metrics: dict[str, float], selection: Selection | None, stopped_by: StoppedBy | None) -> Update:
        return Update(self.policy.updates, metrics, self.policy, self.progress, selection, stopped_by, self)

    # --- one update ---

    def _step(self) -> tuple[dict[str, float], StoppedBy | None]:
        """Samples, estimates and makes one step; tells why the batch could not be learned from, if it could not."""
        began = time.perf_counter()
        batch, fresh = self._next_batch()
        rolled = time.perf_counter()
        weighed = self.estimator.weigh(self.policy, batch)
        size = float(weighed.weights.effective_sample_size)
        metrics = {
            **return_figures(batch.returns),
            "mean_length": float(batch.lengths.mean()),
            "truncated_fraction": float(batch.truncated.mean()),
            "effective_sample_size": size,
        }
        unusable = self._unusable(batch, size)
        if self._measures():
            metrics |= gradient_figures(self.estimator, self.policy, self.tensors, batch)
            most = exact_budget(self.spec.diagnostics_every)
            metrics |= exact_figures(self.environment, self.policy, self.algorithm, most=most)
        saturated = saturated_fraction(self.policy, batch)
        if saturated is not None:
            metrics["saturated_fraction"] = saturated
        rate = learning_rate(self.algorithm.optimizer, self.progress.updates)
        set_learning_rate(self.optimizer, rate)
        self.record = StepRecord(batch, weighed, self.policy.copy(), rate)
        self._whole = False
        if unusable is None:
            metrics["gradient_norm"], metrics["entropy"] = self._ascend(batch, weighed, rate)
            self._publish()
            if self._is_last_use():
                self.estimator.fit(batch, weighed)
                self.policy.observe(batch.observations)
        self.policy.updates += 1
        self._whole = True
        ended = time.perf_counter()
        metrics |= {
            "learning_rate": rate,
            "rollout_seconds": rolled - began,
            "update_seconds": ended - rolled,
            "env_steps_per_second": len(batch.rewards) / (ended - began) if fresh else 0.0,
        }
        self._fresh_env_steps = len(batch.rewards) if fresh else 0
        return metrics, unusable

    def _next_batch(self) -> tuple[Batch, bool]:
        """The trajectories of this update, and whether they are new. What acts is decided here."""
        if self.batch is not None and self.batch_uses < self.algorithm.steps_per_batch:
            self.batch_uses += 1
            return self.batch, False
        self._refresh()
        batch = rollout(
            self._actor(),
            self.environment,
            Noise(self.spec.seed, "training", self.policy.updates),
            self.algorithm.trajectories,
            survival=self.algorithm.survival,
        )
        if self.algorithm.steps_per_batch > 1:
            self.batch, self.batch_uses = batch, 1
        return batch, True

    def _refresh(self) -> None:
        """Brings an older policy that acts up to date, with the first new batch after so many updates."""
        named = self.algorithm.importance.behaviour
        if not isinstance(named, OlderBehaviourSpec):
            return
        age = math.inf if self.refreshed_at is None else self.progress.updates - self.refreshed_at
        if age >= named.refresh_every:
            self.behaviour, self.refreshed_at = self.policy.copy(), self.progress.updates

    def _actor(self) -> Policy:
        named = self.algorithm.importance.behaviour
        if isinstance(named, MixtureBehaviourSpec):
            return self.policy.mixed_with_uniform(named.epsilon)
        return self.behaviour or self.policy

    def _is_last_use(self) -> bool:
        """Whether the batch will not be used again: only then may what was learned from it change the next update."""
        return self.algorithm.steps_per_batch == 1 or self.batch_uses >= self.algorithm.steps_per_batch

    def _unusable(self, batch: Batch, effective_sample_size: float) -> StoppedBy | None:
        """Why the ratios of a batch cannot be learned from, if they cannot."""
        importance = self.algorithm.importance
        if importance.kind == "none":
            return None
        if math.isnan(effective_sample_size):
            raise DivergedError(self.policy.updates + 1, self.spec.seed, "an importance ratio")
        if self.behaviour is not None:
            try:
                check_behaviour(self.algorithm, self.policy, self.behaviour, batch.observations, batch.offsets)
            except SpecError:
                return "ratio_variance"  # the deviations have drifted apart since the run was accepted
        least = importance.minimum_effective_sample_size * self.algorithm.trajectories
        return None if effective_sample_size >= least else "effective_sample_size"

    def _measures(self) -> bool:
        every = self.spec.diagnostics_every
        return every > 0 and self.progress.updates % every == 0

    def _ascend(self, batch: Batch, weighed: Weighed, rate: float) -> tuple[float, float]:
        """Makes the step; returns the norm of the estimate and the mean entropy of the batch before it."""
        if self.algorithm.within_episode == "moving":
            return self._ascend_step_by_step(batch, weighed, rate)
        sums, entropy = gradients(self.policy, self.tensors, batch, weighed.weights)
        norm = self._norm(sums)
        for name, total in zip(self.names, sums, strict=True):
            self.tensors[name].grad = total.neg_()
        self.optimizer.step()
        return norm, entropy

    def _ascend_step_by_step(self, batch: Batch, weighed: Weighed, rate: float) -> tuple[float, float]:
        """After each step of the episode: theta <- theta + rate * weight_t * grad log pi_theta(a_t|s_t).

        Source: Bereyhi, chapter 5, the inner loops of PG_v1 and REINFORCE; Lin, an online iterative update approach.
        """
        begin = [self.tensors[name].detach().clone() for name in self.names]
        entropy, B = 0.0, len(batch.rewards)
        for row in range(B):
            sums, row_entropy = gradients(self.policy, self.tensors, batch, weighed.weights, row=row)
            entropy += row_entropy / B
            with torch.no_grad():
                for name, total in zip(self.names, sums, strict=True):
                    self.tensors[name].add_(total, alpha=rate)
        moved = [(self.tensors[name].detach() - old) / rate for name, old in zip(self.names, begin, strict=True)]
        return self._norm(moved), entropy

    def _norm(self, parts: list[torch.Tensor]) -> float:
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if not math.isfinite(norm):
            raise DivergedError(self.policy.updates + 1, self.spec.seed, "the gradient")
        return norm

    def _publish(self) -> None:
        """Lets the policy see the new parameters, and checks that they are finite."""
        for name, tensor in self.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise DivergedError(self.policy.updates + 1, self.spec.seed, f"the parameter {name}")
            if self.device.type != "cpu":
                self.policy.parameters[name] = tensor.detach().cpu().numpy()

    # --- when to stop ---

    def _select(self, mean_return: float) -> Selection | None:
        """A look at the policy, if the batch reached the target and the last miss is some updates ago.

        The error is shared out over the looks, of which each sees another policy: 1/2 + 1/6 + 1/12 + … = 1.
        """
        target = self.spec.stop.target_return
        if target is None or mean_return < target:
            return None
        if self.selected_at is not None and self.policy.updates - self.selected_at < SELECTION_PAUSE:
            return None
        self.selected_at = self.policy.updates
        self.selections += 1
        return select(
            self.environment,
            self.policy,
            target=target,
            error=SELECTION_ERROR / (self.selections * (self.selections + 1)),
            episodes=self.spec.evaluation.episodes,
            seed=self.spec.seed,
            survival=self.algorithm.survival,
        )

    def _advance(self, metrics: dict[str, float], seconds: float) -> None:
        before, stop = self.progress, self.spec.stop
        updates = before.updates + 1
        env_steps = before.env_steps + self._fresh_env_steps
        total = before.seconds + seconds
        shares = [
            used / limit
            for used, limit in ((updates, stop.updates), (env_steps, stop.env_steps), (total, stop.seconds))
            if limit is not None
        ]
        self.progress = Progress(
            updates=updates,
            env_steps=env_steps,
            episodes=before.episodes + (self.algorithm.trajectories if self._fresh_env_steps else 0),
            seconds=total,
            fraction=min(1.0, max(shares, default=0.0)),
        )
        metrics["env_steps"] = float(env_steps)
        metrics["episodes"] = float(self.progress.episodes)

    def _stopped_by(self, selection: Selection | None) -> StoppedBy | None:
        stop, progress = self.spec.stop, self.progress
        if selection is not None and stop.target_return is not None and reaches(selection, stop.target_return):
            return "target_return"
        if stop.updates is not None and progress.updates >= stop.updates:
            return "updates"
        if stop.env_steps is not None and progress.env_steps >= stop.env_steps:
            return "env_steps"
        if stop.seconds is not None and progress.seconds >= stop.seconds:
            return "seconds"
        return None

    # --- what others may ask ---

    def _is_last(self, update: Update) -> bool:
        return update.updates == self.policy.updates and self._whole

    def record_of(self, update: Update) -> StepRecord:
        if self.record is None or not self._is_last(update):
            raise RuntimeError("a record belongs to the update that was yielded last")
        return self.record

    def findings(self, update: Update, evaluation: Evaluation | None) -> list[Finding]:
        if not self._is_last(update):
            raise RuntimeError("findings() belongs to the update that was yielded last; the run has gone on")
        return self.watch.findings(self.spec, self.environment.facts, update.stopped_by, evaluation)

    def state(self, update: Update) -> bytes:
        if not self._is_last(update):
            raise RuntimeError("state() belongs to the update that was yielded last; the run has gone on")
        older = isinstance(self.algorithm.importance.behaviour, OlderBehaviourSpec)
        again = self.batch is not None and self.batch_uses < self.algorithm.steps_per_batch
        return RunState(
            policy=self.policy,
            progress=update.progress,
            metrics={name: value if math.isfinite(value) else None for name, value in update.metrics.items()},
            selection=update.selection,
            selected_at=self.selected_at,
            selections=self.selections,
            spec_hash=spec_hash(self.spec),
            stopped_by=update.stopped_by,
            optimizer=optimizer_arrays(self.optimizer),
            baseline=self.estimator.arrays(),
            behaviour=self.behaviour if older else None,
            behaviour_hash=self.behaviour_hash,
            refreshed_at=self.refreshed_at,
            batch=self.batch if again else None,
            batch_uses=self.batch_uses if again else 0,
            continues=self.continues,
            watch=self.watch,
        ).to_bytes()


def _as_kept(spec: TrainingSpec, policy: Policy) -> TrainingSpec:
    """The spec with the unit of the Gaussian that a policy was made with."""
    said, kept = spec.policy.distribution, policy.spec.distribution
    if not isinstance(said, GaussianSpec) or not isinstance(kept, GaussianSpec):
        return spec
    distribution = said.model_copy(update={"unit": kept.unit})
    return spec.model_copy(update={"policy": spec.policy.model_copy(update={"distribution": distribution})})


def _given(
    algorithm: AlgorithmSpec, behaviour: Policy | None, environment: EpisodeEnvironment, policy: Policy
) -> Policy | None:
    """The policy that acts in the place of the learning one, if the spec names one."""
    if not isinstance(algorithm.importance.behaviour, PolicyBehaviourSpec):
        return None
    if behaviour is None:
        raise SpecError(
            "/algorithm/importance/behaviour", "behaviour_missing", "give the policy that acts: train(behaviour=…)"
        )
    behaviour.fits(environment.facts)
    check_behaviour(algorithm, policy, behaviour)
    return behaviour


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("/device", "device_not_available", "there is no GPU here that torch can use; take cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
