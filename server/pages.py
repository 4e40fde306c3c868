"""Lists in pages: `limit`, `after`, `order` in, `{object: "list", data, has_more, next_cursor}` out.

A page continues behind a value, not at an offset, so objects made or deleted meanwhile neither repeat nor hide others.
The cursor is the id of the last object: ids sort by time, and a deleted object's id still marks its place.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from server.errors import FieldError, InvalidCursor
from server.ids import Prefix, is_id

__all__ = ["LARGEST_PAGE", "Page", "PageQuery", "Slice", "fetch"]

LARGEST_PAGE = 200

T = TypeVar("T")


class PageQuery(BaseModel):
    """Query parameters of a list. Lists with filters of their own extend it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    limit: Annotated[int, Field(ge=1, le=LARGEST_PAGE)] = 20
    """How many objects at most."""
    after: Annotated[str, Field(max_length=64)] | None = None
    """Where the page begins: behind this `next_cursor`, or behind the object with this id."""
    order: Literal["asc", "desc"] = "desc"
    """Newest first (desc) or oldest first (asc)."""


class Page(BaseModel, Generic[T]):
    """One page of a list."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[T]
    """The objects, without their arrays."""
    has_more: bool
    """Whether another page follows."""
    next_cursor: str | None
    """What to send as `after` for the next page; null on the last one."""


@dataclass(frozen=True, slots=True)
class Slice(Generic[T]):
    """The rows of one page, as a store returns them."""

    rows: list[T]
    has_more: bool
    next_cursor: str | None


def fetch(
    session: Session, statement: Select[T], column: InstrumentedAttribute[str], prefix: Prefix, query: PageQuery
) -> Slice[T]:
    """Run the statement for one page.

    Args:
        session: A transaction.
        statement: Selects one entity, filtered, without order and limit.
        column: The id column, unique and sorting by time.
        prefix: Kind of the ids in that column.
        query: What the client asked for.

    Raises:
        InvalidCursor: if `after` is not an id of this kind.
    """
    if query.after is not None:
        if not is_id(prefix, query.after):
            raise InvalidCursor(errors=[FieldError("/after", "invalid_cursor", f"must look like {prefix}_…")])
        statement = statement.where(column > query.after if query.order == "asc" else column < query.after)
    order: Any = column.asc() if query.order == "asc" else column.desc()
    rows = list(session.scalars(statement.order_by(order).limit(query.limit + 1)))
    has_more = len(rows) > query.limit
    rows = rows[: query.limit]
    return Slice(rows, has_more, getattr(rows[-1], column.key) if has_more else None)
