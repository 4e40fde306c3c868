"""One update, step by step: what each action was credited with, and what it added to the estimate and to the step.

Nothing is stored for this. An update is a pure function of its seed and its number, so the run is made again from the
beginning, or from a state, and stops at the update asked for: what is shown is what happened, to the bit, if the
environment draws its random numbers from its seed alone. What the run measured then says whether it does (`recorded`).

    contribution_t = weight_t * grad log pi(a_t|s_t) (+ entropy weight_t * grad H(pi(.|s_t)))
    estimate = sum of all contributions           step = parameters after - parameters before

Source: Bereyhi, chapter 5, the worked updates of PG_v1 and REINFORCE; Lin, credit of rewards to actions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgengine.contributions import Rows, contributions
from pgengine.diagnostics import exact_figures
from pgengine.environments import EpisodeEnvironment, open_environment
from pgengine.errors import DivergedError, ReplayDiffers, SpecError
from pgengine.estimation import gradient
from pgengine.estimators import StepWeights, reward_to_go
from pgengine.exactness import exact_absence
from pgengine.explanations import ExplainedEpisode, ExplainedStep, Explanation, MadeStep
from pgengine.labels import Label, label
from pgengine.policies import Policy
from pgengine.resolution import resolve
from pgengine.spec import AlgorithmSpec, StopSpec, TrainingSpec
from pgengine.states import RunState
from pgengine.training import StepRecord, Update, runtime_fingerprint, train

__all__ = ["ExplainedEpisode", "ExplainedStep", "Explanation", "MadeStep", "Recorded", "explain"]

LISTED = 1000  # parameters up to which whole vectors are shown
LISTED_PER_STEP = 64  # parameters up to which each step's vector is shown


TIMES = ("rollout_seconds", "update_seconds", "env_steps_per_second")  # no replay repeats them
SAME_RUNTIME = (1e-6, 1e-9)  # relative and absolute: to the bit but for how a number is written
OTHER_RUNTIME = (1e-3, 1e-3)  # sums of 32-bit floats in another order


@dataclass(frozen=True)
class Recorded:
    """What was measured when a run was made, to compare a replay with.

    Attributes:
        metrics: Figures by update, as `Update.metrics`; None where one was not finite.
        runtime: The `runtime_fingerprint()` of then, or None if it is not known.
    """

    metrics: Mapping[int, Mapping[str, float | None]]
    runtime: Mapping[str, Any] | None = None


def explain(
    spec: TrainingSpec,
    update: int,
    *,
    policy: Policy | None = None,
    behaviour: Policy | None = None,
    resume_from: bytes | None = None,
    environment: EpisodeEnvironment | None = None,
    recorded: Recorded | None = None,
    first_episode: int = 0,
    episodes: int = 16,
    max_steps: int = 2000,
) -> Explanation:
    """Makes a training run again up to one update and lays that update out.

        worked = pgengine.explain(spec, 3)
        worked.episodes[0].steps[0].weight

    Args:
        spec: Of the run. An update beyond its `stop.updates` is refused; whether a run ended earlier, because it had
            reached its target or run out of time, is not known here.
        update: Number of the policy's update, counted on from those that it had at the beginning.
        policy: What the run started from, as in `train`.
        behaviour: Who acted, as in `train`.
        resume_from: A state of the run before that update, from which it goes on; without one it begins anew.
        environment: One of your own, as in `train`; it is left open.
        recorded: What the run measured; each of its updates that is made again is compared with it.
        first_episode: Place in the batch of the first episode to show.
        episodes: How many to show.
        max_steps: How many time steps to show in all.

    Raises:
        SpecError: if the run cannot be carried out, or has no such update or episode.
        CheckpointError: if `resume_from` is not a state of this run.
        EnvironmentFailure: if the environment raised in the middle.
        ReplayDiffers: if an update comes out otherwise than it was recorded.
        DivergedError: if a gradient or a parameter is no longer finite on the way, or a figure to show is not.
    """
    for name, value in (("episodes", episodes), ("max_steps", max_steps)):
        if value < 1:
            raise SpecError(f"/{name}", "greater_than_equal", "expected 1 or more")
    opened = environment or open_environment(spec.environment)
    try:
        began = None if resume_from is None else RunState.from_bytes(resume_from)
        continues = policy is not None if began is None else began.continues
        resolved = resolve(spec, opened.facts, continues=continues)
        _check_update(resolved.stop, update, policy, resume_from)
        # when a run stops and what it measures changes no bit of the updates before
        whole = resolved.model_copy(
            update={"stop": StopSpec(updates=10_000_000, target_return=None), "diagnostics_every": 0}
        )
        run = train(whole, environment=opened, policy=policy, behaviour=behaviour, resume_from=resume_from)
        changed = [] if recorded is None else _differences(recorded.runtime or {})
        reached = None
        for made in run:
            if recorded is not None:
                _compare(made, recorded, changed)
            if made.updates == update:
                reached = made
                break
        if reached is None:
            raise _no_such_update(f"the run ended before update {update}")
        shown = _Shown(first_episode, episodes, max_steps, spec.seed)
        return _explanation(reached, resolved.algorithm, label(resolved, opened.facts), opened, shown)
    finally:
        if environment is None:
            opened.close()


def _differences(then: Mapping[str, Any]) -> list[str]:
    """What of this runtime is not as it was then."""
    here = runtime_fingerprint()
    return [f"{name}: {then.get(name)} then, {now} now" for name, now in here.items() if then.get(name) != now]


def _compare(made: Update, recorded: Recorded, changed: list[str]) -> None:
    relative, absolute = OTHER_RUNTIME if changed else SAME_RUNTIME
    differ = {
        name: (value, made.metrics[name])
        for name, value in recorded.metrics.get(made.updates, {}).items()
        if value is not None
        and name in made.metrics
        and name not in TIMES
        and not math.isclose(value, made.metrics[name], rel_tol=relative, abs_tol=absolute)
    }
    if differ:
        raise ReplayDiffers(made.updates, differ, changed)


def _no_such_update(message: str) -> SpecError:
    return SpecError("/update", "no_such_update", message)


def _check_update(stop: StopSpec, update: int, policy: Policy | None, resume_from: bytes | None) -> None:
    begins = 0 if policy is None else policy.updates
    made = 0
    if resume_from is not None:
        state = RunState.from_bytes(resume_from)
        begins, made = state.policy.updates - state.progress.updates, state.progress.updates
        if state.stopped_by is not None:
            raise _no_such_update(f"the state is that of a run that ended with update {state.policy.updates}")
    if update <= begins + made:
        raise _no_such_update(
            f"expected an update from {begins + made + 1} on: the policy has had {begins + made} where this begins"
        )
    if stop.updates is not None and update > begins + stop.updates:
        raise _no_such_update(f"the run ends with update {begins + stop.updates}, by its own limit")


@dataclass(frozen=True)
class _Shown:
    first_episode: int
    episodes: int
    max_steps: int
    seed: int

    def check_finite(self, record: StepRecord, what: str, *figures: np.ndarray | float | None) -> None:
        if not all(figure is None or np.isfinite(figure).all() for figure in figures):
            raise DivergedError(record.before.updates + 1, self.seed, what)


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is found
def _explanation(
    update: Update, algorithm: AlgorithmSpec, of_kind: Label, environment: EpisodeEnvironment, shown: _Shown
) -> Explanation:
    record = update.record
    before, batch, weights = record.before, record.batch, record.weighed.weights
    K = len(batch.lengths)
    if not 0 <= shown.first_episode < K:
        raise SpecError("/first_episode", "no_such_episode", f"expected 0 to {K - 1}: the batch has {K} trajectories")
    moving = record.learning_rate if algorithm.within_episode == "moving" else None
    total = np.zeros(before.size)
    for part in contributions(Rows(before, batch), weights.score, weights.entropy, moving=moving):
        total += part.weighted.sum(axis=0)
    step = _flat(update.policy) - _flat(before)
    estimate = gradient(before, batch, weights) if moving is None else step / moving
    norms = [float(np.linalg.norm(vector)) for vector in (estimate, total, step)]
    shown.check_finite(record, "the gradient or the step", *norms)
    exact = exact_figures(environment, before, algorithm)
    return Explanation(
        update=update.updates,
        policy_updates=before.updates,
        label=of_kind,
        algorithm=algorithm,
        episodes_total=K,
        steps_total=len(batch.rewards),
        episodes=_episodes(record, algorithm, shown),
        estimate_norm=norms[0],
        estimate=_nested(before, estimate),
        sum_of_contributions_norm=norms[1],
        step=MadeStep(
            learning_rate=record.learning_rate,
            norm=norms[2],
            parameters=_nested(before, step),
        ),
        unusable=None if update.stopped_by not in ("effective_sample_size", "ratio_variance") else update.stopped_by,
        expected_return=_if_finite(exact.get("exact_return")),
        exact_gradient_norm=_if_finite(exact.get("exact_gradient_norm")),
        exact_absent=exact_absence(environment.facts, before.spec),
    )


def _if_finite(figure: float | None) -> float | None:
    return figure if figure is not None and math.isfinite(figure) else None


# --- episodes ---------------------------------------------------------------------------------------------------------


def _episodes(record: StepRecord, algorithm: AlgorithmSpec, shown: _Shown) -> list[ExplainedEpisode]:
    first, room, explained = shown.first_episode, shown.max_steps, []
    for number in range(first, min(first + shown.episodes, len(record.batch.lengths))):
        if room <= 0:
            break
        episode = _episode(record, algorithm, number, room, shown)
        room -= len(episode.steps)
        explained.append(episode)
    return explained


def _episode(record: StepRecord, algorithm: AlgorithmSpec, number: int, room: int, shown: _Shown) -> ExplainedEpisode:
    batch = record.batch.episodes(number, number + 1)
    rows = slice(int(record.batch.offsets[number]), int(record.batch.offsets[number + 1]))
    weights = _part(record.weighed.weights, rows)
    moving = record.learning_rate if algorithm.within_episode == "moving" else None
    norms = _norms(Rows(record.before, batch), weights, moving)
    to_go = reward_to_go(batch.rewards, batch.offsets, gamma=algorithm.credit_gamma)
    shown.check_finite(
        record,
        f"a figure of episode {number}",
        *(batch.log_probs, batch.rewards, batch.returns, to_go),
        *(weights.credit, weights.baseline, weights.ratio, weights.score, weights.entropy),
        *(norms.score, norms.entropy, norms.contribution, norms.vectors, float(np.linalg.norm(norms.total))),
    )
    steps = [
        ExplainedStep(
            time=t,
            observation=batch.observations[t].tolist(),
            action=batch.actions[t].tolist(),
            sample=batch.samples[t].tolist(),
            log_prob=float(batch.log_probs[t]),
            reward=float(batch.rewards[t]),
            return_to_go=float(to_go[t]),
            credit=float(weights.credit[t]),
            baseline=float(weights.baseline[t]),
            ratio=None if weights.ratio is None else float(weights.ratio[t]),
            weight=float(weights.score[t]),
            score_norm=float(norms.score[t]),
            entropy_weight=None if weights.entropy is None else float(weights.entropy[t]),
            entropy_contribution_norm=None if norms.entropy is None else float(norms.entropy[t]),
            contribution_norm=float(norms.contribution[t]),
            contribution=None if norms.vectors is None else norms.vectors[t].tolist(),
        )
        for t in range(min(len(batch.rewards), room))
    ]
    return ExplainedEpisode(
        number=number,
        total_return=float(batch.returns[0]),
        length=len(batch.rewards),
        terminated=bool(batch.terminated[0]),
        truncated=bool(batch.truncated[0]),
        contribution_norm=float(np.linalg.norm(norms.total)),
        steps=steps,
    )


def _part(weights: StepWeights, rows: slice) -> StepWeights:
    return StepWeights(
        credit=weights.credit[rows],
        baseline=weights.baseline[rows],
        score=weights.score[rows],
        entropy=None if weights.entropy is None else weights.entropy[rows],
        ratio=None if weights.ratio is None else weights.ratio[rows],
        effective_sample_size=weights.effective_sample_size,
    )


@dataclass(frozen=True)
class _Norms:
    """Of the rows of an episode: norms of scores, entropy parts and contributions; the contributions if they are short;
    and their sum.
    """

    score: np.ndarray
    entropy: np.ndarray | None
    contribution: np.ndarray
    vectors: np.ndarray | None
    total: np.ndarray


def _norms(rows: Rows, weights: StepWeights, moving: float | None) -> _Norms:
    B, P = len(rows), rows.policy.size
    score, contribution, total = np.zeros(B), np.zeros(B), np.zeros(P)
    entropy = None if weights.entropy is None else np.zeros(B)
    vectors = np.zeros((B, P)) if P <= LISTED_PER_STEP else None
    for part in contributions(rows, weights.score, weights.entropy, moving=moving):
        score[part.rows] = np.linalg.norm(part.scores, axis=1)
        contribution[part.rows] = np.linalg.norm(part.weighted, axis=1)
        total += part.weighted.sum(axis=0)
        if vectors is not None:
            vectors[part.rows] = part.weighted + 0.0  # no negative zeros
        if entropy is not None and weights.entropy is not None and part.entropies is not None:
            entropy[part.rows] = np.abs(weights.entropy[part.rows]) * np.linalg.norm(part.entropies, axis=1)
    return _Norms(score, entropy, contribution, vectors, total)


# --- vectors ----------------------------------------------------------------------------------------------------------


def _flat(policy: Policy) -> np.ndarray:
    """Parameters in the order of their names, float64."""
    flat: np.ndarray = np.concatenate([policy.parameters[name].reshape(-1) for name in sorted(policy.parameters)])
    return flat.astype(np.float64)


def _nested(policy: Policy, flat: np.ndarray) -> dict[str, Any] | None:
    """A flat vector by parameter name, as nested lists; None if it is too long."""
    if policy.size > LISTED:
        return None
    nested, start = {}, 0
    for name in sorted(policy.parameters):
        array = policy.parameters[name]
        nested[name] = flat[start : start + array.size].reshape(array.shape).tolist()
        start += array.size
    return nested
