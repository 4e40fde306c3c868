"""Rollouts and evaluations, reconstructed by hand from the addresses of their noise."""

import math

import numpy as np
import pytest

import pgengine
from pgengine.noise import CHUNK, Domain, Noise
from pgengine.policies import Policy
from pgengine.rollout import Batch, rollout
from pgengine.spec import GymnasiumSpec, LinearPolicySpec, MlpPolicySpec, TabularSpec
from tests.engine.worlds import CARTPOLE, PENDULUM, Played, random_mdp, table_policy

LONG = random_mdp(3, horizon=2 * CHUNK + 10, terminal=False)


def play(
    spec: GymnasiumSpec | TabularSpec, policy: Policy, noise: Noise, episodes: int, *, deterministic: bool = False
) -> Batch:
    environment = pgengine.open_environment(spec)
    try:
        return rollout(policy, environment, noise, episodes, deterministic=deterministic)
    finally:
        environment.close()


def network(spec: GymnasiumSpec | TabularSpec) -> Policy:
    """A network that is far from even."""
    policy = pgengine.create_policy(MlpPolicySpec(), spec, pgengine.describe(spec), seed=3)
    policy.parameters["layers.2.weight"] *= 100.0
    return policy


def probabilities(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores.astype(np.float64))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def drawn(p: np.ndarray, uniform: float) -> int:
    return int(np.searchsorted(np.cumsum(p)[:-1], uniform, side="right"))


def test_a_long_episode_reads_every_chunk_of_its_noise() -> None:
    noise, K, policy = Noise(1, "training", 5), 3, table_policy(LONG)
    batch = play(LONG, policy, noise, K)
    assert batch.lengths.tolist() == [LONG.horizon] * K
    chunks = range(math.ceil(LONG.horizon / CHUNK))
    actions, transitions = (
        np.concatenate([noise.uniform(purpose, chunk, K) for chunk in chunks], axis=1)
        for purpose in ("action", "transition")
    )
    pi, P = probabilities(policy.parameters["theta"]), np.array(LONG.transitions)
    for k in range(K):
        state = drawn(np.array(LONG.initial), float(noise.words("begin", K)[k] >> np.uint64(11)) * 2.0**-53)
        for t, row in enumerate(range(batch.offsets[k], batch.offsets[k + 1])):
            action = drawn(pi[state], actions[k, t])
            assert (batch.observations[row], batch.samples[row]) == (state, action)
            state = drawn(P[state, action], transitions[k, t])
        assert batch.final_observations[k] == state


def test_a_gaussian_reads_every_chunk_of_its_noise() -> None:
    noise, policy = Noise(1, "training", 5), network(PENDULUM)
    batch = play(PENDULUM, policy, noise, 3)
    normal = np.concatenate([noise.normal("action", chunk, 3, 1) for chunk in range(4)], axis=1)[:, :200]
    sigma = np.exp(policy.parameters["log_sigma"])
    assert np.allclose(batch.samples, policy.outputs(batch.observations) + sigma * normal.reshape(600, 1), atol=1e-5)


@pytest.mark.parametrize("spec", [CARTPOLE, PENDULUM, LONG], ids=["cartpole", "pendulum", "mdp"])
def test_a_deterministic_rollout_plays_the_mode(spec: GymnasiumSpec | TabularSpec) -> None:
    policy, noise = network(spec), Noise(1, "mode", 0)
    batch, drawn_batch = (play(spec, policy, noise, 4, deterministic=d) for d in (True, False))
    outputs = policy.outputs(batch.observations)
    mode = outputs if spec is PENDULUM else outputs.argmax(axis=1)
    assert np.array_equal(batch.samples, mode)
    assert not np.array_equal(batch.samples, drawn_batch.samples)


def test_log_probabilities_are_those_of_the_samples() -> None:
    cartpole, pendulum = (play(spec, network(spec), Noise(1, "training", 0), 3) for spec in (CARTPOLE, PENDULUM))
    pi = probabilities(network(CARTPOLE).outputs(cartpole.observations))
    assert set(cartpole.samples) == {0, 1}
    assert np.allclose(cartpole.log_probs, np.log(pi[np.arange(len(pi)), cartpole.samples]), atol=1e-5)
    policy = network(PENDULUM)
    sigma = math.exp(float(policy.parameters["log_sigma"][0]))
    z = ((pendulum.samples - policy.outputs(pendulum.observations)) / sigma)[:, 0].astype(np.float64)
    expected = -0.5 * z**2 - math.log(sigma * math.sqrt(2 * math.pi))
    assert np.allclose(pendulum.log_probs, expected, atol=1e-4)
    assert np.abs(pendulum.samples).max() > 2.0  # clipping stays outside


def test_outputs_that_are_not_finite_are_divergence() -> None:
    policy = table_policy(LONG)
    policy.parameters["theta"][1, 0] = np.nan
    with pytest.raises(pgengine.DivergedError, match=r"update 8 \(seed 2\)"):
        play(LONG, policy, Noise(2, "training", 7), 2)


def test_samples_that_are_not_finite_are_divergence() -> None:
    spec = GymnasiumSpec(id="Pendulum-v1", max_episode_steps=3)
    policy = pgengine.create_policy(LinearPolicySpec(), spec, pgengine.describe(spec), seed=0)
    policy.parameters["log_sigma"][:] = 1000.0
    assert np.isfinite(policy.outputs(np.ones((2, 3), dtype=np.float32))).all()
    with pytest.raises(pgengine.DivergedError, match=r"update 8 \(seed 2\)"):
        play(spec, policy, Noise(2, "training", 7), 2)


# --- evaluation -------------------------------------------------------------------------------------------------------

SHORT = random_mdp(1, horizon=4)


def parts(episodes: int, domain: Domain, *, deterministic: bool = False) -> Batch:
    return play(SHORT, table_policy(SHORT), Noise(9, domain, 0), episodes, deterministic=deterministic)


def test_an_evaluation_is_its_definition() -> None:
    result = pgengine.evaluate(table_policy(SHORT), Played(SHORT), episodes=5, seed=9)
    batch = parts(5, "evaluation")
    returns = [float(batch.rewards[a:b].sum()) for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    mean = sum(returns) / 5
    half = 2.7764 * math.sqrt(sum((r - mean) ** 2 for r in returns) / 4) / math.sqrt(5)
    assert result.mean_return == pytest.approx(mean)
    assert result.confidence_interval == pytest.approx([mean - half, mean + half], abs=2e-3 * half)
    assert result.mean_length == pytest.approx(len(batch.rewards) / 5)
    assert len(set(batch.lengths.tolist())) > 1


def test_the_mode_is_played_on_episodes_of_its_own() -> None:
    result = pgengine.evaluate(table_policy(SHORT), SHORT, episodes=30, seed=9, deterministic_episodes=30)
    own, shared = (parts(30, domain, deterministic=True).returns.mean() for domain in ("mode", "evaluation"))
    assert result.deterministic_mean_return == pytest.approx(own)
    assert result.deterministic_mean_return != pytest.approx(shared)
    assert result.deterministic_episodes == 30
    none = pgengine.evaluate(table_policy(SHORT), SHORT, episodes=30, seed=9, deterministic_episodes=0)
    assert none.deterministic_mean_return is None
    assert none.mean_return == result.mean_return


def test_waves_are_one_evaluation_of_distinct_episodes() -> None:
    result = pgengine.evaluate(table_policy(SHORT), Played(SHORT), episodes=2500, seed=9, deterministic_episodes=2500)
    whole = parts(2500, "evaluation")
    half = 1.9609 * whole.returns.std(ddof=1) / 50
    assert result.mean_return == pytest.approx(whole.returns.mean(), abs=1e-12)
    assert result.mean_length == pytest.approx(whole.lengths.mean(), abs=1e-12)
    assert result.method == "t"
    assert np.diff(np.array(result.confidence_interval, dtype=float)) == pytest.approx(2 * half, rel=1e-4)
    mode = parts(2500, "mode", deterministic=True).returns.mean()
    assert result.deterministic_mean_return == pytest.approx(mode, abs=1e-12)
