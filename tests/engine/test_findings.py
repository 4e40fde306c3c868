"""What a run is told of at its end, on worlds in which it is known to be true, and that no interruption changes it."""

from typing import Any, get_args

import pytest

import pgengine
from pgengine.findings import FindingCode, Watch
from pgengine.spec import StopSpec, TabularSpec, TrainingSpec
from tests.engine.worlds import CARTPOLE, bandit, small_mdp

RARE = TabularSpec(
    transitions=[[[1.0], [1.0]]],
    reward_values=[0.0, 1.0],
    reward_probabilities=[[[0.95, 0.05], [0.9, 0.1]]],
    initial=[1.0],
    horizon=1,
)
"""Both arms pay 1 now and then."""
NOISY = TabularSpec(
    transitions=[[[1.0], [1.0]]],
    rewards=[[0.0, 0.01]],
    reward_deviation=[[10.0, 10.0]],
    initial=[1.0],
    horizon=1,
)
"""What is better is hidden in noise."""
HARDLY_ENDS = TabularSpec(
    transitions=[[[1.0, 0.0], [1.0 - 1e-9, 1e-9]], [[0.0, 1.0]] * 2],
    rewards=[[0.0, 1.0], [0.0, 0.0]],
    initial=[1.0, 0.0],
    terminal=[1],
    horizon=3,
)
TEMPTING = TabularSpec(
    transitions=[[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]] * 2, [[0.0, 0.0, 1.0]] * 2],
    rewards=[[0.0, 1.0], [10.0, 10.0], [0.0, 0.0]],
    initial=[1.0, 0.0, 0.0],
    terminal=[2],
    horizon=2,
)
"""The first action pays nothing at first and 10 later, the second 1: whoever counts the first step alone takes it."""


def spec(environment: Any, updates: int, **fields: Any) -> TrainingSpec:
    algorithm = {"optimizer": {"kind": "adam", "learning_rate": 0.1}} | fields.pop("algorithm", {})
    stop = {"updates": updates} | fields.pop("stop", {})
    whole = {"environment": environment, "policy": {"kind": "linear"}, "algorithm": algorithm, "stop": stop}
    return TrainingSpec.model_validate(whole | fields)


OTHER_ACTS = {"kind": "per_decision", "behaviour": {"kind": "mixture", "epsilon": 0.99}}
PARTICLE = {"kind": "gymnasium", "id": "pgengine/ParticleContinuous-v0"}
RUNS: dict[str, TrainingSpec] = {
    "returns_alike": spec(bandit(1.0, 1.0), 6),
    "estimates_zero": spec(RARE, 60, algorithm={"trajectories": 3}),
    "episodes_cut": spec(HARDLY_ENDS, 6),
    "entropy_vanished": spec(bandit(0.0, 1.0), 30, algorithm={"optimizer": {"kind": "adam", "learning_rate": 1.0}}),
    "gradient_drowned": spec(NOISY, 200, algorithm={"optimizer": {"kind": "adam", "learning_rate": 0.001}}),
    "target_missed": spec(bandit(0.0, 1.0), 5, stop={"target_return": 2.0}),
    "best_was_earlier": spec(TEMPTING, 60, algorithm={"gamma": 0.0}),
    "actions_saturated": spec(
        PARTICLE, 2, policy={"kind": "linear", "distribution": {"kind": "gaussian", "initial_sigma": 100.0}}
    ),
    "ratios_unusable": spec(
        bandit(0.0, 1.0, 0.5), 50, algorithm={"importance": OTHER_ACTS | {"minimum_effective_sample_size": 0.95}}
    ),
}
"""By the code that each must bring."""


def ended(run: TrainingSpec, evaluated: bool = False) -> list[pgengine.Finding]:
    last = list(pgengine.train(run))[-1]
    evaluation = pgengine.evaluate(last.policy, run.environment, episodes=100) if evaluated else None
    return last.findings(evaluation)


def codes(found: list[pgengine.Finding]) -> list[str]:
    return [finding.code for finding in found]


@pytest.mark.parametrize("code", get_args(FindingCode))
def test_a_run_is_told_what_is_true_of_it(code: str) -> None:
    found = ended(RUNS[code])
    assert code in codes(found)
    for finding in found:
        assert not finding.message.endswith(".")
        assert len(finding.suggestion) > 20


def test_the_figures_of_a_finding_are_those_of_the_run() -> None:
    (alike,) = [f for f in ended(RUNS["returns_alike"]) if f.code == "returns_alike"]
    assert alike.message.startswith("all returns of a batch were alike in each of the 6 updates (mean return 1)")
    zero = next(f for f in ended(RUNS["estimates_zero"]) if f.code == "estimates_zero")
    norms = [update.metrics["gradient_norm"] for update in pgengine.train(RUNS["estimates_zero"])]
    assert f"exactly zero in {norms.count(0.0)} of 60 updates" in zero.message


def test_a_mean_of_fresh_episodes_says_how_it_ended() -> None:
    run = RUNS["target_missed"]
    last = list(pgengine.train(run))[-1]
    fresh = pgengine.evaluate(last.policy, run.environment, episodes=50)
    assert fresh.exact_mean_return is not None
    assert f"the mean return at the end was {fresh.exact_mean_return:.6g}" in last.findings(fresh)[0].message
    sampled = fresh.model_copy(update={"exact_mean_return": None, "confidence_interval": [None, None]})
    assert f"the mean return at the end was {fresh.mean_return:.6g}" in last.findings(sampled)[0].message


def test_an_end_without_an_interval_may_lie_below_the_best() -> None:
    run = RUNS["best_was_earlier"]
    last = list(pgengine.train(run))[-1]
    fresh = pgengine.evaluate(last.policy, run.environment, episodes=50)
    for changes in ({}, {"exact_mean_return": None}, {"exact_mean_return": None, "confidence_interval": [None, None]}):
        assert "best_was_earlier" in codes(last.findings(fresh.model_copy(update=changes)))


@pytest.mark.parametrize("one", [1, 8])
def test_where_the_only_trajectory_of_each_batch_returns_the_same_they_are_alike(one: int) -> None:
    run = spec(bandit(0.5, 0.5), 8, algorithm={"trajectories": one, "baseline": {"kind": "none"}})
    assert "returns_alike" in codes(ended(run))
    differs = spec(bandit(0.0, 1.0), 8, algorithm={"trajectories": one, "baseline": {"kind": "none"}})
    assert "returns_alike" not in codes(ended(differs))


def test_returns_that_are_alike_but_paid_at_other_times_are_not_called_alike() -> None:
    """Both ways pay 1, one of them a step later, which a discount tells apart."""
    late = TEMPTING.model_copy(update={"rewards": [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]})
    assert "returns_alike" in codes(ended(spec(late, 6)))
    assert "returns_alike" not in codes(ended(spec(late, 6, algorithm={"gamma": 0.5})))


def test_a_run_that_learns_is_told_nothing() -> None:
    assert ended(spec(bandit(0.0, 1.0, 0.5), 12), evaluated=True) == []


def test_a_proven_target_leaves_nothing_to_say() -> None:
    run = spec(bandit(1.0, 1.0), 20, stop={"target_return": 0.5})
    last = list(pgengine.train(run))[-1]
    assert (last.stopped_by, last.findings()) == ("target_return", [])


@pytest.mark.parametrize("code", ["estimates_zero", "best_was_earlier", "returns_alike"])
@pytest.mark.parametrize("at", [1, 4, 17])
def test_a_run_that_was_stopped_anywhere_and_resumed_finds_the_same(code: str, at: int) -> None:
    run = RUNS[code].model_copy(update={"stop": StopSpec(updates=30, target_return=None)})
    whole, halted = list(pgengine.train(run))[-1], pgengine.train(run)
    state = next(update.state() for update in halted if update.updates == at)
    resumed = list(pgengine.train(run, resume_from=state))[-1]
    assert resumed.findings() == whole.findings() != []
    (again,) = pgengine.train(run, resume_from=resumed.state())
    assert again.findings() == whole.findings()


def test_sums_are_kept_to_the_bit() -> None:
    run = pgengine.train(spec(small_mdp(0), 9))
    watch = Watch()
    for update in run:
        watch = watch.after(update.metrics, RUNS["returns_alike"].algorithm, update.updates)
        assert Watch.model_validate_json(watch.model_dump_json()) == watch
    assert watch.updates == watch.measured == 9


def test_findings_of_an_update_that_is_gone_are_refused() -> None:
    run = pgengine.train(spec(bandit(0.0, 1.0), 3))
    first = next(run)
    next(run)
    with pytest.raises(RuntimeError, match="yielded last"):
        first.findings()


LAKE = {"kind": "gymnasium", "id": "FrozenLake-v1"}
UNLEARNED = {
    "MountainCar-v0": ({"kind": "gymnasium", "id": "MountainCar-v0"}, 6, {"returns_alike", "episodes_cut"}),
    "FrozenLake-v1, small steps": (LAKE, 60, {"estimates_zero", "target_missed"}),
    "CliffWalking-v1 cut at 100": (
        {"kind": "gymnasium", "id": "CliffWalking-v1", "max_episode_steps": 100}, 150, {"returns_alike"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", UNLEARNED)
def test_a_run_that_learned_nothing_has_findings(name: str) -> None:
    environment, updates, expected = UNLEARNED[name]
    target = 0.7 if environment is LAKE else None
    run = TrainingSpec.model_validate(
        {
            "environment": environment,
            "policy": {"kind": "mlp"},
            "algorithm": {"trajectories": 16, "optimizer": {"kind": "adam", "learning_rate": 0.01}},
            "stop": {"updates": updates, "target_return": target},
        }
    )
    assert expected <= set(codes(ended(run)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_cart_pole_that_is_solved_is_told_nothing(seed: int) -> None:
    """With a target that is proven, and without one."""
    last = list(pgengine.train(TrainingSpec(environment=CARTPOLE, seed=seed)))[-1]
    assert last.stopped_by == "target_return"
    assert last.findings() == last.findings(pgengine.evaluate(last.policy, CARTPOLE, episodes=50)) == []
    further = TrainingSpec(environment=CARTPOLE, seed=seed, stop=StopSpec(updates=1))
    more = list(pgengine.train(further, policy=last.policy.copy()))[-1]
    assert more.findings(pgengine.evaluate(more.policy, CARTPOLE, episodes=50)) == []
