"""Guards of ``proxy/outbound/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "the receiver of alerts redirects nowhere",
        "proxy/outbound/alert_webhook.py",
        "allow_redirects=False",
        "allow_redirects=True",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "only a 2xx takes an alert",
        "proxy/outbound/alert_webhook.py",
        "if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:",
        "if response.status < HTTPStatus.OK:",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "the time of an alert is signed",
        "proxy/outbound/alert_webhook.py",
        'f"{moment}.".encode() + body',
        "body",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "JWT keys are not fetched from elsewhere",
        "proxy/outbound/download.py",
        "allow_redirects=False",
        "allow_redirects=True",
        "tests/unit/identity/test_jwks_fetch.py",
    ),
    Mutation(
        "JWT keys come in an answer with a bound",
        "proxy/outbound/download.py",
        "if len(body) > bytes_max:",
        "if len(body) > 100 * bytes_max:",
        "tests/unit/identity/test_jwks_fetch.py",
    ),
    Mutation(
        "a source's redirect is not followed",
        "proxy/outbound/download.py",
        "allow_redirects=False",
        "allow_redirects=True",
        "tests/proxy/outbound/test_fx.py",
    ),
    Mutation(
        "a source's answer has an end",
        "proxy/outbound/download.py",
        "if len(body) > bytes_max:",
        "if len(body) < 0:",
        "tests/proxy/outbound/test_fx.py",
    ),
    Mutation(
        "a source's base is the dollar",
        "proxy/outbound/fx_sources.py",
        'if document.get("base_code" if opened else "base") != "USD":',
        'if document.get("base_code" if opened else "base") == "":',
        "tests/unit/fx/test_rates.py",
    ),
    Mutation(
        "a source's numbers are not floats",
        "proxy/outbound/fx_sources.py",
        "json.loads(body, parse_float=Decimal, parse_constant=Decimal)",
        "json.loads(body, parse_float=lambda text: Decimal(repr(float(text))), parse_constant=Decimal)",
        "tests/unit/fx/test_rates.py",
    ),
)
