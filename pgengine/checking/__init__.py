"""Gradient checks: is an estimator what its label says? Compared with the exact gradient, on finite MDPs and LQR.

settings, subject (what is checked and refused) ─► sampling (with tails) | enumerating ─► moments (the test) ─► running

Reports are data and load no torch; what makes them is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pgengine.checking.reports import CheckProgress, EstimatorReport, GradientCheck

if TYPE_CHECKING:
    from pgengine.checking.moments import BiasTest, Moments, bias_test
    from pgengine.checking.running import check_gradient, check_steps
    from pgengine.checking.settings import check_settings, resolve_estimators
    from pgengine.checking.subject import MAX_BATCHES, MAX_TRAJECTORIES, refuse

_HOME = {
    "MAX_BATCHES": "subject",
    "MAX_TRAJECTORIES": "subject",
    "BiasTest": "moments",
    "Moments": "moments",
    "bias_test": "moments",
    "check_gradient": "running",
    "check_settings": "settings",
    "check_steps": "running",
    "refuse": "subject",
    "resolve_estimators": "settings",
}

__all__ = [
    "MAX_BATCHES",
    "MAX_TRAJECTORIES",
    "BiasTest",
    "CheckProgress",
    "EstimatorReport",
    "GradientCheck",
    "Moments",
    "bias_test",
    "check_gradient",
    "check_settings",
    "check_steps",
    "refuse",
    "resolve_estimators",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
