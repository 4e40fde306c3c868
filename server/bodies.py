"""JSON bodies, read strictly.

Python's JSON reader takes NaN, numbers beyond every float, lone surrogates and repeated names, each of which later
breaks something that is not the client's fault to see: a response, an index, a database. Here they are refused before
anything looks at the body. Knows JSON; knows no HTTP.
"""

import json
from collections.abc import Iterable
from math import isfinite
from typing import Any, cast

from server.errors import FieldError, InvalidRequest, invalid, pointer_to

__all__ = ["LARGEST_INTEGER", "MAX_ERRORS", "MAX_NAME", "decode"]

LARGEST_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader keeps exact."""
MAX_NAME = 256
MAX_NAMES = 1024
"""No object that we read has more fields; a million unknown ones would be a million errors."""
MAX_VALUES = 200_000
"""No list that makes sense is longer, unless it holds plain numbers; those are bounded by the body's size alone."""
MAX_ERRORS = 20


class _Repeated(dict[str, Any]):
    """An object in which a name occurs twice."""


def decode(raw: bytes, max_depth: int) -> Any:
    """A JSON body as Python values: finite numbers, integers within 2^53, clean text, bounded depth.

    Args:
        raw: The body as it was sent.
        max_depth: How many lists and objects may lie inside each other.

    Raises:
        InvalidRequest: with a pointer to each fault.
    """
    try:
        value = json.loads(raw.decode(), parse_int=_integer, object_pairs_hook=_object)
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


def _integer(digits: str) -> int:
    # Python refuses to read integers of thousands of digits, and takes quadratic time for those before
    return int(digits) if len(digits) <= 17 else LARGEST_INTEGER + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Repeated(members)


def _too_deep(max_depth: int) -> tuple[str, str]:
    return "too_deep", f"Expected at most {max_depth} levels of nesting."


def _faults(root: Any, max_depth: int) -> list[FieldError]:
    """What JSON readers and databases disagree about, each with its place."""
    faults: list[FieldError] = []
    pending: list[tuple[Any, str, int]] = [(root, "", 0)]
    while pending and len(faults) < MAX_ERRORS:
        value, pointer, depth = pending.pop()
        if not isinstance(value, list | dict):
            faults += [] if _clean(value) else [FieldError(pointer, *_fault(value))]
        elif depth == max_depth:
            faults.append(FieldError(pointer, *_too_deep(max_depth)))
        elif isinstance(value, list):
            # most of a large body is numbers in lists: only what needs a second look gets a pointer
            if _clean_numbers(value):
                continue
            if len(value) > MAX_VALUES:
                faults.append(FieldError(pointer, "too_many_values", f"Expected at most {MAX_VALUES} values here."))
                continue
            pending += [(v, f"{pointer}/{i}", depth + 1) for i, v in enumerate(value) if not _clean(v)]
        elif len(value) > MAX_NAMES:
            faults.append(FieldError(pointer, "too_many_fields", f"Expected at most {MAX_NAMES} fields."))
        else:
            faults += _name_faults(value, pointer)
            pending += [(v, pointer_to(pointer, name), depth + 1) for name, v in value.items() if not _clean(v)]
    return faults


def _clean_numbers(values: list[Any]) -> bool:
    """Whether they are numbers of one kind without fault, at the speed of C."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return all(map(isfinite, values))
    return kinds == {int} and min(values) >= -LARGEST_INTEGER and max(values) <= LARGEST_INTEGER


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


def _name_faults(members: dict[str, Any], pointer: str) -> Iterable[FieldError]:
    if isinstance(members, _Repeated):
        yield FieldError(pointer, "repeated_name", "Expected each field name once in an object.")
    # a name that is at fault is not repeated in the pointer: it could not be written
    if any(len(name) > MAX_NAME or not _clean_text(name) for name in members):
        message = f"Expected field names of at most {MAX_NAME} characters, without NUL and unpaired surrogates."
        yield FieldError(pointer, "invalid_name", message)
