"""Where exchange rates come from: open.er-api.com, openexchangerates.org, or a file of either shape."""

import asyncio
import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from billing.errors import FxSourceError, InputError
from billing.fx.rates import SourceRates, clean_rates
from billing.fx.sync import RateSource
from config.settings import FxSettings
from proxy.outbound.download import download
from proxy.outbound.trusted_url import check_url

_ERROR_CODE = re.compile(r"[a-z][a-z_-]{2,39}")
_FUTURE_S = 24 * 3600.0  # clocks differ; a day is none
_TIME_MAX = 10**11  # seconds since 1970 that a datetime holds
# What is asked for below a base: https://www.exchangerate-api.com/docs/free, https://docs.openexchangerates.org/reference/latest-json
_OPEN = {"": "v6/latest/USD", "/v6": "latest/USD"}
_KEYED = {"": "api/latest.json", "/api": "latest.json"}


def make_sources(settings: FxSettings) -> list[RateSource]:
    """Return the sources of the settings, the first first; none without ``TUMA_FX__URL``.

    Raises:
        InputError: an address that cannot be trusted, or the same twice.
    """
    named = [
        ("TUMA_FX__URL", settings.url, settings.app_id.get_secret_value()),
        ("TUMA_FX__SECOND_URL", settings.second_url, settings.second_app_id.get_secret_value()),
    ]
    if settings.second_url and not settings.url:
        raise InputError("TUMA_FX__SECOND_URL is compared with TUMA_FX__URL, which is not set")
    if settings.url and settings.url == settings.second_url:
        raise InputError("TUMA_FX__URL and TUMA_FX__SECOND_URL must be two sources: one agrees with itself")
    return [_make(name, url, app_id, settings) for name, url, app_id in named if url]


def _make(name: str, url: str, app_id: str, settings: FxSettings) -> RateSource:
    if url.startswith("file:"):
        return FileSource(Path(URL(url).path), settings)
    return HttpSource(locate(url, keyed=bool(app_id), name=name), app_id, settings)


def locate(url: str, *, keyed: bool, name: str) -> URL:
    """Return the document's address: the one given, or below it where it is a service's base.

    Args:
        url: as in the settings.
        keyed: there is an ``app_id``: openexchangerates.org's paths.
        name: of the setting.

    Raises:
        InputError: someone on the way could answer for it.
    """
    address = check_url(url, name=name)
    below = (_KEYED if keyed else _OPEN).get(address.path.rstrip("/"))
    return address if below is None else address.with_path(f"{address.path.rstrip('/')}/{below}")


class HttpSource:
    """A source that is asked over HTTP; redirects are not followed, and the ``app_id`` is in no message.

    Args:
        address: of the document.
        app_id: openexchangerates.org's key, or empty.
        settings: bounds on time, size and age.
    """

    def __init__(self, address: URL, app_id: str, settings: FxSettings) -> None:
        port = address.explicit_port
        self.name = f"{address.host}" if port is None else f"{address.host}:{port}"
        self._address = address.with_query({"app_id": app_id}) if app_id else address
        self._settings = settings

    async def fetch(self) -> SourceRates:
        """Ask for the rates of now.

        Raises:
            FxSourceError: no answer, or none that can be believed.
        """
        try:
            body = await download(
                self._address, timeout_s=self._settings.timeout_s, bytes_max=self._settings.answer_bytes
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:  # its text may have the address in it
            raise FxSourceError(f"{self.name} does not answer: {type(error).__name__}") from None
        except ValueError as error:
            raise FxSourceError(f"{self.name} answered with {error}") from None
        return _read(self.name, body, self._settings)


class FileSource:
    """A source that somebody else writes: a file of either service's shape, or just ``{"base": "USD", "rates": {…}}``.

    Args:
        path: of the file.
        settings: bounds on size and age.
    """

    def __init__(self, path: Path, settings: FxSettings) -> None:
        self.name = f"file:{path}"
        self._path = path
        self._settings = settings

    async def fetch(self) -> SourceRates:
        """Read the file.

        Raises:
            FxSourceError: it cannot be read, or not be believed.
        """
        try:
            body = await asyncio.to_thread(self._read)
        except OSError as error:
            raise FxSourceError(f"{self.name} cannot be read: {type(error).__name__}") from None
        if len(body) > self._settings.answer_bytes:
            raise FxSourceError(f"{self.name} has more than {self._settings.answer_bytes} bytes")
        return _read(self.name, body, self._settings)

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            return file.read(self._settings.answer_bytes + 1)


def _read(name: str, body: bytes, settings: FxSettings) -> SourceRates:
    try:
        return read_document(body, now=datetime.now(UTC), age_max_s=settings.document_age_max_s)
    except FxSourceError as error:
        raise FxSourceError(f"{name}: {error}") from None


def read_document(body: bytes, *, now: datetime, age_max_s: float) -> SourceRates:
    """Read what a source answered, in either shape; numbers as they are written.

    open.er-api.com: ``result, base_code, time_last_update_unix, rates``; openexchangerates.org: ``base, timestamp, rates``.

    Args:
        body: the answer.
        now: for how old its rates are.
        age_max_s: the most that they may be.

    Raises:
        FxSourceError: it is neither, its base is not USD, its rates are too old, or none of them is usable.
    """
    try:
        document = json.loads(body, parse_float=Decimal, parse_constant=Decimal)
    except (ValueError, ArithmeticError, RecursionError):
        raise FxSourceError("what it sent is no JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("rates"), dict):
        raise FxSourceError(f"what it sent has no rates{_reason(document)}")
    opened = "base_code" in document or "result" in document
    if opened and document.get("result") != "success":
        raise FxSourceError(f"it did not succeed{_reason(document)}")
    if document.get("base_code" if opened else "base") != "USD":
        raise FxSourceError("its rates are not for one USD")
    as_of = _moment(document.get("time_last_update_unix" if opened else "timestamp"))
    if as_of is not None and not -_FUTURE_S <= (now - as_of).total_seconds() <= age_max_s:
        raise FxSourceError(f"its rates are of {as_of:%Y-%m-%d %H:%M} UTC")
    rates, unusable = clean_rates(document["rates"])
    if not rates:
        raise FxSourceError("it names no usable rate")
    return SourceRates(as_of, rates, unusable)


def _moment(seconds: object) -> datetime | None:
    if seconds is None:
        return None
    if type(seconds) is not int or not 0 <= seconds < _TIME_MAX:
        raise FxSourceError("the time that it names is none")
    return datetime.fromtimestamp(seconds, UTC)


def _reason(document: Any) -> str:
    """Return the code of a service's own error; nothing else that it sent is shown."""
    said = document.get("error-type", document.get("message")) if isinstance(document, dict) else None
    return f": {said}" if isinstance(said, str) and _ERROR_CODE.fullmatch(said) else ""
