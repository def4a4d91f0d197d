"""Who acts: said once at the rim (a command, a request), written into the audit log by Postgres.

``Database.transaction()`` tells Postgres, for that transaction alone. Where nobody is said to act, the house does
(``system``), and a settlement pays no round trip for it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass

_ACTOR = re.compile(r"admin|system|(operator|user|key|payment):\S.{0,199}")
_REQUEST_ID_MAX = 200


@dataclass(frozen=True, slots=True)
class Acting:
    """Who acts, and in which request."""

    actor: str
    request_id: str | None = None


_acting: ContextVar[Acting | None] = ContextVar("acting", default=None)


@contextmanager
def acting(actor: str, request_id: str | None = None) -> Iterator[None]:
    """Let what this task changes inside the block be audited as an actor's doing.

    Args:
        actor: ``operator:NAME``, ``user:ID``, ``key:ID``, ``payment:PROVIDER``, ``admin`` or ``system``.
        request_id: of the request that asks for it.

    Raises:
        ValueError: it is no actor's name.
    """
    if not _ACTOR.fullmatch(actor):
        raise ValueError(f"{actor!r} is not an actor")
    token = _acting.set(Acting(actor, request_id and request_id[:_REQUEST_ID_MAX]))
    try:
        yield
    finally:
        _acting.reset(token)


def find_acting() -> Acting | None:
    """Return who acts here; None for the house."""
    return _acting.get()


def copy_context_of_house() -> Context:
    """Return a copy of this context in which nobody acts, for a task that outlives who started it."""
    context = copy_context()
    context.run(_acting.set, None)
    return context
