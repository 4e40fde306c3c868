"""The state machine of jobs, on both databases: who may write what, and what readers see of it."""

import contextlib
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, func, select, update

from server.checkpoints import store as checkpoints
from server.database import Database, now
from server.errors import NotCancellable, NotFound, NotTerminal, PolicyBusy
from server.ids import new_id
from server.jobs import history, store
from server.jobs.reports import Claim, Evaluated, Failure, Measured, Outcome, Progress, Report, Rival, Snapshot
from server.pages import PageQuery
from server.tables import Checkpoint, CheckpointContent, Environment, Event, Job, Metric, MetricBlock, Policy
from server.worker.reaper import reap_until

LEASE = 30.0
ENVIRONMENT = {"kind": "gymnasium", "id": "CartPole-v1"}


@pytest.fixture
def new_policy(database: Database) -> Callable[[], Policy]:
    """Makes policies, each in an environment of its own and with its checkpoint 0."""

    def make() -> Policy:
        environment = Environment(id=new_id("env"), content_hash=new_id("env"), spec=ENVIRONMENT, facts={})
        policy = Policy(id=new_id("pol"), environment_id=environment.id, spec={}, seed=0)
        with database.write() as session:
            session.add(environment)
            session.flush()
            session.add(policy)
            session.flush()
            checkpoints.put(session, policy.id, 0, b"policy 0")
        return policy

    return make


@pytest.fixture
def new_job(database: Database, new_policy: Callable[[], Policy]) -> Callable[..., Job]:
    """Makes queued jobs, each for a policy of its own unless one is given."""

    def make(policy: Policy | None = None, **changes: Any) -> Job:
        policy = policy or new_policy()
        with database.write() as session:
            return store.create(
                session,
                policy_id=policy.id,
                environment_id=policy.environment_id,
                start_updates=0,
                spec={"environment": ENVIRONMENT, "seed": 7},
                label={"kind": "exact"},
                **{"max_attempts": 3, **changes},
            )

    return make


def claim(database: Database, worker: str = "worker", lease_seconds: float = LEASE) -> Claim:
    with database.write() as session:
        claimed = store.claim(session, worker, lease_seconds)
    assert claimed is not None
    return claimed


def report_to(database: Database, claimed: Claim, report: Report) -> str:
    with database.write() as session:
        return store.report(session, claimed.job_id, claimed.token, report)


def finish(database: Database, claimed: Claim, outcome: Outcome) -> None:
    with database.write() as session:
        store.finish(session, claimed.job_id, claimed.token, outcome)


def job_of(database: Database, job_id: str) -> Job:
    with database.read() as session:
        return store.get(session, job_id)


def events_of(database: Database, job_id: str, after: int = 0) -> list[dict[str, Any]]:
    with database.read() as session:
        return history.events(session, job_id, after)


def statuses_of(database: Database, job_id: str) -> list[str]:
    return [event["data"]["status"] for event in events_of(database, job_id) if event["type"] == "status"]


def expire(database: Database, job_id: str) -> None:
    """Let the database's clock be past the lease, as after a long silence."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=now(-1)))


def updates(first: int, last: int, **values: float) -> Report:
    measured = tuple(Measured(n, 10 * n, {"mean_return": float(n), **values}) for n in range(first, last + 1))
    return Report(Progress(last, 10 * last, 2 * last, last / 100), measured)


def with_checkpoint(
    report: Report, evaluation: dict[str, Any] | None = None, selection: dict[str, Any] | None = None
) -> Report:
    assert report.progress is not None
    n = report.progress.updates
    snapshot = Snapshot(n, report.progress, f"policy {n}".encode(), f"state {n}".encode(), selection, evaluation)
    return Report(report.progress, report.metrics, snapshot)


SUCCEEDED = Outcome("succeeded", result={"evaluation": {"mean_return": 475.0}, "stopped_by": "updates"})


# --- creation and the queue ------------------------------------------------------------------------------------------


def test_a_new_job_is_queued_and_says_so(database: Database, new_job: Callable[..., Job]) -> None:
    job = new_job(name="cartpole", metadata={"team": "a"})
    stored = job_of(database, job.id)
    assert (stored.status, stored.attempt, stored.token, stored.name) == ("queued", 1, 0, "cartpole")
    assert stored.metadata_ == {"team": "a"}
    (event,) = events_of(database, job.id)
    assert event["data"] == {"status": "queued", "is_terminal": False, "attempt": 1}
    assert (event["object"], event["job_id"], event["seq"], event["type"]) == ("event", job.id, 1, "status")


def test_a_policy_has_one_job_that_has_not_ended(database: Database, new_job: Any, new_policy: Any) -> None:
    policy = new_policy()
    job = new_job(policy)
    with pytest.raises(PolicyBusy):
        new_job(policy)
    with database.write() as session:
        store.request_cancel(session, job.id)
    assert new_job(policy).status == "queued"


def test_jobs_are_claimed_oldest_first(database: Database, new_job: Any) -> None:
    jobs = [new_job() for _ in range(3)]
    assert [claim(database).job_id for _ in jobs] == [job.id for job in jobs]
    with database.write() as session:
        assert store.claim(session, "worker", LEASE) is None


def test_a_claim_has_all_that_is_needed_to_begin(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database, "host:1")
    assert claimed == Claim(job.id, 1, 1, {"seed": 7, "environment": ENVIRONMENT}, 0, 0, b"policy 0", None)
    assert job_of(database, job.id).spec == {"seed": 7}, "the environment is kept once, in its own row"
    held = job_of(database, job.id)
    assert (held.status, held.worker) == ("running", "host:1")
    assert held.started_at is not None
    assert held.lease_expires_at is not None
    assert held.lease_expires_at - held.started_at == timedelta(seconds=LEASE)
    assert statuses_of(database, job.id) == ["queued", "running"]
    assert [event["type"] for event in events_of(database, job.id)] == ["status", "status"]


def test_of_eight_claimers_of_one_job_one_wins(database: Database, new_job: Any) -> None:
    new_job()
    barrier = threading.Barrier(8)

    def try_to(number: int) -> Claim | None:
        barrier.wait()
        with database.write() as session:
            return store.claim(session, f"worker {number}", LEASE)

    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(try_to, range(8)))
    assert sum(each is not None for each in claims) == 1


def test_eight_claimers_share_forty_jobs_without_a_double(database: Database, new_job: Any) -> None:
    jobs = {new_job().id for _ in range(40)}
    barrier = threading.Barrier(8)

    def claim_all(number: int) -> list[str]:
        barrier.wait()
        mine = []
        while True:
            with database.write() as session:
                claimed = store.claim(session, f"worker {number}", LEASE)
            if claimed is None:
                return mine
            mine.append(claimed.job_id)

    with ThreadPoolExecutor(8) as pool:
        claimed = [job_id for mine in pool.map(claim_all, range(8)) for job_id in mine]
    assert len(claimed) == 40
    assert set(claimed) == jobs


def test_a_queued_job_says_why_it_waits(database: Database, new_job: Any) -> None:
    first, second, third = new_job(), new_job(), new_job()
    with database.read() as session:
        reasons = store.queue_reasons(session, [third, first, second])
    assert {job_id: (reason.code, reason.ahead) for job_id, reason in reasons.items()} == {
        first.id: ("waiting_for_worker", 0),
        second.id: ("behind", 1),
        third.id: ("behind", 2),
    }
    claim(database)
    with database.read() as session:
        reasons = store.queue_reasons(session, [store.get(session, first.id), second])
    assert {job_id: reason.code for job_id, reason in reasons.items()} == {second.id: "workers_busy"}


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_moves_progress_and_is_one_event_for_a_range(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    assert report_to(database, claimed, updates(1, 3)) == "continue"
    stored = job_of(database, job.id)
    assert (stored.updates, stored.env_steps, stored.episodes, stored.fraction) == (3, 30, 6, 0.03)
    assert stored.last_progress_at is not None
    (event,) = events_of(database, job.id, after=2)
    assert event["type"] == "metrics"
    assert event["data"] == {
        "from_update": 1,
        "to_update": 3,
        "metrics": [{"update": n, "mean_return": float(n), "nonfinite": []} for n in (1, 2, 3)],
    }


def test_numbers_that_are_not_finite_are_null_and_named(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    report_to(database, claimed, updates(1, 1, entropy=math.nan, gradient_norm=math.inf))
    (event,) = events_of(database, job.id, after=2)
    assert event["data"]["metrics"] == [
        {
            "update": 1,
            "mean_return": 1.0,
            "entropy": None,
            "gradient_norm": None,
            "nonfinite": ["entropy", "gradient_norm"],
        }
    ]
    with database.read() as session:
        curves = history.metrics(session, job.id)
    assert curves.values == {"mean_return": [1.0], "entropy": [None], "gradient_norm": [None]}
    assert curves.nonfinite == {"entropy": [1], "gradient_norm": [1]}


def test_a_checkpoint_is_kept_with_state_and_evaluation(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    evaluation = {"mean_return": 12.0, "confidence_interval": [-math.inf, math.inf], "episodes": 100}
    selection = {"mean_return": math.nan, "lower_bound": 3.0, "method": "t", "error": 0.025, "episodes": 30}
    report_to(database, claimed, with_checkpoint(updates(1, 5), evaluation, selection))
    with database.read() as session:
        latest = checkpoints.latest(session, job.policy_id)
        assert latest.selection == selection | {"mean_return": None}
        assert (latest.updates, latest.job_id) == (5, job.id)
        assert latest.evaluation == {"mean_return": 12.0, "confidence_interval": [None, None], "episodes": 100}
        assert checkpoints.state(session, latest.id) == b"state 5"
    told = events_of(database, job.id, after=2)
    assert [event["type"] for event in told] == ["metrics", "checkpoint", "evaluation", "evaluation"]
    looked, reported = (event["data"] for event in told[2:])
    named = {"checkpoint_id": latest.id, "updates": 5}
    assert looked == named | {"purpose": "selection", "selection": latest.selection}
    assert reported == named | {"purpose": "report", "evaluation": latest.evaluation}


def test_who_claims_a_job_is_told_the_best_checkpoint_so_far(database: Database, new_job: Any) -> None:
    new_job()
    claimed = claim(database)
    assert claimed.rival is None
    report_to(database, claimed, with_checkpoint(updates(1, 5), selection={"mean_return": 7.0}))
    report_to(database, claimed, with_checkpoint(updates(6, 8), selection={"mean_return": 5.0}))
    with database.write() as session:
        store.release(session, claimed.job_id, claimed.token, "shutdown")
    again = claim(database)
    assert again.updates == 8
    assert again.rival == Rival(5, 7.0, b"policy 5", is_evaluated=False)


def test_an_evaluation_of_an_earlier_checkpoint_is_kept_with_it(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    report_to(database, claimed, with_checkpoint(updates(1, 5), selection={"mean_return": 7.0}))
    of_best = Evaluated(5, sha256(b"policy 5").hexdigest(), {"mean_return": 4.0})
    of_another = Evaluated(5, sha256(b"policy").hexdigest(), {"mean_return": 9.0})
    for evaluated in (of_best, of_another):
        last = with_checkpoint(updates(6, 8), {"mean_return": 3.0}, {"mean_return": 5.0})
        report_to(database, claimed, replace(last, evaluated=evaluated))
    with database.read() as session:
        best = checkpoints.best(session, job.policy_id)
        assert best is not None
        assert (best.updates, best.selection, best.evaluation) == (5, {"mean_return": 7.0}, {"mean_return": 4.0})
    told = [event["data"] for event in events_of(database, job.id) if event["data"].get("updates") == 5]
    assert told[-1] == {
        "checkpoint_id": best.id, "updates": 5, "purpose": "report", "evaluation": {"mean_return": 4.0}
    }  # fmt: skip


def states_of(database: Database, job_id: str) -> list[int]:
    """Updates at which a state of the job is kept."""
    statement = select(Checkpoint.updates).join(CheckpointContent, CheckpointContent.checkpoint_id == Checkpoint.id)
    kept = statement.where(Checkpoint.job_id == job_id, CheckpointContent.state_bytes.is_not(None))
    with database.read() as session:
        return list(session.scalars(kept.order_by(Checkpoint.updates)))


def test_old_updates_are_played_again_from_the_state_before_them(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    for last in (5, 9, 20):
        report_to(database, claimed, with_checkpoint(updates(last - 3, last)))
    with database.read() as session:
        found = {update: store.explainable(session, job.id, update) for update in (5, 6, 9, 10, 20)}
    states = {update: each.state_bytes for update, each in found.items()}
    assert states == {5: None, 6: b"state 5", 9: b"state 5", 10: b"state 9", 20: b"state 9"}
    assert (found[5].policy_bytes, found[6].policy_bytes) == (b"policy 0", None)
    # what is played again is compared with what was recorded of it
    assert list(found[9].recorded) == [6, 7, 8, 9]
    assert found[9].recorded[9] == {"mean_return": 9.0}


def test_states_are_kept_evenly_and_their_number_is_bounded(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    last = 2 * checkpoints.MOST_STATES
    with database.write() as session:
        instant = session.scalar(select(now()))
        assert instant is not None
        for n in range(1, last):
            # a checkpoint every five seconds
            at = instant - timedelta(seconds=5 * (last - n))
            row = Checkpoint(id=new_id("ckpt"), policy_id=job.policy_id, job_id=job.id, updates=n, size=1, sha256="0")
            row.created_at = at
            session.add(row)
            session.flush()
            session.add(CheckpointContent(checkpoint_id=row.id, policy_bytes=b"p", state_bytes=b"s"))
    report_to(database, claimed, with_checkpoint(updates(1, last)))
    kept = states_of(database, job.id)
    assert len(kept) == checkpoints.MOST_STATES
    assert kept[-1] == last
    # a replay begins at most three checkpoints before its update, where twice as many were made as are kept
    assert max(after - before for before, after in pairwise([0, *kept])) <= 3
    with database.read() as session:
        assert store.explainable(session, job.id, last // 2).state_bytes is not None


def test_large_states_leave_room_for_the_newest_alone(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    size = checkpoints.MOST_STATE_BYTES // 2 + 1
    for n in (1, 2, 3):
        snapshot = Snapshot(n, Progress(n), f"policy {n}".encode(), bytes([n]) * size)
        report_to(database, claimed, Report(Progress(n), checkpoint=snapshot))
        assert states_of(database, job.id) == [n]


def test_states_go_with_their_job(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    for n in (1, 2):
        report_to(database, claimed, with_checkpoint(updates(n, n)))
    finish(database, claimed, SUCCEEDED)
    assert states_of(database, job.id) == [1, 2]
    with database.write() as session:
        store.delete(session, job.id)
    with database.read() as session:
        kept = session.scalars(select(CheckpointContent.state_bytes).where(CheckpointContent.state_bytes.is_not(None)))
        assert kept.all() == []


def test_the_runtime_is_kept_and_another_one_is_an_event(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    report_to(database, claimed, Report(fingerprint={"torch": "2.13", "threads": 2}))
    report_to(database, claimed, Report(fingerprint={"torch": "2.13", "threads": 2}))
    assert [event["type"] for event in events_of(database, job.id, after=2)] == []
    report_to(database, claimed, Report(fingerprint={"torch": "2.14", "threads": 2}))
    (event,) = events_of(database, job.id, after=2)
    assert (event["type"], event["data"]["code"], event["data"]["changed"]) == ("log", "runtime_changed", ["torch"])
    assert job_of(database, job.id).fingerprint == {"torch": "2.14", "threads": 2}


# --- ends ------------------------------------------------------------------------------------------------------------


def test_success_keeps_result_and_checkpoint_at_once(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    last = with_checkpoint(updates(1, 8), {"mean_return": 475.0})
    finish(database, claimed, Outcome("succeeded", last, SUCCEEDED.result))
    stored = job_of(database, job.id)
    with database.read() as session:
        checkpoint = checkpoints.latest(session, job.policy_id)
    assert stored.result == {**(SUCCEEDED.result or {}), "checkpoint_id": checkpoint.id}
    assert (stored.status, stored.fraction, stored.worker, stored.lease_expires_at) == ("succeeded", 1.0, None, None)
    assert stored.finished_at is not None
    last_event = events_of(database, job.id)[-1]
    assert last_event["data"]["status"] == "succeeded"
    assert last_event["data"]["is_terminal"] is True
    assert last_event["data"]["result"] == stored.result


def test_failure_has_a_code_and_a_message(database: Database, new_job: Any) -> None:
    job = new_job()
    finish(database, claim(database), Outcome("failed", failure=Failure("diverged", "not finite in update 3")))
    stored = job_of(database, job.id)
    assert stored.status == "failed"
    assert stored.failure == {"code": "diverged", "message": "not finite in update 3"}
    assert events_of(database, job.id)[-1]["data"]["failure"] == stored.failure


def test_an_ended_job_is_not_written_again(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    finish(database, claimed, SUCCEEDED)
    before = events_of(database, job.id)
    with pytest.raises(store.LeaseLost):
        finish(database, claimed, Outcome("failed", failure=Failure("internal", "late")))
    with pytest.raises(store.LeaseLost):
        report_to(database, claimed, updates(1, 1))
    assert events_of(database, job.id) == before


def test_a_running_job_cannot_end_as_cancelled_unasked(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    with pytest.raises(ValueError, match="cannot go from running to cancelled"):
        finish(database, claimed, Outcome("cancelled"))
    assert job_of(database, job.id).status == "running"


# --- cancellation ----------------------------------------------------------------------------------------------------


def cancel(database: Database, job_id: str) -> str:
    with database.write() as session:
        return store.request_cancel(session, job_id).status


def test_a_queued_job_is_cancelled_at_once_and_again_without_effect(database: Database, new_job: Any) -> None:
    job = new_job()
    assert cancel(database, job.id) == "cancelled"
    assert cancel(database, job.id) == "cancelled"
    assert statuses_of(database, job.id) == ["queued", "cancelled"]
    assert job_of(database, job.id).finished_at is not None
    with database.read() as session:
        assert not store.any_queued(session)


def test_a_running_job_hears_of_its_cancellation_with_an_answer(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    assert cancel(database, job.id) == "cancelling"
    assert cancel(database, job.id) == "cancelling"
    # the holder's last writes are accepted
    assert report_to(database, claimed, updates(1, 2)) == "cancel"
    finish(database, claimed, Outcome("cancelled", with_checkpoint(updates(3, 4))))
    stored = job_of(database, job.id)
    assert (stored.status, stored.updates) == ("cancelled", 4)
    assert statuses_of(database, job.id) == ["queued", "running", "cancelling", "cancelled"]
    with database.read() as session:
        assert checkpoints.latest(session, job.policy_id).updates == 4


def test_a_job_that_succeeds_before_it_hears_of_its_cancellation_has_succeeded(
    database: Database, new_job: Any
) -> None:
    job = new_job()
    claimed = claim(database)
    cancel(database, job.id)
    finish(database, claimed, SUCCEEDED)
    assert job_of(database, job.id).status == "succeeded"


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_an_ended_job_cannot_be_cancelled(database: Database, new_job: Any, status: Any) -> None:
    job = new_job()
    finish(database, claim(database), Outcome(status, failure=Failure("internal", "") if status == "failed" else None))
    with pytest.raises(NotCancellable) as caught:
        cancel(database, job.id)
    assert caught.value.headers["x-should-retry"] == "false"


def test_a_cancelling_job_whose_worker_is_lost_is_cancelled(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    cancel(database, job.id)
    with database.write() as session:
        store.lose(session, claimed.job_id, claimed.token, "the trainer ended by signal 9")
    stored = job_of(database, job.id)
    assert (stored.status, stored.attempt) == ("cancelled", 1)


def test_an_unknown_job_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound), database.read() as session:
        store.get(session, new_id("job"))
    with pytest.raises(NotFound):
        cancel(database, new_id("job"))


# --- crashes ---------------------------------------------------------------------------------------------------------


def lose(database: Database, claimed: Claim) -> None:
    with database.write() as session:
        store.lose(session, claimed.job_id, claimed.token, "the trainer ended by signal 9")


def test_a_crash_queues_the_next_attempt_which_goes_on_from_the_checkpoint(database: Database, new_job: Any) -> None:
    job = new_job()
    first = claim(database)
    report_to(database, first, with_checkpoint(updates(1, 5)))
    report_to(database, first, updates(6, 8))
    lose(database, first)
    queued = job_of(database, job.id)
    assert (queued.status, queued.attempt, queued.worker) == ("queued", 2, None)
    reason = events_of(database, job.id)[-1]["data"]["reason"]
    assert reason == "the trainer ended by signal 9"

    second = claim(database)
    assert (second.token, second.attempt, second.updates) == (2, 2, 5)
    assert (second.policy_bytes, second.state_bytes) == (b"policy 5", b"state 5")
    resumed = job_of(database, job.id)
    assert (resumed.updates, resumed.env_steps, resumed.episodes, resumed.fraction) == (5, 50, 10, 0.05)
    assert resumed.started_at == queued.started_at
    rewind = events_of(database, job.id)[-1]
    assert (rewind["type"], rewind["data"], rewind["attempt"]) == ("rewind", {"to_update": 5}, 2)
    with database.read() as session:
        assert history.metrics(session, job.id).updates == [1, 2, 3, 4, 5]


def test_a_repeated_update_overwrites_and_names_its_attempt(database: Database, new_job: Any) -> None:
    job = new_job()
    first = claim(database)
    report_to(database, first, with_checkpoint(updates(1, 2)))
    report_to(database, first, updates(3, 4))
    lose(database, first)
    report_to(database, claim(database), updates(3, 5, entropy=0.5))
    with database.read() as session:
        curves = history.metrics(session, job.id)
    assert curves.updates == [1, 2, 3, 4, 5]
    assert curves.attempts == [1, 1, 2, 2, 2]
    assert curves.values["entropy"] == [None, None, 0.5, 0.5, 0.5]


def test_a_crash_before_the_first_checkpoint_begins_again(database: Database, new_job: Any) -> None:
    job = new_job()
    first = claim(database)
    report_to(database, first, updates(1, 4))
    lose(database, first)
    second = claim(database)
    assert (second.updates, second.state_bytes) == (0, None)
    assert job_of(database, job.id).updates == 0
    assert events_of(database, job.id)[-1]["data"] == {"to_update": 0}


def test_a_job_on_a_trained_policy_begins_without_state(database: Database, new_job: Any, new_policy: Any) -> None:
    policy = new_policy()
    new_job(policy)
    finish(database, claim(database), Outcome("succeeded", with_checkpoint(updates(1, 6)), {}))
    job = new_job(policy)
    claimed = claim(database)
    assert (claimed.updates, claimed.policy_bytes, claimed.state_bytes) == (6, b"policy 6", None)
    assert [event["type"] for event in events_of(database, job.id)] == ["status", "status"]


def test_the_last_crash_fails_the_job(database: Database, new_job: Any) -> None:
    job = new_job(max_attempts=2)
    lose(database, claim(database))
    lose(database, claim(database))
    stored = job_of(database, job.id)
    assert (stored.status, stored.attempt) == ("failed", 2)
    assert stored.failure is not None
    assert stored.failure["code"] == "worker_lost"


def test_a_released_job_goes_on_with_the_same_attempt(database: Database, new_job: Any) -> None:
    job = new_job()
    first = claim(database)
    with database.write() as session:
        store.release(session, first.job_id, first.token, "the worker was stopped", with_checkpoint(updates(1, 3)))
    released = job_of(database, job.id)
    assert (released.status, released.attempt, released.lease_expires_at) == ("queued", 1, None)
    second = claim(database)
    assert (second.token, second.attempt, second.updates, second.state_bytes) == (2, 1, 3, b"state 3")


def test_a_released_job_keeps_its_place_in_the_queue(database: Database, new_job: Any) -> None:
    job = new_job()
    first = claim(database)
    new_job()
    lose(database, first)
    assert claim(database).job_id == job.id


def test_an_expired_lease_is_reaped_and_a_live_one_is_not(database: Database, new_job: Any) -> None:
    lost, live = new_job(), new_job()
    claim(database)
    claim(database)
    with database.read() as session:
        assert not store.any_expired(session)
    expire(database, lost.id)
    with database.read() as session:
        assert store.any_expired(session)
    with database.write() as session:
        assert store.reap(session) == 1
    with database.write() as session:
        assert store.reap(session) == 0
    assert (job_of(database, lost.id).status, job_of(database, lost.id).attempt) == ("queued", 2)
    assert job_of(database, live.id).status == "running"


def test_a_renewed_lease_does_not_expire(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    expire(database, job.id)
    with database.write() as session:
        assert store.renew(session, job.id, claimed.token, LEASE)
        assert not store.renew(session, job.id, claimed.token + 1, LEASE)
    with database.write() as session:
        assert store.reap(session) == 0


def test_a_zombie_can_write_nothing(database: Database, new_job: Any) -> None:
    job = new_job()
    zombie = claim(database, "zombie")
    report_to(database, zombie, with_checkpoint(updates(1, 2)))
    expire(database, job.id)
    with database.write() as session:
        store.reap(session)

    def attempt_all_writes() -> None:
        snapshot = with_checkpoint(updates(1, 9))
        with database.write() as session:
            assert not store.renew(session, job.id, zombie.token, LEASE)
        for write in (
            lambda s: store.report(s, job.id, zombie.token, snapshot),
            lambda s: store.finish(s, job.id, zombie.token, Outcome("succeeded", snapshot, {})),
            lambda s: store.release(s, job.id, zombie.token, "late", snapshot),
            lambda s: store.lose(s, job.id, zombie.token, "late"),
        ):
            with pytest.raises(store.LeaseLost), database.write() as session:
                write(session)

    # while the job is queued again, while another worker has it, and after it has ended
    attempt_all_writes()
    heir = claim(database, "heir")
    attempt_all_writes()
    finish(database, heir, Outcome("succeeded", with_checkpoint(updates(3, 4)), {}))
    attempt_all_writes()
    stored = job_of(database, job.id)
    assert (stored.status, stored.updates, stored.attempt) == ("succeeded", 4, 2)
    with database.read() as session:
        assert checkpoints.latest(session, job.policy_id).updates == 4


def test_a_reaper_and_a_finishing_holder_do_not_both_write(database: Database, new_job: Any) -> None:
    for _ in range(5):
        job = new_job()
        claimed = claim(database)
        expire(database, job.id)
        barrier = threading.Barrier(2)

        def reap(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with database.write() as session:
                store.reap(session)

        def end(claimed: Claim = claimed, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with contextlib.suppress(store.LeaseLost):
                finish(database, claimed, SUCCEEDED)

        with ThreadPoolExecutor(2) as pool:
            for future in (pool.submit(reap), pool.submit(end)):
                future.result()
        last = statuses_of(database, job.id)[2:]
        assert last in (["succeeded"], ["queued"])
        if last == ["queued"]:
            cancel(database, job.id)


# --- readers ---------------------------------------------------------------------------------------------------------


def test_the_order_of_commits_is_the_order_of_seq(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    ended = threading.Event()
    seen: list[int] = []

    def follow() -> None:
        last = 0
        while True:
            over = ended.is_set()
            with database.read() as session:
                page = history.events(session, job.id, last, 7)
            for event in page:
                seen.append(event["seq"])
                last = event["seq"]
            if over and not page:
                return

    def write(number: int) -> None:
        for n in range(10):
            report_to(database, claimed, updates(100 * number + n, 100 * number + n))

    reader = threading.Thread(target=follow)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    ended.set()
    reader.join()
    # a tail that reads on from the last number it has seen misses none
    assert seen == list(range(1, 43))
    with database.read() as session:
        assert history.heads(session, [job.id, new_id("job")]) == {job.id: history.Head(42, is_terminal=False)}


def test_events_come_in_pages(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    for n in range(1, 6):
        report_to(database, claimed, updates(n, n))
    with database.read() as session:
        first = history.events(session, job.id, 0, 4)
        second = history.events(session, job.id, first[-1]["seq"], 4)
        assert history.events(session, new_id("job")) == []
    assert [event["seq"] for event in first + second] == [1, 2, 3, 4, 5, 6, 7]


def test_curves_keep_each_bucket_s_peaks_of_each_metric(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)

    def measured(n: int) -> Measured:
        return Measured(n, n, {"a": 1e6 if n == 777 else n % 10, "b": -1e6 if n == 1234 else n % 7})

    report_to(database, claimed, Report(Progress(2000), tuple(measured(n) for n in range(1, 2001))))
    with database.read() as session:
        curves = history.metrics(session, job.id, ["a", "b"], max_points=100)
        one = history.metrics(session, job.id, ["a"], max_points=100)
        part = history.metrics(session, job.id, ["a"], from_update=1990, max_points=100)
        unknown = history.metrics(session, job.id, ["c"], max_points=100)
    assert curves.recorded == 2000
    assert len(curves.updates) <= 100
    assert curves.updates[0] == 1
    assert curves.updates[-1] == 2000
    assert max(v for v in curves.values["a"] if v is not None) == 1e6
    assert min(v for v in curves.values["b"] if v is not None) == -1e6
    assert curves.updates == sorted(curves.updates)
    assert len(one.updates) <= 100
    # of each of the 49 buckets of one curve the least and the greatest value are there
    for bucket in range(49):
        low, high = bucket * 2000 // 49 + 1, (bucket + 1) * 2000 // 49
        inside = [value for n, value in zip(one.updates, one.values["a"], strict=True) if low <= n <= high]
        expected = [measured(n).values["a"] for n in range(low, high + 1)]
        assert min(inside) == min(expected)  # type: ignore[type-var]
        assert max(inside) == max(expected)  # type: ignore[type-var]
    assert part.updates == list(range(1990, 2001))
    assert unknown.values == {"c": [None, None]}


def irregular(update: int) -> Measured:
    """Metrics that come and go, and are infinite or not a number now and then."""
    values = {"mean_return": math.sin(update) * update, "entropy": math.inf if update % 97 == 0 else 1 / update}
    if update % 3 == 0:
        values["gradient_noise"] = math.nan if update % 5 == 0 else float(update)
    if update > 700:
        values["exact_return"] = -float(update)
    return Measured(update, 10 * update, values)


def published(measured: Measured) -> dict[str, Any]:
    """An update as events show it."""
    nonfinite = [name for name, value in measured.values.items() if not math.isfinite(value)]
    return {"update": measured.update, **history.finite(measured.values), "nonfinite": nonfinite}


@pytest.mark.parametrize("size", [1, 100, 512, 2000])
def test_a_long_history_says_the_same_however_it_came(database: Database, new_job: Any, size: int) -> None:
    count = 300 if size == 1 else 2000
    job = new_job()
    claimed = claim(database)
    expected = {update: irregular(update) for update in range(1, count + 1)}
    for first in range(1, count + 1, size):
        part = tuple(expected[update] for update in range(first, min(first + size, count + 1)))
        report_to(database, claimed, Report(Progress(part[-1].update), part))
    with database.read() as session:
        # what is a row each is bounded, and what is read of a long job is not parsed update by update
        assert (session.scalar(select(func.count()).select_from(Metric)) or 0) < 2 * history.BLOCK
        whole = history.metrics(session, job.id, max_points=10_000)
        part_ = history.metrics(session, job.id, ["entropy", "absent"], from_update=count - 57)
        seen = [row for event in history.events(session, job.id, 2, 10_000) for row in event["data"]["metrics"]]
        assert set(history.names(session, job.id)) >= {"mean_return", "entropy", *history.METRICS}
    assert seen == [published(measured) for measured in expected.values()]
    assert whole.updates == list(expected)
    assert (whole.env_steps, set(whole.attempts)) == ([10 * update for update in expected], {1})
    for name, column in whole.values.items():
        assert column == [history.finite(measured.values).get(name) for measured in expected.values()]
    infinite = {
        name: [n for n, measured in expected.items() if not math.isfinite(measured.values.get(name, 0.0))]
        for name in whole.values
    }
    assert whole.nonfinite == {name: found for name, found in infinite.items() if found}
    assert (part_.recorded, part_.updates) == (58, list(range(count - 57, count + 1)))
    assert part_.values["absent"] == [None] * 58


@pytest.mark.parametrize("to", [0, 1, 255, 256, 257, 700, 1024, 1499])
def test_a_crash_takes_a_long_history_back_to_the_checkpoint(database: Database, new_job: Any, to: int) -> None:
    job = new_job()
    claimed = claim(database)
    if to:
        report_to(database, claimed, with_checkpoint(updates(1, to)))
    report_to(database, claimed, updates(to + 1, 1500))
    expire(database, job.id)
    with database.write() as session:
        assert store.reap(session) == 1
    again = claim(database)
    assert again.updates == to
    with database.read() as session:
        assert history.metrics(session, job.id, max_points=10_000).updates == list(range(1, to + 1))
    report_to(database, again, updates(to + 1, 1600, mean_return=-1.0))
    with database.read() as session:
        curves = history.metrics(session, job.id, ["mean_return"], max_points=10_000)
    assert curves.updates == list(range(1, 1601))
    assert curves.attempts == [1] * to + [2] * (1600 - to)
    assert curves.values["mean_return"] == [float(n) for n in range(1, to + 1)] + [-1.0] * (1600 - to)


def test_a_history_of_an_earlier_version_is_read_and_packed(database: Database, new_job: Any) -> None:
    """All updates were rows once, however many."""
    job = new_job()
    claimed = claim(database)
    with database.write() as session:
        for n in range(1, 1001):
            session.add(Metric(job_id=job.id, update=n, attempt=1, env_steps=n, values={"mean_return": n, "x": None}))
    with database.read() as session:
        before = history.metrics(session, job.id, max_points=10_000)
    report_to(database, claimed, updates(1001, 1001, x=0.5))
    with database.read() as session:
        after = history.metrics(session, job.id, max_points=10_000)
        assert (session.scalar(select(func.count()).select_from(Metric)) or 0) < history.BLOCK
    assert after.values["mean_return"] == [*before.values["mean_return"], 1001.0]
    assert after.values["x"] == [None] * 1000 + [0.5]


def test_a_page_of_events_names_a_bounded_number_of_updates(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    for first in range(1, 3001, 300):
        report_to(database, claimed, updates(first, first + 299))
    seen: list[int] = []
    after = 0
    with database.read() as session:
        while page := history.events(session, job.id, after, 200, 1000):
            rows = [row["update"] for event in page if event["type"] == "metrics" for row in event["data"]["metrics"]]
            assert len(rows) < 1000 + 300
            seen += rows
            after = page[-1]["seq"]
    assert seen == list(range(1, 3001))


@pytest.mark.slow
def test_a_very_long_history_is_thinned(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    count = history.RECORDED_UPDATES + 1
    report_to(database, claimed, with_checkpoint(updates(1, count)))
    with database.read() as session:
        curves = history.metrics(session, job.id, ["mean_return"], max_points=2 * count)
        page = history.events(session, job.id, 2, 200)
        few = history.events(session, job.id, 2, 200, 1)
    # every second one, and the newest stays
    assert curves.updates == list(range(1, count + 1, 2))
    assert curves.values["mean_return"] == [float(n) for n in curves.updates]
    assert sum(len(event["data"].get("metrics", ())) for event in page) == len(curves.updates)
    # an event names a bounded number of updates, however many a report has brought
    assert [event["data"]["to_update"] for event in few] == [history.EVENT_UPDATES]
    report_to(database, claimed, with_checkpoint(updates(count + 1, count + 3)))
    with database.read() as session:
        assert history.metrics(session, job.id, ["mean_return"], count).updates == list(range(count, count + 4))


def test_lists_are_filtered(database: Database, new_job: Any) -> None:
    jobs = [new_job() for _ in range(3)]
    claim(database)
    with database.read() as session:
        running = store.list_(session, PageQuery(), statuses=["running"])
        queued = store.list_(session, PageQuery(limit=1, order="asc"), statuses=["queued"])
        mine = store.list_(session, PageQuery(), policy_id=jobs[2].policy_id)
    assert [job.id for job in running.rows] == [jobs[0].id]
    assert ([job.id for job in queued.rows], queued.has_more) == ([jobs[1].id], True)
    assert [job.id for job in mine.rows] == [jobs[2].id]


def test_figures_count_jobs_queue_and_leases(database: Database, new_job: Any) -> None:
    new_job()
    lost = new_job()
    new_job()
    report_to(database, claim(database), updates(1, 4))
    claim(database)
    expire(database, lost.id)
    with database.read() as session:
        figures = store.figures(session)
    assert figures.jobs["running"] == 2
    assert figures.jobs["queued"] == 1
    assert figures.jobs["paused"] == 0
    assert figures.live_leases == 1
    assert (figures.updates, figures.env_steps) == (4, 40)
    assert figures.queue_age_seconds >= 0


def test_only_an_ended_job_is_deleted_and_its_checkpoints_stay(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database)
    report_to(database, claimed, with_checkpoint(updates(1, 700)))
    with pytest.raises(NotTerminal), database.write() as session:
        store.delete(session, job.id)
    finish(database, claimed, SUCCEEDED)
    with database.write() as session:
        store.delete(session, job.id)
    with database.read() as session:
        with pytest.raises(NotFound):
            store.get(session, job.id)
        for table in (Event, Metric, MetricBlock):
            assert session.scalar(select(func.count()).select_from(table)) == 0
        kept = list(session.scalars(select(Checkpoint).order_by(Checkpoint.updates)))
        assert [(row.updates, row.job_id) for row in kept] == [(0, None), (700, None)]


@pytest.mark.slow
@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_lease_that_cannot_be_taken_yet_is_not_said_to_be_reaped(
    database: Database, new_job: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server")
    job = new_job()
    claim(database, lease_seconds=-1)
    stopped, tried = threading.Event(), threading.Semaphore(0)
    reaper = threading.Thread(target=reap_until, args=(stopped, database), name="reaper")

    def committed(_: Any) -> None:
        if threading.current_thread() is reaper:
            tried.release()

    patient = Database(database.url.render_as_string(hide_password=False), lease_seconds=600)
    sqlalchemy.event.listen(Engine, "commit", committed)
    try:
        with patient.write() as session:
            session.scalars(select(Job).where(Job.id == job.id).with_for_update()).one()
            reaper.start()
            assert all(tried.acquire(timeout=60) for _ in range(2))
            assert not [record for record in caplog.records if record.getMessage() == "leases_reaped"]
        assert tried.acquire(timeout=60)
        while job_of(database, job.id).status != "queued":
            assert tried.acquire(timeout=60)
    finally:
        stopped.set()
        reaper.join()
        patient.dispose()
        sqlalchemy.event.remove(Engine, "commit", committed)
    (line,) = [record for record in caplog.records if record.getMessage() == "leases_reaped"]
    assert line.__dict__["fields"] == {"jobs": 1}


# --- writes and claims whose answer was lost -------------------------------------------------------------------------


def as_it_is(database: Database, job_id: str) -> tuple[Any, ...]:
    """All that a write could change about a job."""
    job = job_of(database, job_id)
    row = {column.key: getattr(job, column.key) for column in Job.__mapper__.column_attrs}
    with database.read() as session:
        kept = checkpoints.list_(session, PageQuery(limit=200), policy_id=job.policy_id).rows
    return row, events_of(database, job_id), [(one.id, one.updates, one.evaluation) for one in kept]


@pytest.mark.parametrize(
    "write",
    [
        lambda session, claimed, number: store.report(
            session, claimed.job_id, claimed.token, with_checkpoint(updates(1, 3)), number
        ),
        lambda session, claimed, number: store.finish(
            session, claimed.job_id, claimed.token, Outcome("succeeded", with_checkpoint(updates(1, 3)), {}), number
        ),
        lambda session, claimed, number: store.finish(
            session, claimed.job_id, claimed.token, Outcome("failed", failure=Failure("timeout", "late")), number
        ),
        lambda session, claimed, number: store.release(
            session, claimed.job_id, claimed.token, "stopped", with_checkpoint(updates(1, 3)), number
        ),
        lambda session, claimed, number: store.lose(session, claimed.job_id, claimed.token, "crashed", number),
    ],
    ids=["report", "succeeded", "failed", "release", "lose"],
)
def test_a_write_that_is_repeated_with_its_number_changes_nothing_and_is_answered_as_at_first(
    database: Database, new_job: Any, write: Any
) -> None:
    job = new_job()
    claimed = claim(database)
    with database.write() as session:
        first = write(session, claimed, 1)
    before = as_it_is(database, job.id)
    for _ in range(2):
        with database.write() as session:
            assert write(session, claimed, 1) == first
    assert as_it_is(database, job.id) == before


def test_a_report_is_told_from_the_one_before_and_from_that_of_another_holder(database: Database, new_job: Any) -> None:
    job = new_job()
    for attempt in (1, 2):
        claimed = claim(database)
        with database.write() as session:
            store.report(session, job.id, claimed.token, updates(2 * attempt - 1, 2 * attempt - 1), 1)
            store.report(session, job.id, claimed.token, updates(2 * attempt, 2 * attempt), 2)
            store.lose(session, job.id, claimed.token, "crashed", 3)
    measured = [event["data"]["from_update"] for event in events_of(database, job.id) if event["type"] == "metrics"]
    assert measured == [1, 2, 3, 4]


def test_a_repeated_report_of_a_job_that_was_taken_away_says_so(database: Database, new_job: Any) -> None:
    job = new_job()
    claimed = claim(database, lease_seconds=-1)
    with database.write() as session:
        store.report(session, job.id, claimed.token, updates(1, 3), 1)
    with database.write() as session:
        assert store.reap(session) == 1
    with pytest.raises(store.LeaseLost), database.write() as session:
        store.report(session, job.id, claimed.token, updates(1, 3), 1)


def test_a_claim_whose_answer_was_lost_is_given_again(database: Database, new_job: Any) -> None:
    job, other = new_job(), new_job()
    claimed = claim(database, "lost")
    before = events_of(database, job.id)
    with database.write() as session:
        assert store.claimed_before(session, "somebody else", LEASE) is None
        again = store.claimed_before(session, "lost", LEASE)
    assert again == claimed
    assert events_of(database, job.id) == before
    # who has written knows what it holds; what is left over from it is for the reaper
    report_number = 1
    with database.write() as session:
        store.report(session, job.id, claimed.token, updates(1, 3), report_number)
        assert store.claimed_before(session, "lost", LEASE) is None
    assert job_of(database, other.id).status == "queued"
