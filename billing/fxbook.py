"""Exchange rates in Postgres: history kept, quotes immutable, the current ones cached in the process."""

from collections.abc import Mapping
from decimal import Decimal

import asyncpg

from billing.db import Database
from billing.errors import FxUnavailableError, InputError
from billing.fx import FxQuote
from billing.ids import new_id
from billing.money import get_currency, has_more_decimals

_RATE_MAX = Decimal(10) ** 9


class FxBook:
    """Sets rates and quotes them; ``get_quote`` answers from memory.

    Args:
        database: where rates and quotes are.
        markup_bps: for a rate that is set without a markup of its own, in hundredths of a percent.
    """

    def __init__(self, database: Database, *, markup_bps: int) -> None:
        self._database = database
        self._markup_bps = markup_bps
        self._quotes: dict[str, FxQuote] = {}

    @property
    def quotes(self) -> Mapping[str, FxQuote]:
        """The current quote of each currency, as last loaded."""
        return self._quotes

    async def load(self, _change: str = "*") -> None:
        """Read the current quotes."""
        async with self._database.connection() as connection:
            rows = await connection.fetch("SELECT * FROM list_fx_quotes()")
        self._quotes = {
            row["currency"]: FxQuote(row["id"], row["currency"], row["rate"], row["markup_bps"])
            for row in rows
        }

    def get_quote(self, currency: str) -> FxQuote:
        """Return the current quote from USD into ``currency``.

        Raises:
            FxUnavailableError: there is no rate.
        """
        quote = self._quotes.get(currency)
        if quote is None:
            raise FxUnavailableError(f"There is no exchange rate from USD to {currency}.", retry_after_s=60)
        return quote

    async def set_rate(
        self, base: str, quote: str, rate: Decimal, *, markup_bps: int | None = None
    ) -> FxQuote:
        """Record a rate by an operator's hand and quote it from now on; calls in flight keep theirs.

        Args:
            base: must be USD, the currency of the provider's prices.
            quote: the wallets' currency.
            rate: units of ``quote`` for one USD.
            markup_bps: on top of the rate, in hundredths of a percent; the setting's, when left out (none for USD itself).

        Raises:
            InputError: the pair, the rate or the markup is unusable.
            UnknownCurrencyError: not an ISO 4217 code.
        """
        get_currency(base)
        get_currency(quote)
        if base != "USD":
            raise InputError(
                f"rates are set from USD, the currency of the provider's prices; not from {base}"
            )
        if not rate.is_finite() or not 0 < rate <= _RATE_MAX or has_more_decimals(rate, 18):
            raise InputError("a rate must be positive, at most 10^9, with at most 18 decimals")
        if quote == "USD" and rate != 1:
            raise InputError("one USD is one USD")
        markup = markup_bps if markup_bps is not None else (0 if quote == "USD" else self._markup_bps)
        rate_id, quote_id = new_id(), new_id()
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    "INSERT INTO fx_rates (id, base, quote, rate, source) VALUES ($1, $2, $3, $4, 'manual')",
                    rate_id,
                    base,
                    quote,
                    rate,
                )
                await connection.execute(
                    "UPDATE fx_quotes SET superseded_at = now() WHERE currency = $1 AND superseded_at IS NULL",
                    quote,
                )
                await connection.execute(
                    "INSERT INTO fx_quotes (id, currency, rate, markup_bps, fx_rate_id) VALUES ($1, $2, $3, $4, $5)",
                    quote_id,
                    quote,
                    rate,
                    markup,
                    rate_id,
                )
        except (asyncpg.CheckViolationError, asyncpg.NumericValueOutOfRangeError):
            raise InputError("the markup must be between 0 and 100000 basis points") from None
        return FxQuote(quote_id, quote, rate, markup)
