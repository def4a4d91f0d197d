"""Messages to the operator's URL: signed, bounded in time and size, no redirect followed.

The header ``Tuma-Signature: t=UNIX_SECONDS,v1=HEX`` is HMAC-SHA256, by the shared secret, of the time, a point and the body's bytes.
``Tuma-Message`` is the id that a receiver knows a repeat by. What the receiver answers is not looked at but for its status.
"""

import hashlib
import hmac
import time
from http import HTTPStatus
from uuid import UUID

import aiohttp
from yarl import URL

from billing.errors import AlertNotTakenError
from config.settings import AlertSettings
from proxy.outbound.trusted_url import check_url


class AlertHook:
    """Posts messages.

    Args:
        settings: with a URL and a secret.

    Raises:
        InputError: somebody on the way could read the messages.
    """

    def __init__(self, settings: AlertSettings) -> None:
        self._url: URL = check_url(settings.url.get_secret_value(), name="TUMA_ALERTS__URL")
        self._key = settings.secret.get_secret_value().encode()
        self._settings = settings

    async def send(self, message_id: UUID, body: bytes) -> None:
        """Post a message; only a 2xx within the time takes it.

        Raises:
            AlertNotTakenError: anything else; the reason has nothing of the address in it.
        """
        moment = int(time.time())
        signature = hmac.digest(self._key, f"{moment}.".encode() + body, hashlib.sha256).hex()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "tuma",
            "Tuma-Message": str(message_id),
            "Tuma-Signature": f"t={moment},v1={signature}",
        }
        try:
            async with (
                aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    trust_env=False,
                ) as session,
                session.post(self._url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                    raise AlertNotTakenError(f"status {response.status}")
                seen = 0
                async for chunk in response.content.iter_any():
                    seen += len(chunk)
                    if seen > self._settings.answer_bytes:
                        raise AlertNotTakenError(
                            f"an answer of more than {self._settings.answer_bytes} bytes"
                        )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:  # its text may have the address in it
            raise AlertNotTakenError(type(error).__name__) from None


def make_messenger(settings: AlertSettings) -> AlertHook | None:
    """Return who carries messages; None where no URL is set.

    Raises:
        InputError: the URL is neither https nor on this machine.
    """
    return AlertHook(settings) if settings.url.get_secret_value() else None
