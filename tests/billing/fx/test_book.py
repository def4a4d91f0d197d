"""Rates in Postgres: what sources say is kept, what can be believed is quoted, and an operator has the last word."""

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner

from billing.errors import FxSourceError, FxStaleError, FxUnavailableError, InputError
from billing.fx.book import FxBook
from billing.fx.rates import SourceRates, clean_rates
from billing.fx.sync import FxFeed, RateSource, SyncReport
from billing.money import NANO, UnknownCurrencyError
from billing.postgres.database import Database
from config.settings import FxSettings, Settings
from scripts.cli.main import main
from scripts.office import Office
from tests.support.payers import make_payer

BASE = FxSettings(markup_bps=100, band_bps=100, jump_bps=1000, stale_after_s=3600)


class Source:
    """A source that says what it was told to."""

    def __init__(self, name: str, **rates: str) -> None:
        self.name = name
        self.say(**rates)

    def say(self, **rates: str) -> None:
        self._rates: Mapping[str, object] | None = {code: Decimal(rate) for code, rate in rates.items()}

    def fail(self) -> None:
        self._rates = None

    async def fetch(self) -> SourceRates:
        await asyncio.sleep(0)
        if self._rates is None:
            raise FxSourceError(f"{self.name} does not answer")
        return SourceRates(datetime(2026, 11, 24, tzinfo=UTC), *clean_rates(self._rates))


async def sync(office: Office, *sources: RateSource, **changes: Any) -> SyncReport:
    return await FxFeed(office.database, sources, BASE.model_copy(update=changes)).sync()


async def book(office: Office, **changes: Any) -> FxBook:
    made = FxBook(office.database, BASE.model_copy(update=changes))
    await made.load()
    return made


async def rows(office: Office, query: str) -> list[Any]:
    async with office.database.connection() as connection:
        return list(await connection.fetch(query))


async def test_wallets_currencies_are_quoted_and_everything_is_kept(office: Office) -> None:
    await make_payer(office, currency="NGN")
    await make_payer(office, currency="KES")
    source = Source("one", NGN="1600", JPY="155", EUR="0.9", XXX="5")
    report = await sync(office, source, currencies=("EUR",))
    assert (report.quoted, report.missing, report.ok) == (["EUR", "NGN"], ["KES"], True)
    assert report.sources[0]["currencies"] == 3
    kept = await rows(office, "SELECT quote, rate, source, state FROM fx_rates ORDER BY quote")
    assert [tuple(row) for row in kept] == [
        ("EUR", Decimal("0.9"), "one", "accepted"),
        ("JPY", Decimal(155), "one", "accepted"),
        ("NGN", Decimal(1600), "one", "accepted"),
    ]
    quotes = await book(office)
    assert (quotes.get_quote("NGN").rate, quotes.get_quote("NGN").markup_bps) == (Decimal(1600), 100)
    with pytest.raises(FxUnavailableError):
        quotes.get_quote("KES")
    again = await sync(office, source, currencies=("EUR",))
    assert (again.quoted, again.confirmed) == ([], ["EUR", "NGN"])
    assert len(await rows(office, "SELECT FROM fx_rates")) == 3, "what is repeated is not written again"
    assert (await book(office)).get_quote("NGN") == quotes.get_quote("NGN")


async def test_a_new_wallets_currency_is_quoted_by_what_was_said(office: Office) -> None:
    feed = FxFeed(office.database, [Source("one", NGN="1600")], BASE)
    await feed.sync()
    assert await feed.quote_missing() == []
    await make_payer(office, currency="NGN")
    await make_payer(office, currency="KES")
    assert await feed.quote_missing() == ["NGN"]
    assert (await book(office)).get_quote("NGN").markup_bps == 100
    assert await feed.quote_missing() == []


async def test_a_jump_is_held_until_an_operator_says_so(office: Office) -> None:
    await make_payer(office, currency="NGN")
    source = Source("one", NGN="1600")
    await sync(office, source)
    source.say(NGN="2000")
    for _ in range(2):
        assert (await sync(office, source)).held == ["NGN"]
    quotes = await book(office)
    assert quotes.get_quote("NGN").rate == 1600, "the old quote goes on"
    (shown,) = await quotes.describe("NGN")
    assert shown["waiting"] == {"rate": "2000", "state": "held", "source": "one"}
    with pytest.raises(InputError, match="2000 by now"):
        await quotes.accept_rate("NGN", expected=Decimal(1900))
    taken = await quotes.accept_rate("NGN", expected=Decimal(2000))
    assert (taken.rate, taken.markup_bps) == (Decimal(2000), 100)
    with pytest.raises(InputError, match="waits"):
        await quotes.accept_rate("NGN")
    report = await sync(office, source)
    assert (report.held, report.confirmed) == ([], ["NGN"])
    (shown,) = await quotes.describe("NGN")
    assert (shown["waiting"], shown["source"], shown["stale"]) == (None, "one", False)


@pytest.mark.calendar
async def test_a_held_rate_does_not_keep_the_old_one_fresh(office: Office) -> None:
    await make_payer(office, currency="NGN")
    source = Source("one", NGN="1600")
    await sync(office, source)
    await age(office, 3000)
    source.say(NGN="2000")
    await sync(office, source)
    assert (await book(office)).get_quote("NGN").rate == 1600
    await age(office, 601)
    await sync(office, source)
    with pytest.raises(FxStaleError) as caught:
        (await book(office)).get_quote("NGN")
    assert caught.value.retry_after_s > 0
    source.say(NGN="1601")
    await sync(office, source)
    assert (await book(office)).get_quote("NGN").rate == 1601


async def age(office: Office, seconds: int) -> None:
    async with office.database.connection() as connection:
        await connection.execute(
            "UPDATE fx_quotes SET confirmed_at = confirmed_at - make_interval(secs => $1)", seconds
        )


@pytest.mark.calendar
async def test_a_quote_goes_stale_by_the_clock_and_fresh_by_a_confirmation(office: Office) -> None:
    await make_payer(office, currency="NGN")
    source = Source("one", NGN="1600")
    await sync(office, source)
    now = 1000.0
    quotes = FxBook(office.database, BASE, monotonic=lambda: now)
    await quotes.load()
    assert quotes.get_quote("NGN").rate == 1600
    now += 3599
    quotes.get_quote("NGN")
    now += 1
    with pytest.raises(FxStaleError):
        quotes.get_quote("NGN")
    assert quotes.get_quote("USD").rate == 1
    await sync(office, source)
    await quotes.load()
    quotes.get_quote("NGN")


async def test_a_rate_by_hand_stays_unless_told(office: Office) -> None:
    now = 0.0
    quotes = FxBook(office.database, BASE, monotonic=lambda: now)
    await quotes.set_rate("USD", "NGN", Decimal(1600))
    await quotes.set_rate("USD", "KES", Decimal(129), good_for_s=60)
    await quotes.load()
    now = 59.0
    assert [quotes.get_quote(code).rate for code in ("NGN", "KES")] == [1600, 129]
    now = 10.0**9
    quotes.get_quote("NGN")
    with pytest.raises(FxStaleError):
        quotes.get_quote("KES")
    for bad in (0, -1, 10**9):
        with pytest.raises(InputError):
            await quotes.set_rate("USD", "KES", Decimal(129), good_for_s=bad)
    for markup in (-1, 100_001, 2**70):
        with pytest.raises(InputError, match="markup"):
            await quotes.set_rate("USD", "KES", Decimal(129), markup_bps=markup)


async def test_fetched_rates_follow_a_rate_by_hand_unless_it_is_pinned(office: Office) -> None:
    quotes = await book(office)
    await make_payer(office, currency="NGN")
    await make_payer(office, currency="KES")
    source = Source("one", NGN="1610", KES="130")
    await quotes.set_rate("USD", "NGN", Decimal(1600), markup_bps=250)
    await quotes.set_rate("USD", "KES", Decimal(129), pinned=True)
    report = await sync(office, source)
    assert (report.quoted, report.pinned) == (["NGN"], ["KES"])
    await quotes.load()
    assert quotes.get_quote("NGN").charge(10**18).charge_nano == 1610 * NANO * 10_250 // 10_000, (
        "markup stays"
    )
    assert quotes.get_quote("KES").charge(10**18).charge_nano == 129 * NANO * 10_100 // 10_000
    await sync(office, source, markup_bps_by_currency={"NGN": 400})
    await quotes.load()
    assert quotes.get_quote("NGN").markup_bps == 400
    await quotes.set_rate("USD", "KES", Decimal(129))
    assert "KES" in (await sync(office, source)).quoted


async def test_the_operators_word_holds_against_what_is_repeated(office: Office) -> None:
    """A source that goes on saying what an operator did not take is held each time, and can still be taken."""
    quotes = await book(office)
    await make_payer(office, currency="NGN")
    source = Source("one", NGN="1600")
    await sync(office, source)
    source.say(NGN="3000")
    await sync(office, source)
    await quotes.set_rate("USD", "NGN", Decimal(1650))
    with pytest.raises(InputError, match="waits"):
        await quotes.accept_rate("NGN")
    assert (await sync(office, source)).held == ["NGN"]
    assert (await quotes.accept_rate("NGN")).rate == 3000


async def test_two_sources_must_agree(office: Office) -> None:
    await make_payer(office, currency="NGN")
    await make_payer(office, currency="KES")
    one, two = Source("one", NGN="1600", KES="129"), Source("two", NGN="1610", KES="140")
    report = await sync(office, one, two)
    assert (report.quoted, report.disputed) == (["NGN"], ["KES"])
    assert (await book(office)).get_quote("NGN").rate == 1600, "the first's is quoted"
    states = await rows(office, "SELECT source, quote, state FROM fx_rates ORDER BY source, quote")
    assert [tuple(row) for row in states] == [
        ("one", "KES", "disputed"),
        ("one", "NGN", "accepted"),
        ("two", "KES", "witness"),
        ("two", "NGN", "witness"),
    ]
    two.say(NGN="1610")
    report = await sync(office, one, two)
    assert (report.confirmed, report.missing) == (["NGN"], ["KES"])
    for silent in (two, one):
        silent.fail()
        if silent is one:
            two.say(NGN="1600", KES="129")
        report = await sync(office, one, two)
        assert (report.ok, report.confirmed, report.quoted) == (False, [], [])
        assert report.missing == ["KES", "NGN"]
    assert (await (await book(office)).accept_rate("KES")).rate == 129, "an operator may take it"
    two.fail()
    before = await rows(office, "SELECT id FROM fx_rates")
    with pytest.raises(FxSourceError, match="one does not answer; two does not answer"):
        await sync(office, one, two)
    assert await rows(office, "SELECT id FROM fx_rates") == before


async def test_without_a_source_nothing_is_asked(office: Office) -> None:
    with pytest.raises(InputError, match="TUMA_FX__URL"):
        await sync(office)


async def test_syncs_and_operators_at_once_leave_one_current_quote(office: Office) -> None:
    await make_payer(office, currency="NGN")
    quotes = await book(office)
    sources = [Source("one", NGN=str(1600 + step)) for step in range(8)]
    await asyncio.gather(
        *(sync(office, source) for source in sources),
        *(quotes.set_rate("USD", "NGN", Decimal(1600 + step)) for step in range(8)),
    )
    current = await rows(
        office, "SELECT rate FROM fx_quotes WHERE currency = 'NGN' AND superseded_at IS NULL"
    )
    assert len(current) == 1
    linked = await rows(
        office,
        "SELECT FROM fx_quotes q JOIN fx_rates r ON r.id = q.fx_rate_id WHERE r.rate <> q.rate",
    )
    assert linked == []


async def test_the_keeper_syncs_and_the_proxy_only_reads(office: Office, settings: Settings) -> None:
    await make_payer(office, currency="NGN")
    keeper, proxy = Database(settings.postgres, role="keeper"), Database(settings.postgres, role="proxy")
    try:
        feed = FxFeed(keeper, [Source("one", NGN="1600")], BASE)
        assert (await feed.sync()).quoted == ["NGN"]
        await feed.quote_missing()
        quotes = FxBook(proxy, BASE)
        await quotes.load()
        assert quotes.get_quote("NGN").rate == 1600
        async with proxy.connection() as connection:
            for statement in ("SELECT lock_fx()", "SELECT confirm_fx('NGN')", "SELECT * FROM fx_rates"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
        async with keeper.connection() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute("UPDATE fx_quotes SET rate = 1")
    finally:
        await keeper.close()
        await proxy.close()


async def test_what_was_said_is_never_rewritten(office: Office) -> None:
    await sync(office, Source("one", NGN="1600"))
    async with office.database.connection() as connection:
        for statement in (
            "UPDATE fx_rates SET state = 'held'",
            "DELETE FROM fx_rates",
            "TRUNCATE fx_rates CASCADE",
        ):
            with pytest.raises(asyncpg.PostgresError):
                await connection.execute(statement)


@pytest.mark.calendar
async def test_rates_are_shown(office: Office) -> None:
    quotes = await book(office)
    await quotes.set_rate("USD", "NGN", Decimal(1600), pinned=True)
    await quotes.set_rate("USD", "EUR", Decimal("0.75"))
    (shown,) = await quotes.describe("NGN", against="EUR")
    assert {
        name: shown[name] for name in ("rate", "inverse", "cross", "against", "source", "pinned", "stale")
    } == {
        "rate": "1600",
        "inverse": "0.000625",
        "cross": "0.00046875",
        "against": "EUR",
        "source": "manual",
        "pinned": True,
        "stale": False,
    }
    assert [row["currency"] for row in await quotes.describe()] == ["EUR", "NGN", "USD"]
    with pytest.raises(InputError, match="tuma fx set USD KES"):
        await quotes.describe("KES")
    with pytest.raises(UnknownCurrencyError):
        await quotes.describe("XXX")


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    return {
        "TUMA_POSTGRES__DSN": settings.postgres.dsn.get_secret_value(),
        "TUMA_FX__BAND_BPS": "100",
        "TUMA_FX__CURRENCIES": "NGN, KES",
        "TUMA_FX__MARKUP_BPS_BY_CURRENCY": '{"NGN": 250}',
    }


async def tuma(environment: dict[str, str], *words: str) -> tuple[int, dict[str, Any]]:
    result = await asyncio.to_thread(CliRunner().invoke, main, ["--json", *words], env=environment)
    return result.exit_code, json.loads(result.stdout)


async def test_the_command(environment: dict[str, str], office: Office, tmp_path: Any) -> None:
    """The whole of it through `tuma fx`, from a file that somebody else writes."""
    code, said = await tuma(environment, "fx", "sync")
    assert code == 1
    assert "TUMA_FX__URL" in said["error"]["message"]
    path = tmp_path / "rates.json"
    environment["TUMA_FX__URL"] = f"file://{path}"
    assert (await tuma(environment, "fx", "sync"))[0] == 1
    path.write_text('{"base": "USD", "rates": {"NGN": 1600.123456789, "KES": 129}}')
    code, said = await tuma(environment, "fx", "sync")
    assert (code, said["ok"], said["quoted"], said["held"]) == (0, True, ["KES", "NGN"], [])
    code, said = await tuma(environment, "fx", "show", "NGN")
    assert (code, said["rate"], said["markup_bps"], said["waiting"]) == (0, "1600.123456789", 250, None)
    assert 86_300 < said["stale_in_s"] <= 86_400
    path.write_text('{"base": "USD", "rates": {"NGN": 2000, "KES": 129}}')
    code, said = await tuma(environment, "fx", "sync")
    assert (code, said["held"], said["confirmed"]) == (0, ["NGN"], ["KES"])
    code, said = await tuma(environment, "doctor")
    (finding,) = [item for item in said["findings"] if item["name"] == "exchange rates"]
    assert "tuma fx accept" in finding["detail"]
    assert (await tuma(environment, "fx", "accept", "NGN", "--rate", "1999"))[0] == 1
    code, said = await tuma(environment, "fx", "accept", "NGN", "--rate", "2000")
    assert (code, said["rate"], said["markup_bps"]) == (0, "2000", 250)
    code, said = await tuma(environment, "fx", "set", "USD", "NGN", "1900.5", "--markup-bps", "10", "--pin")
    assert (code, said["rate"], said["markup_bps"]) == (0, "1900.5", 10)
    code, said = await tuma(environment, "fx", "sync")
    assert (said["pinned"], said["confirmed"]) == (["NGN"], ["KES"])
    code, said = await tuma(environment, "fx", "show")
    assert [row["currency"] for row in said["rates"]] == ["KES", "NGN", "USD"]
    for bad in ("1e3", "-1", "0", "1,5", "NaN"):
        assert (await tuma(environment, "fx", "set", "USD", "NGN", "--", bad))[0] == 1
