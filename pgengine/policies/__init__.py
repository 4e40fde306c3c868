"""Policies: pure functions of (parameters, observation) that act in numpy and train in torch."""

from pgengine.policies.behaviour import check_behaviour
from pgengine.policies.independence import rows_are_independent
from pgengine.policies.keeping import load
from pgengine.policies.layers import FORWARD_VERSION
from pgengine.policies.policy import Acted, Policy, create_policy

__all__ = ["FORWARD_VERSION", "Acted", "Policy", "check_behaviour", "create_policy", "load", "rows_are_independent"]
