"""Defaults are written out, and settings that contradict each other are refused with the way out."""

import pytest
from pydantic import ValidationError

import pgengine
from pgengine.spec import StopSpec, TrainingSpec
from tests.engine.worlds import CARTPOLE, random_mdp

FACTS = pgengine.describe(CARTPOLE)


def resolve(**fields: object) -> TrainingSpec:
    return pgengine.resolve(TrainingSpec.model_validate({"environment": CARTPOLE.model_dump(), **fields}), FACTS)


def test_the_shortest_spec_is_exact_and_has_a_target() -> None:
    resolved = resolve()
    assert (resolved.stop.updates, resolved.stop.target_return) == (500, 475.0)
    assert resolved.algorithm.discount_weight == "gamma_power"
    assert pgengine.label(resolved, FACTS).kind == "exact"
    assert pgengine.resolve(resolved, FACTS) == resolved


def test_a_target_can_be_switched_off_and_a_limit_replaces_the_default() -> None:
    assert resolve(stop={"target_return": None}).stop.target_return is None
    assert resolve(stop={"env_steps": 10}).stop.updates is None
    assert pgengine.resolve(TrainingSpec(environment=random_mdp(0)), pgengine.describe(random_mdp(0))).stop == StopSpec(
        updates=500, target_return=None
    )


def test_the_discount_weight_follows_the_credit() -> None:
    assert resolve(algorithm={"credit": "total_return"}).algorithm.discount_weight == "none"


@pytest.mark.parametrize(("algorithm", "pointer", "code"), [
    ({"credit": "total_return", "discount_weight": "gamma_power"},
     "/algorithm/discount_weight", "discount_counted_twice"),
    ({"trajectories": 1}, "/algorithm/baseline", "baseline_needs_trajectories"),
])  # fmt: skip
def test_contradictions_are_named(algorithm: dict[str, object], pointer: str, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        resolve(algorithm=algorithm)
    assert (error.value.pointer, error.value.code) == (pointer, code)


@pytest.mark.parametrize("fields", [
    {"algorithm": {"gamma": 1.1}}, {"algorithm": {"gamma": True}}, {"algorithm": {"gamma": "0.9"}},
    {"algorithm": {"gamma": float("nan")}}, {"algorithm": {"lambda": 0.9}}, {"algorithm": {"trajectories": 0}},
    {"algorithm": {"trajectories": 2.0}}, {"algorithm": {"optimizer": {"kind": "rmsprop"}}},
    {"algorithm": {"optimizer": {"kind": "sgd", "learning_rate": float("inf")}}}, {"seed": -1}, {"seed": 2**53},
    {"policy": {"kind": "mlp", "hidden": []}}, {"policy": {"kind": "cnn"}}, {"stop": {"updates": 0}},
    {"evaluation": {"episodes": 1}}, {"version": 2}, {"unknown": 1},
])  # fmt: skip
def test_values_out_of_bounds_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        resolve(**fields)
