"""Follows the sources of exchange rates: what they say is kept, what can be believed is quoted."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID

import structlog

from billing.errors import FxSourceError, InputError
from billing.fx.rates import SourceRates, State, judge
from billing.ids import new_id
from billing.postgres.database import Database
from config.settings import FxSettings

_log = structlog.get_logger("tuma.fx")


class RateSource(Protocol):
    """Somebody who names exchange rates; ``name`` is kept with each of them."""

    name: str

    async def fetch(self) -> SourceRates:
        """Return the rates of now.

        Raises:
            FxSourceError: there are none that can be believed.
        """


@dataclass(slots=True)
class SyncReport:
    """What came of asking the sources: currencies by what became of their rate."""

    sources: list[dict[str, Any]]
    ok: bool  # every source answered
    quoted: list[str] = field(default_factory=list)  # at a new rate or markup
    confirmed: list[str] = field(default_factory=list)  # at the rate that they have
    pinned: list[str] = field(default_factory=list)  # an operator's rate that is to stay
    held: list[str] = field(default_factory=list)  # waiting for an operator's word
    disputed: list[str] = field(default_factory=list)  # the sources do not agree
    missing: list[str] = field(default_factory=list)  # needed, and not named by every source

    def as_json(self) -> dict[str, Any]:
        """Return it as a command prints it."""
        return {name: getattr(self, name) for name in self.__slots__}


class FxFeed:
    """Asks the sources, and quotes the currencies that are needed: those of wallets, and those of the settings.

    Args:
        database: as the keeper, or the owner.
        sources: the one that is quoted, and the one that must agree, if there is one.
        settings: bounds and markups.
    """

    def __init__(self, database: Database, sources: Sequence[RateSource], settings: FxSettings) -> None:
        self._database = database
        self._sources = sources
        self._settings = settings

    async def sync(self) -> SyncReport:
        """Ask every source, keep what they say, and quote what can be believed, in one transaction.

        Raises:
            InputError: there is no source.
            FxSourceError: none answers; nothing was written.
            PostgresUnavailableError: Postgres is away.
        """
        if not self._sources:
            raise InputError("TUMA_FX__URL is not set: there is no source of exchange rates to ask")
        answers = await asyncio.gather(*(source.fetch() for source in self._sources), return_exceptions=True)
        found: list[SourceRates | None] = []
        report = SyncReport([], ok=True)
        for source, answer in zip(self._sources, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, FxSourceError):
                    raise answer
                _log.error("fx.source_failed", source=source.name, error=str(answer))
                report.ok = False
            found.append(None if isinstance(answer, BaseException) else answer)
            report.sources.append(_describe(source.name, answer))
        if not any(found):
            raise FxSourceError("; ".join(item["error"] for item in report.sources))
        async with self._database.transaction() as connection:
            await connection.execute("SELECT lock_fx()")
            await self._take_over(connection, found, report)
        _log.info(
            "fx.synced",
            quoted=len(report.quoted),
            confirmed=len(report.confirmed),
            held=report.held,
            disputed=report.disputed,
            missing=report.missing,
        )
        return report

    async def quote_missing(self) -> list[str]:
        """Quote the currencies of new wallets by what the sources said last, without asking them; return which."""
        quoted = []
        async with self._database.transaction() as connection:
            rows = await connection.fetch(_MISSING)
            if rows:
                await connection.execute("SELECT lock_fx()")
                rows = await connection.fetch(_MISSING)
            for row in rows:
                last = await connection.fetchrow(
                    "SELECT * FROM last_rate($1, false) r WHERE r.state = 'accepted'"
                    " AND r.created_at > now() - make_interval(secs => $2)",
                    *(row["currency"], self._settings.stale_after_s),
                )
                if last is not None:
                    markup = self._settings.markup_bps_by_currency.get(
                        row["currency"], self._settings.markup_bps
                    )
                    await connection.execute(
                        "SELECT quote_fx($1, $2, $3, $4, false, $5, $6, NULL, false)",
                        *(new_id(), row["currency"], last["rate"], markup, last["id"], last["created_at"]),
                    )
                    quoted.append(row["currency"])
        return quoted

    async def _take_over(
        self, connection: Any, found: Sequence[SourceRates | None], report: SyncReport
    ) -> None:
        first = found[0].rates if found[0] is not None else {}
        witness: Mapping[str, Decimal] = found[1].rates if len(found) > 1 and found[1] is not None else {}
        quotes = {row["currency"]: row for row in await connection.fetch("SELECT * FROM list_fx_quotes()")}
        states: dict[str, State] = {}
        for currency, rate in first.items():
            current = quotes.get(currency)
            states[currency] = judge(
                rate,
                witness=witness.get(currency),
                two_sources=len(self._sources) > 1,
                current=None if current is None else current["rate"],
                band_bps=self._settings.band_bps,
                jump_bps=self._settings.jump_bps,
            )
        kept = await self._record(connection, found, states)
        for currency in sorted(await self._needed(connection)):
            current, state = quotes.get(currency), states.get(currency)
            if current is not None and current["pinned"]:
                report.pinned.append(currency)
            elif state is None or state == "alone":
                report.missing.append(currency)
            elif state == "held":
                assert current is not None
                _log.error(
                    "fx.held", currency=currency, rate=str(first[currency]), quoted=str(current["rate"])
                )
                report.held.append(currency)
            elif state == "disputed":
                _log.error(
                    "fx.disputed",
                    currency=currency,
                    rates=[str(first[currency]), str(witness[currency])],
                )
                report.disputed.append(currency)
            else:
                await self._quote(
                    connection,
                    report,
                    currency=currency,
                    rate=first[currency],
                    rate_id=kept[currency],
                    current=current,
                )

    async def _record(
        self, connection: Any, found: Sequence[SourceRates | None], states: Mapping[str, State]
    ) -> dict[str, UUID]:
        """Keep what every source said; return the row of the first source's rate by currency."""
        rows = [
            (new_id(), currency, rate, source.name, "witness" if number else states[currency], said.as_of)
            for number, (source, said) in enumerate(zip(self._sources, found, strict=True))
            if said is not None
            for currency, rate in said.rates.items()
        ]
        kept = await connection.fetch(
            "SELECT * FROM record_rates($1, $2, $3, $4, $5, $6)",
            *(list(column) for column in zip(*rows, strict=True)),
        )
        return {row["currency"]: row["id"] for row in kept if row["state"] != "witness"}

    async def _needed(self, connection: Any) -> set[str]:
        rows = await connection.fetch("SELECT DISTINCT w.currency FROM wallets w")
        configured = {*self._settings.currencies, *self._settings.markup_bps_by_currency}
        return ({row["currency"] for row in rows} | configured) - {"USD"}

    async def _quote(
        self,
        connection: Any,
        report: SyncReport,
        *,
        currency: str,
        rate: Decimal,
        rate_id: UUID,
        current: Any,
    ) -> None:
        """Quote an accepted rate, or confirm that the quoted one still is what the sources say."""
        markup = self._settings.markup_bps_by_currency.get(currency)
        by_hand = current is not None and current["markup_by_hand"] and markup is None
        if markup is None:
            markup = current["markup_bps"] if by_hand else self._settings.markup_bps
        if current is not None and (current["rate"], current["markup_bps"]) == (rate, markup):
            await connection.execute("SELECT confirm_fx($1)", currency)
            report.confirmed.append(currency)
            return
        await connection.execute(
            "SELECT quote_fx($1, $2, $3, $4, $5, $6, now(), NULL, false)",
            *(new_id(), currency, rate, markup, by_hand, rate_id),
        )
        report.quoted.append(currency)


_MISSING = """
    SELECT DISTINCT w.currency FROM wallets w
    WHERE NOT EXISTS (SELECT FROM fx_quotes f WHERE f.currency = w.currency AND f.superseded_at IS NULL)
"""


def _describe(name: str, answer: SourceRates | BaseException) -> dict[str, Any]:
    if isinstance(answer, BaseException):
        return {"name": name, "error": str(answer), "as_of": None, "currencies": 0, "unusable": []}
    return {
        "name": name,
        "error": None,
        "as_of": None if answer.as_of is None else answer.as_of.isoformat(),
        "currencies": len(answer.rates),
        "unusable": list(answer.unusable),
    }
