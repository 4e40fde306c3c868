"""Jobs of several kinds in one queue, and the checkpoints that they hold: on both databases."""

from collections.abc import Callable
from typing import Any

import pytest

from server.checkpoints import store as checkpoints
from server.database import Database
from server.errors import InUse, NotFound
from server.ids import new_id
from server.jobs import history, store
from server.jobs.reports import Claim, Failure, Outcome, Progress, Report, Snapshot
from server.pages import PageQuery
from server.policies import store as policies
from server.tables import Environment, Job, Policy

ENVIRONMENT = {"kind": "gymnasium", "id": "FrozenLake-v1"}
CHECK = "gradient_check"
RESULT = {
    "mode": "sample",
    "gradient": [1.0, float("nan")],
    "parameter_names": ["theta[0]", "theta[1]"],
    "estimators": [{"verdict": "no_bias_seen", "mean": [1.0, 2.0]}],
}


@pytest.fixture
def new_policy(database: Database) -> Callable[[], Policy]:
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


def created(database: Database, policy: Policy, kind: Any = CHECK, **changes: Any) -> Job:
    given = {"policy_id": policy.id, "spec": {"seed": 7, "environment": ENVIRONMENT, "checkpoint_id": "c"}, **changes}
    with database.write() as session:
        return store.create(
            session,
            kind=kind,
            environment_id=policy.environment_id,
            start_updates=0,
            label={},
            max_attempts=2,
            **given,
        )


def claimed(database: Database) -> Claim:
    with database.write() as session:
        claim = store.claim(session, "worker", 30.0)
    assert claim is not None
    return claim


def finish(database: Database, claim: Claim, outcome: Outcome) -> None:
    with database.write() as session:
        store.finish(session, claim.job_id, claim.token, outcome)


def head_of(database: Database, policy: Policy) -> str:
    with database.read() as session:
        return checkpoints.latest(session, policy.id).id


def test_kinds_share_the_queue_and_not_the_lists(database: Database, new_policy: Any) -> None:
    policy = new_policy()
    check, training = created(database, policy), created(database, policy, "training")
    second = created(database, policy)
    with database.read() as session:
        assert [job.id for job in store.list_(session, PageQuery(), kind=CHECK).rows] == [second.id, check.id]
        assert [job.id for job in store.list_(session, PageQuery()).rows] == [training.id]
        assert store.get(session, check.id).id == check.id
        for wrong in ((check.id, "training"), (training.id, CHECK)):
            with pytest.raises(NotFound):
                store.get(session, *wrong)
        assert history.heads(session, [check.id, training.id], CHECK).keys() == {check.id}
    for change in (store.request_cancel, store.delete):
        with pytest.raises(NotFound), database.write() as session:
            change(session, check.id, "training")
    assert [claimed(database).kind for _ in range(3)] == [CHECK, "training", CHECK]


def test_only_training_makes_a_policy_busy(database: Database, new_policy: Any) -> None:
    policy = new_policy()
    created(database, policy)
    created(database, policy)
    with database.read() as session:
        assert store.at_work(session, policy.id) is None
    training = created(database, policy, "training")
    with database.read() as session:
        assert store.at_work(session, policy.id) is not None
    with database.write() as session:
        store.request_cancel(session, training.id)
    with database.read() as session:
        assert store.at_work(session, policy.id) is None


def test_a_check_brings_the_checkpoint_that_it_was_made_for(database: Database, new_policy: Any) -> None:
    policy = new_policy()
    pinned = head_of(database, policy)
    created(database, policy, checkpoint_id=pinned)
    created(database, policy, policy_id=None)
    with database.write() as session:
        checkpoints.put(session, policy.id, 5, b"policy 5")
    first, second = claimed(database), claimed(database)
    assert (first.policy_bytes, first.state_bytes, first.behaviour_bytes) == (b"policy 0", None, None)
    assert second.policy_bytes is None
    assert first.spec == {"seed": 7, "environment": ENVIRONMENT}


def test_a_training_brings_the_policy_that_acts(database: Database, new_policy: Any) -> None:
    policy, actor = new_policy(), new_policy()
    with database.write() as session:
        acting = checkpoints.put(session, actor.id, 3, b"actor 3").id
    created(database, policy, "training", checkpoint_id=acting)
    claim = claimed(database)
    assert (claim.policy_bytes, claim.behaviour_bytes) == (b"policy 0", b"actor 3")


def test_what_a_job_reads_cannot_be_deleted_before_it_ends(database: Database, new_policy: Any) -> None:
    policy, actor = new_policy(), new_policy()
    created(database, policy, "training", checkpoint_id=head_of(database, actor))
    with pytest.raises(InUse), database.write() as session:
        policies.delete(session, actor.id)
    finish(database, claimed(database), Outcome("failed", failure=Failure("internal", "no")))
    with database.write() as session:
        policies.delete(session, actor.id)
    with database.read() as session, pytest.raises(NotFound):
        policies.get(session, actor.id)


def test_a_repeated_update_leaves_the_checkpoint_that_a_job_reads(database: Database, new_policy: Any) -> None:
    """Another machine may come to other bits after a crash: the job that reads the old ones must not notice."""
    policy, actor = new_policy(), new_policy()
    old = head_of(database, actor)
    training = created(database, policy, "training", checkpoint_id=old)
    with database.write() as session:
        for data in (b"again", b"and again"):
            new = checkpoints.put(session, actor.id, 0, data)
    with database.read() as session:
        assert checkpoints.latest(session, actor.id).id == new.id
        assert checkpoints.content(session, new.id) == b"and again"
        assert store.get(session, training.id).checkpoint_id == old
        assert [row.id for row in checkpoints.list_(session, PageQuery(), policy_id=actor.id).rows] == [new.id, old]
    assert claimed(database).behaviour_bytes == b"policy 0"


def test_a_finished_check_has_its_result_and_its_event_is_short(database: Database, new_policy: Any) -> None:
    policy = new_policy()
    check = created(database, policy, checkpoint_id=head_of(database, policy))
    claim = claimed(database)
    with database.write() as session:
        assert store.report(session, claim.job_id, claim.token, Report(Progress(fraction=0.25))) == "continue"
    with database.read() as session:
        assert store.get(session, check.id).fraction == 0.25
    finish(database, claim, Outcome("succeeded", result=RESULT))
    with database.read() as session:
        job = store.get(session, check.id)
        last = history.events(session, check.id)[-1]
    assert (job.status, job.fraction, job.checkpoint_id, job.updates) == ("succeeded", 1.0, None, 0)
    assert job.result == RESULT | {"gradient": [1.0, None]}
    assert last["data"]["result"]["estimators"] == [{"verdict": "no_bias_seen", "mean": None}]
    assert (last["data"]["result"]["gradient"], last["data"]["result"]["mode"]) == (None, "sample")


@pytest.mark.parametrize("how", ["release", "lose"])
def test_a_check_that_is_given_back_begins_again(database: Database, new_policy: Any, how: str) -> None:
    policy = new_policy()
    check = created(database, policy, checkpoint_id=head_of(database, policy))
    claim = claimed(database)
    with database.write() as session:
        store.report(session, claim.job_id, claim.token, Report(Progress(fraction=0.5)))
        if how == "release":
            store.release(session, claim.job_id, claim.token, "stopped")
        else:
            store.lose(session, claim.job_id, claim.token, "crashed")
    again = claimed(database)
    assert (again.job_id, again.policy_bytes, again.attempt) == (check.id, b"policy 0", 1 if how == "release" else 2)
    with database.read() as session:
        assert store.get(session, check.id).fraction == 0.0
        assert {event["type"] for event in history.events(session, check.id)} == {"status"}
    with database.write() as session:
        store.lose(session, again.job_id, again.token, "crashed")
    last = None if how == "lose" else claimed(database)
    if last is not None:
        with database.write() as session:
            store.lose(session, last.job_id, last.token, "crashed")
    with database.read() as session:
        job = store.get(session, check.id)
    assert (job.status, job.checkpoint_id) == ("failed", None)


# --- playing an update again


def trained(database: Database, policy: Policy, checkpointed: dict[int, bool]) -> str:
    """A job of six updates, with a checkpoint after some of them; True keeps the state."""
    job = created(database, policy, "training", spec={"environment": ENVIRONMENT, "algorithm": {}})
    claim = claimed(database)
    for updates, stated in checkpointed.items():
        progress = Progress(updates, 10 * updates, updates, 0.1)
        state = f"state {updates}".encode() if stated else None
        snapshot = Snapshot(updates, progress, f"policy {updates}".encode(), state)
        with database.write() as session:
            store.report(session, claim.job_id, claim.token, Report(progress, checkpoint=snapshot))
    with database.write() as session:
        store.report(session, claim.job_id, claim.token, Report(Progress(6, 60, 6, 0.2)))
    return job.id


def test_an_update_is_played_from_the_newest_state_before_it(database: Database, new_policy: Any) -> None:
    job_id = trained(database, new_policy(), {2: True, 4: True})
    with database.read() as session:
        late, early, first = (store.explainable(session, job_id, update) for update in (5, 4, 2))
    assert (late.state_bytes, late.policy_bytes) == (b"state 4", None)
    assert (early.state_bytes, early.policy_bytes) == (b"state 2", None)
    assert (first.state_bytes, first.policy_bytes) == (None, b"policy 0")
    assert (late.start_updates, late.updates, late.spec["environment"]) == (0, 6, ENVIRONMENT)


@pytest.mark.parametrize("update", [0, 7])
def test_an_update_that_was_not_made_is_told_from_the_range(database: Database, new_policy: Any, update: int) -> None:
    job_id = trained(database, new_policy(), {2: True})
    with database.read() as session, pytest.raises(NotFound, match="updates 1 to 6"):
        store.explainable(session, job_id, update)
