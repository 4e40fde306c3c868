"""What a run keeps so that it can be stopped anywhere and goes on to the bit: safetensors with a JSON header."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import Field

from pgengine.errors import CheckpointError
from pgengine.evaluation import Selection
from pgengine.findings import Watch
from pgengine.noise import NOISE_VERSION
from pgengine.policies import Policy, load
from pgengine.rollout import Batch
from pgengine.spec import Spec, StoppedBy, TrainingSpec

__all__ = ["Progress", "RunState", "StoppedBy", "spec_hash"]


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


class _Header(Spec):
    """What stands beside the arrays of a state."""

    format: Literal["pgengine-state"] = "pgengine-state"
    version: Literal[1, 2] = 2
    noise_version: int = NOISE_VERSION
    policy_bytes: int = Field(ge=0)
    progress: Progress
    metrics: dict[str, float | None]
    evaluation: dict[str, Any] | None = None  # what versions before this one wrote in the place of `selection`
    selection: Selection | None = None
    selected_at: int | None
    selections: int = Field(ge=0)
    spec_hash: str
    stopped_by: StoppedBy | None
    behaviour_hash: str | None = None
    refreshed_at: int | None = None
    batch_uses: int = Field(default=0, ge=0)
    continues: bool = False
    watch: Watch = Field(default_factory=Watch)


@dataclass(frozen=True)
class RunState:
    """A run between two updates.

    Attributes:
        policy: Parameters and normaliser.
        progress: How far it has come.
        metrics: Of the last update; None where a figure was not finite.
        selection: Made after the last update, if one was.
        selected_at: Updates of the policy at the last evaluation that was to prove the target.
        selections: How many such evaluations there were.
        spec_hash: Of the spec that it belongs to; None in states of version 1, which hashed it in another way.
        stopped_by: Why the run has ended, if it has.
        optimizer: What the optimizer remembers.
        baseline: What the baseline remembers.
        behaviour: An older policy that acts, if it is not the newest.
        behaviour_hash: Of the other policy that acts, if the spec names one.
        refreshed_at: Updates of the run when the older policy was brought up to date.
        batch: Trajectories that will be used again.
        batch_uses: How often they have been used.
        continues: Whether the run began with a policy that was given to it.
        watch: Sums over the updates so far, from which findings are made; empty in states of earlier versions.
    """

    policy: Policy
    progress: Progress
    metrics: dict[str, float | None]
    selection: Selection | None
    selected_at: int | None
    selections: int
    spec_hash: str | None
    stopped_by: StoppedBy | None
    optimizer: dict[str, torch.Tensor] = field(default_factory=dict)
    baseline: dict[str, np.ndarray] = field(default_factory=dict)
    behaviour: Policy | None = None
    behaviour_hash: str | None = None
    refreshed_at: int | None = None
    batch: Batch | None = None
    batch_uses: int = 0
    continues: bool = False
    watch: Watch = field(default_factory=Watch)

    def to_bytes(self) -> bytes:
        """Bytes that `from_bytes` reads."""
        policy = self.policy.to_bytes()
        header = _Header(
            policy_bytes=len(policy),
            progress=self.progress,
            metrics=self.metrics,
            selection=self.selection,
            selected_at=self.selected_at,
            selections=self.selections,
            spec_hash=self.spec_hash or "",
            stopped_by=self.stopped_by,
            behaviour_hash=self.behaviour_hash,
            refreshed_at=self.refreshed_at,
            batch_uses=self.batch_uses,
            continues=self.continues,
            watch=self.watch,
        )
        tensors = {"policy": _blob(policy)}
        if self.behaviour is not None:
            tensors["behaviour"] = _blob(self.behaviour.to_bytes())
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.items()}
        tensors |= {f"baseline.{name}": torch.tensor(array) for name, array in self.baseline.items()}
        if self.batch is not None:
            tensors |= {f"batch.{name}": torch.tensor(array) for name, array in vars(self.batch).items()}
        return safetensors.torch.save(tensors, {"pgengine": header.model_dump_json()})

    @staticmethod
    def from_bytes(data: bytes) -> "RunState":
        """The state that `to_bytes` wrote.

        Raises:
            CheckpointError: if the bytes are not a state of this engine.
        """
        try:
            tensors = safetensors.torch.load(data)
            length = int.from_bytes(data[:8], "little")
            header = _Header.model_validate_json(json.loads(data[8 : 8 + length])["__metadata__"]["pgengine"])
            policy = load(tensors.pop("policy").numpy().tobytes())
            behaviour = load(tensors.pop("behaviour").numpy().tobytes()) if "behaviour" in tensors else None
            batch = {name: tensor.numpy() for name, tensor in _under(tensors, "batch.").items()}
            kept = Batch(**batch) if batch else None
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"these bytes are not a state of a run: {type(error).__name__}") from error
        if header.noise_version != NOISE_VERSION:
            raise CheckpointError(
                f"the state was made with noise version {header.noise_version}, this is {NOISE_VERSION}"
            )
        return RunState(
            policy=policy,
            progress=header.progress,
            metrics=header.metrics,
            selection=header.selection,
            selected_at=header.selected_at,
            selections=header.selections,
            spec_hash=None if header.version == 1 else header.spec_hash,
            stopped_by=header.stopped_by,
            optimizer=_under(tensors, "optimizer."),
            baseline={name: tensor.numpy() for name, tensor in _under(tensors, "baseline.").items()},
            behaviour=behaviour,
            behaviour_hash=header.behaviour_hash,
            refreshed_at=header.refreshed_at,
            batch=kept,
            batch_uses=header.batch_uses,
            continues=header.continues,
            watch=header.watch,
        )


def spec_hash(spec: TrainingSpec) -> str:
    """What must not change between a state and its resumption.

    Defaults are left out, so that a field that a later version adds does not part a run from its states.
    """
    said = _said(spec)
    for name in ("stop", "diagnostics_every"):
        said.pop(name, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _said(spec: Spec) -> dict[str, Any]:
    """Fields that differ from their defaults, and kinds."""
    said: dict[str, Any] = {}
    for name, field_info in type(spec).model_fields.items():
        value = getattr(spec, name)
        if isinstance(value, Spec):
            said[name] = _said(value)
        elif name == "kind" or value != field_info.get_default(call_default_factory=True, validated_data={}):
            said[name] = value
    return said


def _blob(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
