"""Two people who have something of everything, and a connection with the login of a role."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from billing.identity.key import KeyRules
from billing.identity.keys import Keys
from billing.ids import new_id
from billing.money import NANO
from billing.postgres.roles import (
    Role,
    login_of,
)
from billing.wallets.caps import Caps
from config.settings import Settings
from scripts.office import Office
from tests.support.payers import Payer, make_payer


@asynccontextmanager
async def connected(settings: Settings, role: Role | None) -> AsyncIterator[Any]:
    postgres = settings.postgres
    login = {"dsn": postgres.dsn.get_secret_value()} if role is None else login_of(postgres, role)
    connection = await asyncpg.connect(**login)
    try:
        yield connection
    finally:
        await connection.close()


async def furnish_two(office: Office) -> tuple[Payer, Payer]:
    """Two people with something of everything that a person has."""
    payers = (await make_payer(office), await make_payer(office))
    room = Keys(office.database, office.settings.auth, office.settings.limits)
    for payer in payers:
        await Caps(office.database).set_caps("wallet", payer.wallet_id, {"day": NANO})
        await room.create(payer.wallet_id, KeyRules(name="second"))
        call = new_id()
        async with office.database.connection() as connection:
            await connection.execute(
                "INSERT INTO calls (id, user_id, wallet_id, key_id, worker_id, model, stream, price_id, fx_quote_id, currency,"
                " hold_nano, hold_nanousd, available_after_nano, state, ended_at, cost_nanousd, charge_nano)"
                " VALUES ($1, $2, $3, $4, $1, 'm', false, $1, $1, 'USD', 0, 0, 0, 'void', now(), 0, 0)",
                *(call, payer.user_id, payer.wallet_id, payer.key_id),
            )
            await connection.execute(
                "INSERT INTO usage (call_id, source, prompt_tokens, completion_tokens) VALUES ($1, 'counted', 1, 1)",
                call,
            )
            await connection.execute("SELECT add_usage(ARRAY[$1::uuid], 1)", call)
            await connection.execute(
                "INSERT INTO events (user_id, wallet_id, kind, body) VALUES ($1, $2, 'test', '{}')",
                *(payer.user_id, payer.wallet_id),
            )
            await connection.execute(
                "INSERT INTO cap_windows (scope_id, period, starts_at, ends_at, user_id, held_nano, spent_nano)"
                " VALUES ($2, 'week', now(), now(), $1, 0, 0)",
                *(payer.user_id, payer.wallet_id),
            )
            await connection.execute(
                "INSERT INTO payment_intents (id, wallet_id, user_id, kind, provider, currency, amount_nano, expires_at)"
                " VALUES ($1, $2, $3, 'topup', 'stripe', 'USD', 1, now())",
                *(call, payer.wallet_id, payer.user_id),
            )
            await connection.execute(
                "INSERT INTO payment_credits (provider, provider_txn_id, wallet_id, currency, paid_nano, credited_nano, state,"
                " tx_id) VALUES ('stripe', $1, $2, 'USD', 1, 1, 'credited', $3)",
                *(str(call), payer.wallet_id, call),
            )
            await connection.execute(
                "INSERT INTO payment_reversals (id, provider, provider_txn_id, kind, state, amount_nano, suspense_nano, tx_id)"
                " VALUES ($1, 'stripe', $2, 'refund', 'final', 1, 0, $1)",
                *(call, str(call)),
            )
            await connection.execute(
                "INSERT INTO payment_methods (wallet_id, provider, customer_id, method_id, label)"
                " VALUES ($1, 'stripe', 'cus_1', 'pm_1', 'visa')",
                payer.wallet_id,
            )
            await connection.execute(
                "INSERT INTO auto_topups (wallet_id, enabled, threshold_nano, amount_nano, pause)"
                " VALUES ($1, true, 1, 1, '1 hour')",
                payer.wallet_id,
            )
    return payers
