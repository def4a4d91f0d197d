"""Who signs in: the frontend's JWTs (RFC 7519, in Supabase's shape), verified by the shared secret or the issuer's keys.

HS256 is verified by the secret alone, RS256 and ES256 by the issuer's key of the token's ``kid`` alone (RFC 8725): what a
token says of itself chooses neither key nor algorithm.

PyJWT verifies: spelling, signature, algorithm, issuer and audience. In front of it stands what it does not ask: that a
name occurs once, that the text is UTF-8, and that the header brings no key along and is of a token to sign in with.
Behind it stands what it reads with less care: times (to it ``"60"`` and ``true`` are numbers, and fractions are cut), a
person's role, and text that a database can hold.
"""

import base64
import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

import jwt
from jwt.algorithms import HMACAlgorithm
from jwt.exceptions import (
    InvalidAlgorithmError,
    InvalidAudienceError,
    InvalidIssuerError,
    InvalidSignatureError,
    MissingRequiredClaimError,
    PyJWTError,
)
from jwt.types import Options

from billing.errors import InputError, InvalidTokenError
from config.settings import AuthSettings
from proxy.identity.jwks import KeySet, VerifyingKey

_SECRET_BYTES_MIN = 32  # RFC 7518, 3.2
_SUBJECT_LENGTH_MAX = 255
_EMAIL_LENGTH_MAX = 320
_MOMENT_MAX_S = 253_402_300_799  # the end of the year 9999: of datetime
_PERSON = "authenticated"  # Supabase's role of someone who signed in; "anon" and "service_role" name nobody
_TYPES = ("jwt", "at+jwt")  # a logout or DPoP token of the same issuer is not one to sign in with
_REFUSED_HEADERS = ("crit", "jku", "jwk", "x5u", "x5c")  # extensions, and keys that the token brings along
_COMPACT = re.compile(r"([\w-]+)\.([\w-]+)\.[\w-]+", re.ASCII)  # without the "=" that PyJWT lets pass
_MALFORMED = "The token is malformed."


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says. The e-mail address is the issuer's word: only the subject identifies a person."""

    subject: str
    email: str | None
    role: str | None
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class _Token:
    """A token taken apart; nothing of it is believed yet."""

    alg: str
    kid: str | None
    claims: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Verified:
    """A token's claims, and until when they need no second look."""

    claims: Claims
    until: float  # of the monotonic clock
    expires_s: float  # since 1970
    kid: str | None  # of an issuer's key
    key: VerifyingKey


class JwtVerifier:
    """Verifies tokens; those seen a moment ago from memory.

    Args:
        settings: secret, issuer and bounds.
        clock: seconds since 1970, for the claims.
        monotonic: a clock in seconds that never goes back, for the caches.

    Raises:
        InputError: the secret is too weak, or the address of the keys cannot be trusted.
    """

    def __init__(
        self,
        settings: AuthSettings,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        secret = settings.jwt_secret.get_secret_value()
        self._secret = _secret_key(secret.encode()) if secret else None
        self._keys = KeySet(settings, monotonic=monotonic) if settings.jwks_url else None
        self._settings = settings
        self._options: Options = {
            "verify_aud": bool(settings.audience),  # without it any will do
            "verify_exp": False,  # these are read behind it, by our clock
            "verify_nbf": False,
            "verify_iat": False,
            "verify_sub": False,
            "verify_jti": False,  # nothing is made of it
        }
        self._clock = clock
        self._monotonic = monotonic
        self._cache: OrderedDict[bytes, _Verified] = OrderedDict()

    @property
    def configured(self) -> bool:
        """Whether there is anything to verify tokens with."""
        return self._secret is not None or self._keys is not None

    async def close(self) -> None:
        """Give up what goes on in the background."""
        if self._keys is not None:
            await self._keys.close()

    async def verify(self, token: str) -> Claims:
        """Tell what the token says.

        Raises:
            InvalidTokenError: it is not one of the issuer's, for us, for a person, and for now.
            JwksUnavailableError: its key is not known, and the issuer cannot be asked.
        """
        if not token.isascii() or len(token) > self._settings.jwt_bytes:
            raise InvalidTokenError("The token is malformed or too large.")
        digest = hashlib.sha256(token.encode()).digest()
        claims = self._find_verified(digest)
        if claims is not None:
            return claims
        parts = _take_apart(token)
        key = await self._get_key(parts)
        self._check(token, key)
        claims = _read_claims(parts.claims, self._settings, now_s=self._clock())
        self._remember(digest, claims, parts.kid, key)
        return claims

    async def _get_key(self, token: _Token) -> VerifyingKey:
        if token.alg == "HS256" and self._secret is not None:
            return self._secret
        if token.alg not in ("RS256", "ES256") or self._keys is None:
            raise InvalidTokenError("The token's 'alg' is not accepted here.")
        key = await self._keys.find_key(token.kid) if token.kid is not None else None
        if key is None:
            raise InvalidTokenError("The token's 'kid' is not a key of the issuer.")
        return key

    def _check(self, token: str, key: VerifyingKey) -> None:
        """Check signature, algorithm, issuer and audience.

        Raises:
            InvalidTokenError: one is wrong; the message names it.
        """
        try:
            jwt.decode(
                token,
                key.key,
                algorithms=[key.alg],
                options=self._options,
                issuer=self._settings.issuer or None,
                audience=self._settings.audience or None,
            )
        except PyJWTError as error:
            raise InvalidTokenError(_reason(error)) from None

    def _find_verified(self, digest: bytes) -> Claims | None:
        """Return the claims of a token seen a moment ago, while its key is still the issuer's."""
        found = self._cache.get(digest)
        if found is None:
            return None
        current = found.key is self._secret or (
            self._keys is not None and found.kid is not None and self._keys.known_key(found.kid) is found.key
        )
        if current and self._monotonic() < found.until and self._clock() < found.expires_s:
            return found.claims
        del self._cache[digest]
        return None

    def _remember(self, digest: bytes, claims: Claims, kid: str | None, key: VerifyingKey) -> None:
        until = self._monotonic() + self._settings.cache_ttl_s
        self._cache[digest] = _Verified(claims, until, claims.expires_at.timestamp(), kid, key)
        if len(self._cache) > self._settings.cache_entries:
            self._cache.popitem(last=False)


def _secret_key(secret: bytes) -> VerifyingKey:
    if len(secret) < _SECRET_BYTES_MIN:
        raise InputError(f"TUMA_AUTH__JWT_SECRET must have at least {_SECRET_BYTES_MIN} bytes")
    try:
        return VerifyingKey("HS256", HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret))
    except PyJWTError:
        raise InputError(
            "TUMA_AUTH__JWT_SECRET is a key of another kind: give it the shared secret"
        ) from None


def _take_apart(token: str) -> _Token:
    """Read a token: its header, and what it claims.

    Raises:
        InvalidTokenError: it is malformed, or its header asks for what we do not do.
    """
    parts = _COMPACT.fullmatch(token)
    if parts is None:
        raise InvalidTokenError(_MALFORMED)
    header = _object(parts[1])
    for name in _REFUSED_HEADERS:
        if name in header:
            raise InvalidTokenError(f"The token's '{name}' header is not accepted.")
    alg, kid, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    if not isinstance(alg, str) or not isinstance(kid, str | None):
        raise InvalidTokenError("The token's 'alg' or 'kid' is malformed.")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise InvalidTokenError("The token's 'typ' is not accepted.")
    return _Token(alg, kid, _object(parts[2]))


def _reason(error: PyJWTError) -> str:
    """Say what PyJWT refused, in words that show nothing of the token."""
    match error:
        case InvalidSignatureError():
            return "The token's signature is not valid."
        case InvalidAlgorithmError():
            return "The token's 'alg' is not its key's."
        case InvalidIssuerError() | MissingRequiredClaimError(claim="iss"):
            return "The token's 'iss' is not the issuer that is expected."
        case InvalidAudienceError() | MissingRequiredClaimError(claim="aud"):
            return "The token's 'aud' is not the audience that is expected."
        case _:
            return _MALFORMED


def _object(part: str) -> dict[str, Any]:
    """Read a part: a JSON object in UTF-8 whose names occur once, as others may read the other value."""
    try:
        text = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode()
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidTokenError(_MALFORMED)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _read_claims(claims: dict[str, Any], settings: AuthSettings, *, now_s: float) -> Claims:
    """Check the claims that PyJWT does not, of a token that it found good.

    Raises:
        InvalidTokenError: one is missing, of a wrong type, or not of a person or for now; the message names it.
    """
    expires_s = _find_moment(claims, "exp")
    if expires_s is None or now_s >= expires_s + settings.leeway_s:
        raise InvalidTokenError("The token has expired or has no 'exp': sign in again.")
    for name in ("nbf", "iat"):
        moment_s = _find_moment(claims, name)
        if moment_s is not None and now_s < moment_s - settings.leeway_s:
            raise InvalidTokenError(f"The token's '{name}' is in the future.")
    if claims.get("role", _PERSON) != _PERSON:
        raise InvalidTokenError("The token's 'role' is not that of a person who signed in.")
    subject = _find_text(claims, "sub", _SUBJECT_LENGTH_MAX)
    if subject is None:
        raise InvalidTokenError("The token's 'sub' is missing.")
    email = _find_text(claims, "email", _EMAIL_LENGTH_MAX)
    return Claims(subject, email, claims.get("role"), datetime.fromtimestamp(expires_s, UTC))


def _find_moment(claims: dict[str, Any], name: str) -> float | None:
    """Return seconds since 1970, which may have a fraction (RFC 7519, 2: NumericDate)."""
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOMENT_MAX_S:
        raise InvalidTokenError(f"The token's '{name}' is not a time in seconds.")
    return float(value)


def _find_text(claims: dict[str, Any], name: str, length_max: int) -> str | None:
    """Return a claim that a database can hold as it is; None if it is absent, null or empty."""
    value = claims.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > length_max or not value.isprintable():
        raise InvalidTokenError(f"The token's '{name}' is malformed.")
    if value != value.strip():
        raise InvalidTokenError(f"The token's '{name}' is malformed.")
    return value
