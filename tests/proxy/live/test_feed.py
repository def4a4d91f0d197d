"""The live feed: all that is committed, in that order, once; whatever happens to the connection."""

import asyncio
import random
import re
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import aiohttp
import jwt
import pytest

from billing.calls.corrections import Corrections
from billing.calls.ledger import Extension, Ledger
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.ids import new_id
from billing.money import NANO, parse_amount
from billing.wallets.caps import Caps
from billing.wallets.feed import Feeds, event_id
from config.settings import Settings
from scripts.office import Office
from tests.faults.test_limits import SECRET
from tests.proxy.live.feed_client import balance_of, fed, first_of, refusal, shown, talking
from tests.support.feeds import committed, ending, opening, pay, watching
from tests.support.paths import ROOT
from tests.support.payers import make_payer
from tests.support.running import Running, run_proxy


async def test_everything_is_told(house: Running, office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    corrections = Corrections(office.database, charge_estimates_upward=True)
    async with watching(house.base_url, payer.secret) as stream:
        first = await stream.next()
        assert first is not None
        assert first["type"] == "balance"
        assert first["wallet_id"] == str(payer.wallet_id)
        assert balance_of(first) == await shown(office, payer)
        call = opening(payer, 2 * NANO)

        async def told(kind: str, posted: str, held: str) -> dict[str, Any]:
            event = await stream.next()
            assert event is not None
            assert (event["type"], event["posted_change"], event["held_change"]) == (kind, posted, held)
            assert balance_of(event) == await shown(office, payer)
            return event

        await ledger.open_calls([call])
        hold = await told("hold", "0", "2")
        assert (hold["call_id"], hold["model"]) == (str(call.call_id), "a/model")
        await ledger.extend_calls([Extension(call.call_id, 3 * NANO, 3 * NANO)])
        await told("hold", "0", "1")
        await Caps(office.database).set_caps("wallet", payer.wallet_id, {"day": NANO})
        await ledger.settle_calls([ending(call.call_id, NANO // 2)])
        settled = await told("settlement", "-0.5", "-3")
        assert (settled["call_id"], settled["cost_usd"], settled["charge"], settled["state"]) == (
            str(call.call_id),
            "0.5",
            "0.5",
            "settled",
        )
        cap = await told("cap", "0", "0")
        assert (cap["cap"]["percent"], cap["cap"]["period"]) == (50, "day")
        gone = opening(payer, NANO // 4)
        await ledger.open_calls([gone])
        await told("hold", "0", "0.25")
        await ledger.settle_calls([ending(gone.call_id, 0)])
        assert (await told("settlement", "0", "-0.25"))["state"] == "void"
        await office.wallets.credit(payer.wallet_id, 5 * NANO, reason="a gift")
        assert (await told("grant", "5", "0"))["description"] == "a gift"
        await corrections.refund(call.call_id, amount_nano=None, reason="sorry")
        refund = await told("refund", "0.5", "0")
        assert refund["call_id"] == str(call.call_id)
        await office.wallets.set_wallet(payer.wallet_id, status="frozen")
        assert (await told("wallet", "0", "0"))["status"] == "frozen"
        await office.wallets.set_wallet(payer.wallet_id, status="active", overdraft_nano=7 * NANO)
        assert (await told("wallet", "0", "0"))["overdraft"] == "7"
        await pay(ledger, await make_payer(office), 1)  # of another wallet nothing is told
        await pay(ledger, payer, 10)
        assert [event["type"] for event in await stream.take(2)] == ["hold", "settlement"]
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(DISTINCT wallet_id) FROM feed_events") == 1


async def test_a_users_cap_is_told_to_all_their_wallets(
    house: Running, office: Office, ledger: Ledger
) -> None:
    payer = await make_payer(office)
    second = await office.wallets.create_wallet(str(payer.user_id), currency="USD")
    keys = Keys(office.database, office.settings.auth, office.settings.limits)
    other = (await keys.create(second)).secret
    await Caps(office.database).set_caps("user", payer.user_id, {"day": 2 * NANO})
    async with (
        watching(house.base_url, payer.secret) as here,
        watching(house.base_url, other) as there,
    ):
        await here.take(1)
        await there.take(1)
        await pay(ledger, payer, NANO)
        assert [event["type"] for event in await here.take(3)] == ["hold", "settlement", "cap"]
        (cap,) = await there.take(1)
        assert (cap["type"], cap["wallet_id"], cap["cap"]["percent"]) == ("cap", str(second), 50)
        assert (cap["posted"], cap["posted_change"]) == ("0", "0")


async def test_what_its_owner_is_told_besides(house: Running, office: Office) -> None:
    payer = await make_payer(office)
    async with watching(house.base_url, payer.secret) as stream:
        await stream.take(1)
        for kind in ("wallet.low", "auto_topup.failed", "something.else"):
            async with office.database.connection() as connection:
                await connection.execute(
                    'INSERT INTO events (user_id, wallet_id, kind, body) VALUES ($1, $2, $3, \'{"note": "n"}\')',
                    payer.user_id,
                    payer.wallet_id,
                    kind,
                )
        low, failed = await stream.take(2)
        assert (low["type"], low["low"]["note"]) == ("low", "n")
        assert (failed["type"], failed["auto_topup"]["note"]) == ("auto_topup", "n")
        assert (low["posted_change"], low["posted"]) == ("0", "10")


async def test_payments_are_told(house: Running, office: Office) -> None:
    """What a payment provider says was paid, refunded and disputed, as the payments' own functions post it."""
    payer = await make_payer(office, amount="0", currency="NGN")
    async with watching(house.base_url, payer.secret) as stream:
        await stream.take(1)
        async with office.database.connection() as connection:
            intent = new_id()
            await connection.execute(
                "INSERT INTO payment_intents (id, wallet_id, user_id, kind, provider, currency, amount_nano, state, expires_at)"
                " VALUES ($1, $2, $3, 'topup', 'paystack', 'NGN', $4, 'pending', now() + interval '1 hour')",
                intent,
                payer.wallet_id,
                payer.user_id,
                5000 * NANO,
            )
            await connection.execute(
                "SELECT credit_payment($1, 'paystack', 'txn', $2, 'NGN', $3, false)",
                new_id(),
                intent,
                5000 * NANO,
            )
            for kind, reversal in (("refund", "r1"), ("dispute", "d1")):
                await connection.execute(
                    "SELECT reverse_payment($1, $2, 'paystack', 'txn', $3, $4, NULL, $5, $6)",
                    new_id(),
                    new_id(),
                    kind,
                    reversal,
                    "final" if kind == "refund" else "open",
                    1000 * NANO,
                )
        told = await stream.take(4)
        assert sorted((event["type"], event["posted_change"]) for event in told) == [
            ("dispute", "-1000"),
            ("reversal", "-1000"),
            ("topup", "5000"),
            ("wallet", "0"),
        ]
        assert balance_of(told[-1]) == await shown(office, payer)
        assert told[-1]["status"] == "frozen"


async def test_a_feed_cut_200_times(house: Running, office: Office, ledger: Ledger) -> None:
    """While money moves, a client is cut at random and goes on; it has every event that was committed, once, in order."""
    dice = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    payer = await make_payer(office, amount="1000")
    others = [await make_payer(office, amount="1000") for _ in range(3)]
    done = asyncio.Event()

    async def move() -> None:
        """Settle in batches that touch several wallets, one transaction after another and several at once."""
        while not done.is_set():
            crowd = [payer, *dice.sample(others, 2)]
            calls = [opening(dice.choice(crowd), 2000) for _ in range(dice.randrange(1, 6))]
            await ledger.open_calls(calls)
            await ledger.settle_calls([ending(call.call_id, dice.choice((0, 7, 1500))) for call in calls])
            if dice.random() < 0.2:
                await office.wallets.credit(payer.wallet_id, dice.randrange(1, NANO), reason="more")
            await asyncio.sleep(dice.choice((0, 0, 0.01, 0.05)))

    seen: list[dict[str, Any]] = []
    last: str | None = None
    async with asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(move())
        for cut in range(201):
            async with watching(house.base_url, payer.secret, after=last) as stream:
                if cut == 200:
                    done.set()
                    await asyncio.sleep(0.5)
                    goal = (await committed(office, payer))[-1]
                wanted = dice.randrange(4)
                while (last != goal) if cut == 200 else wanted:
                    event = await stream.next()
                    assert event is not None
                    assert event["type"] != "reset"
                    last = event["id"]
                    wanted -= 1
                    seen.append(event)
    assert seen[0]["type"] == "balance"
    ids = [event["id"] for event in seen]
    rows = await committed(office, payer)
    assert ids[1:] == rows[len(rows) - len(ids) + 1 :], "an event is missing, or there twice"
    assert len(ids) > 150
    posted, held = parse_amount(seen[0]["posted"]), parse_amount(seen[0]["held"])
    for event in seen[1:]:
        posted += parse_amount(event["posted_change"], allow_negative=True)
        held += parse_amount(event["held_change"], allow_negative=True)
        assert (parse_amount(event["posted"]), parse_amount(event["held"])) == (posted, held)
    assert balance_of(seen[-1]) == await shown(office, payer)


async def test_what_was_missed_comes_in_pages(settings: Settings, office: Office, ledger: Ledger) -> None:
    """A watcher that is behind gets all of it before what is live, though others are live meanwhile."""
    payer = await make_payer(office)
    async with run_proxy(fed(settings, page_events=3)) as house:
        begin = await first_of(house, payer)
        async with watching(house.base_url, payer.secret) as other:
            await other.take(1)
            for _ in range(5):
                await pay(ledger, payer, 5)
            ids = [event["id"] for event in await other.take(10)]
            async with watching(house.base_url, payer.secret, after=begin["id"]) as stream:
                told = await stream.take(10)
                await pay(ledger, payer, 5)
                told += await stream.take(2)
        assert [event["id"] for event in told[:10]] == ids
        assert [event["id"] for event in told] == await committed(office, payer)


async def test_who_comes_while_a_transaction_is_under_way(house: Running, office: Office) -> None:
    """It found the wallet unwatched, so nothing is told of it: the feed begins with what it left."""
    payer = await make_payer(office)
    async with office.database.transaction() as connection:
        await connection.execute(
            "SELECT grant_credit($1, $2, $3, 'late', 'k', 'h')", new_id(), payer.wallet_id, 5 * NANO
        )
        await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        coming = asyncio.ensure_future(first_of(house, payer))
        await asyncio.sleep(0.3)
        assert not coming.done()
    assert (await coming)["posted"] == "15"


async def test_a_gap_is_told(settings: Settings, office: Office, ledger: Ledger) -> None:
    """Who was away too long, or comes with an id that is none of this wallet's, is told to begin anew."""
    payer, other = await make_payer(office), await make_payer(office)
    async with run_proxy(settings) as house:
        begin = await first_of(house, payer)
        await pay(ledger, payer, 5)
        ids = await committed(office, payer)
        resumed = await first_of(house, payer, begin["id"])
        assert (resumed["type"], resumed["id"]) == ("hold", ids[0])
        for wrong in (
            (await first_of(house, other))["id"],
            event_id(other.wallet_id, int(begin["id"].partition("-")[2])),
            event_id(payer.wallet_id, int(ids[-1].partition("-")[2]) + 1),
            event_id(payer.wallet_id, int(begin["id"].partition("-")[2]) - 1),
            "0",
            "nonsense",
            "9" * 40,
        ):
            event = await first_of(house, payer, wrong)
            assert event["type"] == "reset", wrong
            assert event["id"] == ids[-1]
            assert balance_of(event) == await shown(office, payer)
        # Nobody watched for a while, and the wallet was not watched any more when its money moved.
        async with office.database.connection() as connection:
            await connection.execute("UPDATE feeds SET watched_until = clock_timestamp()")
        await office.wallets.credit(payer.wallet_id, NANO, reason="unseen")
        assert await committed(office, payer) == ids
        event = await first_of(house, payer, ids[-1])
        assert event["type"] == "reset"
        assert balance_of(event) == await shown(office, payer)
        # Events were removed for their age.
        await pay(ledger, payer, 5)
        async with office.database.connection() as connection:
            await connection.execute("UPDATE feed_events SET created_at = now() - interval '2 days'")
        assert await Feeds(office.database, settings.feed).forget() == 4
        assert (await first_of(house, payer, event["id"]))["type"] == "reset"
        # The wallet's row was removed, too: its numbers do not begin anew.
        last = (await first_of(house, payer))["id"]
        async with office.database.connection() as connection:
            await connection.execute("UPDATE feeds SET watched_until = now() - interval '2 days'")
        await Feeds(office.database, settings.feed).forget()
        async with office.database.connection() as connection:
            assert await connection.fetchval("SELECT count(*) FROM feeds") == 0
        assert (await first_of(house, payer, last))["type"] == "reset"


async def test_numbers_that_a_restore_gives_again_are_not_gone_on_from(
    house: Running, office: Office, ledger: Ledger
) -> None:
    """The backup knows a wallet as watched, and its number as it was: others follow that clients had from the lost hour."""
    payer = await make_payer(office)
    before = int((await first_of(house, payer))["id"].partition("-")[2])
    await pay(ledger, payer, 5)
    lost = (await committed(office, payer))[-1]
    runbook = (ROOT / "docs/operations.md").read_text()
    (step,) = re.findall(r"`(DELETE FROM feed[^`]*)`", runbook)
    async with office.database.connection() as connection:
        await connection.execute("DELETE FROM feed_events")
        await connection.execute("UPDATE feeds SET seq = $1", before)
        await connection.execute(step)
    await first_of(house, payer)
    await pay(ledger, payer, 5)
    await pay(ledger, payer, 5)
    event = await first_of(house, payer, lost)
    assert event["type"] == "reset"
    assert balance_of(event) == await shown(office, payer)


async def test_a_watched_wallet_stays_watched(settings: Settings, office: Office, ledger: Ledger) -> None:
    """For as long as somebody listens, though events are kept for much less."""
    payer = await make_payer(office)
    async with (
        run_proxy(fed(settings, keep_s=1.0)) as house,
        watching(house.base_url, payer.secret) as stream,
    ):
        await stream.take(1)
        await asyncio.sleep(3)
        await pay(ledger, payer, 5)
        assert [event["type"] for event in await stream.take(2)] == ["hold", "settlement"]


async def test_a_feed_that_does_not_agree_is_mended(house: Running, office: Office, ledger: Ledger) -> None:
    payer = await make_payer(office)
    async with watching(house.base_url, payer.secret) as stream:
        await stream.take(1)
        async with office.database.connection() as connection:
            await connection.execute("UPDATE feeds SET posted_nano = posted_nano + 1")
        await office.wallets.credit(payer.wallet_id, NANO, reason="told by a reset")
        (event,) = await stream.take(1)
        assert event["type"] == "reset"
        assert balance_of(event) == await shown(office, payer)
        await pay(ledger, payer, 5)
        told = await stream.take(2)
        assert [event["type"] for event in told] == ["hold", "settlement"]
        assert balance_of(told[-1]) == await shown(office, payer)


@pytest.mark.parametrize("bound", [{"queue_events": 20}, {"write_timeout_s": 1.0}])
async def test_a_slow_reader_is_dropped(
    settings: Settings, office: Office, ledger: Ledger, bound: dict[str, float]
) -> None:
    """It gets no more than its queue and the buffers of its connection, while others get everything."""
    payer = await make_payer(office)
    async with run_proxy(fed(settings, **{"queue_events": 10_000, "write_timeout_s": 50, **bound})) as house:
        host, port = "127.0.0.1", int(house.base_url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection(host, port, limit=1024)
        writer.write(
            f"GET /v1/wallet/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {payer.secret}\r\n\r\n".encode()
        )
        assert b"200" in await reader.readline()
        watchers = house.services.watchers
        async with watching(house.base_url, payer.secret) as stream:
            await stream.take(1)
            async with office.database.connection() as connection:  # much at once, as the sockets take a lot
                for _ in range(40):
                    await connection.execute(
                        "SELECT add_to_feeds(array_agg($1::uuid), array_agg('cap'::text), array_agg(0::bigint),"
                        " array_agg(0::bigint), array_agg(NULL::uuid),"
                        " array_agg(jsonb_build_object('x', repeat('x', 20000)))) FROM generate_series(1, 15)",
                        payer.wallet_id,
                    )
                    await stream.take(15)
            async with asyncio.timeout(20):
                while len(watchers) > 1:
                    await asyncio.sleep(0.05)
            await pay(ledger, payer, 5)
            assert (await stream.take(2))[-1]["type"] == "settlement"
        writer.close()
        async with asyncio.timeout(20):
            while len(watchers):
                await asyncio.sleep(0.05)
        assert not watchers._places
        assert not watchers._counts


@pytest.mark.parametrize("kind", ["key", "token"])
async def test_who_may_no_longer_watch(settings: Settings, office: Office, kind: str) -> None:
    settings = settings.model_copy(
        update={
            "auth": settings.auth.model_copy(update={"jwt_secret": type(settings.auth.key_pepper)(SECRET)})
        }
    )
    user = await office.wallets.create_user("ada@example.com", subject="ada")
    token = jwt.encode({"sub": "ada", "exp": time.time() + 600}, SECRET, algorithm="HS256")
    wallet = await office.wallets.create_wallet(str(user), currency="USD")
    keys = Keys(office.database, office.settings.auth, office.settings.limits)
    made, kept = await keys.create(wallet), await keys.create(wallet)
    async with AsyncExitStack() as stack:
        house = await stack.enter_async_context(run_proxy(settings))
        secret = token if kind == "token" else made.secret
        stream = await stack.enter_async_context(watching(house.base_url, secret))
        other = await stack.enter_async_context(watching(house.base_url, kept.secret))
        assert (await stream.take(1))[0]["wallet_id"] == str(wallet)
        await other.take(1)
        if kind == "token":
            await office.wallets.set_user(user, status="disabled")
            assert (await other.take(1))[0]["reason"] == "refused"
        else:
            await keys.revoke(made.id)
        (end,) = await stream.take(1)
        assert (end["type"], end["reason"]) == ("end", "refused")
        assert await stream.next() is None
        if kind == "key":
            await office.wallets.credit(wallet, NANO, reason="still here")
            assert (await other.take(1))[0]["type"] == "grant"
        async with aiohttp.ClientSession() as session:
            head = {"Authorization": f"Bearer {secret}"}
            async with session.get(f"{house.base_url}/v1/wallet/events", headers=head) as response:
                assert response.status == 401


@pytest.mark.parametrize("kind", ["key", "token"])
async def test_what_expires_ends_the_feed(settings: Settings, office: Office, kind: str) -> None:
    auth = settings.auth.model_copy(
        update={"jwt_secret": type(settings.auth.key_pepper)(SECRET), "leeway_s": 0.0}
    )
    user = await office.wallets.create_user("ada@example.com", subject="ada")
    wallet = await office.wallets.create_wallet(str(user), currency="USD")
    async with run_proxy(settings.model_copy(update={"auth": auth})) as house:
        ends = time.time() + 3
        if kind == "token":
            secret = jwt.encode({"sub": "ada", "exp": ends}, SECRET, algorithm="HS256")
        else:
            rules = KeyRules(expires_at=datetime.fromtimestamp(ends, UTC))
            keys = Keys(office.database, office.settings.auth, office.settings.limits)
            secret = (await keys.create(wallet, rules)).secret
        async with watching(house.base_url, secret) as stream:
            await stream.take(1)
            (end,) = await stream.take(1)
            assert end["reason"] == "refused"
            assert time.time() > ends - 1


async def test_limits_and_heartbeats(settings: Settings, office: Office) -> None:
    payer, other = await make_payer(office), await make_payer(office)
    async with run_proxy(
        fed(settings, watchers=3, watchers_per_caller=2, heartbeat_s=0.3, retry_s=2.5)
    ) as house:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(watching(house.base_url, payer.secret))
            await stack.enter_async_context(watching(house.base_url, payer.secret))
            assert await refusal(house, payer) == (429, "rate_limit_exceeded")
            await stack.enter_async_context(watching(house.base_url, other.secret))
            assert await refusal(house, other) == (503, "feed_full")
            await first.take(1)
            assert first.retries == [2500]
            for _ in range(2):
                async with asyncio.timeout(10):
                    assert await first.response.content.readline() == b": still here\n"
                    assert await first.response.content.readline() == b"\n"
        async with asyncio.timeout(10):
            while len(house.services.watchers):
                await asyncio.sleep(0.02)
        assert (await first_of(house, payer))["type"] == "balance"


async def test_a_stopping_worker_sends_its_watchers_away(settings: Settings, office: Office) -> None:
    payer = await make_payer(office)
    async with AsyncExitStack() as stack:
        async with run_proxy(settings) as house:
            stream = await stack.enter_async_context(watching(house.base_url, payer.secret))
            socket = await stack.enter_async_context(talking(house, payer.secret))
            await stream.take(1)
            await socket.receive_json()
            began = time.monotonic()
        assert time.monotonic() - began < 10
        (end,) = await stream.take(1)
        assert (end["type"], end["reason"]) == ("end", "restart")
        assert len(stream.retries) == 2
        assert (await socket.receive_json())["reason"] == "restart"
        close = await socket.receive()
        assert (close.type, close.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.GOING_AWAY)
