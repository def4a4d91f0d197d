"""What the server asks of each simulated provider's API."""

from typing import Protocol

from aiohttp import web

from scripts.sim.payments.books import Checkout, Payment
from scripts.sim.payments.currencies import Provider
from scripts.sim.payments.till import Voice


class ProviderApi(Protocol):
    """One provider's protocol: its paths, its events, its errors."""

    @property
    def provider(self) -> Provider:
        """Which."""

    @property
    def voice(self) -> Voice:
        """How its events are told."""

    def routes(self) -> list[web.RouteDef]:
        """Return its routes, with full paths; the first segment is the provider's name."""

    def refusal(self, status: int, message: str) -> web.Response:
        """Return an error in the provider's own shape."""

    def return_url(self, checkout: Checkout, payment: Payment) -> str | None:
        """Return where the customer goes after paying, if the merchant said so."""
