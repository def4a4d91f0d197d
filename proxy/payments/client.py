"""The HTTP with which payment providers are asked: JSON, bounded, following nothing, exact numbers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from http import HTTPStatus
from typing import Any
from uuid import UUID

import aiohttp

from billing.errors import InputError, PaymentsUnavailableError
from billing.payments.payment import Refund, Reversal, ReversalState
from billing.payments.provider_api import NotSentError, PaymentRefusedError
from billing.payments.units import PaymentProvider

_ANSWER_BYTES_MAX = 4 * 1024 * 1024
MESSAGE_MAX = 200  # of a provider's own words
_NOTE = "tuma refund "
_AT_THE_DOOR = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.TOO_MANY_REQUESTS,
)  # nothing was done


class BoundedHttp:
    """HTTP to one provider: answers of bounded size and time, no redirect followed, no cookie or proxy used.

    Args:
        provider: for messages.
        timeout_s: for a whole answer.
    """

    def __init__(self, provider: PaymentProvider, *, timeout_s: float) -> None:
        self._provider = provider
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None = None,
        body: str | bytes | None = None,
    ) -> tuple[int, bytes]:
        """Return the status and the body of an answer.

        Raises:
            NotSentError: it was not reached.
            PaymentsUnavailableError: none came, or too much.
        """
        sent = {**headers, "Accept": "application/json", "Accept-Encoding": "identity"}
        try:
            async with self._open().request(
                method, url, params=query, data=body, headers=sent, allow_redirects=False
            ) as answer:
                raw = await answer.content.read(_ANSWER_BYTES_MAX + 1)
                while len(raw) <= _ANSWER_BYTES_MAX and not answer.content.at_eof():
                    raw += await answer.content.read(_ANSWER_BYTES_MAX + 1 - len(raw))
                status = answer.status
        except aiohttp.ClientConnectorError as error:
            raise NotSentError(f"{self._provider} cannot be reached: {type(error).__name__}") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PaymentsUnavailableError(
                f"{self._provider} does not answer: {type(error).__name__}"
            ) from None
        if len(raw) > _ANSWER_BYTES_MAX:
            raise PaymentsUnavailableError(f"{self._provider} answered with more than can be read")
        return status, raw

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


class PaymentClient:
    """JSON both ways, exact numbers, over ``BoundedHttp``.

    Args:
        provider: for messages.
        base_url: without a slash at its end.
        secret_key: sent as a bearer token; in no message.
        timeout_s: for a whole answer.
    """

    def __init__(
        self, provider: PaymentProvider, base_url: str, secret_key: str, *, timeout_s: float
    ) -> None:
        self._provider = provider
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {secret_key}", "Content-Type": "application/json"}
        self._http = BoundedHttp(provider, timeout_s=timeout_s)

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        """Ask, and return the answer's ``data`` and ``meta`` as it is, numbers with decimals as ``Decimal``.

        Returns:
            The JSON object; None where the provider says that there is no such thing (404).

        Raises:
            PaymentRefusedError: another 4xx.
            PaymentsUnavailableError: no answer, 5xx, 429, 401 or 403 (our key), or none that can be read.
        """
        status, raw = await self._http.send(
            method,
            f"{self._base_url}{path}",
            headers=self._headers,
            query=query,
            body=None if body is None else json.dumps(body).encode(),
        )
        return self._judge(status, raw)

    def _judge(self, status: int, raw: bytes) -> Any:
        try:
            answer = json.loads(raw, parse_float=Decimal)
        except (ValueError, RecursionError):
            answer = None
        if status == HTTPStatus.NOT_FOUND:
            return None
        refusals = (HTTPStatus.BAD_REQUEST, HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY)
        if status in refusals and isinstance(answer, dict):
            message = answer.get("message")
            raise PaymentRefusedError(
                f"{self._provider} refuses: {str(message)[:MESSAGE_MAX] if message else status}"
            )
        if status in _AT_THE_DOOR:
            raise NotSentError(f"{self._provider} answered with status {status}")
        if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES or not isinstance(answer, dict):
            raise PaymentsUnavailableError(f"{self._provider} answered with status {status}")
        return answer

    async def close(self) -> None:
        """Close its connections."""
        await self._http.close()


@contextmanager
def reading(provider: PaymentProvider) -> Iterator[None]:
    """Let what a provider answered be read inside; nothing is known where that cannot be done.

    Raises:
        PaymentsUnavailableError: a member is missing, or is not what it should be.
    """
    try:
        yield
    except PaymentRefusedError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, InputError) as error:
        raise PaymentsUnavailableError(
            f"{provider} answered what cannot be read: {type(error).__name__}: {error}"[:MESSAGE_MAX]
        ) from None


def read_object(raw: bytes) -> dict[str, Any]:
    """Read a webhook's body.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        found = json.loads(raw, parse_float=Decimal)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError("a webhook's body is a JSON object")
    return found


def texts(*values: object) -> list[str]:
    """Return those values that can be an id or a reference: texts, and whole numbers as texts."""
    return [
        str(value)
        for value in values
        if (isinstance(value, str) and value) or (isinstance(value, int) and not isinstance(value, bool))
    ]


def note_of(refund_id: UUID) -> str:
    """Return the note that a refund of ours is sent with, where a provider knows no idempotency keys."""
    return f"{_NOTE}{refund_id}"


def refund_id_in(note: object) -> UUID | None:
    """Return which refund of ours a note names; None where it is not one of ours."""
    text = str(note or "")
    try:
        return UUID(text.removeprefix(_NOTE)) if text.startswith(_NOTE) else None
    except ValueError:
        return None


def answered(refund: Refund, row: Any, states: Mapping[str, ReversalState]) -> Reversal | None:
    """Return a refund of ours as the provider's answer to its sending tells it; None where that has no id.

    Args:
        refund: sent.
        row: the answer's data: ``id``, ``status``.
        states: what its statuses mean; one that is not there is on its way.
    """
    ids = texts(row.get("id")) if isinstance(row, dict) else []
    if not ids:
        return None
    state = states.get(str(row.get("status")).partition("-")[0], "open")
    return Reversal(ids[0], "refund", refund.amount_nano, state, refund.id)
