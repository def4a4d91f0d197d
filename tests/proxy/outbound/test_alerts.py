"""Alerts reach a receiver that fails in every way: none is lost, none is told twice under another id, every signature holds."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from billing.calls.ledger import Ledger
from billing.calls.outcome import Ending
from billing.errors import AlertNotTakenError, InputError, NotFoundError
from billing.ids import new_id
from billing.money import NANO
from billing.monitoring.alerts import Evaluation, describe_alerts
from config.settings import AlertSettings, Settings, SettingsError, load_settings
from proxy.outbound.alert_webhook import AlertHook, make_messenger
from scripts.cli.main import main
from scripts.office import Office
from tests.billing.calls.test_ledger import opening
from tests.faults.test_kill import serving
from tests.proxy.account.test_keys import Client
from tests.support.alerts import PATIENCE_S, SECRET, Receiver, alerts_of, told
from tests.support.payers import make_payer, set_rate, sync_models
from tests.support.running import Running, run_proxy
from tests.support.settings import make_settings


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    yield made
    server.close()


async def set_low(office: Office, wallet_id: UUID, low_nano: int | None) -> None:
    async with office.database.connection() as connection:
        await connection.execute("UPDATE wallets SET low_nano = $2 WHERE id = $1", wallet_id, low_nano)


async def run_sql(office: Office, *statements: str) -> None:
    async with office.database.transaction() as connection:
        await connection.execute("SELECT set_config('tuma.usage_kept', 'yes', true)")
        for statement in statements:
            await connection.execute(statement)


async def waiting(office: Office) -> int:
    return len((await describe_alerts(office.database))["undelivered"])


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("ok", None),
        ("slow", None),
        ("500", "status 500"),
        ("redirect", "status 307"),
        ("reset", "Server"),
        ("hang", "Timeout"),
        ("big", "16384 bytes"),
    ],
)
async def test_what_takes_a_message(
    receiver: Receiver, settings: Settings, way: str, why: str | None
) -> None:
    receiver.ways = [way]
    hook = AlertHook(told(settings, receiver).alerts)
    message_id = new_id()
    body = json.dumps({"id": str(message_id), "type": "alert.test", "words": "₦"}).encode()
    if why is None:
        await hook.send(message_id, body)
    else:
        with pytest.raises(AlertNotTakenError, match=why) as caught:
            await hook.send(message_id, body)
        assert "127.0.0.1" not in str(caught.value)
    assert len(receiver.got) == 1
    assert receiver.redirected == 0


async def test_none_is_lost_on_a_bad_day(receiver: Receiver, settings: Settings, office: Office) -> None:
    """Conditions come and go while three workers evaluate and deliver, and the receiver fails as it likes."""
    receiver.dice = random.Random(11)
    payers = [await make_payer(office) for _ in range(12)]
    async with (
        alerts_of(told(settings, receiver, timeout_s=0.5)) as one,
        alerts_of(told(settings, receiver, timeout_s=0.5)) as two,
        alerts_of(told(settings, receiver, timeout_s=0.5)) as three,
    ):
        workers = [asyncio.create_task(worker.run()) for worker in (one, two, three)]
        for low in (20 * NANO, None, 30 * NANO, None):
            for payer in payers:
                await set_low(office, payer.wallet_id, low)
            await asyncio.gather(one.evaluate(), two.evaluate(), three.evaluate())
        async with asyncio.timeout(PATIENCE_S):
            while await waiting(office):
                await asyncio.sleep(0.05)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    async with office.database.connection() as connection:
        assert (
            await connection.fetchval("SELECT count(*) FROM alert_messages WHERE dropped_at IS NOT NULL") == 0
        )
        written = {
            str(row["id"]): row["body"].encode()
            for row in await connection.fetch("SELECT id, body FROM alert_messages")
        }
    assert len(written) == len(payers) * 4
    assert set(receiver.taken) == written.keys(), "every message was taken at least once"
    for message_id, bodies in receiver.bodies.items():
        assert bodies == {written[message_id]}, "a repeat is the same, to the byte"
    firsts: dict[str, list[str]] = {}
    for message_id in dict.fromkeys(receiver.taken):
        message = json.loads(written[message_id])
        firsts.setdefault(message["alert"]["id"], []).append(message["type"])
    assert list(firsts.values()) == [["alert.firing", "alert.resolved"]] * (2 * len(payers))
    assert receiver.redirected == 0


async def test_a_process_killed_before_it_delivered(
    receiver: Receiver, settings: Settings, office: Office
) -> None:
    await sync_models(office)
    payer = await make_payer(office)
    await set_low(office, payer.wallet_id, 20 * NANO)
    receiver.always = "hang"
    more = {
        "TUMA_ALERTS__URL": receiver.url,
        "TUMA_ALERTS__SECRET": SECRET,
        "TUMA_ALERTS__PERIOD_S": "0.2",
        "TUMA_ALERTS__TIMEOUT_S": "1",
        "TUMA_ALERTS__LOOK_S": "0.1",
        "TUMA_ALERTS__PAUSE_S": "0.1",
    }
    async with serving(settings, more=more) as (process, _):
        await receiver.wait(1)
        process.kill()
        await asyncio.to_thread(process.wait, 30)
    assert receiver.taken == []
    receiver.always = "ok"
    async with serving(settings, more=more):
        async with asyncio.timeout(PATIENCE_S):
            while not receiver.taken:
                await asyncio.sleep(0.02)
    assert {message["id"] for message in receiver.got} == set(receiver.taken)
    assert [len(bodies) for bodies in receiver.bodies.values()] == [1]
    assert {message["type"] for message in receiver.got} == {"alert.firing"}


async def make_call(office: Office, state: str) -> str:
    payer = await make_payer(office)
    ledger, call = Ledger(office.database, worker_id=new_id()), opening(payer, NANO)
    await ledger.open_calls([call])
    if state == "review":
        await ledger.settle_calls([Ending(call.call_id, "review", "worker_lost", generation_id="gen-1")])
    return str(call.call_id)


_CREDIT = (
    "INSERT INTO payment_credits (provider, provider_txn_id, currency, paid_nano, credited_nano, state, tx_id)"
    " VALUES ('stripe', 't', 'NGN', 5000000000, 0, 'review', gen_random_uuid())"
)
_EVENT = (
    "INSERT INTO webhook_events (id, provider, event_key, body, state, tries)"
    " VALUES (gen_random_uuid(), 'paystack', {key!r}, '{{}}', {state!r}, {tries})"
)
_DIFF = (
    "INSERT INTO reconciliation_diffs (id, run_id, cause, ours_nanousd, provider_nanousd)"
    " SELECT uuid_floor(now()), r.id, {cause!r}, 1000000000, 3500000000 FROM reconciliation_runs r"
)
_RATE = (
    "INSERT INTO fx_rates (id, base, quote, rate, source, state, created_at)"
    " VALUES (gen_random_uuid(), 'USD', 'NGN', {rate}, 'x', {state!r}, now() + make_interval(secs => {later}))"
)
_OLD_RATE = "UPDATE fx_quotes SET confirmed_at = now() - interval '2 days' WHERE currency = 'NGN'"


CONDITIONS: tuple[tuple[str, list[str], list[str], dict[str, Any]], ...] = (
    (
        "provider_quota_low",
        ["UPDATE provider_quota SET low = true, left_nanousd = 1500000000"],
        ["UPDATE provider_quota SET low = false"],
        {"left_usd": "1.5"},
    ),
    (
        "provider_refuses_us",
        ["UPDATE provider_quota SET paused_until = now() + interval '1 hour', pause_reason = 'key'"],
        ["UPDATE provider_quota SET paused_until = now()"],
        {"reason": "key"},
    ),
    (
        "provider_refuses_calls",
        ["UPDATE provider_quota SET refused_at = now(), refused_reason = '402: no'"],
        ["UPDATE provider_quota SET refused_at = now() - interval '1 hour'"],
        {"reason": "402: no"},
    ),
    (
        "drift",
        [
            "INSERT INTO reconciliation_runs (id) VALUES (gen_random_uuid())",
            _DIFF.format(cause="billed_less_than_settled"),
        ],
        ["UPDATE reconciliation_diffs SET tx_id = gen_random_uuid()"],
        {"causes": {"billed_less_than_settled": {"differences": 1, "drift_usd": "2.5"}}},
    ),
    (
        "payments_in_review",
        [_CREDIT],
        ["UPDATE payment_credits SET credited_nano = paid_nano"],
        {"payments": 1, "suspense": {"NGN": "5"}},
    ),
    (
        "webhook_failures",
        [_EVENT.format(key="a", state="new", tries=3), _EVENT.format(key="b", state="review", tries=8)],
        ["UPDATE webhook_events SET state = 'done'"],
        {"provider": "paystack", "failing": 1, "given_up": 1},
    ),
    (
        "fx_stale",
        [_OLD_RATE],
        ["UPDATE fx_quotes SET confirmed_at = now()"],
        {"currency": "NGN"},
    ),
    (
        "fx_waiting",
        [_RATE.format(rate=9999, state="held", later=0)],
        [_RATE.format(rate=1600, state="accepted", later=1)],
        {"currency": "NGN", "state": "held"},
    ),
    (
        "calls_in_review",
        ["review"],
        ["UPDATE calls SET state = 'void', cost_nanousd = 0, charge_nano = 0"],
        {"calls": 1, "held_usd": "1"},
    ),
    (
        "settle_lag",
        ["open", "UPDATE calls SET opened_at = now() - interval '5 minutes'"],
        ["UPDATE calls SET opened_at = now()"],
        {"calls": 1},
    ),
)


@pytest.mark.calendar
async def test_each_condition_from_its_beginning_to_its_end(
    receiver: Receiver, settings: Settings, office: Office
) -> None:
    await set_rate(office, "NGN", "1600")
    await make_payer(office, currency="NGN")
    async with alerts_of(told(settings, receiver)) as alerts:
        assert await alerts.evaluate() == Evaluation(), "nothing is wrong yet"
        for _, begins, ends, _ in CONDITIONS:
            for step in begins:
                if step in ("open", "review"):
                    await make_call(office, step)
                else:
                    await run_sql(office, step)
            assert await alerts.evaluate() == Evaluation(fired=1), begins
            assert await alerts.evaluate() == Evaluation(), "one alert while it lasts"
            await run_sql(office, *ends)
            assert await alerts.evaluate() == Evaluation(resolved=1), ends
        while await alerts.deliver():
            pass
    for kind, _, _, detail in CONDITIONS:
        first, last = (message for message in receiver.got if message["alert"]["kind"] == kind)
        if first["type"] != "alert.firing":
            first, last = last, first
        assert (first["type"], last["type"]) == ("alert.firing", "alert.resolved")
        assert detail.items() <= first["alert"]["detail"].items()
        assert last["alert"]["id"] == first["alert"]["id"]
        assert last["alert"]["resolved_at"] is not None


async def test_more_low_wallets_than_are_looked_at_at_once(
    receiver: Receiver, settings: Settings, office: Office
) -> None:
    """None ends while it lasts because another, of a smaller id, began; all are told of in the end."""
    wallets = sorted([(await make_payer(office)).wallet_id for _ in range(3)])
    async with alerts_of(told(settings, receiver, rows=1)) as alerts:
        for wallet in reversed(wallets):
            await run_sql(office, f"UPDATE wallets SET low_nano = {20 * NANO} WHERE id = '{wallet}'")
            assert await alerts.evaluate() == Evaluation(fired=1)
        await run_sql(office, "UPDATE wallets SET low_nano = NULL")
        assert await alerts.evaluate() == Evaluation(resolved=3)
        await run_sql(office, f"UPDATE wallets SET low_nano = {20 * NANO}")
        for _ in wallets:
            assert await alerts.evaluate() == Evaluation(fired=1)
        assert await alerts.evaluate() == Evaluation()


async def test_what_users_are_told_of_their_caps_is_passed_on_once(
    receiver: Receiver, settings: Settings, office: Office
) -> None:
    payer = await make_payer(office)
    insert = (
        "INSERT INTO events (user_id, wallet_id, kind, body, created_at)"
        f" VALUES ('{payer.user_id}', '{payer.wallet_id}', '{{}}', '{{}}', now() - interval '{{}}')"
    )
    await run_sql(
        office,
        insert.format("cap.spent", '{"percent": 80, "spent": "8"}', "1 second"),
        insert.format("cap.spent", '{"percent": 50}', "1 second"),
        insert.format("cap.spent", '{"percent": 100}', "2 days"),
        insert.format("another", '{"percent": 100}', "1 second"),
    )
    async with alerts_of(told(settings, receiver)) as alerts:
        await asyncio.gather(alerts.evaluate(), alerts.evaluate())
        await alerts.evaluate()
        await alerts.deliver()
    (message,) = receiver.got
    assert (message["type"], message["event"]["kind"]) == ("user.event", "cap.spent")
    assert message["event"]["body"] == {"percent": 80, "spent": "8"}
    assert (message["event"]["user_id"], message["event"]["wallet_id"]) == (
        str(payer.user_id),
        str(payer.wallet_id),
    )


async def test_reminders_quiet_and_who_was_never_told(
    receiver: Receiver, settings: Settings, office: Office
) -> None:
    await run_sql(office, "UPDATE provider_quota SET low = true, left_nanousd = 1")
    nobody = settings.model_copy(update={"alerts": AlertSettings()})
    async with alerts_of(nobody) as alerts:
        assert (await alerts.evaluate()).fired == 1
        assert await waiting(office) == 0
        with pytest.raises(InputError, match="TUMA_ALERTS__URL"):
            await alerts.send_test()
    async with alerts_of(told(settings, receiver, remind_s=3600, quiet_s=3600)) as alerts:
        await alerts.evaluate()
        await alerts.evaluate()
        await alerts.deliver()
        assert [message["type"] for message in receiver.got] == ["alert.firing"], "told late, and once"
        await run_sql(office, "UPDATE alerts SET told_at = now() - interval '2 hours'")
        assert (await alerts.evaluate()).reminded == 1
        assert (await alerts.evaluate()).reminded == 0
        await run_sql(office, "UPDATE provider_quota SET low = false")
        assert (await alerts.evaluate()).resolved == 0, "it may come again at once"
        await run_sql(office, "UPDATE alerts SET seen_at = now() - interval '2 hours'")
        assert (await alerts.evaluate()).resolved == 1
        while await alerts.deliver():
            pass
    assert [message["type"] for message in receiver.got] == [
        "alert.firing",
        "alert.reminder",
        "alert.resolved",
    ]


async def test_a_message_that_nobody_takes_is_given_up(
    receiver: Receiver, settings: Settings, office: Office
) -> None:
    receiver.always = "500"
    await run_sql(office, "UPDATE provider_quota SET low = true, left_nanousd = 1")
    async with alerts_of(told(settings, receiver, drop_after_s=3600)) as alerts:
        await alerts.evaluate()
        await alerts.deliver()
        (left,) = (await describe_alerts(office.database))["undelivered"]
        assert (left["tries"], left["last_error"]) == (1, "status 500")
        await run_sql(
            office, "UPDATE alert_messages SET created_at = now() - interval '2 hours', next_at = now()"
        )
        assert await alerts.deliver() == 1
        assert await waiting(office) == 0
        assert await alerts.deliver() == 0


async def test_an_owner_names_a_balance_and_is_told(
    receiver: Receiver, settings: Settings, office: Office
) -> None:
    await sync_models(office)
    payer, other = await make_payer(office), await make_payer(office)
    token = "the operator's token, long enough"
    more = told(settings, receiver).model_copy(
        update={"admin": settings.admin.model_copy(update={"token": SecretStr(token)})}
    )
    async with run_proxy(more) as running, aiohttp.ClientSession() as session:
        client = Client(session, running.base_url, payer.secret)
        assert (await client.ask("GET", "/v1/wallet/alerts"))[1]["low"] is None
        status, answer = await client.ask("PUT", "/v1/wallet/alerts", {"low": "12.5"})
        assert (status, answer["low"], answer["wallet_id"]) == (200, "12.5", str(payer.wallet_id))
        assert (await client.ask("PUT", "/v1/wallet/alerts", {"low": 1.5}))[0] == 400
        assert (await client.ask("PUT", "/v1/wallet/alerts", {}))[0] == 400
        async with asyncio.timeout(PATIENCE_S):
            while not receiver.taken:
                await asyncio.sleep(0.02)
        (message,) = receiver.got
        detail = message["alert"]["detail"]
        assert (detail["wallet_id"], detail["user_id"]) == (str(payer.wallet_id), str(payer.user_id))
        assert (detail["balance"], detail["low"]) == ("10", "12.5")
        admin = client.with_secret(token)
        shown = (await admin.ask("GET", "/admin/alerts"))[1]["data"]
        assert [(item["kind"], item["subject"]) for item in shown] == [("wallet_low", str(payer.wallet_id))]
        assert (await client.with_secret(other.secret).ask("GET", "/v1/wallet/alerts"))[1]["low"] is None
        with pytest.raises(NotFoundError):
            await running.services.wallets.set_own_low(other.user_id, payer.wallet_id, None)
        assert (await client.ask("PUT", "/v1/wallet/alerts", {"low": None}))[1]["low"] is None
    async with office.database.connection() as connection:
        events = await connection.fetch("SELECT user_id, wallet_id, kind FROM events")
    assert [tuple(row) for row in events] == [(payer.user_id, payer.wallet_id, "wallet.low")]


async def test_a_key_for_calls_alone_sets_nothing(proxy: Running, office: Office) -> None:
    payer = await make_payer(office, manages=False)
    async with aiohttp.ClientSession() as session:
        client = Client(session, proxy.base_url, payer.secret)
        assert (await client.ask("PUT", "/v1/wallet/alerts", {"low": "1"}))[0] == 403


async def test_the_command(receiver: Receiver, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUMA_POSTGRES__DSN", office.settings.postgres.dsn.get_secret_value())

    async def run(*words: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, main, ["alerts", *words])

    done = await run("test")
    assert done.exit_code == 1
    assert "TUMA_ALERTS__URL is not set" in done.output
    assert (await run("list")).stdout == "There are no alerts.\n"
    monkeypatch.setenv("TUMA_ALERTS__URL", receiver.url)
    monkeypatch.setenv("TUMA_ALERTS__SECRET", SECRET)
    receiver.ways = ["500", "ok"]
    assert (await run("test", "--json")).exit_code == 1
    assert "status 500" in (await run("list")).stdout
    done = await run("test", "--json")
    assert (done.exit_code, json.loads(done.stdout)["delivered"]) == (0, True)
    assert [message["type"] for message in receiver.got] == ["alert.test"] * 2


def test_messages_are_never_sent_unsigned_or_in_the_open() -> None:
    with pytest.raises(SettingsError, match="SECRET must be"):
        load_settings(alerts={"url": "https://hooks.example/x", "secret": "short"})
    with pytest.raises(InputError, match="TUMA_ALERTS__URL must start with https") as caught:
        make_messenger(AlertSettings(url=SecretStr("http://hooks.example/token"), secret=SecretStr(SECRET)))
    assert "token" not in str(caught.value)
    settings = make_settings(postgres_dsn="x", redis_url="x")
    assert make_messenger(settings.alerts) is None
