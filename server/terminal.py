"""How a training job looks in a terminal: its progress while it trains, and its learning curve.

Reads jobs and events as the API gives them; knows no connection and no database.
"""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

__all__ = ["learning_curve", "watch"]

LINE_SECONDS = 1.0
"""Least time between two lines where the output is no terminal."""

WAITING = "waiting for the worker"


class _Training:
    """What the events of a job have said so far.

    Attributes:
        phase: What goes on, in a few words.
        mean_return: Of the last update, in training episodes.
        env_steps_per_second: Of the last update.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.phase = WAITING
        self.mean_return = math.nan
        self.env_steps_per_second = math.nan
        self._limit: int | None = job["stop"]["updates"]
        self._target: float | None = job["stop"]["target_return"]
        self._points: dict[int, tuple[float, float]] = {}
        self._began: float | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Learn from one event; types that are not known here are passed over, as more may come."""
        data = event["data"]
        match event["type"]:
            case "status" if data["status"] == "running":
                self.phase, self._began = "training", time.monotonic()
            case "status":
                self.phase = WAITING if data["status"] == "queued" else data["status"]
            case "metrics":
                for row in data["metrics"]:
                    self._take_update(row)
            case "rewind":
                self._points = {n: point for n, point in self._points.items() if n <= data["to_update"]}
            case "evaluation" if self._target is not None:
                if (data.get("selection", {}).get("lower_bound") or -math.inf) >= self._target:
                    self.phase = "evaluating"

    def _take_update(self, row: Mapping[str, Any]) -> None:
        if row["mean_return"] is not None:
            self.mean_return = row["mean_return"]
            self._points[row["update"]] = (row["env_steps"], row["mean_return"])
        if row["env_steps_per_second"] is not None:
            self.env_steps_per_second = row["env_steps_per_second"]
        if len(self._points) == self._limit:
            self.phase = "evaluating"

    @property
    def updates(self) -> int:
        """Updates so far."""
        return max(self._points, default=0)

    @property
    def points(self) -> list[tuple[float, float]]:
        """The learning curve: env_steps and mean return."""
        return [self._points[number] for number in sorted(self._points)]

    @property
    def fraction(self) -> float:
        """How near the end is: of the way to the target, or to the limit of updates if that is nearer."""
        if self.phase in ("evaluating", "succeeded"):
            return 1.0
        recent = [mean_return for _, mean_return in self.points[-3:]]
        # returns below zero have no beginning from which a share of the way could be told
        way = statistics.fmean(recent) / self._target if recent and self._target and self._target > 0 else 0.0
        return min(1.0, max(0.0, way, len(self._points) / self._limit if self._limit else 0.0))

    def left(self) -> str:
        """Time left to train, as far as the speed so far can tell; empty while nothing can be told."""
        if self.phase != "training" or self._began is None or self.fraction == 0.0:
            return ""
        seconds = (time.monotonic() - self._began) * (1 - self.fraction) / self.fraction
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f} left"


class _Display(Protocol):
    """How progress is shown."""

    def show(self, training: _Training) -> None:
        """Show how it stands now."""


class _Bar:
    """A bar that lives in one line of a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task(WAITING, total=1.0, returned="", rate="", left="")

    def show(self, training: _Training) -> None:
        known = training.updates > 0
        self._progress.update(
            self._task,
            description=training.phase,
            completed=training.fraction,
            returned=f"mean return {training.mean_return:5.1f}" if known else "",
            rate=f"{training.env_steps_per_second:,.0f} env_steps/s" if known else "",
            left=training.left(),
        )


class _Lines:
    """Lines for a file or a pipe, at most one a second and one for each change of phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = ("", -1)
        self._at = -math.inf

    def show(self, training: _Training) -> None:
        now = time.monotonic()
        state = (training.phase, training.updates)
        if state == self._shown or (training.phase == self._shown[0] and now - self._at < LINE_SECONDS):
            return
        self._shown, self._at = state, now
        parts = [f"   {training.phase}"]
        if training.updates > 0:
            parts += [
                f"update {training.updates}",
                f"mean return {training.mean_return:.1f}",
                f"{training.env_steps_per_second:,.0f} env_steps/s",
            ]
        if left := training.left():
            parts.append(left)
        self._console.print(", ".join(parts))


def watch(console: Console, job: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Show a training job's progress until its events end.

    Args:
        console: Where; a bar in a terminal, lines elsewhere.
        job: As the server gives it.
        events: Its events as they come.

    Returns:
        The learning curve: env_steps and mean return.
    """
    training = _Training(job)
    with _display(console) as display:
        display.show(training)
        for event in events:
            training.take(event)
            display.show(training)
    return training.points


@contextmanager
def _display(console: Console) -> Iterator[_Display]:
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("  "),
        SpinnerColumn("line"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[returned]}"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield _Bar(progress)


def learning_curve(
    points: Sequence[tuple[float, float]], *, width: int = 60, height: int = 10, encoding: str = "utf-8"
) -> list[str]:
    """A learning curve in characters, with labelled axes.

    Args:
        points: env_steps, increasing, and mean return.
        width: Columns of the curve, axis apart.
        height: Rows of the curve, axis apart.
        encoding: Of the output; without Unicode the columns have whole rows only.

    Returns:
        Lines to print; none without points.
    """
    if not points:
        return []
    blocks = " ▁▂▃▄▅▆▇█" if encoding.lower().replace("-", "").startswith("utf") else " #"
    side, corner, floor = ("│", "└", "─") if len(blocks) > 2 else ("|", "+", "-")
    steps = len(blocks) - 1
    top = max(1.0, *(y for _, y in points))
    last = points[-1][0]
    heights = [
        round(max(0.0, _between(points, last * (column + 1) / width)) / top * height * steps) for column in range(width)
    ]
    labels = {height - 1: f"{top:.0f}", (height - 1) // 2: f"{top * ((height - 1) // 2 + 1) / height:.0f}"}
    lines = ["mean return"]
    for row in reversed(range(height)):
        cells = "".join(blocks[min(steps, max(0, filled - row * steps))] for filled in heights)
        lines.append(f"{labels.get(row, ''):>7} {side}{cells}".rstrip())
    lines.append(f"{0:>7} {corner}{floor * width}")
    right = f"{last:,.0f} env_steps"
    lines.append(f"{'':>9}0{right:>{width - 1}}")
    return lines


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """The curve at x, straight between its points and level beyond them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[0][1] if x < points[0][0] else points[-1][1]
