"""Calls in flight: reserve, open, extend, end (``leases.py`` keeps them alive). The proxy's view of money.

What can interrupt a call, and what then becomes of its money:

* before ``reserve`` answers: nothing is held, or a hold without a call, which the sweeper drops when its lease ends;
* between ``reserve`` and the commit of ``open``: the same, as no byte of an answer reaches the client before that commit;
* after it: the call is ``open`` in Postgres. Whoever lives ends it: ``end`` on every way out, else the sweeper;
* between the commit of ``settle`` and ``release``: the settlement stands; the sweeper drops the hold left in Redis;
* Redis flushed: ``renew`` puts back the holds of this worker's calls; a release of a forgotten hold cools the mirror;
* Redis and the worker lost together: the id of an answer that lasted for a second is in Postgres, too.
"""

import asyncio
import contextlib
import time
from typing import Any
from uuid import UUID

import structlog

from billing.calls.assessment import ending_as_note, in_review
from billing.calls.corrections import Corrections
from billing.calls.leases import Leases
from billing.calls.ledger import Extension, Ledger, Opening
from billing.calls.live_call import LiveCall, hold_of, opening_of
from billing.calls.outcome import Ending, Settlement, on_the_house
from billing.calls.turns import Turns
from billing.errors import (
    BrokenInvariantError,
    CapExceededError,
    InsufficientFundsError,
    PostgresUnavailableError,
    RedisUnavailableError,
    TumaError,
    WalletFrozenError,
)
from billing.holds.admission import Room
from billing.holds.hold import Hold
from billing.holds.holds import Holds
from billing.identity.caller import Caller
from billing.meters import Meters, Metric
from billing.money import AMOUNT_MAX_NANO
from billing.postgres.database import Database
from billing.postgres.group_commit import Batcher
from billing.pricing.quote import Quote
from billing.provider.quota import Quota
from billing.tasks import TrackedTasks, wait_until_done
from config.settings import Settings

_log = structlog.get_logger("tuma.calls")
_AWAY_POLL_S = 0.05
_OPENED = "opened"
_COMMIT_MS = 2.0  # about what the commit of a batch takes
_DROP_AFTER_S = 2.0  # past the pipeline's own deadline


class Calls:
    """The calls of this worker.

    Args:
        database: where the truth is.
        holds: where calls are admitted.
        quota: this worker's part of the provider's quota.
        worker_id: whose calls these are; its lease in Postgres keeps the sweeper off them.
        settings: of group commit, leases and corrections.
        settler, keeper: the same database, by roles that may settle and correct; ``database``, without them.
        meters: where calls are counted.
    """

    def __init__(
        self,
        database: Database,
        holds: Holds,
        quota: Quota,
        *,
        worker_id: UUID,
        settings: Settings,
        settler: Database | None = None,
        keeper: Database | None = None,
        meters: Meters | None = None,
    ) -> None:
        self._meters = meters = meters or Meters()
        self.holds = holds
        self.quota = quota
        self._batch = batch = settings.batch
        self._calls_max = settings.limits.calls_in_flight
        self._ledger = ledger = Ledger(database, worker_id=worker_id, settler=settler, hold=True)
        self._opens = Batcher[Opening, str](
            ledger.open_calls,
            name="open",
            rows_max=batch.open_rows,
            delay_ms=batch.settle_delay_ms,
            queue_max=batch.queue_rows,
            meters=meters,
            coming=lambda: self._arriving,
        )
        self._extends = Batcher[Extension, str](
            ledger.extend_calls,
            name="extend",
            rows_max=batch.open_rows,
            delay_ms=0,
            queue_max=batch.queue_rows,
            meters=meters,
        )
        self._settles = Batcher[Ending, Settlement](
            ledger.settle_calls,
            name="settle",
            rows_max=batch.settle_rows,
            delay_ms=batch.settle_delay_ms,
            queue_max=batch.queue_rows,
            meters=meters,
            coming=lambda: len(self._leaving),
        )
        self._corrections = Corrections(
            keeper or database, charge_estimates_upward=settings.reconcile.charge_estimates_upward
        )
        self._live: dict[UUID, LiveCall] = {}
        self._turns = Turns(settings.holds)
        # Who is about to be opened, and who is about to be settled: batches wait for them.
        self._arriving = 0
        self._leaving: set[UUID] = set()
        self._thinks_s = 0.0  # how long the provider lets its first byte be waited for, of late
        self._show_gauges(meters)
        self._endings = TrackedTasks()
        self.leases = Leases(
            database, holds, ledger, self._live, self._endings, worker_id=worker_id, settings=settings
        )

    def __len__(self) -> int:
        return len(self._live)

    def _show_gauges(self, meters: Meters) -> None:
        batches: dict[str, Batcher[Any, Any]] = {
            "open": self._opens,
            "extend": self._extends,
            "settle": self._settles,
        }
        flight = Metric("tuma_calls_in_flight", "gauge", "Calls between their hold and their settlement.")
        waiting = Metric("tuma_batch_waiting", "gauge", "Rows that wait for a commit.", ("batch",))
        away = Metric(
            "tuma_batch_away",
            "gauge",
            "Whether Postgres did not take the latest batch.",
            ("batch",),
            of_all=True,
        )
        meters.gauge(flight, lambda: [((), len(self._live))])
        meters.gauge(waiting, lambda: [((name,), len(batch)) for name, batch in batches.items()])
        meters.gauge(away, lambda: [((name,), int(batch.away)) for name, batch in batches.items()])

    async def reserve(
        self, caller: Caller, quote: Quote, *, call_id: UUID, model: str, stream: bool
    ) -> LiveCall:
        """Set the quoted amount aside, or refuse.

        Where the request named no bound on its output, and the wallet or a cap does not cover what the model can give, the call
        is quoted anew at what is left; if that is little, it first waits for other calls of the wallet to end.

        Raises:
            InsufficientFundsError, CapExceededError, WalletFrozenError, RateLimitError: see ``Holds.reserve``.
            ProviderQuotaError: the provider's quota does not cover it, or the provider refuses us.
            RedisUnavailableError: Redis is away.
            PostgresUnavailableError: Postgres has been away for longer than a call may wait, or too much waits for it.
        """
        _require_an_amount(quote)
        hold = hold_of(caller, quote, call_id)
        return await self._turns.admit(
            quote,
            caller.wallet_id,
            attempt=lambda wanted: self._admit(caller, wanted, call_id=call_id, model=model, stream=stream),
            find_room=lambda: self.holds.left(hold),
        )

    async def _admit(
        self, caller: Caller, quote: Quote, *, call_id: UUID, model: str, stream: bool
    ) -> LiveCall:
        self.quota.admit(call_id, caller.user_id)
        taken_nanousd = 0
        self._arriving += 1
        try:
            await self._wait_for_postgres()
            if not self.quota.covers(quote.hold_nanousd):
                # No slab is leased, and no quota called used up, for a call that its wallet cannot bear anyway.
                await self.holds.check(hold_of(caller, quote, call_id))
            taken_nanousd = await self.quota.take(quote.hold_nanousd)
            call = await self._reserve(
                caller, quote, call_id=call_id, model=model, stream=stream, taken_nanousd=taken_nanousd
            )
        except BaseException:
            self.quota.give_back(taken_nanousd, spent_nanousd=0)
            self.quota.ended(call_id)
            self._arriving -= 1
            self._opens.reconsider()
            raise
        self._arriving -= 1
        return call

    async def look(self, caller: Caller, quote: Quote, *, call_id: UUID) -> Quote:
        """Return what ``reserve`` would hold just now, or raise what it would; hold, write and count nothing, and wait for nobody.

        Of the provider's quota only what is known here is looked at: no slab is leased to find out.

        Raises:
            InsufficientFundsError, CapExceededError, WalletFrozenError, RateLimitError, ProviderQuotaError: as ``reserve``.
            RedisUnavailableError, PostgresUnavailableError: nobody can tell, and a call would be refused, too.
        """
        _require_an_amount(quote)
        self.quota.look(quote.hold_nanousd)
        await self._wait_for_postgres()
        hold = hold_of(caller, quote, call_id)
        try:
            await self.holds.look(hold)
        except (InsufficientFundsError, CapExceededError):
            smaller = self._turns.fit(quote, await self.holds.left(hold)) if quote.open_ended else None
            if smaller is None:
                raise
            await self.holds.look(hold_of(caller, smaller, call_id))
            return smaller
        return quote

    async def find_room(self, caller: Caller, *, call_id: UUID) -> Room:
        """Return what a call of this caller could take just now; nothing is held or counted.

        Raises:
            InsufficientFundsError, CapExceededError, WalletFrozenError, RateLimitError: whatever it asks for, it would be
                refused.
            RedisUnavailableError, PostgresUnavailableError: nobody can tell.
        """
        least = Hold(
            call_id=call_id,
            user_id=caller.user_id,
            wallet_id=caller.wallet_id,
            key_id=caller.key_id,
            amount_nano=1,
            tokens=0,
            limits=caller.limits,
            amount_nanousd=1,
            user_limits=caller.user_limits,
            currency=caller.currency,
            place=caller.place,
        )
        try:
            return await self.holds.check(least)
        except InsufficientFundsError:
            raise InsufficientFundsError("The wallet is empty: top up.") from None

    async def _reserve(
        self, caller: Caller, quote: Quote, *, call_id: UUID, model: str, stream: bool, taken_nanousd: int
    ) -> LiveCall:
        hold = hold_of(caller, quote, call_id)
        try:
            rates = await self.holds.reserve(hold)
        except (RedisUnavailableError, PostgresUnavailableError, asyncio.CancelledError):
            # Whether the hold exists is unknown. Its lease would end it; this ends it sooner.
            self._endings.start(self._drop_later(hold), name=f"drop {call_id}")
            raise
        call = LiveCall(call_id, caller, model, stream, quote, hold, quote.hold_nanousd, rates, taken_nanousd)
        self.leases.begin(call)
        self._live[call_id] = call
        self._turns.began(caller.wallet_id)
        return call

    async def _drop_later(self, hold: Hold) -> None:
        await asyncio.sleep(_DROP_AFTER_S)
        with contextlib.suppress(RedisUnavailableError):
            await self.holds.release(hold, charge_nano=None)

    async def _wait_for_postgres(self) -> None:
        if self._opens.full or self._settles.full or len(self._live) >= self._calls_max:
            raise PostgresUnavailableError("Too many calls are in flight.")
        deadline = time.monotonic() + self._batch.open_wait_s
        while self._opens.away or self._settles.away:
            if time.monotonic() > deadline:
                raise PostgresUnavailableError(
                    "Postgres is away; nothing was sent and nothing is charged.", retry_after_s=5
                )
            await asyncio.sleep(_AWAY_POLL_S)

    def open(self, call: LiveCall) -> None:
        """Queue the call's row for the next group commit; ``confirm_open`` waits for it."""
        call.opening_s = time.monotonic()
        # While the provider thinks there is time to wait for company; one that answers at once would be kept waiting.
        patience_ms = min(self._batch.open_delay_ms, self._thinks_s * 1000 - _COMMIT_MS)
        call.opened = self._opens.submit(
            opening_of(call, hold_nano=call.hold.amount_nano, hold_nanousd=call.hold_nanousd),
            patience_ms=patience_ms if patience_ms > 0 else None,
        )

    def _learn_pace(self, call: LiveCall) -> None:
        """Follow how long the provider takes to its first byte: down quickly, up slowly."""
        took_s = time.monotonic() - call.opening_s
        self._thinks_s += (took_s - self._thinks_s) * (0.5 if took_s < self._thinks_s else 0.1)

    async def confirm_open(self, call: LiveCall) -> None:
        """Wait until the call is open in Postgres; no byte of the answer may reach the client before.

        Raises:
            InsufficientFundsError, CapExceededError, WalletFrozenError: Postgres, the truth, refuses what Redis admitted.
            PostgresUnavailableError: it did not answer in time; the row may still be committed, and is then ended.
        """
        assert call.opened is not None
        self._learn_pace(call)
        if not call.stream:
            self._leaving.add(call.call_id)  # all of its answer is here
        self._opens.hurry(call.opened)
        if not await wait_until_done(call.opened, self._batch.open_wait_s):
            raise PostgresUnavailableError("Postgres does not answer.", retry_after_s=5)
        match call.opened.result():
            case "opened":
                await self.leases.confirm_noted(call)
            case "insufficient_funds":
                raise InsufficientFundsError("The wallet does not cover this call.")
            case "cap_exceeded":
                raise CapExceededError("A cap on the wallet, its key or its user does not cover this call.")
            case "wallet_frozen":
                raise WalletFrozenError("The wallet is frozen.")
            case verdict:
                raise BrokenInvariantError(f"call {call.call_id} is {verdict} before it began")

    async def extend(self, call: LiveCall, *, hold_nano: int, hold_nanousd: int) -> bool:
        """Enlarge the hold, in Redis and in Postgres; False when wallet or quota cannot bear it, or nobody can tell."""
        extended = await self._extend(call, hold_nano=hold_nano, hold_nanousd=hold_nanousd)
        self._meters.extensions.add(1, "extended" if extended else "refused")
        return extended

    async def _extend(self, call: LiveCall, *, hold_nano: int, hold_nanousd: int) -> bool:
        if hold_nano <= call.hold.amount_nano:
            return True
        if max(hold_nano, hold_nanousd) > AMOUNT_MAX_NANO:
            return False
        async with call.turn:
            try:
                call.quota_nanousd += await self.quota.take(hold_nanousd - call.hold_nanousd)
                if not await self.holds.extend(call.hold, hold_nano, hold_nanousd):
                    return False
            except TumaError as error:
                _log.warning("hold.not_extended", call_id=str(call.call_id), error=str(error))
                return False
            call.hold = call.hold.extended_to(hold_nano, hold_nanousd)
        answer = self._extends.submit(Extension(call.call_id, hold_nano, hold_nanousd))
        if not await wait_until_done(answer, self._batch.open_wait_s) or answer.result() != "extended":
            return False
        call.hold_nanousd = hold_nanousd
        return True

    def end(self, call: LiveCall, ending: Ending) -> asyncio.Task[Settlement | None]:
        """End a call: settle it in Postgres, then release its hold. Reached on every way out, once per call.

        The work is a task of its own: neither a client that hangs up nor a cancelled handler stops it. Wait for it
        with ``wait_until_done``, never ``await`` it bare.

        Returns:
            the task; its result is None where nothing had to be settled.
        """
        if call.ended is None:
            call.ending = ending
            call.stages.mark("relay")
            call.ended = self._endings.start(self._end(call, ending), name=f"end {call.call_id}")
            call.ended.add_done_callback(lambda _: self._tell_end(call, ending))
        return call.ended

    def _tell_end(self, call: LiveCall, ending: Ending) -> None:
        self._turns.ended(call.caller.wallet_id)
        self._count(call, ending)
        if call.on_ended is not None:
            call.on_ended()

    def _count(self, call: LiveCall, ending: Ending) -> None:
        """Count a call; its money only if this settlement is the one that stands."""
        meters, settlement = self._meters, call.settlement
        model, how = meters.model(call.model), "yes" if call.stream else "no"
        meters.calls.add(1, ending.outcome, model)
        for stage, spent_s in call.stages.sums_s().items():
            meters.stage.observe(spent_s, stage)
        if ending.first_byte_ms is not None:
            meters.first_byte.observe(ending.first_byte_ms / 1000, how)
        if ending.duration_ms is not None:
            meters.duration.observe(ending.duration_ms / 1000, how)
        if settlement is None or not settlement.won:
            return
        meters.settlements.add(1, settlement.state, ending.accuracy)
        if settlement.state == "settled":
            meters.tokens.add(ending.usage.prompt_tokens, model, "prompt")
            meters.tokens.add(ending.usage.completion_tokens, model, "completion")
            meters.cost.add(ending.cost_nanousd, model)
            meters.charged.add(settlement.charge_nano, call.caller.currency)
            meters.house.add(ending.house_nanousd)

    async def _end(self, call: LiveCall, ending: Ending) -> Settlement | None:
        settlement, began_s = None, time.perf_counter()
        try:
            settlement = await self._settle(call, ending)
            if settlement is not None:
                self._meters.settle_lag.observe(time.perf_counter() - began_s)
        finally:
            call.stages.mark("settle")
            self._live.pop(call.call_id, None)
            self._leaving.discard(call.call_id)
            self._settles.reconsider()
            ended = settlement is not None and settlement.state != "review"
            spent_nanousd = ending.cost_nanousd if ended else 0
            self.quota.give_back(call.quota_nanousd, spent_nanousd=spent_nanousd)
            self.quota.ended(call.call_id)
        if settlement is None:  # nothing was ever open in Postgres: all of the hold goes back
            await self._release(call, charge_nano=None if _was_refused(call) else 0)
        elif settlement.state != "review":
            await self._release(
                call,
                charge_nano=settlement.charge_nano if settlement.won and not _was_refused(call) else None,
                charge_nanousd=ending.cost_nanousd - ending.house_nanousd,
                tokens_used=ending.usage.prompt_tokens + ending.usage.completion_tokens,
            )
        return settlement

    async def _release(
        self, call: LiveCall, *, charge_nano: int | None, charge_nanousd: int = 0, tokens_used: int = 0
    ) -> None:
        if call.noting is not None:  # what brings a hold back must not come after what drops it
            await wait_until_done(call.noting)
            if not call.noting.cancelled():
                call.noting.exception()  # looked at: nothing is to be noted any more
        try:
            async with call.turn:
                await self.holds.release(
                    call.hold, charge_nano=charge_nano, charge_nanousd=charge_nanousd, tokens_used=tokens_used
                )
        except RedisUnavailableError as error:
            _log.warning("hold.left_to_lease", call_id=str(call.call_id), error=str(error))
        finally:
            call.stages.mark("release")

    async def _settle(self, call: LiveCall, ending: Ending) -> Settlement | None:
        if call.opened is None:
            return None  # refused or failed before the call's row was queued
        self._opens.hurry(call.opened)
        verdict = await call.opened
        if verdict != _OPENED:
            if ending.cost_nanousd == 0:
                return None
            # Postgres refused the call, yet the provider billed it: our cost, on nobody's wallet.
            await self._opens.submit(opening_of(call, hold_nano=0, hold_nanousd=0))
            ending = on_the_house(ending)
        if ending.state == "review":
            _log.error("call.beyond_reason", call_id=str(call.call_id), generation_id=ending.generation_id)
        self._leaving.discard(call.call_id)
        answer = self._settles.submit(ending)
        if not await wait_until_done(answer, self._batch.settle_wait_s):
            await self.leases.note(call, settlement=ending_as_note(ending))
        try:
            settlement = await answer
        except BrokenInvariantError:
            if ending.state == "review":
                raise
            # Postgres refuses these figures for good: people look at the call, its hold stays, and all others go on.
            ending = in_review(ending)
            settlement = await self._settles.submit(ending)
        if not settlement.won and ending.state == "settled" and ending.source != "counted":
            await self._correct_late(ending)
        return settlement

    async def _correct_late(self, ending: Ending) -> None:
        """The sweeper ended the call before its own worker could: what the provider told the worker is a correction, what was counted here is none."""
        try:
            await self._corrections.correct_late(ending)
        except TumaError as error:
            _log.warning("correction.left_to_reconciliation", call_id=str(ending.call_id), error=str(error))

    async def close(self, timeout_s: float) -> None:
        """Let endings finish within ``timeout_s`` seconds, then give up the worker's lease: the sweeper takes the rest."""
        left = await self._endings.drain(timeout_s)
        unsent = (
            await self._opens.close(timeout_s),
            await self._extends.close(1.0),
            await self._settles.close(timeout_s),
        )
        if left or any(unsent):
            _log.error("shutdown.calls_left", endings=left, batches=[len(items) for items in unsent])
        await self.leases.sign_off_worker()


def _was_refused(call: LiveCall) -> bool:
    """Tell whether Postgres refused what Redis had admitted: then the mirror is wrong, and the next call has it rebuilt."""
    opened = call.opened
    return opened is not None and opened.done() and not opened.cancelled() and opened.result() != _OPENED


def _require_an_amount(quote: Quote) -> None:
    """Refuse what no wallet can hold, and no store can keep."""
    if max(quote.hold_nano, quote.hold_nanousd) > AMOUNT_MAX_NANO:
        raise InsufficientFundsError("The call could cost more than any wallet can hold.")
