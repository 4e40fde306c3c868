"""Exact answers: what J, its gradient, values and best policies are, and what an estimator gives on average."""

from pgengine.exact.finite import ExactValues, exact_values, table_return
from pgengine.exact.linear_quadratic import (
    BestLinear,
    LinearQuadraticValues,
    OptimalControl,
    StationaryControl,
    best_linear,
    linear_values,
    lqr_return,
    optimal_control,
    stationary_control,
)
from pgengine.exact.objective import check_exact, exact_gradient, exact_return
from pgengine.exact.optima import (
    BestStationary,
    OptimalPlan,
    OptimalValues,
    best_stationary,
    optimal_plan,
    optimal_values,
)
from pgengine.exact.tables import entropies_of, log_policy, parameters_in_double, policy_table
from pgengine.exact.trajectories import (
    EnumeratedRows,
    Moments,
    Trajectories,
    Weights,
    count_trajectories,
    enumerate_trajectories,
    estimate_moments,
    expected_estimate,
    trajectory_log_probabilities,
    trajectory_probabilities,
)

__all__ = [
    "BestLinear",
    "BestStationary",
    "EnumeratedRows",
    "ExactValues",
    "LinearQuadraticValues",
    "Moments",
    "OptimalControl",
    "OptimalPlan",
    "OptimalValues",
    "StationaryControl",
    "Trajectories",
    "Weights",
    "best_linear",
    "best_stationary",
    "check_exact",
    "count_trajectories",
    "entropies_of",
    "enumerate_trajectories",
    "estimate_moments",
    "exact_gradient",
    "exact_return",
    "exact_values",
    "expected_estimate",
    "linear_values",
    "log_policy",
    "lqr_return",
    "optimal_control",
    "optimal_plan",
    "optimal_values",
    "parameters_in_double",
    "policy_table",
    "stationary_control",
    "table_return",
    "trajectory_log_probabilities",
    "trajectory_probabilities",
]
