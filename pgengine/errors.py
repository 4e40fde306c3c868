"""What the engine raises.

PgengineError
├── SpecError               a setting that is wrong by itself or does not fit another: pointer, code, message
├── ObservationError        an observation that the policy cannot read: pointer, code, message
├── EnvironmentFailure      an environment raised, or broke its contract, in the middle of an episode
├── DivergedError           a gradient or a parameter is no longer finite: update, seed
├── ReplayDiffers           an update that is made again comes out otherwise than it was recorded: update, figures
├── CheckpointError         bytes that are not a checkpoint of ours, or are damaged
└── ShapeMismatch           arrays that do not belong together; a mistake of the caller
"""

__all__ = [
    "CheckpointError",
    "DivergedError",
    "EnvironmentFailure",
    "ObservationError",
    "PgengineError",
    "ReplayDiffers",
    "ShapeMismatch",
    "SpecError",
]


class PgengineError(Exception):
    """Everything that the engine raises on purpose."""


class _PointedError(PgengineError):
    def __init__(self, pointer: str, code: str, message: str) -> None:
        super().__init__(f"{pointer or '/'}: {message}")
        self.pointer = pointer
        self.code = code
        self.message = message


class SpecError(_PointedError):
    """A setting that is wrong by itself or does not fit another.

    Attributes:
        pointer: JSON Pointer (RFC 6901) from the root of a training spec, such as `/algorithm/gamma`.
        code: Closed machine-readable code, such as `baseline_needs_trajectories`.
        message: What was expected and what to do, for people.
    """

    def under(self, prefix: str) -> "SpecError":
        """The same error, seen from an object that holds this one at `prefix`."""
        return SpecError(prefix + self.pointer, self.code, self.message)


class ObservationError(_PointedError):
    """An observation that the policy cannot read.

    Attributes:
        pointer: JSON Pointer from the root of the observations, such as `/3` or `/3/1`.
        code: Closed machine-readable code, such as `observation_shape`.
        message: What was expected, for people.
    """


class EnvironmentFailure(PgengineError):
    """An environment raised, or broke its contract, in the middle of an episode; the cause is chained."""


class DivergedError(PgengineError):
    """A gradient or a parameter is no longer finite.

    Attributes:
        update: Number of the update that could not be taken.
        seed: Seed of the run, with which the update can be repeated.
    """

    def __init__(self, update: int, seed: int, what: str) -> None:
        super().__init__(
            f"{what} is not finite in update {update} (seed {seed}); "
            "a smaller learning rate or a smaller scale of the rewards usually helps"
        )
        self.update = update
        self.seed = seed


class ReplayDiffers(PgengineError):
    """An update that is made again comes out otherwise than it was recorded.

    Attributes:
        update: Number of the first such update.
        figures: What differs: by name the recorded value and the one of now.
        runtime: What is another runtime now, as sentences have it; empty if none of what is known of it is.
    """

    def __init__(self, update: int, figures: dict[str, tuple[float, float]], runtime: list[str]) -> None:
        differ = ", ".join(f"{name} was {then:.6g} and is {now:.6g}" for name, (then, now) in figures.items())
        cause = (
            "the environment does not repeat what it did: it draws random numbers that do not come from its seed, or "
            "has changed since"
        )
        if runtime:
            cause = f"the run was computed in another runtime ({'; '.join(runtime)}), or {cause}"
        super().__init__(f"update {update} comes out otherwise: {differ}; {cause}")
        self.update = update
        self.figures = figures
        self.runtime = runtime


class CheckpointError(PgengineError):
    """Bytes that are not a checkpoint of ours, are damaged, or belong to another version."""


class ShapeMismatch(PgengineError):
    """Arrays that do not belong together."""
