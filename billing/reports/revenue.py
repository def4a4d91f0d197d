"""What the house earned, and what it owes: the accounts of the journal summed per currency, over a time.

The signs are the journal's (``migrations/0018_tables.sql``): income and what is owed to others are positive, expense and what we own negative.
So every currency's accounts sum to zero (I1), over any time.
"""

from datetime import datetime
from typing import Any

from typing_extensions import TypedDict

from billing.errors import BrokenInvariantError
from billing.money import format_amount
from billing.postgres.replica import Late
from billing.shapes import Amount, Moment

_TIMEOUT_S = 600.0
_SHOWN = ("revenue", "fx_spread", "psp_fee", "provider_cost", "house_loss", "suspense", "wallets")
_EARNED = ("revenue", "fx_spread", "psp_fee", "provider_cost", "house_loss")
_SUMS = """
SELECT e.currency, e.account, sum(e.amount_nano) AS nano FROM journal_entry e
WHERE ($1::timestamptz IS NULL OR e.tx_id >= uuid_floor(greatest($1, to_timestamp(0))))
  AND ($2::timestamptz IS NULL OR e.tx_id < uuid_floor(greatest($2, to_timestamp(0))))
GROUP BY e.currency, e.account
"""


class RevenueInCurrencyJson(TypedDict):
    """The accounts' sums in one currency, major units: income and what is owed is positive, expense and what we own negative."""

    currency: str
    earned: Amount
    revenue: Amount
    fx_spread: Amount
    psp_fee: Amount
    provider_cost: Amount
    house_loss: Amount
    suspense: Amount
    wallets: Amount
    others: dict[str, Amount]
    sum: Amount


class RevenueFields(TypedDict):
    """What the house earned and owes, of what was posted in a time; ``as_of``: by a replica, which knew everything up to then."""

    since: Moment | None
    until: Moment | None
    as_of: Moment | None
    currencies: list[RevenueInCurrencyJson]


async def describe_revenue(
    late: Late, *, since: datetime | None = None, until: datetime | None = None
) -> RevenueFields:
    """Return the sums per currency, as decimal strings in major units, of what was posted in a time.

    A call counts in the moment in which it arrived, whatever else in that of its posting. ``earned`` is what of it is the house's:
    what calls were sold for less what the provider bills for them, the markup (``fx_spread``), the fees of payment providers
    and losses. ``as_of`` is the moment up to which a replica knew everything; None: the primary was asked.

    Args:
        late: by a role that reads the journal.
        since: from this moment on.
        until: before this one.

    Raises:
        BrokenInvariantError: a currency's accounts do not sum to zero.
    """

    async def read(connection: Any, as_of: datetime | None) -> tuple[list[Any], datetime | None]:
        return list(await connection.fetch(_SUMS, since, until, timeout=_TIMEOUT_S)), as_of

    rows, as_of = await late.read(read)
    sums: dict[str, dict[str, int]] = {}
    for row in rows:
        account = "wallets" if row["account"] == "wallet" else row["account"]
        sums.setdefault(row["currency"], {})[account] = int(row["nano"])
    for currency, accounts in sums.items():
        if sum(accounts.values()) != 0:
            raise BrokenInvariantError(f"the accounts in {currency} do not sum to zero")
    return {
        "since": None if since is None else since.isoformat(),
        "until": None if until is None else until.isoformat(),
        "as_of": None if as_of is None else as_of.isoformat(),
        "currencies": [_describe(currency, accounts) for currency, accounts in sorted(sums.items())],
    }


def _describe(currency: str, accounts: dict[str, int]) -> RevenueInCurrencyJson:
    return {
        "currency": currency,
        "earned": format_amount(sum(accounts.get(name, 0) for name in _EARNED)),
        "revenue": format_amount(accounts.get("revenue", 0)),
        "fx_spread": format_amount(accounts.get("fx_spread", 0)),
        "psp_fee": format_amount(accounts.get("psp_fee", 0)),
        "provider_cost": format_amount(accounts.get("provider_cost", 0)),
        "house_loss": format_amount(accounts.get("house_loss", 0)),
        "suspense": format_amount(accounts.get("suspense", 0)),
        "wallets": format_amount(accounts.get("wallets", 0)),
        "others": {
            name: format_amount(nano) for name, nano in sorted(accounts.items()) if name not in _SHOWN
        },
        "sum": format_amount(sum(accounts.values())),
    }
