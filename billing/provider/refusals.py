"""Whose fault a provider's refusal is: one caller's, with one model or one large request, or our account's.

The provider's own record of the account decides where there is one. A provider without records refuses the account when
it refuses different callers and different models alike, while it serves nobody; one that says by a code that the account
is empty is believed, unless its record knows better.

What can abuse it: a caller who provokes refusals on purpose. They are one caller however many models they try, and one
call that is served in between shows that the account is not what is refused.
"""

import time
from dataclasses import dataclass
from typing import Literal, Protocol
from uuid import UUID

from billing.errors import ProviderUnavailableError

Subject = Literal["key", "money"]  # what a refusal speaks of
Standing = Literal["refused", "served", "unknown"]

CALLERS_MIN = 3
MODELS_MIN = 2
_STRIKES_MAX = 256
_BELIEVED_S = (
    1.0  # a record that does not refuse us is not asked again for so long, however many calls are refused
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call that the provider refused with words about our key or our account.

    Args:
        reason: the provider's own, for the operator alone.
        is_empty: it said by a code of its own that the account is empty.
    """

    call_id: UUID
    user_id: UUID
    model: str
    subject: Subject
    reason: str
    is_empty: bool = False


class AccountRecord(Protocol):
    """What is asked of a provider about our account."""

    async def find_standing(self, subject: Subject) -> Standing:
        """Return how our key or our money stands by the provider's own record; ``unknown`` where it does not say.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """


class Judge:
    """Tells whether a refusal is meant for all.

    Args:
        record: the provider's, of our account.
        window_s: for how long a refusal counts beside others.
    """

    def __init__(self, record: AccountRecord, *, window_s: float) -> None:
        self._record = record
        self._window_s = window_s
        self._strikes: dict[tuple[UUID, str], float] = {}  # by caller and model: when, by the monotonic clock
        self._in_a_row = 0
        self._by_record = False
        self._said: dict[Subject, tuple[Standing, float]] = {}  # and when, if it was no refusal
        self._key_record_is_wrong = False

    @property
    def in_a_row(self) -> int:
        """How many calls were refused since one was served."""
        return self._in_a_row

    def note(self, refusal: Refusal) -> None:
        """Remember a refusal until a call is served."""
        self._in_a_row += 1
        self._strikes.pop((refusal.user_id, refusal.model), None)
        self._strikes[refusal.user_id, refusal.model] = time.monotonic()
        if len(self._strikes) > _STRIKES_MAX:
            del self._strikes[next(iter(self._strikes))]

    async def is_for_all(self, refusal: Refusal, *, paused: bool) -> bool:
        """Tell whether the account is what is refused; the provider's record is asked.

        Args:
            refusal: noted before.
            paused: it ended a pause, so that what led to that one counts on, however long ago.
        """
        standing, at_s = self._said.get(refusal.subject, ("unknown", -_BELIEVED_S))
        if time.monotonic() - at_s >= _BELIEVED_S:
            standing = await self._ask(refusal.subject)
            if standing != "refused":
                self._said[refusal.subject] = standing, time.monotonic()
        self._by_record = standing == "refused"
        if standing != "unknown":
            return standing == "refused"
        return refusal.is_empty or self._is_alike(paused=paused)

    async def _ask(self, subject: Subject) -> Standing:
        if subject == "key" and self._key_record_is_wrong:
            return "unknown"
        try:
            return await self._record.find_standing(subject)
        except ProviderUnavailableError:
            return "unknown"

    def _is_alike(self, *, paused: bool) -> bool:
        since_s = 0.0 if paused else time.monotonic() - self._window_s
        alike = [place for place, at_s in self._strikes.items() if at_s >= since_s]
        callers, models = {user_id for user_id, _ in alike}, {model for _, model in alike}
        return len(callers) >= CALLERS_MIN and len(models) >= MODELS_MIN

    def served(self) -> None:
        """Forget what was refused: the account is served."""
        self._in_a_row = 0
        self._strikes.clear()

    async def doubt(self) -> None:
        """After a pause ended: a record that still calls the key refused, while it is served, is not believed again."""
        if self._by_record and await self._ask("key") == "refused":
            self._key_record_is_wrong = True
        self._by_record = False
