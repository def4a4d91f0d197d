"""Whether a call is still its worker's own: asked once after a standstill, and never on the normal way."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from billing.calls import leases as leases_module
from billing.calls.leases import Leases
from billing.calls.ledger import Ledger
from billing.calls.live_call import LiveCall
from billing.calls.outcome import Ending
from billing.errors import PostgresUnavailableError, WorkerStalledError
from billing.ids import new_id
from config.settings import Settings
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.payers import make_payer, sync_models
from tests.support.running import Running, run_proxy

BODY = {
    "model": "openai/gpt-4o-mini",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "sim": {"chunks": 150, "chunk_delay_ms": 20},
}
FAR_S = 1000.0


class Clock:
    """The clock by which leases run out, with what a standstill adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.later_s = 0.0
        read = leases_module.read_clock_s
        monkeypatch.setattr(leases_module, "read_clock_s", lambda: read() + self.later_s)


class Streaming:
    """A stream under way, and its worker's leases."""

    def __init__(self, proxy: Running, office: Office, response: aiohttp.ClientResponse) -> None:
        self.proxy = proxy
        self.office = office
        self.response = response
        self.asked = 0
        ask = self.leases._ask_whose

        async def count() -> None:
            self.asked += 1
            await ask()

        self.leases._ask_whose = count  # type: ignore[method-assign]

    @property
    def leases(self) -> Leases:
        return self.proxy.services.calls.leases

    @property
    def call(self) -> LiveCall:
        (call,) = self.leases._live.values()
        return call

    async def end_without_it(self) -> None:
        """As the sweeper would."""
        ledger = Ledger(self.office.database, worker_id=new_id())
        (settlement,) = await ledger.settle_calls([Ending(self.call.call_id, "void", "worker_lost")])
        assert settlement.won


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
async def streaming(
    settings: Settings, office: Office, sim: SimulatedProvider, clock: Clock
) -> AsyncIterator[Streaming]:
    await sync_models(office)
    payer = await make_payer(office)
    holds = settings.holds.model_copy(update={"renew_s": 0.2})
    async with (
        run_proxy(settings.model_copy(update={"holds": holds})) as proxy,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session,
        session.post(f"{proxy.base_url}/v1/chat/completions", json=BODY) as response,
    ):
        assert (await response.content.readline()).startswith(b"data:")
        yield Streaming(proxy, office, response)
        await proxy.quiet()


async def test_nothing_is_asked_on_the_normal_way(streaming: Streaming) -> None:
    assert (await streaming.response.read()).rstrip().endswith(b"data: [DONE]")
    assert streaming.asked == 0


async def test_one_question_and_the_stream_goes_on(streaming: Streaming, clock: Clock) -> None:
    clock.later_s = FAR_S
    assert (await streaming.response.read()).rstrip().endswith(b"data: [DONE]")
    assert streaming.asked == 1


async def test_a_lease_that_is_renewed_afterwards_hides_no_standstill(
    streaming: Streaming, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewals come first when a worker goes on: what was ended meanwhile is ended all the same."""
    call, leases = streaming.call, streaming.leases
    await streaming.end_without_it()
    clock.later_s = FAR_S
    leases._notice_standstill()  # as the loop of renewals does, before anything else
    await leases._renew_worker()
    assert not leases.is_own(call)
    with pytest.raises(WorkerStalledError):
        await leases.confirm_own(call)
    assert not leases.is_own(call), "once lost, always lost"
    with pytest.raises(WorkerStalledError):
        await leases.confirm_own(call)
    rest = await streaming.response.read()
    assert b"server_stalled" in rest
    assert b"[DONE]" not in rest or b'"content"' not in rest.partition(b"server_stalled")[2]


async def test_the_hold_of_a_lost_call_is_not_put_back(streaming: Streaming, clock: Clock) -> None:
    call, leases = streaming.call, streaming.leases
    await streaming.end_without_it()
    await streaming.office.holds.release(call.hold, charge_nano=None)
    clock.later_s = FAR_S
    leases._notice_standstill()
    await leases._ask_whose()
    await leases._renew_calls()
    assert await streaming.office.holds.find_leases(expired=False, limit=9) == []


async def test_a_lease_of_one_kind_is_enough(
    streaming: Streaming, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Postgres is away for long the holds' leases in Redis keep the sweeper off: streams go on unasked."""

    async def away() -> None:
        raise PostgresUnavailableError("played")

    monkeypatch.setattr(streaming.leases, "_renew_lease", away)
    lease_s = streaming.proxy.services.settings.holds.lease_s
    for _ in range(4):
        clock.later_s += lease_s * 0.7
        await asyncio.sleep(0.35)  # a renewal
        assert streaming.leases.is_own(streaming.call)
    assert (await streaming.response.read()).rstrip().endswith(b"data: [DONE]")
    assert streaming.asked == 0


async def test_where_nobody_can_tell_nothing_is_passed_on(
    streaming: Streaming, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> bool:
        raise PostgresUnavailableError("Postgres is away.")

    monkeypatch.setattr(streaming.leases, "_renew_lease", away)
    clock.later_s = FAR_S
    rest = await streaming.response.read()
    assert b"metering_unavailable" in rest
    assert rest.count(b'"content"') < 150
