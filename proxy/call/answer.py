"""One answer of the provider, from sending the request to knowing what it cost.

However a call ends, ``conclude`` ends it: it lets the provider finish or stops it, gathers the best evidence of the
cost, and hands that to ``Calls.end``. It runs as a tracked task, so that nobody who hangs up can stop it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from billing.calls.assessment import Evidence, assess
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending, Settlement
from billing.errors import (
    InsufficientFundsError,
    ProviderUnavailableError,
    TumaError,
    UnavailableError,
    WalletFrozenError,
    WorkerStalledError,
)
from billing.money import format_usd, nanousd_from_attousd
from billing.pricing.cost import Usage, cost_attousd, reported_cost_usd, usage_from_openai
from billing.provider.records import Bill
from billing.provider.refusals import Refusal
from billing.tasks import wait_until_done
from proxy.http.errors import (
    ProxyError,
    UpstreamError,
    UpstreamRefusesUsError,
    UpstreamTimeoutError,
    upstream_error,
)
from proxy.protocol.ask import Ask
from proxy.protocol.meter import PlainAnswer, StreamMeter
from proxy.protocol.sse import EventTooLargeError
from proxy.services.call import CallServices
from proxy.upstream.client import UpstreamResponse

_ERROR_BYTES_MAX = 64 * 1024
_ID_LENGTH_MAX = 256
_BILL_PAUSE_FIRST_S = 0.05
_BILL_PAUSE_MAX_S = 2.0
_REFUSED_BY_WALLET = (InsufficientFundsError, WalletFrozenError)


class Answer:
    """The provider's answer to one call, and the evidence of its cost as it gathers.

    Args:
        services: the rooms.
        call: reserved.
        ask: what was asked.
    """

    def __init__(self, services: CallServices, call: LiveCall, ask: Ask) -> None:
        self.services = services
        self.call = call
        self.ask = ask
        self.response: UpstreamResponse | None = None
        self.meter: StreamMeter | None = None
        self.plain: PlainAnswer | None = None
        self.ending: Ending | None = None  # how it ended, once that is known
        self.outcome = "failed"
        self.house = False  # the house pays: the caller was told that nothing is charged
        self.begun = False  # bytes of it may have reached the client
        self.complete = False  # the provider has said all it will say
        self.first_byte_ms: int | None = None
        self._failed_status = False
        self._conclusion: asyncio.Task[Settlement | None] | None = None

    async def send(self) -> None:
        """Send the request; on return the provider has accepted it with 200 and its body is still to be read.

        Raises:
            UpstreamRefusedError, UpstreamError, UpstreamTimeoutError, UpstreamBusyError, UpstreamRefusesUsError.
        """
        try:
            self.response = await self.services.upstream.send(
                self.ask, call_id=self.call.call_id, trace=self.call.stages.begin_upstream()
            )
            if self.response.status != 200:  # noqa: PLR2004 - HTTP
                self._failed_status = True
                body = await self.response.read_up_to(_ERROR_BYTES_MAX)
                raise self.refusal(self.response.status, body, self.response.headers)
        except ProxyError as error:
            self.outcome = (
                "upstream_refused" if isinstance(error, UpstreamError) is False else "upstream_error"
            )
            raise
        except TimeoutError as error:
            self.outcome = "upstream_timeout"
            raise UpstreamTimeoutError("The provider did not answer in time.") from error
        except (aiohttp.ClientError, OSError) as error:
            self.outcome = "upstream_error"
            raise UpstreamError(f"The provider could not be reached: {type(error).__name__}.") from error
        finally:
            self.call.stages.mark("upstream")
        await self.note_id(self.services.upstream.generation_id(self.response))
        self.call.stages.mark("note")

    async def read_whole(self) -> bytes:
        """Read an answer that is not streamed to its end.

        Raises:
            UpstreamError, UpstreamTimeoutError: it broke off, or is larger than ``TUMA_UPSTREAM__ANSWER_BYTES``.
        """
        assert self.response is not None
        most = self.services.settings.upstream.answer_bytes
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := await self.response.read_some():
                pieces.append(piece)
                size += len(piece)
                if size > most:
                    raise UpstreamError("The provider's answer is too large.")
        except TimeoutError as error:
            self.outcome = "upstream_timeout"
            raise UpstreamTimeoutError("The provider stopped answering.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"The provider's answer broke off: {type(error).__name__}.") from error
        return b"".join(pieces)

    def accept(self) -> None:
        """Take it that the provider serves us: what it sent is an answer, and not an error inside a 200."""
        self.services.quota.served(self.call.call_id)

    def refusal(self, status: int, body: bytes, headers: Mapping[str, str]) -> ProxyError:
        """Return the error for a provider's refusal; if it is our account that it refuses, others may be spared the same."""
        error = upstream_error(status, body, headers, redact=self.services.upstream.redact)
        if isinstance(error, UpstreamRefusesUsError):
            call = self.call
            self.services.quota.refused(
                Refusal(
                    call.call_id,
                    call.caller.user_id,
                    call.model,
                    error.subject,
                    error.reason,
                    is_empty=error.is_empty,
                )
            )
        return error

    def refusal_inside(self, code: str | None, body: bytes) -> ProxyError:
        """Return the error for a refusal that came inside a 200."""
        is_status = code is not None and code.isdecimal() and 400 <= int(code) <= 599  # noqa: PLR2004 - HTTP
        return self.refusal(int(code) if code is not None and is_status else 502, body, {})

    async def confirm_open(self) -> None:
        """Wait for the commit that opens the call; after it, bytes of the answer may reach the client.

        Raises:
            InsufficientFundsError, WalletFrozenError, PostgresUnavailableError: it could not be opened; the house pays.
            WorkerStalledError: it is not this worker's own any more; the house pays.
        """
        self.call.stages.mark("upstream")  # to its first byte, or of a plain answer to its last
        try:
            await self.services.calls.confirm_open(self.call)
            await self.confirm_own()
            self.begun = True
        except WorkerStalledError:
            self.house = True
            raise
        except TumaError as error:
            self.house = True
            self.outcome = "refused_by_ledger" if isinstance(error, _REFUSED_BY_WALLET) else "ledger_away"
            raise
        finally:
            self.call.stages.mark("open")

    async def confirm_own(self) -> None:
        """Make sure that the call is still this worker's own before anything of it is passed on; asks only after a standstill.

        Raises:
            WorkerStalledError: the sweeper ended it; what is learned of its cost becomes a correction.
            PostgresUnavailableError: nobody can tell.
        """
        leases = self.services.calls.leases
        if leases.is_own(self.call):
            return
        try:
            await leases.confirm_own(self.call)
        except UnavailableError as error:
            self.outcome = "worker_stalled" if isinstance(error, WorkerStalledError) else "ledger_away"
            raise

    async def note_id(self, generation_id: str | None) -> None:
        """Note the provider's id of the answer, once; an id that no record could be asked for by is none.

        Before the answer's first byte it is noted beside the commit that opens the call: ``confirm_open`` waits for both.
        """
        if generation_id is None or self.call.generation_id is not None:
            return
        if generation_id.isascii() and generation_id.isprintable() and len(generation_id) <= _ID_LENGTH_MAX:
            if self.begun:
                await self.services.calls.leases.note(self.call, generation_id=generation_id)
            else:
                self.services.calls.leases.note_soon(self.call, generation_id=generation_id)

    def price_usage(self) -> Callable[[Mapping[str, Any]], str | None] | None:
        """Return what makes ``usage.cost`` for a provider that sends none; None where its own figure must be asked for."""
        return self._price_by_book if self.services.upstream.bills_by_price_book else None

    def _price_by_book(self, said: Mapping[str, Any]) -> str | None:
        usage = usage_from_openai(said)
        if usage == Usage():
            return None  # it may be counted here, at the end
        return format_usd(nanousd_from_attousd(cost_attousd(self.call.quote.price, usage)))

    def mark_first_byte(self) -> None:
        """Note when the provider's first byte came, in milliseconds since arrival."""
        if self.first_byte_ms is None:
            self.first_byte_ms = self._elapsed_ms()

    def _elapsed_ms(self) -> int:
        return int((time.monotonic() - self.call.started_s) * 1000)

    def conclude(self) -> asyncio.Task[Settlement | None]:
        """End the call, once; the task's result is its settlement. Wait for it with ``wait_until_done``."""
        if self._conclusion is None:
            evidence = self._reported()
            if evidence is not None:
                self._conclusion = self._end(evidence)
                # By then the provider's last bytes have come, and the connection can serve another call.
                self._conclusion.add_done_callback(lambda _: self._release_connection())
            else:
                self._conclusion = self.services.conclusions.start(
                    self._conclude(), name=f"conclude {self.call.call_id}"
                )
        return self._conclusion

    async def settled(self) -> Settlement | None:
        """Wait a bounded time for the settlement, so that a caller who looks at the balance next sees this call in it.

        Where the cost must be told, the provider's records are waited for, too.
        """
        settings = self.services.settings
        wait_s = settings.batch.settle_wait_s
        if self.ask.dialect.tells_cost:
            wait_s += settings.upstream.generation_wait_s
        task = self.conclude()
        done = await wait_until_done(task, wait_s)
        return task.result() if done and not task.cancelled() and task.exception() is None else None

    def _reported(self) -> Evidence | None:
        """Return the evidence if nothing more need be asked: the provider named the cost, or nothing was answered."""
        if self.response is None or self._failed_status:
            return Evidence()
        if not self.complete:
            return None
        evidence = self._from_answer()
        if evidence.billed_usd is not None or (evidence.usage is not None and evidence.bills_by_price_book):
            return evidence
        # Complete, but without a figure: an answer that is none at all, and named no id, costs nothing.
        nothing = self.plain is not None and not self.plain.is_object and self.call.generation_id is None
        return Evidence() if nothing else None

    def _from_answer(self) -> Evidence:
        source = self.meter or self.plain
        said = source.usage if source is not None else None
        billed_usd = reported_cost_usd(said) if said is not None else None
        usage = usage_from_openai(said) if said is not None else None
        if usage == Usage() and billed_usd is None and (self._count() or not self.ask.output.choices):
            usage = None  # some servers send zeros where they did not count
        return Evidence(
            generation_id=self.call.generation_id,
            billed_usd=billed_usd,
            usage=usage,
            bills_by_price_book=self.services.upstream.bills_by_price_book,
        )

    async def _conclude(self) -> Settlement | None:
        try:
            await self._let_the_provider_end()
        finally:
            self._release_connection()  # before its records are asked: it bills until it notices
        evidence = self._reported() or await self._from_records()
        ended = self._end(evidence)
        await wait_until_done(ended)
        return ended.result()

    async def _let_the_provider_end(self) -> None:
        """Read on to the end, or only until the answer's id is known and then hang up: as this provider bills."""
        if self.complete or self.response is None or self.meter is None:
            return  # of an answer that is not streamed the rest tells nothing without what came before
        drain = self.services.upstream.on_client_gone == "drain" and self.outcome != "upstream_timeout"
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, EventTooLargeError):
            async with asyncio.timeout(self.services.settings.upstream.drain_timeout_s):
                while drain or self.call.generation_id is None:
                    chunk = await self.response.read_some()
                    if not chunk:
                        self.complete = True
                        break
                    await self.meter_chunk(chunk)

    async def meter_chunk(self, chunk: bytes) -> bytes:
        """Meter a piece of a streamed answer; return what goes on to the client.

        The answer's id is noted before this returns, so before any byte of it is passed on.
        """
        assert self.meter is not None
        passed = self.meter.feed(chunk)
        if self.call.generation_id is None:
            await self.note_id(self.meter.generation_id)
        return passed

    async def _from_records(self) -> Evidence:
        """Ask the provider's records; where they are silent, take its usage, else count."""
        generation_id = self.call.generation_id
        if generation_id is not None and self.services.upstream.keeps_bills:
            bill = await self._wait_for_bill(generation_id)
            if bill is not None:
                return Evidence(generation_id=generation_id, billed_usd=bill.cost_usd, usage=bill.usage)
        evidence = self._from_answer()
        if evidence.usage is not None:
            return evidence
        completion_tokens = self._count()
        if generation_id is None and completion_tokens == 0 and self.ask.output.choices:
            return (
                Evidence()
            )  # nothing was answered; where there is no output, the answer is the prompt's alone
        usage = Usage(prompt_tokens=self.call.quote.prompt.tokens, completion_tokens=completion_tokens)
        return Evidence(generation_id=generation_id, usage=usage, counted=True)

    def _count(self) -> int:
        if self.meter is not None:
            return self.meter.fold(self.count_text)
        return self.count_text(self.plain.completion_text) if self.plain is not None else 0

    def count_text(self, text: str) -> int:
        """Count tokens of the answer as its model does, or close to it."""
        return self.services.counter.count_text(self.ask.model, text)

    async def _wait_for_bill(self, generation_id: str) -> Bill | None:
        """Ask for the record until it is there; the provider writes it some time after the answer's end."""
        deadline = time.monotonic() + self.services.settings.upstream.generation_wait_s
        pause_s = _BILL_PAUSE_FIRST_S
        while True:
            with contextlib.suppress(ProviderUnavailableError):
                bill = await self.services.upstream.find_bill(generation_id)
                if bill is not None:
                    return bill
            if time.monotonic() + pause_s > deadline:
                return None
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _BILL_PAUSE_MAX_S)

    def _end(self, evidence: Evidence) -> asyncio.Task[Settlement | None]:
        ending = assess(
            self.call.call_id,
            evidence,
            price=self.call.quote.price,
            fx=self.call.quote.fx,
            outcome=self.outcome,
            house=self.house,
            first_byte_ms=self.first_byte_ms,
            duration_ms=self._elapsed_ms(),
        )
        self.ending = ending
        return self.services.calls.end(self.call, ending)

    def _release_connection(self) -> None:
        if self.response is not None:
            self.response.close()  # an answer that was read to its end has no connection any more
