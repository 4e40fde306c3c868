"""JSON bodies, read strictly.

Python's JSON reader takes NaN, numbers beyond every float, lone surrogates and repeated names, each of which later
breaks something that is not the client's fault to see: a response, an index, a database. Here they are refused before
anything looks at the body. That reader also holds the interpreter until it is through, for seconds with some bodies of
16 MB; large ones are read in pieces, between which other threads go on. Knows JSON; knows no HTTP.
"""

import json
import re
from collections.abc import Iterable
from json.decoder import scanstring  # type: ignore[attr-defined]
from math import isfinite
from typing import Any, cast

from server.errors import FieldError, InvalidRequest, invalid, pointer_to

__all__ = ["LARGEST_INTEGER", "LARGE_BODY", "MAX_ERRORS", "MAX_NAME", "check_containers", "decode", "takes_long"]

LARGEST_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""
MAX_NAME = 256
MAX_NAMES = 1024
"""No object that we read has more fields; a million unknown ones would be a million errors."""
MAX_VALUES = 200_000
"""No list that makes sense is longer, unless it holds plain numbers; those are bounded by the body's size alone."""
MAX_CONTAINERS = 250_000
"""No body that makes sense has more lists and objects in it."""
MAX_ERRORS = 20

LARGE_BODY = 65_536
MANY_CONTAINERS = 2_000
"""Bodies from here on are read in a thread: other requests do not wait for them."""

PIECE = 65_536
"""Characters of a list of numbers that are read at once, which takes a few milliseconds."""


def takes_long(raw: bytes) -> bool:
    """Whether a body should be decoded in a thread."""
    return len(raw) >= LARGE_BODY or raw.count(b"[") + raw.count(b"{") > MANY_CONTAINERS


def check_containers(raw: bytes, most: int) -> None:
    """Whether a body has so many lists and objects at most: by far the dearest thing to read, and quick to count.

    Raises:
        InvalidRequest: if it has more.
    """
    count = 0
    for start in range(0, len(raw), LARGE_BODY):
        count += raw.count(b"[", start, start + LARGE_BODY) + raw.count(b"{", start, start + LARGE_BODY)
        if count > most:
            raise invalid("", "too_many_values", f"Expected at most {most} lists and objects.")


class _Repeated(dict[str, Any]):
    """An object in which a name occurs twice."""


def decode(raw: bytes, max_depth: int, most_containers: int = MAX_CONTAINERS) -> Any:
    """A JSON body as Python values: finite numbers, integers within 2^53, clean text, bounded depth.

    Args:
        raw: The body as it was sent.
        max_depth: How many lists and objects may lie inside each other.
        most_containers: How many lists and objects there may be.

    Raises:
        InvalidRequest: with a pointer to each fault.
    """
    check_containers(raw, most_containers)
    try:
        text = raw.decode()
        value = _Reader(text, max_depth).read() if len(raw) >= LARGE_BODY else _any.decode(text)
    except RecursionError:
        raise invalid("", *_too_deep(max_depth)) from None
    except UnicodeDecodeError:
        raise invalid("", "malformed_json", "Expected JSON in UTF-8.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise invalid("", "malformed_json", f"Expected JSON; {where}: {error.msg}.") from None
    faults = _faults(value, max_depth)
    if faults:
        raise InvalidRequest(errors=faults)
    return value


class _Reader:
    """Reads what `json.loads` reads, and says the same of what is wrong with it, but in pieces.

    Texts and lists of numbers are read by that of the standard library; what is between them is gone through here.
    """

    def __init__(self, text: str, max_depth: int) -> None:
        self._text = text
        self._max_depth = max_depth
        self._path: list[str | int] = []

    def read(self) -> Any:
        if self._text.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", self._text, 0)
        value, at = self._value(self._behind_space(0))
        at = self._behind_space(at)
        if at != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, at)
        return value

    def _value(self, at: int) -> tuple[Any, int]:
        first = self._text[at : at + 1]
        if first == "[":
            return self._list(at)
        if first == "{":
            return self._object(at)
        try:
            return cast(tuple[Any, int], _any.scan_once(self._text, at))  # type: ignore[attr-defined]
        except StopIteration as stop:
            raise json.JSONDecodeError("Expecting value", self._text, stop.value) from None

    def _list(self, at: int) -> tuple[list[Any], int]:
        if len(self._path) >= self._max_depth:
            raise invalid(self._pointer(), *_too_deep(self._max_depth))
        text, begin = self._text, at + 1
        if (end := self._end_of_plain(begin)) is not None:
            return self._plain(begin, end), end + 1
        values: list[Any] = []
        at = self._behind_space(begin)
        while True:
            if len(values) == MAX_VALUES:
                raise invalid(self._pointer(), *_TOO_MANY_VALUES)
            self._path.append(len(values))
            value, at = self._value(at)
            self._path.pop()
            values.append(value)
            at = self._behind_space(at)
            following = text[at : at + 1]
            if following == "]":
                return values, at + 1
            if following != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = self._behind_space(at + 1)

    def _object(self, at: int) -> tuple[dict[str, Any], int]:
        if len(self._path) >= self._max_depth:
            raise invalid(self._pointer(), *_too_deep(self._max_depth))
        text, pairs = self._text, list[tuple[str, Any]]()
        at = self._behind_space(at + 1)
        if text[at : at + 1] == "}":
            return {}, at + 1
        while True:
            if text[at : at + 1] != '"':
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
            if len(pairs) == MAX_NAMES:
                raise invalid(self._pointer(), *_TOO_MANY_FIELDS)
            name, at = scanstring(text, at + 1, True)
            at = self._behind_space(at)
            if text[at : at + 1] != ":":
                raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
            self._path.append(name)
            value, at = self._value(self._behind_space(at + 1))
            self._path.pop()
            pairs.append((name, value))
            at = self._behind_space(at)
            following = text[at : at + 1]
            if following == "}":
                return _object(pairs), at + 1
            if following != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = self._behind_space(at + 1)

    def _end_of_plain(self, begin: int) -> int | None:
        """Where a list ends that holds neither lists nor objects nor texts; None for every other list."""
        at = begin
        while True:
            end = _PLAIN.match(self._text, at, at + PIECE).end()  # type: ignore[union-attr]
            if end < at + PIECE:
                return end if self._text[end : end + 1] == "]" else None
            at = end

    def _plain(self, begin: int, end: int) -> list[Any]:
        """The values of a list without lists, objects and texts."""
        text, values, at = self._text, list[Any](), begin
        while True:
            cut = text.find(",", at + PIECE, end)
            stop = end if cut < 0 else cut
            piece = text[at:stop]
            if at > begin and not piece.strip(" \t\n\r"):
                raise json.JSONDecodeError("Expecting value", text, stop)
            # a function of ours for each integer takes ten times as long, and only long ones need it
            decoder = _any if len(piece) > 2 * PIECE or _LONG_INTEGER.search(piece) else _short
            try:
                values += decoder.decode(f"[{piece}]")
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, text, at + error.pos - 1) from None
            if cut < 0:
                return values
            at = cut + 1

    def _behind_space(self, at: int) -> int:
        while True:
            end = _SPACE.match(self._text, at, at + PIECE).end()  # type: ignore[union-attr]
            if end < at + PIECE:
                return end
            at = end

    def _pointer(self) -> str:
        pointer = ""
        for part in self._path:
            pointer = pointer_to(pointer, part)
        return pointer


_PLAIN = re.compile(r'[^][{}"]*')
_SPACE = re.compile(r"[ \t\n\r]*")
_LONG_INTEGER = re.compile(r"(?<![\d.])\d{17}")
_TOO_MANY_VALUES = ("too_many_values", f"Expected at most {MAX_VALUES} values here.")
_TOO_MANY_FIELDS = ("too_many_fields", f"Expected at most {MAX_NAMES} fields.")


def _integer(digits: str) -> int:
    # Python refuses to read integers of thousands of digits, and takes quadratic time for those before
    return int(digits) if len(digits) <= 17 else LARGEST_INTEGER + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Repeated(members)


_any = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_object)
_short = json.JSONDecoder(object_pairs_hook=_object)


def _too_deep(max_depth: int) -> tuple[str, str]:
    return "too_deep", f"Expected at most {max_depth} levels of nesting."


_Place = tuple["_Place", str | int] | None
"""The way to a value, from its last part back to the root. Only a fault needs it as a pointer."""


def _pointer(place: _Place) -> str:
    parts: list[str | int] = []
    while place is not None:
        place, part = place
        parts.append(part)
    pointer = ""
    for part in reversed(parts):
        pointer = pointer_to(pointer, part)
    return pointer


def _faults(root: Any, max_depth: int) -> list[FieldError]:
    """What JSON readers and databases disagree about, each with its place."""
    faults: list[FieldError] = []
    pending: list[tuple[Any, _Place, int]] = [(root, None, 0)]
    while pending and len(faults) < MAX_ERRORS:
        value, place, depth = pending.pop()
        if not isinstance(value, list | dict):
            faults += [] if _clean(value) else [FieldError(_pointer(place), *_fault(value))]
        elif depth == max_depth:
            faults.append(FieldError(_pointer(place), *_too_deep(max_depth)))
        elif isinstance(value, list):
            # most of a large body is numbers in lists: only what needs a second look gets a place
            if _clean_numbers(value):
                continue
            if len(value) > MAX_VALUES:
                faults.append(FieldError(_pointer(place), *_TOO_MANY_VALUES))
                continue
            pending += [(v, (place, i), depth + 1) for i, v in enumerate(value) if not _clean(v)]
        elif len(value) > MAX_NAMES:
            faults.append(FieldError(_pointer(place), *_TOO_MANY_FIELDS))
        else:
            faults += [FieldError(_pointer(place), *fault) for fault in _name_faults(value)]
            pending += [(v, (place, name), depth + 1) for name, v in value.items() if not _clean(v)]
    return faults


def _clean_numbers(values: list[Any]) -> bool:
    """Whether they are numbers of one kind without fault, at the speed of C, and in pieces."""
    kind = type(values[0]) if values else None
    if kind is not float and kind is not int:
        return False
    return all(_clean_piece(values[at : at + PIECE], kind) for at in range(0, len(values), PIECE))


def _clean_piece(values: list[Any], kind: type) -> bool:
    if set(map(type, values)) != {kind}:
        return False
    if kind is float:
        return all(map(isfinite, values))
    return bool(min(values) >= -LARGEST_INTEGER and max(values) <= LARGEST_INTEGER)


def _clean(value: Any) -> bool:
    kind = type(value)
    if kind is float:
        return isfinite(cast(float, value))
    if kind is int:
        return -LARGEST_INTEGER <= cast(int, value) <= LARGEST_INTEGER
    if kind is str:
        return _clean_text(value)
    return value is None or kind is bool


def _clean_text(text: str) -> bool:
    if "\x00" in text:
        return False
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _fault(value: Any) -> tuple[str, str]:
    if isinstance(value, float):
        return "not_finite", "Expected a finite number."
    if isinstance(value, int):
        return "integer_too_large", "Expected an integer within 2^53 of zero, as every JSON reader keeps it exact."
    return "invalid_text", "Expected text without NUL and without unpaired surrogates."


def _name_faults(members: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if isinstance(members, _Repeated):
        yield "repeated_name", "Expected each field name once in an object."
    # a name that is at fault is not repeated in the pointer: it could not be written
    if any(len(name) > MAX_NAME or not _clean_text(name) for name in members):
        message = f"Expected field names of at most {MAX_NAME} characters, without NUL and unpaired surrogates."
        yield "invalid_name", message
