"""What is looked at when the faults are over: that all ends, and that the books say what the provider says."""

import asyncio
import contextlib
import time
from collections import Counter
from decimal import Decimal
from typing import Any
from uuid import UUID

import psutil

from billing.books.usage_proof import FIRST_ID, LAST_ID, compare_usage
from billing.fx.quote import FxQuote
from billing.ids import minted_at
from billing.money import attousd_from_decimal, format_usd
from scripts.office import Office
from tests.faults.campaign.faults import Faults
from tests.faults.campaign.load import KNOWN_S, Load
from tests.faults.campaign.result import Result
from tests.faults.campaign.servers import Servers

_SETTLE_S = 90.0
_NOTED_S = 4.0  # by then an answer's id is in Postgres, on a busy machine
_SWEPT_S = 30.0  # and by then the calls of a dead worker are swept, Postgres having been away meanwhile


class Verdict:
    """Looks for broken promises, and adds them to the result.

    Args:
        servers: on which the faults were.
        load: knows which calls were answered.
        faults: knows what was lost when.
    """

    def __init__(self, servers: Servers, load: Load, faults: Faults, result: Result) -> None:
        self._servers = servers
        self._load = load
        self._faults = faults
        self._result = result

    async def settle_down(self, office: Office) -> None:
        """A server runs on, undisturbed, until nothing is open."""
        with contextlib.suppress(TimeoutError):
            await self._servers.provider.books.wait_quiet(timeout_s=_SETTLE_S)
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            async with office.database.connection() as connection:
                live = await connection.fetchval(
                    "SELECT count(*) FROM calls WHERE state IN ('open', 'review')"
                )
            if not live and not await office.holds.find_leases(expired=False, limit=10):
                break
            await asyncio.sleep(0.2)
        else:
            self._result.violations.append(f"after {_SETTLE_S:.0f} quiet seconds {live} calls have not ended")
        await asyncio.sleep(KNOWN_S)
        for pid in self._servers.orphans:
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                self._result.violations.append(f"worker {pid} outlives its master")

    async def look(self, office: Office) -> None:
        result = self._result
        await self._servers.command("sweep")
        result.ended = await self._count_ended(office)
        first = await self._servers.command("reconcile")
        result.differences = Counter(item["cause"] for item in first.get("differences", []))
        second = await self._servers.command("reconcile")
        result.drift_usd = second.get("drift_usd", "unknown")
        if result.drift_usd != "0":
            result.violations.append(f"drift {result.drift_usd} USD")
        for item in second.get("differences", []):
            result.violations.append(f"a difference that does not go away: {item}")
        checks = (await self._servers.command("books", "check")).get("checks", {})
        result.violations += [
            f"{name}: {check['detail']}" for name, check in checks.items() if not check["ok"]
        ]
        if len(checks) != 9:
            result.violations.append(f"only {len(checks)} of the checks of the books were made")
        await self._servers.stop_server()
        await self._servers.command("sweep")
        await self._look_at_calls(office)
        await self._look_at_quota(office)
        await self._look_at_usage(office)

    async def _count_ended(self, office: Office) -> Counter[str]:
        async with office.database.connection() as connection:
            rows = await connection.fetch(
                "SELECT state, accuracy, count(*) AS calls FROM calls GROUP BY state, accuracy"
            )
        return Counter(
            {
                row["accuracy"] if row["state"] == "settled" else row["state"]: row["calls"]
                for row in rows
                if row["calls"]
            }
        )

    async def _look_at_calls(self, office: Office) -> None:
        """No wallet pays for more than its calls cost, by the provider's own books."""
        books = self._servers.provider.books
        async with office.database.connection() as connection:
            calls = await connection.fetch(
                "SELECT c.*, f.rate, f.markup_bps FROM calls c JOIN fx_quotes f ON f.id = c.fx_quote_id"
            )
            lowest = await connection.fetch(
                "SELECT currency, min(posted_nano + overdraft_nano) AS low FROM wallets GROUP BY currency ORDER BY 1"
            )
            loss = int(
                await connection.fetchval(
                    "SELECT coalesce(-sum(amount_nano), 0) FROM journal_entry WHERE account = 'house_loss'"
                )
            )
        self._result.lowest_balance = ", ".join(
            f"{format_usd(row['low'])} {row['currency']}" for row in lowest
        )
        self._result.house_loss_usd = format_usd(loss)
        self._result.billed_usd = format_usd(books.total_nanousd)
        for call in calls:
            fault = self._judge(call, books.generations.get(call["generation_id"] or ""))
            if fault is None and call["state"] == "void" and str(call["id"]) in self._load.answered:
                if self._is_of_a_double_fault(call["id"]):
                    self._result.lost_with_both += 1
                else:
                    fault = "void, though its client had an answer"
            if fault is not None:
                self._result.violations.append(f"call {call['id']} ({call['outcome']}): {fault}")
        unknown = self._load.answered - {str(call["id"]) for call in calls}
        self._result.violations += [f"call {call_id} was answered and never opened" for call_id in unknown]

    def _is_of_a_double_fault(self, call_id: UUID) -> bool:
        """Tell whether its worker died before the answer's id could be in Postgres, and Redis lost its data before the sweep.

        See docs/reliability.md.
        """
        begun_s = minted_at(call_id).timestamp()
        # From when on Postgres could be told: from the beginning, or since it was back.
        from_s = [begun_s, *(back_s for back_s in self._faults.back_s if back_s > begun_s)]
        return any(
            begun_s < killed_s
            and any(since_s < killed_s < since_s + _NOTED_S for since_s in from_s)
            and any(begun_s < lost_s < killed_s + _SWEPT_S for lost_s in self._faults.lost_s)
            for killed_s in self._faults.killed_s
        )

    @staticmethod
    def _judge(call: Any, generation: Any) -> str | None:
        if call["state"] == "open":
            return "still open"
        if call["state"] == "review":
            return "in review though the provider knows it" if generation is not None else None
        billed = 0 if generation is None else generation.cost_nanousd
        if call["charge_nano"] and generation is None:
            return "charged, and the provider knows no such answer"
        if generation is not None and generation.request_id != str(call["id"]):
            return f"has the answer of call {generation.request_id}"
        if call["state"] == "void":
            return f"void, but {billed} nano-dollars were billed" if billed else None
        fx = FxQuote(call["fx_quote_id"], call["currency"], call["rate"], call["markup_bps"])
        most = fx.charge(attousd_from_decimal(Decimal(billed).scaleb(-9))).charge_nano
        if call["charge_nano"] > most:
            return f"charged {call['charge_nano']} nano {call['currency']}, and cost {most}"
        if call["charge_nano"] < most and not call["house_nanousd"]:
            return f"charged only {call['charge_nano']} of {most} nano {call['currency']}, and nobody bore the rest"
        if call["cost_nanousd"] != billed:
            return f"our cost is {call['cost_nanousd']} nano-dollars, the provider's {billed}"
        return None

    async def _look_at_quota(self, office: Office) -> None:
        async with office.database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT sum(leased_nanousd) AS leased, sum(spent_nanousd) AS spent FROM quota_slabs"
            )
        if row["leased"] != row["spent"]:
            self._result.violations.append(
                f"{row['leased'] - row['spent']} nano-dollars of the quota were not returned"
            )

    async def _look_at_usage(self, office: Office) -> None:
        """What usage sums is what the calls say, after all that was done to them."""
        async with office.database.connection() as connection:
            differences = await compare_usage(connection, FIRST_ID, LAST_ID)
            summed = await connection.fetchval("SELECT sum(calls) + sum(voids) FROM usage_rollup")
            ended = await connection.fetchval("SELECT count(*) FROM calls WHERE state IN ('settled', 'void')")
        self._result.violations += [f"usage: {text}" for text in differences]
        if summed != ended:
            self._result.violations.append(f"usage sums {summed} calls, {ended} have ended")
