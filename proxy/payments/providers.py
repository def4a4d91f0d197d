"""Which payment providers the settings name."""

from billing.payments.provider_api import PaymentApi
from billing.payments.units import PaymentProvider
from config.settings import Settings
from proxy.payments.client import BoundedHttp, PaymentClient
from proxy.payments.flutterwave import FlutterwaveApi
from proxy.payments.paystack import PaystackApi
from proxy.payments.stripe import StripeApi


def make_payment_apis(settings: Settings) -> dict[PaymentProvider, PaymentApi]:
    """Return the providers that have a secret key."""
    made: dict[PaymentProvider, PaymentApi] = {}
    timeout_s = settings.payments.timeout_s
    stripe, paystack, flutterwave = settings.stripe, settings.paystack, settings.flutterwave
    if key := stripe.secret_key.get_secret_value():
        http = BoundedHttp("stripe", timeout_s=timeout_s)
        made["stripe"] = StripeApi(http, key, base_url=stripe.base_url, return_url=stripe.return_url)
    if key := paystack.secret_key.get_secret_value():
        made["paystack"] = PaystackApi(PaymentClient("paystack", paystack.base_url, key, timeout_s=timeout_s))
    if key := flutterwave.secret_key.get_secret_value():
        client = PaymentClient("flutterwave", flutterwave.base_url, key, timeout_s=timeout_s)
        made["flutterwave"] = FlutterwaveApi(client)
    return made
