"""Errors in OpenAI's shape, and the one table from error class to status and code.

* ProxyError (TumaError)
  - BadRequestError, BodyTooLargeError, BodyTimeoutError: the request itself
    - AmbiguousRequestError: two servers could read its head differently; the connection is closed
    - NotStoredError: it continues an answer that is not kept here; a client sends the whole input then
  - UpstreamRefusedError: the provider's 4xx for the caller's own input, passed on
  - UpstreamError, UpstreamTimeoutError, UpstreamBusyError: the provider failed
  - UpstreamRefusesUsError: the provider refuses a call with words about our key or account
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast

from aiohttp import web
from typing_extensions import TypedDict

from billing import errors as billing
from billing.provider.refusals import Subject


class ErrorObjectJson(TypedDict):
    """What went wrong, in OpenAI's shape; an error of the provider's may have more members."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorJson(TypedDict):
    """An error, in OpenAI's shape."""

    error: ErrorObjectJson


class ProxyError(billing.TumaError):
    """The root of what the proxy itself refuses."""


class BadRequestError(ProxyError):
    """The request cannot be understood, or a value in it is out of bounds; ``param`` names the member."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotStoredError(BadRequestError):
    """The request continues an earlier answer by its id, and no answer is kept here.

    Its code is OpenAI's for an id that it does not know (https://developers.openai.com/docs/guides/websocket-mode): a client that can
    (VS Code's chat, for one) then sends the whole input.
    """


class AmbiguousRequestError(BadRequestError):
    """Two servers could read this request's head differently; nothing more is read on its connection."""


class HeadTooLargeError(AmbiguousRequestError):
    """The request's head is larger than the settings allow."""


class BodyTooLargeError(ProxyError):
    """The body is larger than the settings allow."""


class BodyTimeoutError(ProxyError):
    """The body did not arrive in time."""


class UpstreamRefusedError(ProxyError):
    """The provider refused the caller's input; its status and error pass through.

    They may quote the input, so they are not in the exception's own text, which is logged.

    Args:
        status: the provider's 4xx.
        error: the provider's error object, in OpenAI's shape.
    """

    def __init__(self, status: int, error: ErrorObjectJson) -> None:
        super().__init__(f"The provider refused the request with status {status}.")
        self.status = status
        self.error = error


class UpstreamError(ProxyError):
    """The provider failed, or answered what cannot be understood."""


class UpstreamTimeoutError(ProxyError):
    """The provider did not answer in time.

    Args:
        may_be_billed: it had the request, and may go on with it; a client that asked again could pay twice.
    """

    def __init__(self, message: str, *, may_be_billed: bool = False) -> None:
        super().__init__(message)
        self.may_be_billed = may_be_billed


class UpstreamBusyError(ProxyError):
    """The provider limits our requests; ``retry_after`` is its own header, if it sent one."""

    def __init__(self, message: str, *, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamRefusesUsError(ProxyError):
    """The provider refuses a call with words about our key or our account: ours to mend, if it is meant for all.

    Args:
        reason: the provider's own, for the operator alone.
        subject: whether it speaks of our key or of our money.
        is_empty: it says by a code that the account is empty.
    """

    retry_after_s = 5

    def __init__(self, reason: str, *, subject: Subject, is_empty: bool = False) -> None:
        super().__init__("The provider does not serve us now; the operator has been told.")
        self.reason = reason
        self.subject: Subject = subject
        self.is_empty = is_empty


@dataclass(frozen=True, slots=True)
class Shape:
    """How an error class looks from outside."""

    status: int
    type: str
    code: str | None


# The most derived class that is found wins.
TABLE: Mapping[type[billing.TumaError], Shape] = {
    BadRequestError: Shape(400, "invalid_request_error", None),
    NotStoredError: Shape(400, "invalid_request_error", "previous_response_not_found"),
    billing.InputError: Shape(400, "invalid_request_error", None),
    billing.NotFoundError: Shape(404, "invalid_request_error", "not_found"),
    billing.InvalidKeyError: Shape(401, "invalid_request_error", "invalid_api_key"),
    billing.InvalidSignatureError: Shape(401, "invalid_request_error", "invalid_signature"),
    billing.InsufficientFundsError: Shape(402, "insufficient_quota", "insufficient_funds"),
    billing.CapExceededError: Shape(402, "insufficient_quota", "cap_exceeded"),
    billing.NotPermittedError: Shape(403, "permission_error", "not_permitted"),
    billing.ModelNotAllowedError: Shape(403, "permission_error", "model_not_allowed"),
    billing.AddressNotAllowedError: Shape(403, "permission_error", "ip_not_allowed"),
    billing.WalletFrozenError: Shape(403, "permission_error", "wallet_frozen"),
    billing.PriceMissingError: Shape(400, "invalid_request_error", "price_missing"),
    billing.ModelNotFoundError: Shape(404, "invalid_request_error", "model_not_found"),
    BodyTimeoutError: Shape(408, "invalid_request_error", "request_timeout"),
    BodyTooLargeError: Shape(413, "invalid_request_error", "request_too_large"),
    HeadTooLargeError: Shape(431, "invalid_request_error", "request_too_large"),
    billing.RateLimitError: Shape(429, "rate_limit_error", "rate_limit_exceeded"),
    UpstreamBusyError: Shape(429, "rate_limit_error", "rate_limit_exceeded"),
    UpstreamRefusedError: Shape(400, "invalid_request_error", None),
    billing.RefusalError: Shape(400, "invalid_request_error", None),
    UpstreamError: Shape(502, "api_error", "upstream_error"),
    billing.UnavailableError: Shape(503, "api_error", "metering_unavailable"),
    billing.WorkerStalledError: Shape(503, "api_error", "server_stalled"),
    billing.PaymentsUnavailableError: Shape(503, "api_error", "payment_provider_unavailable"),
    billing.OverloadedError: Shape(503, "api_error", "overloaded"),
    billing.FeedFullError: Shape(503, "api_error", "feed_full"),
    billing.FxStaleError: Shape(503, "api_error", "fx_stale"),
    billing.ProviderQuotaError: Shape(503, "api_error", "provider_quota_exhausted"),
    UpstreamRefusesUsError: Shape(503, "api_error", "provider_quota_exhausted"),
    UpstreamTimeoutError: Shape(504, "api_error", "upstream_timeout"),
    billing.BrokenInvariantError: Shape(500, "api_error", "internal_error"),
    ProxyError: Shape(500, "api_error", "internal_error"),
    billing.TumaError: Shape(500, "api_error", "internal_error"),
}
_REASON_LENGTH_MAX = 200
# OpenAI's codes of an account without money, which come with 429 and mostly with the type that they had all before:
# https://help.openai.com/en/articles/6614457, https://developers.openai.com/docs/guides/error-codes
_EMPTY = {
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "project_spend_limit_exceeded",
}
# OpenRouter's `error.metadata.limit_source` of a limit that is ours, and of calls that are only too many at once:
# https://openrouter.ai/docs/api_reference/limits
_LIMIT_PREFIX = "openrouter_"
_IN_FLIGHT = "openrouter_in_flight_budget"
_SECONDS = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,3})?")
_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    431: "request_too_large",
}


def shape_of(error: billing.TumaError) -> Shape:
    """Return how an error looks from outside."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    raise AssertionError(f"{type(error).__name__} is no TumaError")


def error_object(error: billing.TumaError) -> ErrorObjectJson:
    """Return the ``error`` object in OpenAI's shape."""
    if isinstance(error, UpstreamRefusedError):
        return {**error.error}
    shape = shape_of(error)
    message = str(error)
    if shape.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        message = "Something went wrong on our side; nothing was charged that was not answered."
    return {
        "message": message,
        "type": shape.type,
        "param": getattr(error, "param", None),
        "code": shape.code,
    }


def error_response(error: billing.TumaError, *, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return the response for an error, with ``Retry-After`` where waiting helps."""
    status = error.status if isinstance(error, UpstreamRefusedError) else shape_of(error).status
    return _response(status, error_object(error), {**(headers or {}), **_retry_headers(error)})


def http_error_response(
    status: int, message: str, *, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return an error that HTTP itself made (unknown path, method, malformed request) in OpenAI's shape."""
    body: ErrorObjectJson = {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": _HTTP_CODES.get(status),
    }
    return _response(status, body, dict(headers or {}))


def _retry_headers(error: billing.TumaError) -> dict[str, str]:
    if isinstance(error, billing.RateLimitError):
        return {
            "Retry-After": str(-(-error.retry_after_ms // 1000)),
            "retry-after-ms": str(error.retry_after_ms),
            **({"x-should-retry": "false"} if error.hopeless else {}),
        }
    if isinstance(error, UpstreamTimeoutError):
        return {"x-should-retry": "false"} if error.may_be_billed else {}
    if isinstance(error, UpstreamBusyError):
        return {"Retry-After": error.retry_after or "1"}
    retry_after_s = getattr(error, "retry_after_s", None)
    return {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}


def _response(status: int, error: ErrorObjectJson, headers: Mapping[str, str]) -> web.Response:
    whole: ErrorJson = {"error": error}
    return web.Response(
        status=status,
        body=json.dumps(whole).encode(),
        content_type="application/json",
        headers=headers,
    )


def upstream_error(
    status: int, body: bytes, headers: Mapping[str, str], *, redact: Callable[[str], str]
) -> ProxyError:
    """Turn a provider's refusal into ours.

    4xx for the caller's own input passes through, moderation's and guardrails' 403 included; 401, 402, a limit of our
    account and a code of an empty account speak of us, whoever they are meant for.

    Args:
        status: the provider's.
        body: the provider's.
        headers: the provider's, by lower-case name; only ``retry-after`` is used.
        redact: takes our own key out, should the provider show it.
    """
    error = _parse_error(body, redact)
    reason = f"{status}: {error['message'][:_REASON_LENGTH_MAX]}"
    limit = _limit_source(error)
    if error["code"] in _EMPTY or error["type"] in _EMPTY:
        return UpstreamRefusesUsError(reason, subject="money", is_empty=True)
    if status == HTTPStatus.TOO_MANY_REQUESTS or limit == _IN_FLIGHT:
        return UpstreamBusyError(
            "The provider limits requests; try again.",
            retry_after=_whole_seconds(headers.get("retry-after")),
        )
    match status:
        case 401:
            return UpstreamRefusesUsError(reason, subject="key")
        case 402:
            return UpstreamRefusesUsError(reason, subject="money")
        case 403 if limit.startswith(_LIMIT_PREFIX):
            return UpstreamRefusesUsError(reason, subject="money")
        case 408 | 504:
            return UpstreamTimeoutError("The provider did not answer in time.")
        case _ if 400 <= status < 500:  # noqa: PLR2004 - HTTP
            return UpstreamRefusedError(status, error)
        case _:
            # A redirect, too: it is never followed, as it would take our key elsewhere.
            return UpstreamError(f"The provider failed with status {status}.")


def _limit_source(error: ErrorObjectJson) -> str:
    metadata = cast("Mapping[str, object]", error).get("metadata")
    source = metadata.get("limit_source") if isinstance(metadata, dict) else None
    return source if isinstance(source, str) else ""


def _whole_seconds(value: str | None) -> str | None:
    return value if value is not None and _SECONDS.fullmatch(value) else None


def _parse_error(body: bytes, redact: Callable[[str], str]) -> ErrorObjectJson:
    try:
        # Written anew, so that a key looks the same however it was escaped.
        parsed = json.loads(redact(json.dumps(json.loads(body), allow_nan=False)))
    except (ValueError, RecursionError):
        parsed = None
    found = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(found, str):
        found = {"message": found}
    if not isinstance(found, dict):
        found = {}
    code = found.get("code")
    ours: ErrorObjectJson = {
        "message": str(found.get("message") or "The provider refused the request."),
        "type": str(found.get("type") or "invalid_request_error"),
        "param": found.get("param"),
        "code": None if code is None else str(code),
    }
    return cast("ErrorObjectJson", {**found, **ours})  # with the provider's own members, each in its place
