"""All there is to know about checkpoints: which there are, their bytes, and which is the latest and the best.

Beside the policy a checkpoint may keep the state from which its job goes on. Of each job the newest state is kept, and
others so that old updates can be played again without the whole job before them: evenly in time, and bounded.

A checkpoint never changes its parameters: where a repeated update gives other bytes, it is another checkpoint with
another id, so an id may be cached for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from sqlalchemy import JSON, ColumnElement, Select, func, select, type_coerce, update
from sqlalchemy import delete as delete_from
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from server.database import now
from server.errors import NotFound
from server.ids import new_id
from server.pages import PageQuery, Slice, fetch
from server.tables import Checkpoint, CheckpointContent, Policy

__all__ = [
    "Checkpoint",
    "Heads",
    "best",
    "content",
    "content_after",
    "evaluate",
    "forget_states",
    "get",
    "heads",
    "latest",
    "list_",
    "put",
    "state",
    "state_before",
]


MOST_STATES = 256
"""States that are kept of one job: a job of an hour is played again for less than half a minute to reach an update."""

MOST_STATE_BYTES = 32 * 2**20
"""The same in bytes; the newest one is kept in any case."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What `latest` and `best` mean for a policy at one moment.

    Attributes:
        latest: Id of its newest checkpoint.
        latest_updates: Updates that the policy had had there.
        best: Id of the checkpoint with the highest mean return in a selection; None if none was looked at.
    """

    latest: str
    latest_updates: int
    best: str | None


def put(
    session: Session,
    policy_id: str,
    updates: int,
    policy_bytes: bytes,
    *,
    job_id: str | None = None,
    state_bytes: bytes | None = None,
    selection: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    digest: str | None = None,
) -> Checkpoint:
    """Keep a policy as it is after so many updates. Repeating it keeps one checkpoint.

    Args:
        session: A writing transaction.
        policy_id: Whose checkpoint it is.
        updates: Updates that the policy has had.
        policy_bytes: The policy, as `pgengine.load` reads it.
        job_id: The job that has made it.
        state_bytes: What the job resumes from. Older ones are kept for replays while there is room.
        selection: What a selection saw of this very policy, by which the best is found.
        evaluation: An evaluation of it on episodes that decided nothing.
        digest: SHA-256 of the policy's bytes in hexadecimal, if it was computed before the transaction.
    """
    digest = digest or sha256(policy_bytes).hexdigest()
    row = session.scalar(_of(policy_id).where(Checkpoint.updates == updates).with_for_update())
    if row is not None and row.sha256 != digest:
        _replace(session, row)
        row = None
    if row is None:
        row = _insert(session, policy_id, updates, policy_bytes, digest)
    row.job_id = row.job_id or job_id
    row.selection = selection if selection is not None else row.selection
    row.evaluation = evaluation if evaluation is not None else row.evaluation
    session.flush()
    if state_bytes is not None:
        _keep_state(session, row, state_bytes)
    # the policy's own count is what lists show; kept here because only a checkpoint moves it
    session.execute(update(Policy).where(Policy.id == policy_id, Policy.updates < updates).values(updates=updates))
    return row


def get(session: Session, checkpoint_id: str, *, hold: bool = False) -> Checkpoint:
    """The checkpoint, without its bytes.

    Args:
        session: A transaction.
        checkpoint_id: Its id.
        hold: Whether it must not be deleted before the (writing) transaction ends.

    Raises:
        NotFound: if there is none with this id.
    """
    row = session.get(Checkpoint, checkpoint_id, with_for_update={"read": True, "key_share": True} if hold else None)
    if row is None:
        raise NotFound("There is no checkpoint with this id.")
    return row


def latest(session: Session, policy_id: str) -> Checkpoint:
    """The newest checkpoint of a policy; each has one from its creation on.

    Raises:
        NotFound: if there is no such policy.
    """
    row = session.scalar(_of(policy_id).order_by(Checkpoint.updates.desc()).limit(1))
    if row is None:
        raise NotFound("There is no policy with this id.")
    return row


def best(session: Session, policy_id: str) -> Checkpoint | None:
    """The checkpoint with the highest mean return in a selection, of equals the newest; None if none was looked at.

    A number that was selected for being high is too high on average, so it is not what the checkpoint is worth: that is
    its evaluation, if there is one.
    """
    return session.scalar(
        _of(policy_id)
        .where(_selected_by(Checkpoint).is_not(None))
        .order_by(_selected_by(Checkpoint).desc(), Checkpoint.updates.desc())
        .limit(1)
    )


def heads(session: Session, policy_ids: Sequence[str]) -> dict[str, Heads]:
    """What `latest` and `best` mean for each of these policies, in one query; unknown ones are missing."""
    newest, highest = aliased(Checkpoint), aliased(Checkpoint)
    latest_id = (
        select(newest.id)
        .where(newest.policy_id == Policy.id, newest.replica == 0)
        .order_by(newest.updates.desc())
        .limit(1)
        .scalar_subquery()
    )
    best_id = (
        select(highest.id)
        .where(highest.policy_id == Policy.id, highest.replica == 0, _selected_by(highest).is_not(None))
        .order_by(_selected_by(highest).desc(), highest.updates.desc())
        .limit(1)
        .scalar_subquery()
    )
    rows = session.execute(
        select(Policy.id, Checkpoint.id, Checkpoint.updates, best_id)
        .join(Checkpoint, Checkpoint.id == latest_id)
        .where(Policy.id.in_(policy_ids))
    )
    return {policy_id: Heads(newest_id, updates, found) for policy_id, newest_id, updates, found in rows}


def evaluate(
    session: Session, policy_id: str, updates: int, digest: str, evaluation: dict[str, Any]
) -> Checkpoint | None:
    """Keep an evaluation of a checkpoint that is kept already; None if it has been replaced by another.

    Args:
        session: A writing transaction.
        policy_id: Whose checkpoint it is.
        updates: Updates that the policy had had.
        digest: SHA-256 of the bytes that were evaluated, in hexadecimal.
        evaluation: On episodes that decided nothing.
    """
    row = session.scalar(_of(policy_id).where(Checkpoint.updates == updates, Checkpoint.sha256 == digest))
    if row is not None:
        row.evaluation = evaluation
        session.flush()
    return row


def list_(
    session: Session, query: PageQuery, *, policy_id: str | None = None, job_id: str | None = None
) -> Slice[Checkpoint]:
    """One page of the checkpoints of a policy, or of those that a job has made."""
    statement = select(Checkpoint)
    if policy_id is not None:
        statement = statement.where(Checkpoint.policy_id == policy_id)
    if job_id is not None:
        statement = statement.where(Checkpoint.job_id == job_id)
    return fetch(session, statement, Checkpoint.id, "ckpt", query)


def content(session: Session, checkpoint_id: str) -> bytes:
    """The policy's bytes.

    Raises:
        NotFound: if there is no checkpoint with this id.
    """
    found = session.scalar(
        select(CheckpointContent.policy_bytes).where(CheckpointContent.checkpoint_id == checkpoint_id)
    )
    if found is None:
        raise NotFound("There is no checkpoint with this id.")
    return found


def content_after(session: Session, policy_id: str, updates: int) -> bytes:
    """The bytes of a policy as it was after so many updates.

    Raises:
        NotFound: if no checkpoint of it was kept then.
    """
    row = session.scalar(_of(policy_id).where(Checkpoint.updates == updates))
    if row is None:
        raise NotFound("The checkpoint from which the job began is gone.")
    return content(session, row.id)


def state_before(session: Session, job_id: str, update: int) -> tuple[int, bytes] | None:
    """The newest state that a job has kept from before an update, and the updates until then, if it has kept any."""
    found = session.execute(
        _states_of(job_id)
        .where(Checkpoint.updates < update)
        .with_only_columns(Checkpoint.updates, CheckpointContent.state_bytes)
        .order_by(Checkpoint.updates.desc())
        .limit(1)
    ).first()
    return None if found is None else (found.updates, found.state_bytes)


def forget_states(session: Session, job_id: str) -> None:
    """Drop all states of a job that is deleted; its checkpoints stay."""
    _drop_states(session, session.scalars(select(Checkpoint.id).where(Checkpoint.job_id == job_id)).all())


def state(session: Session, checkpoint_id: str) -> bytes | None:
    """What a job resumes from, if it is still kept."""
    return session.scalar(select(CheckpointContent.state_bytes).where(CheckpointContent.checkpoint_id == checkpoint_id))


def _of(policy_id: str) -> Select[Checkpoint]:
    return select(Checkpoint).where(Checkpoint.policy_id == policy_id, Checkpoint.replica == 0)


def _selected_by(entity: type[Checkpoint]) -> ColumnElement[float]:
    mean_return: ColumnElement[float] = type_coerce(entity.selection, JSON)["mean_return"].as_float()
    return mean_return


def _replace(session: Session, row: Checkpoint) -> None:
    """Makes room for another checkpoint after as many updates.

    One that a job holds cannot be deleted; it stays beside the new one, as a replica that is neither latest nor best.
    """
    try:
        with session.begin_nested():
            session.execute(delete_from(Checkpoint).where(Checkpoint.id == row.id))
    except IntegrityError:
        others = (Checkpoint.policy_id == row.policy_id, Checkpoint.updates == row.updates)
        row.replica = 1 + (session.scalar(select(func.max(Checkpoint.replica)).where(*others)) or 0)
        session.flush()
        return
    session.expunge(row)


def _insert(session: Session, policy_id: str, updates: int, policy_bytes: bytes, digest: str) -> Checkpoint:
    row = Checkpoint(
        id=new_id("ckpt"), policy_id=policy_id, updates=updates, size=len(policy_bytes), sha256=digest, created_at=now()
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    session.add(CheckpointContent(checkpoint_id=row.id, policy_bytes=policy_bytes))
    session.flush()
    return row


def _keep_state(session: Session, row: Checkpoint, state_bytes: bytes) -> None:
    kept = {"state_bytes": state_bytes, "state_sha256": sha256(state_bytes).hexdigest()}
    session.execute(update(CheckpointContent).where(CheckpointContent.checkpoint_id == row.id).values(kept))
    if row.job_id is None:
        return
    size = func.length(CheckpointContent.state_bytes)
    columns = (Checkpoint.id, Checkpoint.updates, Checkpoint.created_at, size)
    states = session.execute(_states_of(row.job_id).with_only_columns(*columns).order_by(Checkpoint.updates))
    _drop_states(session, _surplus([_State(*each) for each in states]))


def _states_of(job_id: str) -> Select[Any]:
    return (
        select(Checkpoint)
        .join(CheckpointContent, CheckpointContent.checkpoint_id == Checkpoint.id)
        .where(Checkpoint.job_id == job_id, Checkpoint.replica == 0, CheckpointContent.state_bytes.is_not(None))
    )


def _drop_states(session: Session, checkpoint_ids: Sequence[str]) -> None:
    if checkpoint_ids:
        session.execute(
            update(CheckpointContent)
            .where(CheckpointContent.checkpoint_id.in_(checkpoint_ids))
            .values(state_bytes=None, state_sha256=None),
            execution_options={"synchronize_session": False},
        )


@dataclass(frozen=True, slots=True)
class _State:
    checkpoint_id: str
    updates: int
    at: datetime
    size: int


def _surplus(states: list[_State]) -> list[str]:
    """Checkpoints whose states there is no room for: again and again the one whose neighbours are nearest in time.

    The time between two states is what a replay between them costs, about. The newest one stays, since the job goes on
    from it, and the first one as long as there is a third.
    """
    kept, room, dropped = list(states), MOST_STATE_BYTES - sum(state.size for state in states), []
    while len(kept) > 1 and (len(kept) > MOST_STATES or room < 0):
        around = zip(kept, kept[2:], strict=False)
        gaps = [(after.at - before.at, after.updates - before.updates) for before, after in around]
        surplus = kept.pop(1 + gaps.index(min(gaps)) if gaps else 0)
        room += surplus.size
        dropped.append(surplus.checkpoint_id)
    return dropped
