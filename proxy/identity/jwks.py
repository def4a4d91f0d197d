"""The keys that an issuer publishes (JWKS, RFC 7517): which of them are used, and how they are fetched and kept."""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from jwt.exceptions import PyJWTError

from billing.errors import JwksUnavailableError
from billing.tasks import TrackedTasks
from config.settings import AuthSettings
from proxy.outbound.download import download
from proxy.outbound.trusted_url import check_url

_RSA_BITS_MIN = 2048
_RSA_BITS_MAX = 8192  # beyond it a signature costs milliseconds
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_DRAIN_S = 1.0
_log = structlog.get_logger("tuma.jwks")


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key and the one algorithm that it is used with, whatever a token says."""

    alg: str
    key: Any


def parse_jwks(body: bytes) -> Mapping[str, VerifyingKey]:
    """Return the usable keys of a JWKS by their ``kid``; the others are logged and left out.

    A ``kid`` that several usable keys share names none of them: which one is meant would be a guess.

    Raises:
        ValueError: this is no JWKS.
    """
    try:
        document = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("a JWKS is an object with a list of keys")  # noqa: TRY004 - it is what was sent
    found: list[tuple[str, VerifyingKey]] = []
    for jwk in listed:
        try:
            found.append(_parse_jwk(jwk))
        except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError) as error:
            name = jwk.get("kid") if isinstance(jwk, dict) else None
            _log.warning("jwks.key_refused", kid=name, reason=str(error))
    times = Counter(kid for kid, _ in found)
    for kid in (kid for kid, count in times.items() if count > 1):
        _log.warning("jwks.key_refused", kid=kid, reason="several keys share a kid")
    return {kid: key for kid, key in found if times[kid] == 1}


def _parse_jwk(jwk: object) -> tuple[str, VerifyingKey]:
    """Return a key and its name.

    Raises:
        PyJWTError, UnsupportedAlgorithm, ValueError, TypeError: it is not a public key to verify RS256 or ES256 with.
    """
    if not isinstance(jwk, dict):
        raise TypeError("not an object")
    kid = jwk.get("kid")
    if not isinstance(kid, str) or not kid:
        raise ValueError("a key without a kid")
    if jwk.get("use", "sig") != "sig" or "verify" not in jwk.get("key_ops", ["verify"]):
        raise ValueError("not for signatures")
    if jwk.get("kty") not in ("RSA", "EC") or _PRIVATE_MEMBERS & jwk.keys():
        raise ValueError("not a public key")  # a secret that everybody can read proves nothing
    key = _parse_rsa(jwk) if jwk["kty"] == "RSA" else _parse_ec(jwk)
    if jwk.get("alg", key.alg) != key.alg:
        raise ValueError("for another algorithm")
    return kid, key


def _parse_rsa(jwk: dict[str, Any]) -> VerifyingKey:
    key = RSAAlgorithm.from_jwk(jwk)
    if not _RSA_BITS_MIN <= key.key_size <= _RSA_BITS_MAX:
        raise ValueError(f"RSA of {key.key_size} bits")
    return VerifyingKey("RS256", key)


def _parse_ec(jwk: dict[str, Any]) -> VerifyingKey:
    if jwk.get("crv") != "P-256":
        raise ValueError("another curve than P-256")
    return VerifyingKey("ES256", ECAlgorithm.from_jwk(jwk))


class KeySet:
    """The issuer's keys: fetched when they are needed, by one fetch at a time, and kept while it is away.

    Args:
        settings: the address and the bounds.
        monotonic: a clock in seconds that never goes back.

    Raises:
        InputError: the address is not one that can be trusted.
    """

    def __init__(self, settings: AuthSettings, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        check_url(settings.jwks_url, name="TUMA_AUTH__JWKS_URL")
        self._settings = settings
        self._monotonic = monotonic
        self._keys: Mapping[str, VerifyingKey] = {}
        self._asked_at: float | None = None  # the last fetch, whatever came of it
        self._fetched_at: float | None = None  # the last that brought keys
        self._tasks = TrackedTasks()
        self._fetching: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Give up a fetch that goes on."""
        self._tasks.cancel()
        await self._tasks.drain(_DRAIN_S)

    def known_key(self, kid: str) -> VerifyingKey | None:
        """Return the key of this name as last fetched, without asking the issuer; None when that is too long ago."""
        return self._keys.get(kid) if self._age_s() <= self._settings.jwks_stale_s else None

    async def find_key(self, kid: str) -> VerifyingKey | None:
        """Return the key of this name, or None if the issuer has none; only for an unknown one the caller waits.

        Raises:
            JwksUnavailableError: it is not known, and the issuer cannot be asked.
        """
        key = self.known_key(kid)
        if key is not None:
            if self._age_s() > self._settings.jwks_ttl_s:
                self._fetch_soon()
            return key
        fetching = self._fetch_soon()
        if fetching is not None:
            await asyncio.wait(
                {fetching}
            )  # not the task itself: a caller that leaves must not end it for the others
        key = self.known_key(kid)
        if key is None and (
            self._fetched_at != self._asked_at or self._age_s() > self._settings.jwks_stale_s
        ):
            raise JwksUnavailableError(
                "The issuer of the token cannot be asked for its keys now; try again.",
                retry_after_s=max(1, math.ceil(self._wait_s())),
            )
        return key

    def _age_s(self) -> float:
        return math.inf if self._fetched_at is None else self._monotonic() - self._fetched_at

    def _wait_s(self) -> float:
        """Seconds until the issuer may be asked again: a caller can name any kid, and must not make us hammer it."""
        if self._asked_at is None:
            return 0.0
        return self._asked_at + self._settings.jwks_retry_s - self._monotonic()

    def _fetch_soon(self) -> asyncio.Task[None] | None:
        """Return the fetch that goes on, or that begins now; None when it is too early for another."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        if self._wait_s() > 0:
            return None
        self._asked_at = self._monotonic()
        self._fetching = self._tasks.start(self._fetch(self._asked_at), name="jwks")
        return self._fetching

    async def _fetch(self, began_at: float) -> None:
        try:
            keys = parse_jwks(
                await download(
                    self._settings.jwks_url,
                    timeout_s=self._settings.jwks_timeout_s,
                    bytes_max=self._settings.jwks_bytes,
                )
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            _log.warning("jwks.fetch_failed", error=repr(error))
            return
        # A key that is still there stays the same object: what it verified stays verified.
        self._keys = {kid: old if (old := self._keys.get(kid)) == key else key for kid, key in keys.items()}
        self._fetched_at = began_at
        _log.info("jwks.fetched", keys=len(keys))
