"""Windows over the last observations, and the transformer that reads them, against loops written by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pgengine
from pgengine.environments import EnvironmentFacts
from pgengine.noise import Noise
from pgengine.policies import Policy
from pgengine.policies.memory import mark, present, windows_of_rows
from pgengine.rollout import rollout
from pgengine.spaces import BoxSpace, DiscreteSpace, MultiBinarySpace, MultiDiscreteSpace, Space
from pgengine.spec import (
    AdamSpec,
    AlgorithmSpec,
    GaussianSpec,
    GymnasiumSpec,
    MlpPolicySpec,
    StopSpec,
    TrainingSpec,
    TransformerPolicySpec,
)
from tests.engine.worlds import CARTPOLE, PENDULUM, random_mdp

PLANE = BoxSpace(shape=[2], low=[None], high=[None], dtype="float32")
SPACES: list[Space] = [
    PLANE,
    DiscreteSpace(n=4, start=2),
    MultiDiscreteSpace(nvec=[2, 3], start=[1, -1]),
    MultiBinarySpace(n=3),
]
SMALL = TransformerPolicySpec(window=3, width=4, heads=2, layers=2)


def policy_on(space: Space, spec: TransformerPolicySpec = SMALL, actions: int = 3) -> Policy:
    """A transformer with parameters that are large enough to matter."""
    facts = EnvironmentFacts(
        observation_space=space, action_space=DiscreteSpace(n=actions), max_episode_steps=10, limit_from="declared"
    )
    policy = pgengine.create_policy(spec, CARTPOLE, facts, seed=0)
    generator = np.random.default_rng(1)
    policy.parameters = {n: generator.normal(size=s).astype(np.float32) for n, s in sorted(policy.shapes().items())}
    return policy


def rows(space: Space, N: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    if isinstance(space, BoxSpace):
        return generator.normal(size=(N, *space.shape)).astype(np.float32)
    if isinstance(space, DiscreteSpace):
        return space.start + generator.integers(space.n, size=N)
    if isinstance(space, MultiDiscreteSpace):
        return np.array(space.starts) + generator.integers(space.nvec, size=(N, len(space.nvec)))
    return generator.integers(2, size=(N, space.n))


def by_kind(space: Space) -> str:
    return space.kind


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=by_kind)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_window_holds_the_last_observations_of_its_own_episode(space: Space, k: int) -> None:
    """Against a loop, and step by step as a rollout does it."""
    policy = policy_on(space, SMALL.model_copy(update={"window": k}))
    lengths = [4, 1, 6, 2]
    offsets = np.cumsum([0, *lengths])
    x = rows(space, int(offsets[-1]))
    found = policy.windows(x, offsets)
    for first, last in zip(offsets[:-1], offsets[1:], strict=True):
        seen = policy.begin_windows(x[first : first + 1])
        for row in range(first, last):
            if k == 1:
                assert np.array_equal(found[row], x[row])
            else:
                for place in range(k):
                    source = row - (k - 1) + place
                    expected = x[source] if source >= first else np.broadcast_to(mark(space), x.shape[1:])
                    assert np.array_equal(found[row, place], expected, equal_nan=x.dtype.kind == "f")
            assert np.array_equal(seen[0], found[row], equal_nan=x.dtype.kind == "f")
            if row + 1 < last:
                seen = policy.next_windows(seen, x[row + 1 : row + 2])


def test_marks_stand_outside_of_their_spaces() -> None:
    assert np.isnan(mark(PLANE))
    assert mark(DiscreteSpace(n=4, start=2)) == 1
    assert mark(MultiDiscreteSpace(nvec=[2, 3], start=[1, -1])).tolist() == [0, -2]
    assert mark(MultiDiscreteSpace(nvec=[2, 3])).tolist() == [-1, -1]
    assert mark(MultiBinarySpace(n=3)).tolist() == [-1, -1, -1]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 9))
def test_a_window_is_filled_from_its_newest_place(lengths: list[int], k: int) -> None:
    offsets = np.cumsum([0, *lengths])
    x = rows(PLANE, int(offsets[-1]))
    there = present(PLANE, windows_of_rows(PLANE, x, offsets, k))
    time = np.concatenate([np.arange(length) for length in lengths])
    assert there.sum(axis=1).tolist() == np.minimum(time + 1, k).tolist()
    assert (np.diff(there.astype(int), axis=1) >= 0).all()


def test_the_next_window_leaves_the_last_one_alone() -> None:
    policy = policy_on(PLANE)
    seen = policy.begin_windows(rows(PLANE, 2))
    before = seen.copy()
    policy.next_windows(seen, rows(PLANE, 2, seed=1))[:] = 0.0
    assert np.array_equal(seen, before, equal_nan=True)


# --- the network ------------------------------------------------------------------------------------------------------


def by_hand(policy: Policy, history: np.ndarray) -> np.ndarray:
    """The outputs for one history of up to k observations, with one place and one head after the other."""
    spec, p = policy.spec, {name: array.astype(np.float64) for name, array in policy.parameters.items()}
    assert isinstance(spec, TransformerPolicySpec)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{name}.scale"] + p[f"{name}.shift"]

    T, d = len(history), spec.width // spec.heads
    x = [history[t] @ p["embedding"] + p["position"][spec.window - T + t] for t in range(T)]
    for n in range(spec.layers):
        b = f"blocks.{n}"
        normed = [norm(row, f"{b}.norm0") for row in x]
        query, key, value = ([row @ p[f"{b}.{name}.weight"] for row in normed] for name in ("query", "key", "value"))
        attended = []
        for t in range(T):
            heads = []
            for head in range(spec.heads):
                own = slice(head * d, (head + 1) * d)
                weights = np.exp([query[t][own] @ key[j][own] / np.sqrt(d) for j in range(T)])
                heads.append(sum(w * value[j][own] for j, w in enumerate(weights)) / weights.sum())
            attended.append(np.concatenate(heads) @ p[f"{b}.merge.weight"] + p[f"{b}.merge.bias"])
        x = [x[t] + attended[t] for t in range(T)]
        for t in range(T):
            wide = norm(x[t], f"{b}.norm1") @ p[f"{b}.expand.weight"] + p[f"{b}.expand.bias"]
            wide = np.maximum(wide, 0.0) if spec.activation == "relu" else np.tanh(wide)
            x[t] = x[t] + wide @ p[f"{b}.contract.weight"] + p[f"{b}.contract.bias"]
    return norm(x[-1], "norm") @ p["head.weight"] + p["head.bias"]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_transformer_is_its_formula(activation: str, length: int) -> None:
    policy = policy_on(PLANE, SMALL.model_copy(update={"activation": activation}))
    history = rows(PLANE, length).astype(np.float64)
    found = policy.outputs(policy.parse(history.tolist(), batch=False))
    assert np.allclose(found[0], by_hand(policy, history), rtol=1e-4, atol=1e-4)


def test_a_discrete_observation_is_a_row_of_the_embedding() -> None:
    space = DiscreteSpace(n=4, start=2)
    policy = policy_on(space)
    for history in ([5], [2, 5], [3, 3, 4]):
        one_hot = np.eye(4)[np.array(history) - 2]
        found = policy.outputs(policy.parse(history, batch=False))
        assert np.allclose(found[0], by_hand(policy, one_hot), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", SPACES, ids=by_kind)
@pytest.mark.parametrize("window", [1, 3])
def test_torch_and_numpy_agree(space: Space, window: int) -> None:
    policy = policy_on(space, SMALL.model_copy(update={"window": window}))
    seen = policy.windows(rows(space, 12), np.array([0, 5, 6, 12]))
    encoded = torch.as_tensor(policy.encode(seen))
    for dtype in (torch.float32, torch.float64):
        parameters = {name: torch.as_tensor(array, dtype=dtype) for name, array in policy.parameters.items()}
        found = policy.network.outputs(parameters, encoded.to(dtype) if encoded.is_floating_point() else encoded)
        assert found.dtype == dtype
        assert np.allclose(found, policy.outputs(seen), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("space", [PLANE, DiscreteSpace(n=4, start=2)], ids=by_kind)
def test_the_gradient_in_float64_is_that_of_differences(space: Space) -> None:
    policy = policy_on(space, TransformerPolicySpec(window=2, width=4, heads=2, layers=1, activation="tanh"), actions=2)
    seen = policy.windows(rows(space, 3), np.array([0, 2, 3]))
    encoded = torch.as_tensor(policy.encode(seen))
    encoded = encoded.double() if encoded.is_floating_point() else encoded
    names = sorted(policy.parameters)
    samples = torch.tensor([0, 1, 1])

    def log_prob(*values: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.as_tensor(policy.log_prob(parameters, encoded, samples))

    start = [torch.tensor(policy.parameters[name], dtype=torch.float64, requires_grad=True) for name in names]
    assert torch.autograd.gradcheck(log_prob, start)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("space", SPACES, ids=by_kind)
def test_nothing_is_seen_of_places_without_an_observation(space: Space) -> None:
    """The encoding of such a place may be anything: its numbers never reach the outputs, not to the last bit."""
    policy = policy_on(space)
    encoded = policy.encode(policy.begin_windows(rows(space, 8)))
    changed = encoded.copy()
    if isinstance(space, DiscreteSpace):
        changed[:, :-1] = -7
    else:
        changed[:, :-1, :-1] = 5.0
    one, other = (policy.network.outputs(policy.parameters, e) for e in (encoded, changed))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("space", SPACES, ids=by_kind)
def test_every_observation_of_the_window_counts_and_so_does_their_order(space: Space) -> None:
    policy = policy_on(space)
    seen = rows(space, 3 * 40).reshape(40, 3, *rows(space, 1).shape[1:])
    outputs = policy.outputs(seen)
    for place in range(3):
        changed = seen.copy()
        changed[:, place] = rows(space, 40, seed=1)
        assert np.abs(policy.outputs(changed) - outputs).max() > 0.01
    assert np.abs(policy.outputs(seen[:, [1, 0, 2]]) - outputs).max() > 0.01


@pytest.mark.parametrize("space", SPACES, ids=by_kind)
@pytest.mark.parametrize("spec", [SMALL, TransformerPolicySpec()], ids=["small", "default"])
def test_a_window_has_the_same_bits_alone_and_among_hundreds(space: Space, spec: TransformerPolicySpec) -> None:
    policy = policy_on(space, spec)
    seen = policy.windows(rows(space, 600), np.arange(0, 601, 20))
    among = policy.outputs(seen)
    for row in range(0, 600, 37):
        assert np.array_equal(policy.outputs(seen[row : row + 1])[0], among[row])


def test_all_actions_start_about_equally_likely_and_the_stream_does_not_grow_with_depth() -> None:
    for layers in (1, 8):
        spec = TransformerPolicySpec(window=8, width=32, heads=4, layers=layers)
        policy = pgengine.create_policy(spec, CARTPOLE, pgengine.describe(CARTPOLE), seed=3)
        outputs = policy.outputs(policy.windows(rows(policy.observation_space, 100), np.array([0, 100])))
        assert 1e-4 < np.abs(outputs).max() < 0.1


# --- histories as JSON ------------------------------------------------------------------------------------------------


def test_a_history_is_parsed_from_the_oldest_to_the_newest() -> None:
    policy = policy_on(PLANE)
    seen = policy.parse([[1.0, 2.0], [3.0, 4.0]], batch=False)
    assert seen.shape == (1, 3, 2)
    assert np.isnan(seen[0, 0]).all()
    assert seen[0, 1:].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    both = policy.parse([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], batch=True)
    assert present(PLANE, both).tolist() == [[False, False, True], [True, True, True]]
    assert np.array_equal(both[1:], [[[1, 2], [3, 4], [5, 6]]])


@pytest.mark.parametrize(("value", "batch", "pointer", "code"), [
    ([], False, "", "observation_shape"),
    ([[0.0, 0.0]] * 4, False, "", "observation_shape"),
    (0.0, False, "", "observation_shape"),
    ([0.0, 0.0], False, "/0", "observation_shape"),
    ([[0.0, 0.0], [0.0]], False, "/1", "observation_shape"),
    ([[0.0, 0.0], [0.0, None]], False, "/1/1", "observation_kind"),
    ([[[0.0, 0.0]], [[0.0, 0.0], ["0", 0.0]]], True, "/1/1/0", "observation_kind"),
    ([[[0.0, 0.0]], []], True, "/1", "observation_shape"),
    ([[[0.0, 0.0]], [[1e39, 0.0]]], True, "/1/0", "observation_not_finite"),
    ([], True, "", "observation_shape"),
])  # fmt: skip
def test_a_wrong_history_is_named(value: object, batch: bool, pointer: str, code: str) -> None:
    with pytest.raises(pgengine.ObservationError) as error:
        policy_on(PLANE).parse(value, batch=batch)
    assert (error.value.pointer, error.value.code) == (pointer, code)


def test_a_window_of_one_is_no_memory() -> None:
    policy = policy_on(PLANE, SMALL.model_copy(update={"window": 1}))
    assert policy.memory == 1
    assert policy.parse([1.0, 2.0], batch=False).tolist() == [[1.0, 2.0]]
    assert policy.answer(policy.parse([1.0, 2.0], batch=False)).actions.shape == (1,)


@pytest.mark.parametrize(("changes", "pointer", "code"), [
    ({"width": 6, "heads": 4}, "/width", "width_not_divisible"),
    ({"distribution": GaussianSpec()}, "/distribution/kind", "action_family_mismatch"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_named(changes: dict[str, object], pointer: str, code: str) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        policy_on(PLANE, SMALL.model_copy(update=changes))
    assert (error.value.pointer, error.value.code) == (pointer, code)


# --- in a rollout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [CARTPOLE, PENDULUM, random_mdp(1, horizon=6)], ids=["cartpole", "pendulum", "mdp"])
def test_what_was_seen_can_be_made_again_from_the_batch(world: object) -> None:
    """The log-probabilities of a rollout are those of the windows that `windows` cuts from its rows."""
    policy = pgengine.create_policy(SMALL, world, pgengine.describe(world), seed=0)  # type: ignore[arg-type]
    generator = np.random.default_rng(2)
    policy.parameters = {n: generator.normal(size=s).astype(np.float32) for n, s in sorted(policy.shapes().items())}
    opened = pgengine.open_environment(world)  # type: ignore[arg-type]
    batch = rollout(policy, opened, Noise(0, "training", 0), 5)
    opened.close()
    seen = policy.windows(batch.observations, batch.offsets)
    again = policy.log_prob(policy.parameters, policy.encode(seen), batch.samples)
    assert np.allclose(again, batch.log_probs, rtol=1e-3, atol=1e-3)
    memoryless = policy.begin_windows(batch.observations)
    assert not np.allclose(policy.outputs(memoryless), policy.outputs(seen), atol=1e-2)


@pytest.mark.slow
def test_only_a_policy_with_memory_can_tell_what_a_cue_said() -> None:
    """A cue of two kinds, then two blank observations: at the end the junction looks the same after both cues.

    Whatever its parameters, a policy without memory then acts the same after both; a transformer learns to act on the
    cue, here by the gradient of the log-probability of the right action.
    """
    space = DiscreteSpace(n=4)  # cue left, cue right, corridor, junction
    x, offsets = np.array([0, 2, 3, 1, 2, 3]), np.array([0, 3, 6])
    policy = policy_on(space, TransformerPolicySpec(window=3, width=8, heads=2), actions=2)
    at_junction = np.array([2, 5])
    encoded = torch.as_tensor(policy.encode(policy.windows(x, offsets)[at_junction]))
    names = sorted(policy.parameters)
    tensors = {name: torch.tensor(policy.parameters[name], requires_grad=True) for name in names}
    optimizer = torch.optim.Adam(list(tensors.values()), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss = -policy.log_prob(tensors, encoded, torch.tensor([0, 1])).sum()
        loss.backward()
        optimizer.step()
    policy.parameters = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    found = policy.answer(policy.windows(x, offsets)[at_junction]).probabilities
    assert isinstance(found, np.ndarray)
    assert found[0, 0] > 0.95
    assert found[1, 1] > 0.95
    facts = EnvironmentFacts(
        observation_space=space, action_space=DiscreteSpace(n=2), max_episode_steps=3, limit_from="declared"
    )
    memoryless = pgengine.create_policy(MlpPolicySpec(), CARTPOLE, facts, seed=0)
    left, right = memoryless.outputs(memoryless.windows(x, offsets)[at_junction])
    assert np.array_equal(left, right)


@pytest.mark.slow
def test_a_transformer_solves_a_t_maze_in_which_no_policy_without_memory_is_better_than_chance() -> None:
    """The cue stands in the first observation alone, and the junction looks the same after both cues.

    Without memory the action at the junction is independent of the cue, so the mean return is 1/2 at most, whatever is
    learned: at 400 fresh episodes 0.65 is 6 standard errors above that (odds below 1e-8). With memory 1 is possible,
    and 0.95 leaves room for a policy that still tries the other way now and then.
    """
    maze = GymnasiumSpec(id="pgengine/TMaze-v0")
    found = []
    for policy, updates in ((TransformerPolicySpec(window=8, width=16), 120), (MlpPolicySpec(hidden=[16]), 60)):
        algorithm = AlgorithmSpec(trajectories=32, optimizer=AdamSpec(learning_rate=3e-3))
        spec = TrainingSpec(environment=maze, policy=policy, algorithm=algorithm, stop=StopSpec(updates=updates))
        *_, last = pgengine.train(spec)
        found.append(pgengine.evaluate(last.policy, maze, episodes=400, seed=1).mean_return)
    assert found[0] >= 0.95
    assert found[1] <= 0.65
