"""Exchange rates in Postgres: history kept, quotes immutable, the current ones cached in the process."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

from billing.errors import FxStaleError, FxUnavailableError, InputError
from billing.fx.quote import FxQuote
from billing.fx.rates import cross_rate, inverse_rate
from billing.ids import new_id
from billing.money import get_currency
from billing.postgres.database import Database
from config.settings import FxSettings

_RETRY_AFTER_S = 60
_GOOD_FOR_MAX_S = 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class _Current:
    """A current quote, and when by the process's own clock it goes stale; None: never."""

    quote: FxQuote
    stale_at: float | None


class FxBook:
    """Sets rates and quotes them; ``get_quote`` answers from memory.

    Args:
        database: where rates and quotes are.
        settings: markups, and how long a fetched rate is good.
        monotonic: a clock in seconds that never goes back.
    """

    def __init__(
        self, database: Database, settings: FxSettings, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._settings = settings
        self._monotonic = monotonic
        self._quotes: dict[str, _Current] = {}

    @property
    def quotes(self) -> Mapping[str, FxQuote]:
        """The current quote of each currency, as last loaded, stale or not."""
        return {currency: current.quote for currency, current in self._quotes.items()}

    async def load(self, _change: str = "*") -> None:
        """Read the current quotes."""
        asked_at = self._monotonic()  # before the answer: a quote goes stale rather too early than too late
        async with self._database.connection() as connection:
            rows = await connection.fetch("SELECT * FROM list_fx_quotes()")
        self._quotes = {row["currency"]: self._read(row, asked_at) for row in rows}

    def _read(self, row: Any, asked_at: float) -> _Current:
        quote = FxQuote(row["id"], row["currency"], row["rate"], row["markup_bps"])
        if row["age_s"] is None:
            return _Current(quote, None)
        good_for_s = row["good_for_s"] if row["good_for_s"] is not None else self._settings.stale_after_s
        return _Current(quote, asked_at - row["age_s"] + good_for_s)

    def get_quote(self, currency: str) -> FxQuote:
        """Return the current quote from USD into ``currency``, for a new call.

        Raises:
            FxUnavailableError: there is no rate.
            FxStaleError: it was not confirmed for too long.
        """
        current = self._quotes.get(currency)
        if current is None:
            raise FxUnavailableError(
                f"There is no exchange rate from USD to {currency}.", retry_after_s=_RETRY_AFTER_S
            )
        if current.stale_at is not None and self._monotonic() >= current.stale_at:
            raise FxStaleError(
                f"The exchange rate from USD to {currency} is too old to price new calls; try again.",
                retry_after_s=_RETRY_AFTER_S,
            )
        return current.quote

    async def set_rate(
        self,
        base: str,
        quote: str,
        rate: Decimal,
        *,
        markup_bps: int | None = None,
        good_for_s: float | None = None,
        pinned: bool = False,
    ) -> FxQuote:
        """Record a rate by an operator's hand and quote it from now on; calls in flight keep theirs.

        Args:
            base: must be USD, the currency of the provider's prices.
            quote: the wallets' currency.
            rate: units of ``quote`` for one USD.
            markup_bps: on top of the rate, in hundredths of a percent; the setting's, when left out (none for USD itself).
            good_for_s: seconds until it prices no new calls; for good, when left out.
            pinned: fetched rates do not replace it.

        Raises:
            InputError: the pair, the rate, the markup or the time is unusable.
            UnknownCurrencyError: not an ISO 4217 code.
        """
        get_currency(base)
        get_currency(quote)
        if base != "USD":
            raise InputError(
                f"rates are set from USD, the currency of the provider's prices; not from {base}"
            )
        FxQuote(new_id(), quote, rate, markup_bps or 0)  # refuses what can be no quote
        if quote == "USD" and rate != 1:
            raise InputError("one USD is one USD")
        if good_for_s is not None and not 0 < good_for_s <= _GOOD_FOR_MAX_S:
            raise InputError("a rate is good for some seconds, at most a year")
        async with self._database.transaction() as connection:
            await connection.execute("SELECT lock_fx()")
            rate_id = await connection.fetchval(
                "SELECT r.id FROM record_rates(ARRAY[$1::uuid], ARRAY[$2], ARRAY[$3::numeric],"
                " ARRAY['manual'], ARRAY['accepted'], ARRAY[NULL::timestamptz]) r",
                *(new_id(), quote, rate),
            )
            return await self._quote(
                connection,
                quote,
                rate,
                rate_id,
                markup_bps=markup_bps,
                confirmed=good_for_s is not None,
                good_for_s=good_for_s,
                pinned=pinned,
            )

    async def accept_rate(self, currency: str, *, expected: Decimal | None = None) -> FxQuote:
        """Quote the first source's last rate though it jumped, or no second source agreed: by an operator's word.

        Args:
            currency: whose.
            expected: the rate that the operator saw; refused, if it is another by now.

        Raises:
            InputError: nothing waits for a word, or it is another rate.
            UnknownCurrencyError: not an ISO 4217 code.
        """
        get_currency(currency)
        async with self._database.transaction() as connection:
            await connection.execute("SELECT lock_fx()")
            waiting = await connection.fetchrow(_WAITING, currency)
            if waiting is None:
                raise InputError(f"no rate of {currency} waits for an operator's word")
            if expected is not None and waiting["rate"] != expected:
                raise InputError(
                    f"the rate of {currency} that waits is {_text(waiting['rate'])} by now, not {_text(expected)}"
                )
            current = await connection.fetchrow(
                "SELECT * FROM list_fx_quotes() q WHERE q.currency = $1", currency
            )
            by_hand = current is not None and current["markup_by_hand"]
            return await self._quote(
                connection,
                currency,
                waiting["rate"],
                waiting["id"],
                markup_bps=current["markup_bps"] if by_hand else None,
                confirmed=True,
            )

    async def _quote(
        self,
        connection: Any,
        currency: str,
        rate: Decimal,
        rate_id: Any,
        *,
        markup_bps: int | None,
        confirmed: bool,
        good_for_s: float | None = None,
        pinned: bool = False,
    ) -> FxQuote:
        markup = self._default_markup(currency) if markup_bps is None else markup_bps
        made = FxQuote(new_id(), currency, rate, markup)
        await connection.execute(
            "SELECT quote_fx($1, $2, $3, $4, $5, $6, CASE WHEN $7 THEN now() END, $8, $9)",
            *(made.id, currency, rate, markup, markup_bps is not None, rate_id, confirmed),
            None if good_for_s is None else timedelta(seconds=good_for_s),
            pinned,
        )
        return made

    def _default_markup(self, currency: str) -> int:
        if currency == "USD":
            return 0
        return self._settings.markup_bps_by_currency.get(currency, self._settings.markup_bps)

    async def describe(
        self, currency: str | None = None, *, against: str | None = None
    ) -> list[dict[str, Any]]:
        """Return what is quoted, and what waits for an operator's word, by currency.

        Args:
            currency: of this one; all, when left out.
            against: name the rate against this currency, too.

        Raises:
            InputError: one of the currencies has no rate.
        """
        async with self._database.connection() as connection:
            rows = {row["currency"]: row for row in await connection.fetch(_SHOWN)}
        for code in (currency, against):
            if code is not None and get_currency(code).code not in rows:
                raise InputError(
                    f"there is no exchange rate from USD to {code}: `tuma fx set USD {code} RATE`"
                )
        other = None if against is None else rows[against]["rate"]
        shown = rows.values() if currency is None else [rows[currency]]
        return [self._describe(row, against=against, other=other) for row in shown]

    def _describe(self, row: Any, *, against: str | None, other: Decimal | None) -> dict[str, Any]:
        left_s = None
        if row["age_s"] is not None:
            good_for_s = row["good_for_s"] if row["good_for_s"] is not None else self._settings.stale_after_s
            left_s = good_for_s - row["age_s"]
        return {
            "currency": row["currency"],
            "rate": _text(row["rate"]),
            "inverse": _text(inverse_rate(row["rate"])),
            **({} if other is None else {"cross": _text(cross_rate(row["rate"], other)), "against": against}),
            "markup_bps": row["markup_bps"],
            "source": row["source"],
            "pinned": row["pinned"],
            "quoted_at": row["created_at"].isoformat(),
            "age_s": None if row["age_s"] is None else max(0, int(row["age_s"])),
            "stale_in_s": None if left_s is None else max(0, int(left_s)),
            "stale": left_s is not None and left_s <= 0,
            "waiting": None
            if row["waiting"] is None
            else {
                "rate": _text(row["waiting"]),
                "state": row["waiting_state"],
                "source": row["waiting_source"],
            },
        }


def _text(rate: Decimal) -> str:
    return f"{rate.normalize():f}"


# What was said last of a currency waits, if it could not be believed by itself and was not quoted since.
_WAITING = """
    SELECT r.id, r.rate FROM last_rate($1, false) r
    WHERE r.state <> 'accepted' AND NOT EXISTS (SELECT FROM fx_quotes f WHERE f.fx_rate_id = r.id)
"""
_SHOWN = """
    SELECT q.*, f.created_at, coalesce(s.source, 'itself') AS source,
           w.rate AS waiting, w.state AS waiting_state, w.source AS waiting_source
    FROM list_fx_quotes() q JOIN fx_quotes f ON f.id = q.id LEFT JOIN fx_rates s ON s.id = f.fx_rate_id
    LEFT JOIN last_rate(q.currency, false) w ON w.state <> 'accepted' AND w.id IS DISTINCT FROM f.fx_rate_id
    ORDER BY q.currency
"""
