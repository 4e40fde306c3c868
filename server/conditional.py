"""What a client has already: If-None-Match, and parts of a content after Range (RFC 9110, 13 and 14)."""

import re

from server.errors import RangeNotSatisfiable

__all__ = ["has_already", "wanted_part"]

_TAG = re.compile(r'(?:W/)?("[^"]*")')
_RANGE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.IGNORECASE)


def has_already(if_none_match: list[str], tag: str) -> bool:
    """Whether one of the tags that a client names, in as many headers as it likes, is this one; `*` is every one.

    Args:
        if_none_match: Values of the headers.
        tag: The tag of what there is, in its quotes.
    """
    sent = ", ".join(if_none_match).strip()
    return sent == "*" or tag in _TAG.findall(sent)


def wanted_part(range_: str | None, if_range: str | None, tag: str, size: int) -> range | None:
    """The bytes that a client asks for; None if it gets all of them.

    Several ranges, other units and what is malformed are answered with the whole, as the standard allows.

    Args:
        range_: The Range header.
        if_range: The If-Range header: a part only of what has this tag.
        tag: The tag of what there is, in its quotes.
        size: How many bytes there are.

    Raises:
        RangeNotSatisfiable: if there is no such byte.
    """
    match = _RANGE.fullmatch(range_) if range_ is not None else None
    if match is None or (if_range is not None and if_range.strip() != tag):
        return None
    first, last = match.groups()
    if first:
        part = range(int(first), min(int(last) + 1, size) if last else size)
        if last and int(last) < int(first):
            return None
    elif last:
        part = range(max(0, size - int(last)), size)
    else:
        return None
    if not part:
        raise RangeNotSatisfiable(f"There are {size} bytes.", headers={"content-range": f"bytes */{size}"})
    return part
