"""One answer of the provider, from sending the request to knowing what it cost.

However a call ends, ``conclude`` ends it: it lets the provider finish or stops it, gathers the best evidence of the
cost, and hands that to ``Calls.end``. It runs as a tracked task, so that nobody who hangs up can stop it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import aiohttp

from billing.calls.assessment import Evidence, assess
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending, Settlement, within_hold
from billing.errors import (
    InsufficientFundsError,
    TumaError,
    UnavailableError,
    WalletFrozenError,
    WorkerStalledError,
)
from billing.money import format_usd, nanousd_from_attousd
from billing.pricing.cost import Usage, cost_attousd
from billing.pricing.quote import Quote
from billing.pricing.usage import ReportedCost, UsageReading, read_cost, read_usage, with_prompt
from billing.provider.refusals import Refusal
from billing.tasks import wait_until_done
from proxy.call.bill import wait_for_bill
from proxy.call.last_words import LastWords
from proxy.call.means import smaller_bound
from proxy.http.errors import (
    ProxyError,
    UpstreamError,
    UpstreamRefusesUsError,
    UpstreamTimeoutError,
    upstream_error,
)
from proxy.protocol.aggregate import is_stream
from proxy.protocol.ask import Ask
from proxy.protocol.meter import PlainAnswer, StreamMeter
from proxy.protocol.sse import EventTooLargeError
from proxy.services.call import CallServices
from proxy.upstream.client import UpstreamResponse

_ERROR_BYTES_MAX = 64 * 1024
_ID_LENGTH_MAX = 256
_PEEK_BYTES_MAX = 64 * 1024
_BYTES_PER_TOKEN = 4  # of usual text, until it is counted
_FAILURES = frozenset(("upstream_error", "upstream_timeout", "upstream_refused"))
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
        self.held_nano: int | None = None  # what the wallet pays at most, where it could not bear more
        self.begun = False  # bytes of it may have reached the client
        self.complete = False  # the provider has said all it will say
        self.first_byte_ms: int | None = None
        self._counted_prompt: int | None = None
        self._counting = False
        self._failed_status = False
        self._fell_silent = False  # it had the request, and what it made of it was waited for in vain
        self._last_words = LastWords(services.settings.upstream.end_wait_s)
        self._conclusion: asyncio.Task[Settlement | None] | None = None

    async def send(self) -> None:
        """Send the request; on return the provider has accepted it with 200 and its body is still to be read.

        Raises:
            UpstreamRefusedError, UpstreamError, UpstreamTimeoutError, UpstreamBusyError, UpstreamRefusesUsError.
        """
        try:
            quote, response = self.call.quote, await self._post(self.call.quote)
            while response.status != 200:  # noqa: PLR2004 - HTTP
                self._failed_status = True
                body = await response.read_up_to(_ERROR_BYTES_MAX)
                first, holds = quote is self.call.quote, self.services.settings.holds
                smaller = smaller_bound(quote, response, body, holds, first=first)
                if smaller is None:
                    raise self.refusal(response.status, body, response.headers)
                self._release_connection()
                quote, response = smaller, await self._post(smaller)
        except ProxyError as error:
            self.outcome = (
                "upstream_refused" if isinstance(error, UpstreamError) is False else "upstream_error"
            )
            raise
        except TimeoutError as error:
            self.outcome = "upstream_timeout"
            self._fell_silent = not isinstance(error, aiohttp.ConnectionTimeoutError)
            raise UpstreamTimeoutError(
                "The provider did not answer in time.", may_be_billed=self._fell_silent
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            self.outcome = "upstream_error"
            raise UpstreamError(f"The provider could not be reached: {type(error).__name__}.") from error
        finally:
            self.call.stages.mark("upstream")
        await self.note_id(self.services.upstream.generation_id(response))
        self.call.stages.mark("note")

    async def _post(self, quote: Quote) -> UpstreamResponse:
        self.response, self._failed_status = None, False
        self.response = await self.services.upstream.send(
            self.ask, quote, call_id=self.call.call_id, trace=self.call.stages.begin_upstream()
        )
        return self.response

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
            self._fell_silent = True
            raise UpstreamTimeoutError("The provider stopped answering.", may_be_billed=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(f"The provider's answer broke off: {type(error).__name__}.") from error
        return b"".join(pieces)

    async def streams_anyway(self) -> bool:
        """Tell whether what calls itself JSON, or a page, is a stream all the same.

        Raises:
            UpstreamError, UpstreamTimeoutError: it broke off.
        """
        assert self.response is not None
        try:
            return is_stream(await self.response.peek(_PEEK_BYTES_MAX))
        except TimeoutError as error:
            self.outcome = "upstream_timeout"
            raise UpstreamTimeoutError("The provider stopped answering.", may_be_billed=True) from error
        except (aiohttp.ClientError, OSError) as error:
            self.outcome = "upstream_error"
            raise UpstreamError(f"The provider's answer broke off: {type(error).__name__}.") from error

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
        """Return what makes ``usage.cost`` where the price book decides; None where the provider's own figure must be asked for."""
        return self._price_by_book if self.services.upstream.bills_by_price_book else None

    def _price_by_book(self, said: Mapping[str, Any]) -> str | None:
        usage = self._read(said).usage
        if usage == Usage() or self._cost_of(said, usage) is not None:
            return None  # it may be counted here, at the end; or its own figure counts
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
            evidence = None if self._lacks_a_count() else self._reported()
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
            # Of one that may be billed the prompt is counted first.
            return None if self._may_have_been_billed() else Evidence(generation_id=self.call.generation_id)
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
        if said is None:
            return Evidence(
                generation_id=self.call.generation_id,
                bills_by_price_book=self.services.upstream.bills_by_price_book,
            )
        reading = self._read(said)
        cost = self._cost_of(said, reading.usage)
        usage: Usage | None = reading.usage
        if usage == Usage() and cost is None and (self._count() or not self.ask.output.choices):
            usage = None  # some servers send zeros where they did not count
        return Evidence(
            generation_id=self.call.generation_id,
            billed_usd=None if cost is None else cost.total_usd,
            usage=usage,
            bills_by_price_book=self.services.upstream.bills_by_price_book,
            adds_up=reading.adds_up,
            own_key_usd=Decimal(0) if cost is None else cost.own_key_usd,
        )

    def _read(self, said: Mapping[str, Any]) -> UsageReading:
        has_output = self.ask.output.choices > 0
        reading = read_usage(said, has_output=has_output)
        told = reading.usage.prompt_tokens or not reading.usage.completion_tokens
        return reading if told else with_prompt(reading, self.known_prompt_tokens())

    def _lacks_a_count(self) -> bool:
        """Tell whether the provider left the prompt out of its usage, and nobody has counted it yet."""
        if not self.call.quote.prompt.bound or self._counted_prompt is not None:
            return False
        source = self.meter or self.plain
        usage = None if source is None or source.usage is None else read_usage(source.usage).usage
        return usage is not None and not usage.prompt_tokens and usage.completion_tokens > 0

    def _cost_of(self, said: Mapping[str, Any], usage: Usage) -> ReportedCost | None:
        """Return the provider's own figure, where it is its bill. A zero for what has a price is none: its record knows."""
        if not self.services.upstream.reports_cost:
            return None
        cost = read_cost(said)
        is_none = cost is not None and not cost.total_usd and cost_attousd(self.call.quote.price, usage)
        return None if is_none else cost

    async def _conclude(self) -> Settlement | None:
        try:
            await self._let_the_provider_end()
        finally:
            self._release_connection()  # before its records are asked: it bills until it notices
        if self._lacks_a_count():
            await self.count_prompt()
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
                    chunk = await self.read_on()
                    if not chunk:
                        self.complete = True
                        break
                    await self.meter_chunk(chunk)

    async def read_on(self) -> bytes:
        """Return the next piece of a streamed answer; nothing when its provider has said all it will say.

        Raises:
            aiohttp.ClientError, TimeoutError: it broke off.
        """
        assert self.response is not None
        assert self.meter is not None
        return await self._last_words.read_on(self.response, self.meter)

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
        if self.response is None or self._failed_status:
            return await self._nothing_seen()
        generation_id = self.call.generation_id
        if generation_id is not None and self.services.upstream.keeps_bills:
            upstream, wait_s = self.services.upstream, self.services.settings.upstream.generation_wait_s
            bill = await wait_for_bill(upstream, generation_id, wait_s)
            if bill is not None:
                return Evidence.of(bill)
        evidence = self._from_answer()
        if evidence.usage is not None:
            return evidence
        completion_tokens = self._count()
        if completion_tokens == 0 and self.ask.output.choices and (generation_id is None or self._failed()):
            # Nothing was answered, and no record says that it is billed. Where there is no output, the answer is the prompt's alone.
            return await self._nothing_seen()
        usage = Usage(prompt_tokens=await self.count_prompt(), completion_tokens=completion_tokens)
        return Evidence(generation_id=generation_id, usage=usage, counted=True)

    async def _nothing_seen(self) -> Evidence:
        """Return what is known of a call that was not answered: it costs nothing, or the house pays an estimate."""
        if not self._may_have_been_billed():
            return Evidence(generation_id=self.call.generation_id)
        self.house = True
        expected = self.services.settings.holds.expected_tokens * self.ask.output.choices
        usage = Usage(await self.count_prompt(), min(expected, self.call.quote.completion_tokens))
        return Evidence(generation_id=self.call.generation_id, usage=usage, counted=True)

    def _may_have_been_billed(self) -> bool:
        """Tell whether the provider may have billed a whole answer that it never sent, of which no record will tell."""
        return self._fell_silent and not self.ask.stream and not self.services.upstream.keeps_bills

    def _failed(self) -> bool:
        """Tell whether the provider named an error, or broke off or fell silent; a client that hung up is none of these."""
        source = self.meter or self.plain
        return (source is not None and source.error is not None) or self.outcome in _FAILURES

    def _count(self) -> int:
        if self.meter is not None:
            return self.meter.fold(self.count_text)
        return self.count_text(self.plain.completion_text) if self.plain is not None else 0

    async def count_prompt(self) -> int:
        """Return the prompt's tokens, where nobody but us can tell them; counted now, if it was only bounded before."""
        prompt = self.call.quote.prompt
        if not prompt.bound:
            return prompt.tokens
        if self._counted_prompt is None:
            counted = await self.services.counter.count_prompt_async(
                self.ask.fields, self.ask.model, self.ask.work, owner=self.call.caller.user_id
            )
            self._counted_prompt = counted.tokens
        return self._counted_prompt

    def known_prompt_tokens(self) -> int:
        """Return what is known of the prompt's tokens without waiting: where it was only bounded, counting begins now."""
        prompt = self.call.quote.prompt
        if not prompt.bound:
            return prompt.tokens
        if self._counted_prompt is not None:
            return self._counted_prompt
        if not self._counting:
            self._counting = True
            self.services.conclusions.start(self.count_prompt(), name=f"count {self.call.call_id}")
        return prompt.tokens // _BYTES_PER_TOKEN

    def count_text(self, text: str) -> int:
        """Count tokens of the answer as its model does, or close to it."""
        return self.services.counter.count_text(self.ask.model, text)

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
        if self.held_nano is not None:
            ending = within_hold(ending, self.held_nano)
        self.ending = ending
        return self.services.calls.end(self.call, ending)

    def _release_connection(self) -> None:
        if self.response is not None:
            self.response.close()  # an answer that was read to its end has no connection any more
