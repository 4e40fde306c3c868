"""Small worlds for teaching, each with a known answer, as Gymnasium environments that publish their own table.

Registered as `pgengine/…-v0`. The engine reads them into finite MDPs; played through Gymnasium they draw from the same
table with a generator of their own. Episode limits are those of the registered ids.
"""

from typing import Annotated, Any

import gymnasium
import numpy as np
from pydantic import Field

__all__ = ["Aliased", "Bandit", "Chain", "GridWorld", "TMaze", "TableWorld"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Side = Annotated[int, Field(ge=1, le=16)]

Outcomes = list[tuple[float, int, float, bool]]
"""(probability, next state, reward, whether the episode ends) of everything that may follow an action."""


class TableWorld(gymnasium.Env[np.int64, np.int64]):
    """A world that is nothing but its table.

    Attributes:
        s: State that it is in, whatever is seen of it.
        P: P[s][a], what may follow each action in each state, as Gymnasium's toy-text environments publish it.
        initial_state_distrib: [S] probability that an episode begins in the state.
        observed_as: [S] what is seen of each state.
        state_names: [S] what people call the states.
        action_names: [A] what people call the actions.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}
    steps_by_table = True

    def __init__(
        self,
        P: list[list[Outcomes]],
        initial: list[float],
        *,
        state_names: list[str],
        action_names: list[str],
        observed_as: list[int] | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Keeps the table."""
        self.P = P
        self.initial_state_distrib = np.array(initial)
        self.observed_as = list(range(len(P))) if observed_as is None else observed_as
        self.state_names = state_names
        self.action_names = action_names
        self.observation_space = gymnasium.spaces.Discrete(max(self.observed_as) + 1)
        self.action_space = gymnasium.spaces.Discrete(len(action_names))
        self.render_mode = render_mode
        self.s = int(np.argmax(self.initial_state_distrib))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """Draws the first state."""
        super().reset(seed=seed)
        self.s = int(self.np_random.choice(len(self.P), p=self.initial_state_distrib))
        return self._seen(), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """Draws what follows."""
        outcomes = self.P[self.s][action]
        drawn = self.np_random.choice(len(outcomes), p=[p for p, *_ in outcomes])
        _, self.s, reward, terminated = outcomes[drawn]
        return self._seen(), reward, terminated, False, {}

    def _seen(self) -> np.int64:
        return np.int64(self.observed_as[self.s])

    def render(self) -> Any:
        """Name of the state, whether a policy sees it or not."""
        return self.state_names[self.s]


def _stay(s: int, actions: int) -> list[Outcomes]:
    """The row of a state that ends an episode."""
    return [[(1.0, s, 0.0, True)] for _ in range(actions)]


def _require(fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"expected {expected}")


class Bandit(TableWorld):
    """One choice among arms that pay 1 or 0; arm k of n pays with probability 1/2 + spread (k / (n - 1) - 1/2).

    Known answer: the last arm is best, and J = 1/2 + spread / 2; a uniform policy has J = 1/2.
    """

    def __init__(
        self, arms: Annotated[int, Field(ge=2, le=256)] = 5, spread: Share = 0.8, render_mode: str | None = None
    ) -> None:
        """Builds the table.

        Args:
            arms: How many there are, from 2 to 256.
            spread: How far apart the best and the worst are, from 0 to 1.
            render_mode: `ansi` for the name of the state.

        Raises:
            ValueError: if an argument is out of its range.
        """
        _require(2 <= arms <= 256, "from 2 to 256 arms")
        _require(0.0 <= spread <= 1.0, "a spread from 0 to 1")
        pays = [0.5 + spread * (k / (arms - 1) - 0.5) for k in range(arms)]
        choice: list[Outcomes] = [[(1.0 - p, 1, 0.0, True), (p, 2, 1.0, True)] for p in pays]
        super().__init__(
            [choice, _stay(1, arms), _stay(2, arms)],
            [1.0, 0.0, 0.0],
            state_names=["choice", "nothing", "paid"],
            action_names=[f"arm {k}" for k in range(arms)],
            render_mode=render_mode,
        )


class Chain(TableWorld):
    """A row of states with 1 at its end; in each one can leave with 0.1, and going on fails with probability `slip`.

    Known answer: with n states, always going on has J = (1 - slip)^(n - 1), leaving at once has J = 0.1, and the
    optimum is the larger. A uniform policy gets to the last choice with probability ((1 - slip) / 2)^(n - 2) alone, and
    one that always leaves never does: the gradient vanishes exponentially fast far from the optimum.

    Source: Agarwal, Kakade, Lee and Mahajan, On the theory of policy gradient methods, 2021, vanishing gradients on a
    chain.
    """

    def __init__(
        self,
        states: Annotated[int, Field(ge=2, le=100)] = 5,
        slip: Share = 0.1,
        render_mode: str | None = None,
    ) -> None:
        """Builds the table.

        Args:
            states: Length of the row, its end included, from 2 to 100.
            slip: Probability that going on ends the episode with nothing, from 0 to 1.
            render_mode: `ansi` for the name of the state.

        Raises:
            ValueError: if an argument is out of its range.
        """
        _require(2 <= states <= 100, "from 2 to 100 states")
        _require(0.0 <= slip <= 1.0, "a slip from 0 to 1")
        end, gone = states - 1, states
        P: list[list[Outcomes]] = []
        for s in range(end):
            ends = s + 1 == end
            P.append([[(1.0, gone, 0.1, True)], [(1.0 - slip, s + 1, float(ends), ends), (slip, gone, 0.0, True)]])
        super().__init__(
            [*P, _stay(end, 2), _stay(gone, 2)],
            [1.0] + [0.0] * states,
            state_names=[*(f"state {s}" for s in range(end)), "end", "gone"],
            action_names=["leave", "go on"],
            render_mode=render_mode,
        )


class GridWorld(TableWorld):
    """From the upper left corner to the lower right one, -1 for each step; a wall stops a move.

    With probability `slip` a move turns to one of its sides, each equally likely.

    Known answer: without slip the shortest way, J = -(rows + columns - 2); on 4 by 4 with slip 0.2, J = -7.4036 (by
    dynamic programming; the limit of 100 steps does not matter).
    """

    def __init__(self, rows: Side = 4, columns: Side = 4, slip: Share = 0.0, render_mode: str | None = None) -> None:
        """Builds the table.

        Args:
            rows: From 1 to 16; there are at least two cells.
            columns: From 1 to 16.
            slip: Probability that a move turns to a side, from 0 to 1.
            render_mode: `ansi` for the name of the state.

        Raises:
            ValueError: if an argument is out of its range.
        """
        _require(1 <= rows <= 16 and 1 <= columns <= 16 and rows * columns > 1, "1 to 16 rows and columns, two cells")
        _require(0.0 <= slip <= 1.0, "a slip from 0 to 1")
        goal = rows * columns - 1
        moves = [(-1, 0), (0, 1), (1, 0), (0, -1)]

        def after(s: int, move: tuple[int, int]) -> int:
            row = min(max(s // columns + move[0], 0), rows - 1)
            column = min(max(s % columns + move[1], 0), columns - 1)
            return row * columns + column

        def outcomes(s: int, a: int) -> Outcomes:
            turns = [(1.0 - slip, a), (slip / 2.0, (a - 1) % 4), (slip / 2.0, (a + 1) % 4)]
            ways = [(p, after(s, moves[turn])) for p, turn in turns if p > 0.0]
            return [(p, s_next, -1.0, s_next == goal) for p, s_next in ways]

        super().__init__(
            [[outcomes(s, a) for a in range(4)] for s in range(goal)] + [_stay(goal, 4)],
            [1.0] + [0.0] * goal,
            state_names=[f"row {s // columns}, column {s % columns}" for s in range(goal)] + ["goal"],
            action_names=["up", "right", "down", "left"],
            render_mode=render_mode,
        )


class Aliased(TableWorld):
    """A corridor of three cells that look alike, -1 for each step, in the middle of which left and right are switched.

    Known answer: without a limit the best a memoryless policy can do is to go right with probability
    p = 2 - sqrt(2) = 0.586, which has J = -2 (2 - p) / (p (1 - p)) = -(6 + 4 sqrt(2)) = -11.657. Every deterministic
    one goes on for ever. The limit of 200 steps changes that J by less than 1e-8.

    Source: Sutton and Barto, Reinforcement Learning, 2nd edition, example 13.1.
    """

    def __init__(self, render_mode: str | None = None) -> None:
        """Builds the table.

        Args:
            render_mode: `ansi` for the name of the state.
        """
        ways = [(0, 1), (2, 0), (1, 3)]  # left, right
        super().__init__(
            [[[(1.0, after, -1.0, after == 3)] for after in pair] for pair in ways] + [_stay(3, 2)],
            [1.0, 0.0, 0.0, 0.0],
            observed_as=[0, 0, 0, 0],
            state_names=["first cell", "switched cell", "last cell", "goal"],
            action_names=["left", "right"],
            render_mode=render_mode,
        )


class TMaze(TableWorld):
    """A cue, seen at the beginning alone, says which way is right at the junction at the end of a corridor.

    The corridor is walked by itself, whatever one does; only the choice at the junction counts: 1 if it is what the
    cue said, else 0. Every episode takes length + 1 steps.

    Known answer: both cues are equally likely, so every memoryless policy has J = 1/2, exactly; remembering the last
    length + 1 observations is enough for J = 1.

    Source: Bakker, Reinforcement learning with long short-term memory, 2001, the T-maze.
    """

    def __init__(self, length: Annotated[int, Field(ge=1, le=50)] = 4, render_mode: str | None = None) -> None:
        """Builds the table.

        Args:
            length: Steps from the cue to the junction, from 1 to 50.
            render_mode: `ansi` for the name of the state.

        Raises:
            ValueError: if the length is out of its range.
        """
        _require(1 <= length <= 50, "a length from 1 to 50")
        end = 2 * (length + 1)
        P: list[list[Outcomes]] = []
        seen, names = [], []
        for place in range(length + 1):
            for cue in range(2):  # state 2 place + cue
                if place < length:
                    P.append([[(1.0, 2 * (place + 1) + cue, 0.0, False)]] * 2)
                else:
                    P.append([[(1.0, end, float(choice == cue), True)] for choice in range(2)])
                where = "cue" if place == 0 else "junction" if place == length else f"corridor {place}"
                seen.append(cue if place == 0 else 3 if place == length else 2)
                names.append(f"{where}, {('up', 'down')[cue]}")
        super().__init__(
            [*P, _stay(end, 2)],
            [0.5, 0.5] + [0.0] * (end - 1),
            observed_as=[*seen, 4],
            state_names=[*names, "end"],
            action_names=["up", "down"],
            render_mode=render_mode,
        )
