"""What certainly does not fit into memory is refused before it is played, and nothing else is."""

import tracemalloc
from typing import Any

import pytest

import pgengine
from pgengine.errors import SpecError
from pgengine.footprint import check_footprint, step_bytes
from pgengine.noise import Noise
from pgengine.resolution import resolve
from pgengine.rollout import rollout
from pgengine.spec import GradientCheckSpec, TrainingSpec

GIB = 2**30


def one_state(horizon: int) -> dict[str, Any]:
    return {
        "kind": "tabular",
        "transitions": [[[1.0], [1.0]]],
        "rewards": [[0.0, 1.0]],
        "initial": [1.0],
        "horizon": horizon,
    }


def refused(environment: dict[str, Any], limit: int = 16 * GIB, **more: Any) -> SpecError | None:
    """How a training is refused, if it is."""
    spec = TrainingSpec.model_validate({"environment": environment, "policy": {"kind": "linear"}, **more})
    facts = pgengine.describe(spec.environment)
    try:
        check_footprint(resolve(spec, facts), facts, limit)
    except SpecError as error:
        return error
    return None


def test_a_batch_that_cannot_be_held_is_refused_with_the_figures() -> None:
    error = refused(one_state(1_000_000), algorithm={"trajectories": 10_000})
    assert error is not None
    assert (error.pointer, error.code) == ("/algorithm/trajectories", "does_not_fit")
    assert "10,000 episodes at once, of 1,000,000 steps each, take at least " in error.message
    assert "there may be 16.0 GiB" in error.message


def test_the_episodes_of_the_evaluation_must_fit_too() -> None:
    error = refused(one_state(1_000_000), evaluation={"episodes": 1000}, algorithm={"trajectories": 8})
    assert error is not None
    assert error.pointer == "/evaluation/episodes"


@pytest.mark.parametrize(
    ("environment", "more"),
    [
        (one_state(500), {"algorithm": {"trajectories": 10_000}}),
        (one_state(1_000_000), {"algorithm": {"trajectories": 8}, "evaluation": {"episodes": 8}}),
        # episodes may end long before the limit
        (
            {"kind": "gymnasium", "id": "CliffWalking-v1", "max_episode_steps": 1_000_000},
            {"algorithm": {"trajectories": 10_000}},
        ),
        # and they do where the discount is a termination
        (one_state(1_000_000), {"algorithm": {"trajectories": 10_000, "gamma": 0.9, "discount": "termination"}}),
    ],
)
def test_a_batch_that_may_fit_into_memory_is_not_refused(environment: dict[str, Any], more: dict[str, Any]) -> None:
    assert refused(environment, **more) is None


def test_estimators_of_a_check_must_fit_where_they_are_played() -> None:
    check = {"environment": one_state(1_000_000), "estimators": [{"trajectories": 2}, {"trajectories": 10_000}]}
    facts = pgengine.describe(TrainingSpec.model_validate({"environment": one_state(1_000_000)}).environment)
    with pytest.raises(SpecError) as caught:
        check_footprint(GradientCheckSpec.model_validate(check), facts, 16 * GIB)
    assert caught.value.pointer == "/estimators/1/trajectories"


@pytest.mark.parametrize(
    "environment",
    [one_state(200), {"kind": "gymnasium", "id": "Pendulum-v1"}, {"kind": "gymnasium", "id": "pgengine/TMaze-v0"}],
)
def test_the_figure_is_no_more_than_what_playing_takes(environment: dict[str, Any]) -> None:
    spec = TrainingSpec.model_validate({"environment": environment})
    opened = pgengine.open_environment(spec.environment)
    policy = pgengine.create_policy(spec.policy, spec.environment, opened.facts, seed=0)
    rollout(policy, opened, Noise(0, "training", 0), 2)  # what is made once
    tracemalloc.start()
    batch = rollout(policy, opened, Noise(0, "training", 0), 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    opened.close()
    assert len(batch.rewards) * step_bytes(opened.facts) <= peak
