"""Training: sample K complete trajectories, estimate the gradient, make a step; again.

    for update in pgengine.train(spec):
        update.metrics, update.policy, update.state()

A generator without callbacks, loggers or stop tokens: whoever iterates decides what to keep and when to stop. An
update is a pure function of (parameters, optimizer state, seed, update number), so a run that is stopped anywhere and
resumed from a state ends with the bits of an uninterrupted one (same machine, device and number of threads).

Acting is done in numpy, learning in torch; on the CPU both see the same memory.

Source: Sun, Policy Gradient Algorithm (sample K trajectories, form the stochastic gradient, ascend); Lin, update
after a sequence of N trajectories.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import Field

from pgengine.environments import EpisodeEnvironment, open_environment
from pgengine.errors import CheckpointError, DivergedError, SpecError
from pgengine.estimators import step_weights
from pgengine.evaluation import Evaluation, evaluate_in, lower_bound
from pgengine.noise import NOISE_VERSION, Noise
from pgengine.policies import Policy, create_policy, load
from pgengine.policies.networks import rows_are_independent
from pgengine.resolution import resolve
from pgengine.rollout import Batch, rollout
from pgengine.spec import AdaGradSpec, AdamSpec, SgdSpec, Spec, TrainingSpec

__all__ = ["Progress", "Update", "runtime_fingerprint", "train"]

ROWS_AT_ONCE = 8192  # activations of so many rows stay in cache
SELECTION_PAUSE = 5  # updates after a selection evaluation that missed the target
SELECTION_EPISODES = 30  # the least on which a target is proven: fewer can be all alike by chance
SELECTION_ERROR = 0.05  # odds, over all attempts of a run, of stopping below the target

StoppedBy = Literal["target_return", "updates", "env_steps", "seconds"]


class Progress(Spec):
    """How far a run has come."""

    updates: int = 0
    """Updates of this run."""
    env_steps: int = 0
    """Environment steps of training."""
    episodes: int = 0
    """Training episodes."""
    seconds: float = 0.0
    """Seconds of training, without the time between a crash and its resumption."""
    fraction: float = 0.0
    """Share of the nearest limit that has been used, from 0 to 1; reaching the target return ends it earlier."""


class _RunState(Spec):
    """What stands beside the arrays of a state."""

    format: Literal["pgengine-state"] = "pgengine-state"
    version: Literal[1] = 1
    noise_version: int = NOISE_VERSION
    policy_bytes: int = Field(ge=0)
    progress: Progress
    metrics: dict[str, float | None]
    evaluation: Evaluation | None
    selected_at: int | None
    selections: int = Field(ge=0)
    spec_hash: str
    stopped_by: StoppedBy | None


@dataclass(frozen=True)
class Update:
    """One update of a run that is going on.

    Attributes:
        updates: Updates that the policy has had, earlier runs counted in.
        metrics: Figures of this update, documented in docs/engine/metrics.md.
        policy: Live: the next update changes it. `policy.copy()` or `policy.to_bytes()` keeps it.
        progress: How far the run has come.
        evaluation: A fresh evaluation made after this update to decide whether the target is reached, or None.
        stopped_by: Why this update is the last one, or None.
    """

    updates: int
    metrics: dict[str, float]
    policy: Policy
    progress: Progress
    evaluation: Evaluation | None
    stopped_by: StoppedBy | None
    _run: "_Run"

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
    resume_from: bytes | None = None,
) -> Iterator[Update]:
    """Trains a policy by policy gradient.

    Args:
        spec: Environment, policy, algorithm, limits and seed; see `pgengine.TrainingSpec`.
        environment: One of your own, in the place of the one that the spec names; it is left open.
        policy: What to start from; its updates are counted on. Default: made from the spec and its seed.
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
        run = _Run(resolve(spec, opened.facts), opened, policy, resume_from)
        yield from run.updates()
    finally:
        if environment is None:
            opened.close()


def runtime_fingerprint() -> dict[str, str | int]:
    """What the bits of a run depend on besides its spec: another machine is an event, not a promise."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "noise_version": NOISE_VERSION,
        "rows_are_independent": rows_are_independent(),
    }


class _Run:
    """State of a run between two updates: parameters, optimizer, counters."""

    def __init__(
        self, spec: TrainingSpec, environment: EpisodeEnvironment, policy: Policy | None, resume_from: bytes | None
    ) -> None:
        self.spec = spec
        self.environment = environment
        self.device = _device(spec.device)
        self.progress = Progress()
        self.selected_at: int | None = None
        self.selections = 0
        self._whole = True  # not in the middle of a step
        self.last: _RunState | None = None
        optimizer_state: dict[str, torch.Tensor] = {}
        if resume_from is not None:
            policy, self.last, optimizer_state = _read_state(resume_from)
            self.progress, self.selected_at = self.last.progress, self.last.selected_at
            self.selections = self.last.selections
            if self.last.spec_hash != _hash(spec):
                raise CheckpointError("the state belongs to a run with another spec; only stop may differ")
        start = policy or create_policy(spec.policy, spec.environment, environment.facts, seed=spec.seed)
        start.fits(environment.facts)
        self.policy = start.copy()
        self.names = sorted(self.policy.parameters)
        self.tensors = self._bind()
        self.optimizer = _optimizer(spec.algorithm.optimizer, [self.tensors[name] for name in self.names])
        _restore(self.optimizer, optimizer_state)

    def _bind(self) -> dict[str, torch.Tensor]:
        """Parameters as torch tensors; on the CPU they share memory with the policy's arrays."""
        return {
            name: torch.from_numpy(self.policy.parameters[name]).to(self.device).requires_grad_(True)
            for name in self.names
        }

    def updates(self) -> Iterator[Update]:
        if self.last is not None and self.last.stopped_by is not None:
            metrics = {name: math.nan if value is None else value for name, value in self.last.metrics.items()}
            yield self._update(metrics, self.last.evaluation, self.last.stopped_by)
            return
        stopped_by = None
        while stopped_by is None:
            began = time.perf_counter()
            metrics, reached = self._step()
            evaluation = self._select(reached)
            self._advance(metrics, time.perf_counter() - began)
            stopped_by = self._stopped_by(evaluation)
            yield self._update(metrics, evaluation, stopped_by)

    def _update(self, metrics: dict[str, float], evaluation: Evaluation | None, stopped_by: StoppedBy | None) -> Update:
        return Update(self.policy.updates, metrics, self.policy, self.progress, evaluation, stopped_by, self)

    # --- one update ---

    def _step(self) -> tuple[dict[str, float], bool]:
        """Samples, estimates and makes one step; tells whether the batch reached the target."""
        began = time.perf_counter()
        noise = Noise(self.spec.seed, "training", self.policy.updates)
        batch = rollout(self.policy, self.environment, noise, self.spec.algorithm.trajectories)
        rolled = time.perf_counter()
        weights = step_weights(batch.rewards, batch.offsets, self.spec.algorithm)
        entropy = self._accumulate(batch, weights)
        norm = self._gradient_norm()
        self._whole = False
        self.optimizer.step()
        self._publish()
        self.policy.updates += 1
        self._whole = True
        target = self.spec.stop.target_return
        mean_return = float(batch.returns.mean())
        metrics = {
            "mean_return": mean_return,
            "return_deviation": float(batch.returns.std()),
            "mean_length": float(batch.lengths.mean()),
            "gradient_norm": norm,
            "entropy": entropy,
            "rollout_seconds": rolled - began,
            "update_seconds": time.perf_counter() - rolled,
            "env_steps_per_second": len(batch.rewards) / (time.perf_counter() - began),
            "truncated_fraction": float(batch.truncated.mean()),
            "batch_env_steps": float(len(batch.rewards)),
        }
        return metrics, target is not None and mean_return >= target

    def _accumulate(self, batch: Batch, weights: np.ndarray) -> float:
        """Leaves the gradient of -estimate in the tensors; returns the mean entropy of the batch.

        Rows are taken in chunks that stay in cache. The sum over a batch is one number: what is replayed is the whole
        update.
        """
        self.optimizer.zero_grad(set_to_none=True)
        entropy, B = 0.0, len(weights)
        encoded = self.policy.network.encode(batch.observations)
        for start in range(0, B, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, B))
            x, samples, w = (self._tensor(a[rows]) for a in (encoded, batch.samples, weights))
            outputs = self.policy.network.outputs(self.tensors, x)
            log_prob = self.policy.distribution.log_prob(self.tensors, outputs, samples)
            loss = -(w.to(log_prob.dtype) * log_prob).sum()
            loss.backward()
            with torch.no_grad():
                entropy += float(self.policy.distribution.entropy(self.tensors, outputs).sum())
        return entropy / B

    def _tensor(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)

    def _gradient_norm(self) -> float:
        gradients = [tensor.grad for tensor in self.tensors.values() if tensor.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
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

    def _select(self, reached: bool) -> Evaluation | None:
        """A fresh evaluation, if the batch reached the target and the last miss is some updates ago."""
        if not reached:
            return None
        if self.selected_at is not None and self.policy.updates - self.selected_at < SELECTION_PAUSE:
            return None
        self.selected_at = self.policy.updates
        self.selections += 1
        return evaluate_in(
            self.environment,
            self.policy,
            episodes=max(SELECTION_EPISODES, self.spec.evaluation.episodes),
            seed=self.spec.seed,
            domain="selection",
            deterministic_episodes=0,
        )

    def _advance(self, metrics: dict[str, float], seconds: float) -> None:
        before, stop = self.progress, self.spec.stop
        updates = before.updates + 1
        env_steps = before.env_steps + int(metrics.pop("batch_env_steps"))
        total = before.seconds + seconds
        shares = [
            used / limit
            for used, limit in ((updates, stop.updates), (env_steps, stop.env_steps), (total, stop.seconds))
            if limit is not None
        ]
        self.progress = Progress(
            updates=updates,
            env_steps=env_steps,
            episodes=before.episodes + self.spec.algorithm.trajectories,
            seconds=total,
            fraction=min(1.0, max(shares, default=0.0)),
        )
        metrics["env_steps"] = float(env_steps)
        metrics["episodes"] = float(self.progress.episodes)

    def _stopped_by(self, evaluation: Evaluation | None) -> StoppedBy | None:
        stop, progress = self.spec.stop, self.progress
        if evaluation is not None and stop.target_return is not None:
            # the odds that any of the attempts is lucky are shared out: 1/2 + 1/6 + 1/12 + … = 1
            error = SELECTION_ERROR / (self.selections * (self.selections + 1))
            if lower_bound(evaluation, error) >= stop.target_return:
                return "target_return"
        if stop.updates is not None and progress.updates >= stop.updates:
            return "updates"
        if stop.env_steps is not None and progress.env_steps >= stop.env_steps:
            return "env_steps"
        if stop.seconds is not None and progress.seconds >= stop.seconds:
            return "seconds"
        return None

    # --- state ---

    def state(self, update: Update) -> bytes:
        if update.updates != self.policy.updates or not self._whole:
            raise RuntimeError("state() belongs to the update that was yielded last; the run has gone on")
        policy = self.policy.to_bytes()
        header = _RunState(
            policy_bytes=len(policy),
            progress=update.progress,
            metrics={name: value if math.isfinite(value) else None for name, value in update.metrics.items()},
            evaluation=update.evaluation,
            selected_at=self.selected_at,
            selections=self.selections,
            spec_hash=_hash(self.spec),
            stopped_by=update.stopped_by,
        )
        tensors = {"policy": torch.frombuffer(bytearray(policy), dtype=torch.uint8)}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(v).cpu() for name, v in values.items()}
        return safetensors.torch.save(tensors, {"pgengine": header.model_dump_json()})


def _read_state(data: bytes) -> tuple[Policy, _RunState, dict[str, torch.Tensor]]:
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        header = _RunState.model_validate_json(json.loads(data[8 : 8 + length])["__metadata__"]["pgengine"])
        policy = load(tensors.pop("policy").numpy().tobytes())
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"these bytes are not a state of a run: {type(error).__name__}") from error
    if header.noise_version != NOISE_VERSION:
        raise CheckpointError(f"the state was made with noise version {header.noise_version}, this is {NOISE_VERSION}")
    return policy, header, tensors


def _hash(spec: TrainingSpec) -> str:
    """What must not change between a state and its resumption."""
    return hashlib.sha256(spec.model_dump_json(exclude={"stop"}).encode()).hexdigest()


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Puts an optimizer's state back; the hash of the spec has told that it is this optimizer's."""
    if not tensors:
        return
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        _, index, key = name.split(".", 2)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _optimizer(spec: SgdSpec | AdaGradSpec | AdamSpec, tensors: list[torch.Tensor]) -> torch.optim.Optimizer:
    if isinstance(spec, SgdSpec):
        return torch.optim.SGD(tensors, lr=spec.learning_rate)
    if isinstance(spec, AdaGradSpec):
        return torch.optim.Adagrad(tensors, lr=spec.learning_rate)
    return torch.optim.Adam(
        tensors, lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, foreach=True
    )


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("/device", "device_not_available", "there is no GPU here that torch can use; take cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
