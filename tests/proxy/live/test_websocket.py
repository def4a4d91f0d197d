"""The feed over a websocket."""

import aiohttp
import pytest

from billing.calls.ledger import Ledger
from billing.identity.keys import Keys
from scripts.office import Office
from tests.proxy.live.feed_client import talking
from tests.support.feeds import pay, watching
from tests.support.payers import make_payer
from tests.support.running import Running


async def test_the_same_over_a_websocket(house: Running, office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    async with talking(house, payer.secret) as socket, watching(house.base_url, payer.secret) as stream:
        first = await socket.receive_json()
        assert first == (await stream.take(1))[0]
        await socket.send_str("hello?")
        await pay(ledger, payer, 5)
        told = [await socket.receive_json() for _ in range(2)]
        assert told == await stream.take(2)
        await socket.ping()
    # A page gives its key as a protocol, and goes on by the query.
    offered = ("tuma", f"tuma.bearer.{payer.secret}", f"tuma.wallet.{payer.wallet_id}")
    async with talking(
        house, "", headers={}, protocols=offered, query=f"?last_event_id={told[0]['id']}"
    ) as socket:
        assert socket.protocol == "tuma"
        assert await socket.receive_json() == told[1]
        await Keys(office.database, office.settings.auth, office.settings.limits).revoke(payer.key_id)
        assert (await socket.receive_json())["reason"] == "refused"
        close = await socket.receive()
        assert (close.type, close.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.POLICY_VIOLATION)


async def test_what_is_no_websocket(house: Running, office: Office, caplog: pytest.LogCaptureFixture) -> None:
    payer, other = await make_payer(office), await make_payer(office)
    head = {"Authorization": f"Bearer {payer.secret}"}
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{house.base_url}/v1/wallet/ws", headers=head) as response:
            assert response.status == 400
            assert "Upgrade" in (await response.json())["error"]["message"]
        for protocols, status in (
            ((f"tuma.bearer.{payer.secret}",), 400),
            (("tuma", "tuma.bearer.sk-tuma-wrong"), 401),
            (("tuma", f"tuma.bearer.{payer.secret}", f"tuma.wallet.{other.wallet_id}"), 403),
            (("tuma",), 401),
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await session.ws_connect(f"{house.base_url}/v1/wallet/ws", protocols=protocols)
            assert error.value.status == status
        # A key in a URL opens nothing.
        async with session.get(f"{house.base_url}/v1/wallet/events?key={payer.secret}") as response:
            assert response.status == 401
    assert payer.secret not in caplog.text
