"""Identifiers: a prefix that names the kind of object, and a UUIDv7 in hexadecimal, so that ids sort by time.

Knows the shape of ids and nothing of what they name.
"""

import re
from typing import Annotated, Literal, get_args

import uuid_utils
from pydantic import StringConstraints

__all__ = [
    "CheckpointId",
    "EnvironmentId",
    "JobId",
    "KeyId",
    "PolicyId",
    "Prefix",
    "is_id",
    "new_id",
    "pattern",
]

Prefix = Literal["env", "pol", "job", "ckpt", "key"]

_PATTERNS = {prefix: re.compile(rf"{prefix}_[0-9a-f]{{32}}", re.ASCII) for prefix in get_args(Prefix)}

EnvironmentId = Annotated[str, StringConstraints(pattern=r"^env_[0-9a-f]{32}$")]
PolicyId = Annotated[str, StringConstraints(pattern=r"^pol_[0-9a-f]{32}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^job_[0-9a-f]{32}$")]
CheckpointId = Annotated[str, StringConstraints(pattern=r"^ckpt_[0-9a-f]{32}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^key_[0-9a-f]{32}$")]


def new_id(prefix: Prefix) -> str:
    """A fresh id such as `job_0192f0c1…`; later ids of one process sort after earlier ones."""
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def is_id(prefix: Prefix, text: str) -> bool:
    """Whether the text has the shape of an id of this kind; says nothing of whether it exists."""
    return _PATTERNS[prefix].fullmatch(text) is not None


def pattern(prefix: Prefix) -> str:
    """The anchored regular expression of an id of this kind, for JSON Schemas and path parameters."""
    return f"^{_PATTERNS[prefix].pattern}$"
