"""Passing the provider's bytes on to the client, metering them on the way."""

import asyncio
import contextlib
import json
from collections.abc import Mapping

import aiohttp
from aiohttp import web

from billing.calls.outcome import Settlement
from billing.errors import UnavailableError
from billing.money import format_usd, nanousd_from_attousd
from billing.pricing.cost import Usage, cost_attousd
from proxy.call.answer import Answer
from proxy.call.cost import cost_json
from proxy.call.plain import relay_plain
from proxy.http.connection import ClientWatch, watch_client
from proxy.http.errors import UpstreamError, UpstreamTimeoutError, error_object
from proxy.http.fast_answer import HEADS
from proxy.http.request_facts import facts_of, standard_headers
from proxy.protocol.meter import StreamMeter

_KEEP_BYTES_MAX = 32 * 1024
_COUNT_BYTES_MAX = 512  # of events that are counted while their first byte waits
_GROWTH = 2
_SLACK = 2  # how far our count of an answer may be above its bound before the provider is taken to pass it
_NO_STREAM = (
    "application/json",
    "text/html",
)  # a provider that does not stream, or whose front door answered


async def relay_stream(request: web.Request, answer: Answer) -> web.StreamResponse:
    """Pass a streamed answer on as it comes, in whole events.

    Raises:
        UpstreamError, UpstreamTimeoutError, UpstreamRefusedError: the answer failed before its first byte was sent on.
        InsufficientFundsError, WalletFrozenError, PostgresUnavailableError: the call could not be opened; the house pays.
    """
    assert answer.response is not None
    if answer.response.content_type in _NO_STREAM and not await answer.streams_anyway():
        return await relay_plain(request, answer)
    settings = answer.services.settings
    answer.outcome = "upstream_error"
    answer.meter = answer.ask.dialect.meter(
        include_usage=answer.ask.include_usage,
        event_bytes_max=settings.upstream.event_bytes,
        price_usage=answer.price_usage(),
    )
    relay = _StreamRelay(request, answer, answer.meter)
    answer.call.progress = relay.progress
    with watch_client(request, on_gone=relay.client_left) as watch:
        relay.watch = watch
        return await relay.run()


class _StreamRelay:
    """One stream under way."""

    def __init__(self, request: web.Request, answer: Answer, meter: StreamMeter) -> None:
        assert answer.response is not None
        self._request = request
        self._answer = answer
        self._meter = meter
        self._response = answer.response
        self._client: web.StreamResponse | None = None
        self._completion_tokens = answer.call.quote.completion_tokens
        # Our count may be above the provider's, which was told this bound: what it bills within it is held already.
        self._check_at = self._threshold(self._completion_tokens) * _SLACK
        self.watch: ClientWatch

    def _threshold(self, completion_tokens: int) -> int:
        percent = self._answer.services.settings.holds.extend_at_percent
        return max(completion_tokens * percent // 100, 1)

    def client_left(self) -> None:
        """Stop reading, if this provider stops billing then; once its id is known, or it could not be asked."""
        answer = self._answer
        if answer.services.upstream.on_client_gone == "abort" and answer.call.generation_id is not None:
            answer.response.close()  # type: ignore[union-attr]  # wakes the read under way

    def progress(self, exact: bool) -> Mapping[str, str]:  # noqa: FBT001 - a callback's
        """Count what passed so far: what the sweeper goes by where the provider keeps no records.

        If it is not to be exact, and much came at once, an event counts as one token: it seldom is less.
        """
        cheap = not exact and self._meter.kept_bytes > _COUNT_BYTES_MAX
        tokens = self._meter.least_tokens() if cheap else self._meter.fold(self._answer.count_text)
        return {
            "prompt_tokens": str(self._answer.known_prompt_tokens()),
            "completion_tokens": str(tokens),
        }

    async def run(self) -> web.StreamResponse:
        try:
            funded = await self._pass_all()
        except asyncio.CancelledError:
            self._answer.outcome = "shutdown"
            raise
        except (ConnectionResetError, aiohttp.ClientConnectionResetError) as error:
            if self.watch.gone:
                return self._left()
            return await self._broken(
                UpstreamError(f"The provider's answer broke off: {type(error).__name__}.")
            )
        except UnavailableError as error:
            return await self._broken(error)
        except TimeoutError:
            self._answer.outcome = "upstream_timeout"
            return await self._broken(
                UpstreamTimeoutError("The provider stopped answering.", may_be_billed=True)
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if self.watch.gone:
                return self._left()
            return await self._broken(
                UpstreamError(f"The provider's answer broke off: {type(error).__name__}.")
            )
        if self.watch.gone:
            return self._left()
        if not funded:
            return await self._out_of_funds()
        return await self._ended()

    async def _pass_all(self) -> bool:
        """Relay until the provider's end; False when the wallet is empty before that."""
        meter = self._meter
        answer = self._answer
        read = self._response.read_some  # most chunks are read without a look at whether they are the last
        while chunk := await (read() if meter.usage is None and not meter.done else answer.read_on()):
            answer.mark_first_byte()
            passed = await answer.meter_chunk(chunk)
            if passed:
                if self._client is None:
                    self._refuse_early_error()
                    self._client = await self._begin()
                else:
                    await answer.confirm_own()
                await self.watch.write(self._client, passed)
            if meter.done:
                continue
            if self.watch.gone and answer.services.upstream.on_client_gone == "abort":
                return True
            if meter.kept_bytes > _KEEP_BYTES_MAX:
                meter.fold(answer.count_text)
            if meter.progress_tokens() >= self._check_at and not await self._grow():
                return False
        rest = meter.finish()
        if rest:
            self._refuse_early_error()
            self._client = self._client or await self._begin()
            await answer.confirm_own()
            await self.watch.write(self._client, rest)
        answer.complete = True
        return True

    def _refuse_early_error(self) -> None:
        """An error before the first token becomes a proper HTTP error, as nothing has been sent yet."""
        error = self._meter.error
        if self._client is None and error is not None and self._meter.events == 0:
            self._answer.complete = True
            raise self._answer.refusal_inside(
                error.code, json.dumps({"error": error.raw}, default=str).encode()
            )

    async def _begin(self) -> web.StreamResponse:
        """Begin the response; no byte reaches the client before the call is open in Postgres."""
        self._answer.accept()
        await self._answer.confirm_open()
        request = self._request
        response = facts_of(request).app[HEADS].stream(request, standard_headers(request))
        await response.prepare(request)
        return response

    async def _grow(self) -> bool:
        """Enlarge the hold when the running cost nears it; False when the wallet refuses."""
        answer = self._answer
        tokens = self._meter.fold(answer.count_text)
        if tokens < self._check_at:
            return True  # the cheap estimate ran ahead of the exact count
        wanted = self._completion_tokens * _GROWTH
        while tokens >= self._threshold(wanted):  # much came at once
            wanted *= _GROWTH
        more = answer.call.quote.grown_to(wanted)
        if not await answer.services.calls.extend(
            answer.call, hold_nano=more.hold_nano, hold_nanousd=more.hold_nanousd
        ):
            return False
        self._completion_tokens = wanted
        self._check_at = self._threshold(wanted)
        return True

    def _left(self) -> web.StreamResponse:
        self._answer.outcome = "client_gone"
        return self._client or web.StreamResponse()

    async def _ended(self) -> web.StreamResponse:
        """Settle, then end the stream, so that the balance is right when the client reads ``[DONE]``."""
        answer = self._answer
        if self._client is None:
            self._refuse_early_error()
            if self._meter.events == 0 and not self._meter.done:
                raise UpstreamError("The provider's answer is empty.")
            self._client = await self._begin()
        if not self._meter.done and not self._meter.finished and self._meter.error is None:
            return await self._broken(UpstreamError("The provider's answer broke off."))
        answer.outcome = "upstream_error" if self._meter.error is not None else "completed"
        settlement = await answer.settled()
        await self._finish(self._cost_event(settlement) + self._meter.done_event)
        return self._client

    async def _broken(
        self, error: UpstreamError | UpstreamTimeoutError | UnavailableError
    ) -> web.StreamResponse:
        """The provider failed, or the call is not ours any more: as an HTTP error while nothing was sent, else as an event."""
        if self._client is None:
            raise error
        await self._write_on(self._meter.error_event(error_object(error)))
        told = b""
        if self._answer.ask.dialect.tells_cost:
            told = self._cost_event(await self._answer.settled())
        await self._finish(told)
        return self._client

    async def _out_of_funds(self) -> web.StreamResponse:
        """End the answer cleanly, as if it had reached its bound."""
        answer = self._answer
        answer.outcome = "out_of_funds"
        answer.held_nano = answer.call.quote.grown_to(self._completion_tokens).hold_nano
        answer.response.close()  # type: ignore[union-attr]  # the provider stops here, and not after the counting
        usage = Usage(
            prompt_tokens=await answer.count_prompt(),
            completion_tokens=self._meter.fold(answer.count_text),
        )
        cost = format_usd(nanousd_from_attousd(cost_attousd(answer.call.quote.price, usage)))
        prompt, completion = self._meter.usage_names
        usage_json = (
            f'{{"{prompt}":{usage.prompt_tokens},"{completion}":{usage.completion_tokens},'
            f'"total_tokens":{usage.prompt_tokens + usage.completion_tokens},"cost":{cost}}}'
        )
        self._client = self._client or await self._begin()
        settlement = await answer.settled()
        end = self._meter.clean_end(usage_json=usage_json)
        await self._finish(end + self._cost_event(settlement) + self._meter.done_event)
        return self._client

    def _cost_event(self, settlement: Settlement | None) -> bytes:
        """Return the chunk that tells the cost, for clients that are told; nothing for others."""
        if not self._answer.ask.dialect.tells_cost:
            return b""
        return self._meter.extra_event("tuma", cost_json(self._answer, settlement))

    async def _finish(self, last: bytes) -> None:
        assert self._client is not None
        with contextlib.suppress(ConnectionResetError, aiohttp.ClientConnectionResetError):
            await self.watch.finish(self._client, last)

    async def _write_on(self, data: bytes) -> None:
        """Write what comes after the answer; its settlement does not depend on this client any more."""
        assert self._client is not None
        with contextlib.suppress(ConnectionResetError, aiohttp.ClientConnectionResetError):
            if data:
                await self.watch.write(self._client, data)
