"""Guards of ``billing/payments/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a provider is asked once for all who wait for a top-up",
        "billing/payments/status_checks.py",
        "            if not await self._has_turn(intent):\n                return False\n",
        "            await self._has_turn(intent)\n",
        "tests/proxy/payments/test_status_checks.py",
    ),
    Mutation(
        "who waits for a top-up is not held up for long",
        "billing/payments/status_checks.py",
        "asyncio.timeout(self._settings.waiting_s)",
        "asyncio.timeout(None)",
        "tests/proxy/payments/test_status_checks.py",
    ),
    Mutation(
        "few questions for payers wait at once",
        "billing/payments/status_checks.py",
        "if self._asking >= self._settings.waiting_max:",
        "if self._asking > self._settings.waiting_max:",
        "tests/proxy/payments/test_status_checks.py",
    ),
    Mutation(
        "a refund that the books know to be sent is not sent again",
        "billing/payments/worker.py",
        "not await self.payments.is_refund_requested(item.id)",
        "any(told.ours == item.id for told in payment.reversals)",
        "tests/proxy/payments/test_topups.py",
    ),
    Mutation(
        "a payment that contradicts the books hides no other from the sweep",
        "billing/payments/worker.py",
        "            await self.payments.apply(payment, takes_more=api.takes_more)\n        except BrokenInvariantError as error:",
        "            await self.payments.apply(payment, takes_more=api.takes_more)\n        except ZeroDivisionError as error:",
        "tests/proxy/payments/test_topups.py",
    ),
    Mutation(
        "an event of an end makes the desk look at the intent",
        "billing/payments/worker.py",
        'payment.state in ("failed", "expired")',
        'payment.state == "never"',
        "tests/proxy/payments/test_topups_stripe.py",
    ),
    Mutation(
        "who sends a refund stops before another may",
        "billing/payments/worker.py",
        "async with asyncio.timeout(WORK_MAX_S):",
        "async with asyncio.timeout(None):",
        "tests/proxy/operator/test_payments.py",
    ),
    Mutation(
        "a payment is in the provider's units",
        "billing/payments/units.py",
        "if _bounded(amount_nano) % unit.step_nano:",
        "if _bounded(amount_nano) % unit.unit_nano:",
        "tests/unit/payments/test_units.py",
    ),
)
