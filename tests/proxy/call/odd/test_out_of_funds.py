"""A provider that gives more than it was told, to a wallet that cannot follow: what it billed by then, hidden tokens too, is paid."""

import pytest

from billing.books.proof import Books
from billing.reports.call_view import describe_call
from config.settings import Settings
from scripts.office import Office
from tests.proxy.call.scripted import Scripted, Turn, chunk, running, sse
from tests.support.payers import make_payer, sync_models

WORDS = 5000
TOLD = 2000


async def overflowing(turn: Turn) -> None:
    await turn.head("text/event-stream")
    await turn.send(b"".join(sse(chunk(" word")) for _ in range(WORDS)))


@pytest.mark.parametrize(
    ("kind", "bill_nanousd"),
    [("openrouter", 1_000_000), ("openrouter", 5_000_000), ("openai", None)],
    ids=["billed less than is held", "billed more", "no record"],
)
async def test_what_was_billed_by_then_is_paid_up_to_the_hold(
    settings: Settings, provider: Scripted, office: Office, kind: str, bill_nanousd: int | None
) -> None:
    await sync_models(office)
    payer = await make_payer(office, amount="0.002")  # the hold of the bound, and not of twice as much
    if bill_nanousd is not None:
        provider.records["gen-1"] = {"id": "gen-1", "total_cost": bill_nanousd / 1e9}
    async with running(settings, provider, office, payer, kind=kind, generation_wait_s=2.0) as case:
        status, body = await case.ask(overflowing, stream=True, max_tokens=TOLD)
        assert (status, b'"length"' in body, body.rstrip().endswith(b"[DONE]")) == (200, True, True)
    async with office.database.connection() as connection:
        call = await connection.fetchrow("SELECT * FROM calls")
    assert (call["state"], call["outcome"]) == ("settled", "out_of_funds")
    assert call["accuracy"] == ("estimated" if bill_nanousd is None else "exact")
    assert call["cost_nanousd"] == bill_nanousd or bill_nanousd is None
    assert call["charge_nano"] == min(call["cost_nanousd"], call["hold_nano"])
    assert call["house_nanousd"] == call["cost_nanousd"] - call["charge_nano"]
    assert (call["house_nanousd"] > 0) == (bill_nanousd != 1_000_000)
    told = " ".join((await describe_call(office.database, call["id"]))["explanation"])
    assert ("were held for it" in told) == (call["house_nanousd"] > 0), told
    wallet = await office.wallets.get_wallet(payer.wallet_id)
    assert (wallet.posted_nano, wallet.held_nano) == (2_000_000 - call["charge_nano"], 0)
    checks = await Books(office.database, office.holds, office.upstream, sweep_grace_s=5).check()
    assert {name for name, check in checks.items() if not check.ok} <= {"I8"}, (
        "the scripted provider keeps no books"
    )
