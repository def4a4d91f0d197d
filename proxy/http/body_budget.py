"""How many bytes of bodies may be held at once while they are being read: of one user, and of everybody."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from aiohttp import web

from billing.errors import OverloadedError, RateLimitError
from config.settings import LimitSettings

_RETRY_AFTER_MS = 1_000


class BodyBudget:
    """Counts the bytes of bodies that are being read by this worker.

    Args:
        limits: how many there may be.
    """

    def __init__(self, limits: LimitSettings) -> None:
        self._most = limits.bodies_bytes
        self._most_of_one = limits.user_bodies_bytes
        self.bytes = 0
        self._of_users: dict[UUID, int] = {}

    @contextmanager
    def share_of(self, user_id: UUID) -> Iterator["BodyShare"]:
        """Lend a share of the budget for one body, for as long as the block lasts."""
        share = BodyShare(self, user_id)
        try:
            yield share
        finally:
            if share.bytes:
                self.add(user_id, -share.bytes)

    def require(self, user_id: UUID, more_bytes: int) -> None:
        """Refuse so many bytes more.

        Raises:
            RateLimitError: the user has too many under way.
            OverloadedError: all together have.
        """
        if self._of_users.get(user_id, 0) + more_bytes > self._most_of_one:
            raise RateLimitError(
                f"You send more than {self._most_of_one} bytes of requests at once.",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        if self.bytes + more_bytes > self._most:
            raise OverloadedError("Too much is being sent here just now; try again.", retry_after_s=1)

    def add(self, user_id: UUID, count: int) -> None:
        """Count so many bytes more, or less."""
        self.bytes += count
        left = self._of_users.get(user_id, 0) + count
        if left:
            self._of_users[user_id] = left
        else:
            self._of_users.pop(user_id, None)  # nothing, where nothing came


class BodyShare:
    """The part of one body: it grows with what has arrived, so that what is only announced keeps nobody out.

    Args:
        budget: of which it is a part.
        user_id: whose body it is.
    """

    def __init__(self, budget: BodyBudget, user_id: UUID) -> None:
        self._budget = budget
        self._user_id = user_id
        self.bytes = 0

    def expect(self, count: int) -> None:
        """Refuse a body of which not even now all would fit.

        Raises:
            RateLimitError, OverloadedError: see ``BodyBudget.require``.
        """
        self._budget.require(self._user_id, count)

    def grow(self, count: int) -> None:
        """Count what has arrived.

        Raises:
            RateLimitError, OverloadedError: see ``BodyBudget.require``.
        """
        self._budget.require(self._user_id, count)
        self._budget.add(self._user_id, count)
        self.bytes += count


BODIES = web.AppKey("bodies", BodyBudget)
