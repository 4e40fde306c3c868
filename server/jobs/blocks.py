"""Recorded updates in columns: how a long history is kept in few bytes and read without parsing each row.

    bytes = length of the header, header as JSON (count, names, nonfinite), int64 [3, n], float64 [m, n]

Knows numpy; knows no table.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

__all__ = ["Columns", "peaks"]

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Columns:
    """n recorded updates, in order.

    Attributes:
        numbers: [3, n] update, env_steps and attempt of each.
        names: The m metrics, in the order in which they were first measured.
        values: [m, n] their values; not a number where one is missing or was not finite.
        nonfinite: By metric, the updates in which it was not finite.
    """

    numbers: Int64[np.ndarray, "3 n"]
    names: list[str]
    values: Float[np.ndarray, "m n"]
    nonfinite: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.numbers.shape[1])

    @property
    def updates(self) -> Int64[np.ndarray, "n"]:
        """Numbers of the updates, which only rise."""
        return np.asarray(self.numbers[0])

    def taken(self, which: np.ndarray | slice) -> "Columns":
        """Some of the updates: a mask, indices in order, or a slice."""
        numbers = self.numbers[:, which]
        here = set(numbers[0].tolist()) if self.nonfinite else set()
        nonfinite = {name: [n for n in found if n in here] for name, found in self.nonfinite.items()}
        return Columns(numbers, self.names, self.values[:, which], {name: n for name, n in nonfinite.items() if n})

    def named(self, names: Sequence[str]) -> Float[np.ndarray, "k n"]:
        """Columns by name; one that was never measured is all missing."""
        place = {name: i for i, name in enumerate(self.names)}
        columns = np.full((len(names), len(self)), np.nan)
        for row, name in enumerate(names):
            if name in place:
                columns[row] = self.values[place[name]]
        return columns

    def published(self) -> dict[int, dict[str, Any]]:
        """Each update by its number: what was measured of it, null where it was not finite, and the names of those."""
        infinite = [set(self.nonfinite.get(name, ())) for name in self.names]
        found = {}
        for number, column in zip(self.updates.tolist(), self.values.T.tolist(), strict=True):
            here = [name for name, numbers in zip(self.names, infinite, strict=True) if number in numbers]
            # a number is equal to itself; what was not measured is left out
            known = {
                name: value if value == value else None
                for name, value in zip(self.names, column, strict=True)
                if value == value or name in here
            }
            found[number] = {"update": number, **known, "nonfinite": here}
        return found

    def to_bytes(self) -> bytes:
        """Bytes that `from_bytes` reads."""
        header = json.dumps({"count": len(self), "names": self.names, "nonfinite": self.nonfinite}).encode()
        numbers, values = self.numbers.astype("<i8"), self.values.astype("<f8")
        return b"".join((_LENGTH.pack(len(header)), header, numbers.tobytes(), values.tobytes()))

    @staticmethod
    def from_bytes(data: bytes) -> "Columns":
        """The columns that `to_bytes` wrote."""
        (length,) = _LENGTH.unpack_from(data)
        header = json.loads(data[4 : 4 + length])
        n, names = header["count"], header["names"]
        numbers = np.frombuffer(data, "<i8", 3 * n, 4 + length).reshape(3, n)
        values = np.frombuffer(data, "<f8", len(names) * n, 4 + length + 24 * n).reshape(len(names), n)
        return Columns(numbers, names, values, header["nonfinite"])

    @staticmethod
    def of_rows(rows: Sequence[Mapping[str, Any]]) -> "Columns":
        """The columns of rows as the table keeps them: update, env_steps, attempt, values, nonfinite."""
        numbers = [[row[name] for row in rows] for name in ("update", "env_steps", "attempt")]
        names = list(dict.fromkeys(name for row in rows for name in row["values"]))
        values = [[row["values"].get(name) for row in rows] for name in names]
        nonfinite: dict[str, list[int]] = {}
        for row in rows:
            for name in row["nonfinite"] or ():
                nonfinite.setdefault(name, []).append(row["update"])
        return Columns(
            np.array(numbers, np.int64).reshape(3, len(rows)),
            names,
            np.array(values, np.float64).reshape(len(names), len(rows)),
            nonfinite,
        )

    @staticmethod
    def joined(parts: Iterable["Columns"]) -> "Columns":
        """Columns one behind the other, in the order of their updates."""
        parts = [part for part in parts if len(part)]
        if len(parts) == 1:
            return parts[0]
        names = list(dict.fromkeys(name for part in parts for name in part.names))
        values = [part.values if part.names == names else part.named(names) for part in parts]
        nonfinite: dict[str, list[int]] = {}
        for part in parts:
            for name, found in part.nonfinite.items():
                nonfinite.setdefault(name, []).extend(found)
        return Columns(
            np.concatenate([np.empty((3, 0), np.int64), *(part.numbers for part in parts)], axis=1),
            names,
            np.concatenate([np.empty((len(names), 0)), *values], axis=1),
            nonfinite,
        )


def peaks(values: Float[np.ndarray, "k n"], max_points: int) -> Int64[np.ndarray, "kept"] | slice:
    """Which of n rows stay, so that they are at most so many and no curve loses a peak.

    The rows are cut into buckets of equal size. Of each those rows stay in which one of the k curves has its least or
    its greatest value, and the first and the last row stay too. Where there is no room for two rows of each curve and
    the two ends, rows at even distances stay.
    """
    curves, count = values.shape
    if count <= max_points:
        return slice(None)
    buckets = (max_points - 2) // (2 * curves) if curves else 0
    if buckets == 0:
        even: np.ndarray = np.arange(max_points) * (count - 1) // (max_points - 1)
        return even
    missing: Bool[np.ndarray, "k n"] = np.isnan(values)
    low, high = np.where(missing, np.inf, values), np.where(missing, -np.inf, values)
    kept = np.zeros(count, dtype=bool)
    kept[[0, -1]] = True
    for bucket in range(buckets):
        first, last = bucket * count // buckets, (bucket + 1) * count // buckets
        known = ~missing[:, first:last].all(axis=1)
        kept[first + low[known, first:last].argmin(axis=1)] = True
        kept[first + high[known, first:last].argmax(axis=1)] = True
    return np.flatnonzero(kept)
