"""Questions about a payment whose payer waits for it: at once, but few, and never for long.

Webhooks may come late and the poller keeps long pauses. Who comes back from a payment page asks how their top-up stands, again
and again; each time may make Tuma ask the provider, as seldom over all workers as the settings say.
"""

import asyncio

import structlog

from billing.errors import RedisUnavailableError
from billing.payments.payment import Intent
from billing.payments.worker import PaymentWorker
from billing.redis.client import RedisWay
from config.settings import PaymentSettings

_log = structlog.get_logger("tuma.payments")


class StatusChecks:
    """Asks payment providers for payers who wait.

    Args:
        worker: who asks and applies the answer.
        pipe: Redis, where the workers agree on whose turn it is.
        settings: how often, how long, how many at once.
    """

    def __init__(self, worker: PaymentWorker, pipe: RedisWay, settings: PaymentSettings) -> None:
        self._worker = worker
        self._pipe = pipe
        self._settings = settings
        self._asking = 0

    async def look(self, intent: Intent) -> bool:
        """Ask about an intent that may have been paid, if its turn has come; return whether it was asked about.

        Whatever prevents that is no error here: webhooks and the poller come to the same.

        Raises:
            PostgresUnavailableError: nothing can be looked up.
        """
        if intent.state not in ("pending", "failed") or intent.provider not in self._worker.providers:
            return False
        if self._asking >= self._settings.waiting_max:
            return False
        self._asking += 1
        try:
            if not await self._has_turn(intent):
                return False
            async with asyncio.timeout(self._settings.waiting_s):
                await self._worker.look_at(intent.id)
        except TimeoutError:
            _log.warning(
                "payments.failed", provider=intent.provider, error="no answer while the payer waited"
            )
        finally:
            self._asking -= 1
        return True

    async def _has_turn(self, intent: Intent) -> bool:
        """Return whether nobody asked lately, on any worker; without Redis nobody can tell, and nobody asks."""
        pause_ms = int(self._settings.waiting_pause_s * 1000)
        try:
            return bool(await self._pipe.run("SET", f"tuma:look:{intent.id}", "1", "NX", "PX", pause_ms))
        except RedisUnavailableError:
            return False
