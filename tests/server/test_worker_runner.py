"""What a running job says over its link, and how it follows commands."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from multiprocessing import Pipe
from pathlib import Path

import pytest

import pgengine
from pgengine.spec import (
    AlgorithmSpec,
    EvaluationSpec,
    GymnasiumSpec,
    LinearPolicySpec,
    SgdSpec,
    StopSpec,
    TabularSpec,
    TrainingSpec,
)
from server.jobs.reports import Report, Rival
from server.worker.link import Answer, Command, Finished, Link, LinkClosed, Message, Released, Reported, Start
from server.worker.runner import REPORT_SECONDS, run

BANDIT = TabularSpec(transitions=[[[1.0], [1.0]]], rewards=[[0.0, 1.0]], initial=[1.0], horizon=3)


def start(updates: int, *, checkpoint_seconds: float = 60.0) -> Start:
    spec = TrainingSpec(
        environment=BANDIT,
        policy=LinearPolicySpec(),
        algorithm=AlgorithmSpec(trajectories=4),
        stop=StopSpec(updates=updates, target_return=None),
        evaluation=EvaluationSpec(episodes=10),
    )
    facts = pgengine.describe(BANDIT)
    spec = pgengine.resolve(spec, facts)
    policy = pgengine.create_policy(spec.policy, BANDIT, facts, seed=0)
    return Start("job_1", 0, spec.model_dump(mode="json"), policy.to_bytes(), None, checkpoint_seconds)


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    ours, theirs = (Link(connection) for connection in Pipe())
    yield ours, theirs
    ours.close()
    theirs.close()


def follow(ends: tuple[Link, Link], job: Start, commands: list[Command]) -> tuple[list[Report], Message]:
    """Run the job; its reports and its last message. Reports are answered with the commands, then with continue."""
    ours, theirs = ends
    runner = threading.Thread(target=run, args=(job, theirs))
    runner.start()
    reports: list[Report] = []
    try:
        while isinstance(message := ours.receive(60), Reported):
            # a second report before the answer to this one would be there now
            assert ours.receive(0) is None
            reports.append(message.report)
            ours.send(Answer(commands.pop(0) if commands else "continue"))
        assert message is not None
        return reports, message
    finally:
        runner.join()


def updates_in(reports: list[Report]) -> list[int]:
    return [measured.update for report in reports for measured in report.metrics]


@pytest.mark.slow
def test_every_update_is_reported_once_and_not_too_often(ends: tuple[Link, Link]) -> None:
    began = time.monotonic()
    job = start(300)
    reports, last = follow(ends, job, [])
    seconds = time.monotonic() - began
    assert isinstance(last, Finished)
    assert last.outcome.status == "succeeded"
    assert last.outcome.report is not None
    assert updates_in([*reports, last.outcome.report]) == list(range(1, 301))
    # the checkpoint before the last evaluation does not wait its turn
    assert len(reports) <= seconds / REPORT_SECONDS + 2
    assert reports[0].fingerprint == pgengine.runtime_fingerprint(pgengine.load(job.policy_bytes or b""))
    assert all(report.fingerprint is None for report in reports[1:])


def test_the_end_has_result_and_checkpoint(ends: tuple[Link, Link]) -> None:
    _, last = follow(ends, start(5), [])
    assert isinstance(last, Finished)
    outcome = last.outcome
    assert outcome.result is not None
    assert outcome.report is not None
    snapshot = outcome.report.checkpoint
    assert snapshot is not None
    policy = pgengine.load(snapshot.policy_bytes)
    evaluation = pgengine.evaluate(policy, BANDIT, episodes=10, seed=0).model_dump(mode="json")
    missed = {"target_reached": None, "target_method": None, "target_proven": None, "findings": []}
    assert outcome.result == {"evaluation": evaluation, "stopped_by": "updates", **missed}
    assert (snapshot.updates, snapshot.progress.episodes, snapshot.evaluation) == (5, 20, evaluation)
    # what it is compared with others by is the mean itself, which is known here
    assert snapshot.selection is not None
    assert snapshot.selection["mean_return"] == evaluation["exact_mean_return"]
    assert (snapshot.selection["method"], snapshot.selection["episodes"]) == ("exact", 0)


POLE = GymnasiumSpec(id="CartPole-v1", max_episode_steps=30)


def pole(target: float | None) -> Start:
    """Two updates that change nothing: returns vary, and nothing exact is known."""
    spec = TrainingSpec(
        environment=POLE,
        policy=LinearPolicySpec(),
        algorithm=AlgorithmSpec(trajectories=4, optimizer=SgdSpec(learning_rate=1e-30)),
        stop=StopSpec(updates=2, target_return=target),
        evaluation=EvaluationSpec(episodes=40, deterministic_episodes=0),
    )
    facts = pgengine.describe(POLE)
    spec = pgengine.resolve(spec, facts)
    policy = pgengine.create_policy(spec.policy, POLE, facts, seed=0)
    return Start("job_1", 0, spec.model_dump(mode="json"), policy.to_bytes(), None, 60.0)


def test_what_reached_the_target_is_not_what_is_reported(ends: tuple[Link, Link]) -> None:
    _, last = follow(ends, pole(target=2.0), [])
    assert isinstance(last, Finished)
    assert last.outcome.result is not None
    assert last.outcome.report is not None
    result = last.outcome.result
    assert (result["target_reached"], result["target_method"], result["target_proven"]) == (True, "betting", True)
    snapshot = last.outcome.report.checkpoint
    assert snapshot is not None
    assert snapshot.evaluation == result["evaluation"]
    assert result["evaluation"]["method"] == "betting"


@pytest.mark.parametrize(
    ("mean_return", "is_evaluated", "wins"), [(29.0, False, True), (29.0, True, False), (1.0, False, False)]
)
def test_an_earlier_checkpoint_that_stays_the_best_is_evaluated_on_episodes_of_its_own(
    ends: tuple[Link, Link], mean_return: float, is_evaluated: bool, wins: bool
) -> None:
    """A lucky look saw 29 of a policy that is worth about 20."""
    job = pole(target=None)
    facts = pgengine.describe(POLE)
    earlier = pgengine.create_policy(LinearPolicySpec(), POLE, facts, seed=7)
    data = earlier.copy(updates=0).to_bytes()
    _, last = follow(ends, replace(job, rival=Rival(0, mean_return, data, is_evaluated)), [])
    assert isinstance(last, Finished)
    assert last.outcome.report is not None
    assert last.outcome.report.checkpoint is not None
    assert last.outcome.report.checkpoint.selection is not None
    assert last.outcome.report.checkpoint.selection["mean_return"] < 29.0
    told = last.outcome.report.evaluated
    assert (told is not None) == wins
    if told is not None:
        fresh = pgengine.evaluate(earlier, POLE, episodes=40, seed=0, deterministic_episodes=0)
        assert (told.updates, told.sha256) == (0, sha256(data).hexdigest())
        assert told.evaluation == fresh.model_dump(mode="json")
        assert told.evaluation["mean_return"] < 29.0


@pytest.mark.slow
def test_checkpoints_come_as_often_as_asked(ends: tuple[Link, Link]) -> None:
    reports, _ = follow(ends, start(100, checkpoint_seconds=1e-6), [])
    # each report carries the newest one
    for report in reports:
        assert report.checkpoint is not None
        assert report.progress is not None
        assert report.checkpoint.updates == report.progress.updates


@pytest.mark.parametrize("command", ["cancel", "release"])
def test_a_command_is_followed_at_the_next_update(ends: tuple[Link, Link], command: Command) -> None:
    reports, last = follow(ends, start(10_000_000), ["continue", command])
    if command == "cancel":
        assert isinstance(last, Finished)
        assert last.outcome.status == "cancelled"
        report = last.outcome.report
    else:
        assert isinstance(last, Released)
        report = last.report
    assert len(reports) == 2
    assert report is not None
    assert report.checkpoint is not None
    numbers = updates_in([*reports, report])
    assert numbers == list(range(1, numbers[-1] + 1))
    assert report.checkpoint.updates == numbers[-1]


@pytest.mark.slow
def test_a_released_job_ends_like_an_undisturbed_one(ends: tuple[Link, Link]) -> None:
    job = start(300)
    _, undisturbed = follow(ends, job, [])
    _, released = follow(ends, job, ["release"])
    assert isinstance(released, Released)
    snapshot = released.report.checkpoint
    assert snapshot is not None
    assert 0 < snapshot.updates < 300
    resumed = replace(
        job, updates=snapshot.updates, policy_bytes=snapshot.policy_bytes, state_bytes=snapshot.state_bytes
    )
    reports, last = follow(ends, resumed, [])
    assert isinstance(last, Finished)
    assert isinstance(undisturbed, Finished)
    assert last.outcome.report is not None
    assert undisturbed.outcome.report is not None
    assert updates_in([*reports, last.outcome.report]) == list(range(snapshot.updates + 1, 301))
    ends_at, expected = last.outcome.report.checkpoint, undisturbed.outcome.report.checkpoint
    assert ends_at is not None
    assert expected is not None
    assert ends_at.policy_bytes == expected.policy_bytes
    assert ends_at.progress == expected.progress
    assert last.outcome.result == undisturbed.outcome.result


def test_a_finished_job_that_is_resumed_repeats_only_its_evaluation(ends: tuple[Link, Link]) -> None:
    job = start(5)
    _, first = follow(ends, job, [])
    assert isinstance(first, Finished)
    assert first.outcome.report is not None
    snapshot = first.outcome.report.checkpoint
    assert snapshot is not None
    resumed = replace(job, updates=5, policy_bytes=snapshot.policy_bytes, state_bytes=snapshot.state_bytes)
    reports, last = follow(ends, resumed, [])
    assert isinstance(last, Finished)
    assert last.outcome.report is not None
    assert updates_in([*reports, last.outcome.report]) == []
    assert last.outcome.result == first.outcome.result


@pytest.mark.parametrize("damage", ["policy", "state", "spec"])
def test_what_cannot_be_read_fails_without_insides(ends: tuple[Link, Link], damage: str) -> None:
    job = start(5)
    if damage == "policy":
        job = replace(job, policy_bytes=job.policy_bytes[:-9])
    elif damage == "state":
        job = replace(job, state_bytes=b"no state")
    else:
        job = replace(job, spec={**job.spec, "algorithm": {"secret_field": 1}})
    reports, last = follow(ends, job, [])
    assert reports == []
    assert isinstance(last, Finished)
    assert last.outcome.status == "failed"
    assert last.outcome.failure is not None
    assert last.outcome.failure.code == "internal"
    assert "secret_field" not in last.outcome.failure.message
    assert last.outcome.report is not None
    assert last.outcome.report.progress is None


def test_a_closed_link_ends_the_run(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    ours.close()
    with pytest.raises(LinkClosed):
        run(start(5), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [("trainer", ["sqlalchemy", "fastapi"]), ("supervisor", ["torch", "gymnasium", "fastapi"])],
)
def test_each_side_imports_only_what_is_its_own(module: str, absent: list[str]) -> None:
    program = f"import sys, server.worker.{module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_module_that_cannot_be_imported_ends_the_trainer_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "failing_environments.py").write_text("raise ValueError('no licence')")
    ours, theirs = Pipe()
    with ours, theirs:
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "server.worker.trainer", "--link", str(theirs.fileno()), "--threads", "1"),
                *("--memory", str(2**32)),
                *("--module", "failing_environments"),
            ],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [(line["event"], line["module"], line["error"]) for line in lines] == [
        ("module_not_imported", "failing_environments", "ValueError: no licence")
    ]


def test_a_job_that_learned_nothing_says_so_and_a_resumed_one_too(ends: tuple[Link, Link]) -> None:
    """All rewards are alike: findings are made of sums over all updates, those before the release among them."""
    job = start(8)
    alike = job.spec | {"environment": BANDIT.model_copy(update={"rewards": [[1.0, 1.0]]}).model_dump(mode="json")}
    job = replace(job, spec=alike)
    _, whole = follow(ends, job, [])
    assert isinstance(whole, Finished)
    assert whole.outcome.result is not None
    (finding,) = whole.outcome.result["findings"]
    assert (finding["code"], finding["suggestion"] != "") == ("returns_alike", True)
    assert "in each of the 8 updates" in finding["message"]
    reports, released = follow(ends, job, ["release"])
    assert isinstance(released, Released)
    kept = [report.checkpoint for report in [*reports, released.report] if report.checkpoint is not None][-1]
    again = replace(job, updates=kept.updates, policy_bytes=kept.policy_bytes, state_bytes=kept.state_bytes)
    _, resumed = follow(ends, again, [])
    assert isinstance(resumed, Finished)
    assert resumed.outcome.result == whole.outcome.result
