"""Optimizers of torch, made from their settings, kept and put back."""

import math
from typing import Any

import torch

from pgengine.spec import AdaGradSpec, AdamSpec, ScheduleSpec, SgdSpec

__all__ = ["learning_rate", "open_optimizer", "optimizer_arrays", "restore_optimizer", "set_learning_rate"]


def open_optimizer(spec: SgdSpec | AdaGradSpec | AdamSpec, tensors: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The optimizer that a spec describes. Source: Sun, SG ascent or other off-the-shelf optimizers."""
    if isinstance(spec, SgdSpec):
        return torch.optim.SGD(tensors, lr=spec.learning_rate)
    if isinstance(spec, AdaGradSpec):
        return torch.optim.Adagrad(tensors, lr=spec.learning_rate)
    return torch.optim.Adam(
        tensors, lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, foreach=True
    )


def learning_rate(spec: SgdSpec | AdaGradSpec | AdamSpec, updates: int) -> float:
    """The step size after so many updates of a run."""
    return spec.learning_rate * _factor(spec.schedule, updates)


def _factor(schedule: ScheduleSpec, updates: int) -> float:
    if schedule.kind == "constant":
        return 1.0
    stretched = 1.0 + updates / schedule.scale
    return 1.0 / stretched if schedule.kind == "inverse_time" else 1.0 / math.sqrt(stretched)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Makes the next step with this step size."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that an optimizer remembers, by `index.name`."""
    return {
        f"{index}.{name}": torch.as_tensor(value).cpu()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, arrays: dict[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_arrays` gave for the same kind of optimizer."""
    if not arrays:
        return
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in arrays.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
