"""A large batch of observations, made into numbers piece by piece.

As Python's lists and floats a body takes ten times its bytes, as an array less than they are. So of a large one only
a piece at a time becomes lists. Knows JSON; knows no policy.
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

__all__ = ["Rows", "rows_of"]

PIECE = 262_144
"""Bytes that become lists at once."""

_MARK = re.compile(rb'[]["]')
_BETWEEN = b" \t\r\n,"
_decode = msgspec.json.Decoder().decode


class Rows:
    """The rows of a JSON list of lists, not read yet.

    Args:
        text: The list.
        places: Where each row begins and ends in it.
    """

    def __init__(self, text: memoryview, places: list[tuple[int, int]]) -> None:
        self._text = text
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def pieces(self) -> Iterator[tuple[int, list[Any]]]:
        """Some rows after one another, and the number of the first of them.

        Raises:
            msgspec.DecodeError: if a number is beyond every float.
        """
        first = 0
        while first < len(self._places):
            begin, after = self._places[first][0], first + 1
            while after < len(self._places) and self._places[after][1] - begin <= PIECE:
                after += 1
            yield first, _decode(b"".join((b"[", self._text[begin : self._places[after - 1][1]], b"]")))
            first = after


def rows_of(text: memoryview) -> Rows | None:
    """The rows of a list of lists; None if it is something else, or has texts in it.

    Args:
        text: Good JSON.
    """
    places: list[tuple[int, int]] = []
    depth = begin = end = 0  # where the row begins, and where what was before it ended
    for mark in _MARK.finditer(text):
        at = mark.start()
        if text[at] == ord('"'):  # there may be brackets in it
            return None
        opens = text[at] == ord("[")
        if depth <= 1 and bytes(text[end:at]).strip(_BETWEEN):
            return None
        depth += 1 if opens else -1
        if depth == 2 and opens:
            begin = at
        elif depth <= 1:
            end = at + 1
            if depth == 1 and not opens:
                places.append((begin, end))
    return Rows(text, places) if places else None
