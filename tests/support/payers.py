"""People with a wallet and a key, and the prices and rates that their calls need."""

import itertools
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from billing.fx.book import FxBook
from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.money import parse_amount
from billing.pricing.price_book import PriceBook
from config.settings import FxSettings
from proxy.upstream.price_listing import read_listing
from scripts.office import Office


@dataclass(frozen=True, slots=True)
class Payer:
    """A wallet and a key that spends from it."""

    user_id: UUID
    wallet_id: UUID
    key_id: UUID
    secret: str


_people = itertools.count(1)


async def make_payer(
    office: Office, *, amount: str = "10", currency: str = "USD", overdraft: str = "0", **limits: Any
) -> Payer:
    user_id = await office.wallets.create_user(f"user{next(_people)}@example.com")
    wallet_id = await office.wallets.create_wallet(
        str(user_id), currency=currency, overdraft_nano=parse_amount(overdraft)
    )
    if parse_amount(amount):
        await office.wallets.credit(wallet_id, parse_amount(amount), reason="test")
    made = await Keys(office.database, office.settings.auth, office.settings.limits).create(
        wallet_id, KeyRules(**limits)
    )
    return Payer(user_id, wallet_id, made.id, made.secret)


async def sync_models(office: Office) -> None:
    priced, _ = read_listing(await office.upstream.list_models())
    await PriceBook(office.database).set_prices(priced, source="openrouter")


async def set_rate(office: Office, currency: str, rate: str, markup_bps: int = 0) -> None:
    from decimal import Decimal

    await FxBook(office.database, FxSettings()).set_rate(
        "USD", currency, Decimal(rate), markup_bps=markup_bps
    )
