"""With which settings Tuma uses the simulated payment providers."""

from scripts.sim.payments.currencies import Provider
from scripts.sim.payments.signatures import Secrets


def settings_of(origin: str, secrets: Secrets) -> dict[Provider, dict[str, str]]:
    """Return each provider's section of Tuma's settings.

    Args:
        origin: the simulator's URL without path.
        secrets: as it was given them.
    """
    return {
        "stripe": {
            "secret_key": secrets.stripe_key,
            "webhook_secret": secrets.stripe_webhook,
            "base_url": f"{origin}/stripe",
        },
        "paystack": {"secret_key": secrets.paystack_key, "base_url": f"{origin}/paystack"},
        "flutterwave": {
            "secret_key": secrets.flutterwave_key,
            "webhook_secret": secrets.flutterwave_webhook,
            "base_url": f"{origin}/flutterwave/v3",
        },
    }
