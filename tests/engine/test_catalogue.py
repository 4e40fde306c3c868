"""The teaching worlds are good Gymnasium environments, and their optima are those that they claim."""

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import pgengine
from pgengine.environments import TabularMDP, register_own_ids
from pgengine.spec import GymnasiumSpec

IDS = [f"pgengine/{name}-v0" for name in ("Aliased", "Bandit", "Chain", "GridWorld", "TMaze")]


def world(id: str, *, limit: int | None = None, **arguments: bool | int | float | str | None) -> TabularMDP:
    spec = GymnasiumSpec(id=f"pgengine/{id}-v0", arguments=arguments, max_episode_steps=limit)
    opened = pgengine.open_environment(spec)
    assert isinstance(opened, TabularMDP)
    return opened


def value(mdp: TabularMDP, pi: np.ndarray, steps: int | None = None) -> float:
    """J of a policy [O, A] up to the limit, by backward induction."""
    v = np.zeros(len(mdp.initial))
    taken = pi[mdp.observations]
    for _ in range(steps or mdp.facts.max_episode_steps):
        q = (mdp.transitions * (mdp.rewards + v)).sum(axis=2)
        v = np.where(mdp.terminal, 0.0, (taken * q).sum(axis=1))
    return float(mdp.initial @ v)


def optimum(mdp: TabularMDP) -> float:
    """The largest J up to the limit that knowing state and time allows, by backward induction."""
    v = np.zeros(len(mdp.initial))
    for _ in range(mdp.facts.max_episode_steps):
        v = np.where(mdp.terminal, 0.0, (mdp.transitions * (mdp.rewards + v)).sum(axis=2).max(axis=1))
    return float(mdp.initial @ v)


def always(mdp: TabularMDP, action: int) -> np.ndarray:
    return np.tile(np.eye(mdp.transitions.shape[1])[action], (int(mdp.observations.max()) + 1, 1))


def uniform(mdp: TabularMDP) -> np.ndarray:
    A = mdp.transitions.shape[1]
    return np.full((int(mdp.observations.max()) + 1, A), 1 / A)


@pytest.mark.parametrize("id", IDS)
def test_gymnasiums_checker_finds_nothing(id: str) -> None:
    register_own_ids()
    check_env(gymnasium.make(id).unwrapped)  # warnings are errors here


@pytest.mark.parametrize("id", IDS)
def test_an_instance_names_the_state_that_it_is_in(id: str) -> None:
    register_own_ids()
    environment = gymnasium.make(id, render_mode="ansi")
    environment.reset(seed=0)
    names = environment.unwrapped.state_names  # type: ignore[attr-defined]
    assert environment.render() in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("arms", "spread"), [(2, 1.0), (5, 0.8), (10, 0.0)])
def test_the_best_arm_is_the_last(arms: int, spread: float) -> None:
    mdp = world("Bandit", arms=arms, spread=spread)
    values = [value(mdp, always(mdp, arm)) for arm in range(arms)]
    assert values[-1] == max(values) == pytest.approx(0.5 + spread / 2)
    assert value(mdp, uniform(mdp)) == pytest.approx(0.5)
    assert optimum(mdp) == pytest.approx(0.5 + spread / 2)
    assert mdp.facts.fixed_steps == 1


@pytest.mark.parametrize(("states", "slip"), [(2, 0.0), (5, 0.1), (9, 0.5), (40, 0.02)])
def test_going_on_along_the_chain(states: int, slip: float) -> None:
    mdp = world("Chain", states=states, slip=slip)
    assert value(mdp, always(mdp, 1)) == pytest.approx((1 - slip) ** (states - 1))
    assert value(mdp, always(mdp, 0)) == pytest.approx(0.1)
    assert optimum(mdp) == pytest.approx(max(0.1, (1 - slip) ** (states - 1)))
    assert not mdp.facts.limit_cuts
    d = mdp.initial.copy()
    for _ in range(states - 2):
        d = np.where(mdp.terminal, 0.0, np.einsum("s,sap->p", d / 2, mdp.transitions))
    assert d[states - 2] == pytest.approx(((1 - slip) / 2) ** (states - 2))


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (4, 4), (3, 7)])
def test_the_shortest_way_through_the_grid(rows: int, columns: int) -> None:
    assert optimum(world("GridWorld", rows=rows, columns=columns)) == -(rows + columns - 2)


def test_the_slippery_grid() -> None:
    assert optimum(world("GridWorld", slip=0.2)) == pytest.approx(-7.4036, abs=5e-5)
    assert optimum(world("GridWorld", slip=0.2, limit=2_000)) == pytest.approx(-7.4036, abs=5e-5)


def test_only_a_stochastic_policy_is_optimal_where_cells_look_alike() -> None:
    mdp = world("Aliased")
    assert mdp.observations.tolist() == [0, 0, 0, 0]

    def right(p: float, steps: int = 200) -> float:
        return value(mdp, np.array([[1 - p, p]]), steps)

    best = 2 - np.sqrt(2)
    assert right(best) == pytest.approx(-(6 + 4 * np.sqrt(2)), abs=1e-8)
    for p in np.linspace(0.3, 0.8, 11):
        assert right(p, 4_000) == pytest.approx(-2 * (2 - p) / (p * (1 - p)), rel=1e-9)
        assert right(p) <= right(best)
    assert right(0.0) == right(1.0) == -200
    assert optimum(mdp) == -3  # seeing the cells, one needs no chance


@pytest.mark.parametrize("length", [1, 4, 11])
def test_without_memory_the_maze_pays_one_half(length: int) -> None:
    """Exactly, and whatever is done; remembering the cue, 1."""
    mdp = world("TMaze", length=length)
    assert mdp.facts.fixed_steps == length + 1
    assert optimum(mdp) == 1.0
    generator = np.random.default_rng(length)
    for pi in [np.eye(2)[list(rows)] for rows in itertools.product(range(2), repeat=4)]:
        assert value(mdp, np.vstack([pi, [0.5, 0.5]])) == 0.5
    for _ in range(10):
        assert value(mdp, generator.dirichlet([1, 1], size=5)) == pytest.approx(0.5, abs=1e-15)


def test_the_cue_is_seen_at_the_beginning_alone() -> None:
    mdp = world("TMaze", length=3)
    first = mdp.begin(np.arange(0, 2**64, 2**58, dtype=np.uint64))
    assert sorted(set(first.tolist())) == [0, 1]
    noise = np.full((64, 1), 0.5)
    seen = [mdp.step(first, noise) for _ in range(4)]  # does what the cue says, which matters at the junction
    assert [set(step.observations.tolist()) for step in seen] == [{2}, {2}, {3}, {4}]
    assert seen[-1].terminated.all()
    assert (seen[-1].rewards == 1.0).all()


@pytest.mark.parametrize(("id", "name", "value"), [
    ("Bandit", "arms", 1), ("Bandit", "spread", 1.5), ("Chain", "states", 101), ("Chain", "slip", -0.1),
    ("GridWorld", "rows", 17), ("TMaze", "length", 0),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(id: str, name: str, value: float) -> None:
    with pytest.raises(pgengine.SpecError) as error:
        world(id, **{name: value})
    assert (error.value.pointer, error.value.code) == (f"/arguments/{name}", "argument_value")
    with pytest.raises(ValueError, match="expected"):
        gymnasium.make(f"pgengine/{id}-v0", disable_env_checker=True, **{name: value})


def test_arguments_that_do_not_fit_together_are_refused_by_the_constructor() -> None:
    with pytest.raises(pgengine.SpecError, match="two cells") as error:
        world("GridWorld", rows=1, columns=1)
    assert (error.value.pointer, error.value.code) == ("/arguments", "environment_not_made")
