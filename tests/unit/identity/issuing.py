"""Issuers, their keys and tokens, for the tests of who signs in."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import strategies as st

from billing.errors import InvalidTokenError
from config.settings import AuthSettings
from proxy.identity.jwt import JwtVerifier

NOW_S = 1_800_000_000
ISSUER = "https://project.example/auth/v1"
SECRET = "a secret that the issuer shares with us"
PERSON = "5f0c2f4e-6c52-4d3c-a5ea-6a1f0a5a7a11"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def number(value: int, size: int | None = None) -> str:
    return b64(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


def claims_of(**changes: Any) -> dict[str, Any]:
    """A token's payload as Supabase writes it; a change to None leaves the claim out."""
    usual = {
        "iss": ISSUER,
        "aud": "authenticated",
        "sub": PERSON,
        "email": "ada@example.com",
        "role": "authenticated",
        "aal": "aal1",
        "session_id": "5f0c2f4e-6c52-4d3c-a5ea-6a1f0a5a7a12",
        "is_anonymous": False,
        "iat": NOW_S - 60,
        "exp": NOW_S + 3540,
        "user_metadata": {"name": "Ada"},
    }
    return {name: value for name, value in {**usual, **changes}.items() if value is not None}


@dataclass(frozen=True)
class Key:
    """An issuer's private key, or a secret."""

    alg: str
    kid: str | None
    sign: Callable[[bytes], bytes]
    jwk: dict[str, Any] = field(default_factory=dict)
    private: Any = None

    @property
    def public(self) -> Any:
        return self.private.public_key()

    def token(self, payload: object = None, headers: dict[str, Any] | None = None) -> str:
        """Sign; headers of None are left out."""
        header = {"alg": self.alg, "typ": "JWT", "kid": self.kid, **(headers or {})}
        header = {name: value for name, value in header.items() if value is not None}
        return self.sign_texts(json.dumps(header), json.dumps(claims_of() if payload is None else payload))

    def sign_texts(self, header: str, payload: str) -> str:
        signed = f"{b64(header.encode())}.{b64(payload.encode())}"
        return f"{signed}.{b64(self.sign(signed.encode()))}"


def secret_key(secret: bytes = SECRET.encode(), *, kid: str | None = None) -> Key:
    return Key("HS256", kid, lambda signed: hmac.digest(secret, signed, hashlib.sha256))


def rsa_key(kid: str, bits: int = 2048) -> Key:
    private = rsa.generate_private_key(65537, bits)
    numbers = private.public_key().public_numbers()
    jwk = {"kty": "RSA", "kid": kid, "alg": "RS256", "use": "sig", "key_ops": ["verify"]}
    return Key(
        "RS256",
        kid,
        lambda signed: private.sign(signed, padding.PKCS1v15(), hashes.SHA256()),
        {**jwk, "n": number(numbers.n), "e": number(numbers.e)},
        private,
    )


def ec_key(kid: str, curve: ec.EllipticCurve | None = None) -> Key:
    private = ec.generate_private_key(curve or ec.SECP256R1())
    numbers = private.public_key().public_numbers()
    size = (private.curve.key_size + 7) // 8
    names = {"secp256r1": "P-256", "secp384r1": "P-384", "secp256k1": "secp256k1"}

    def sign(signed: bytes) -> bytes:
        r, s = decode_dss_signature(private.sign(signed, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")

    jwk = {"kty": "EC", "kid": kid, "crv": names[private.curve.name], "use": "sig"}
    return Key(
        "ES256", kid, sign, {**jwk, "x": number(numbers.x, size), "y": number(numbers.y, size)}, private
    )


HS = secret_key()
RSA = rsa_key("rsa-1")
EC = ec_key("ec-1")
GOOD_HS, GOOD_RSA, GOOD_EC = HS.token(), RSA.token(), EC.token()


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def wall(self) -> float:
        return NOW_S + self.passed_s

    def monotonic(self) -> float:
        return 1000 + self.passed_s


class Issuer:
    """Serves a JWKS on loopback, counts who asks, and misbehaves when told to."""

    def __init__(self, *keys: Key) -> None:
        self.jwks: list[Any] = [key.jwk for key in keys]
        self.asked = 0
        self.elsewhere = 0  # what was asked of other paths: somewhere that a token or an answer pointed to
        self.answer: Callable[[], Awaitable[web.StreamResponse]] | None = None
        self.url = ""

    def publish(self, *keys: Key) -> None:
        self.jwks = [key.jwk for key in keys]

    async def _serve(self, _request: web.BaseRequest) -> web.StreamResponse:
        self.asked += 1
        if self.answer is not None:
            return await self.answer()
        return web.json_response({"keys": self.jwks})

    async def _serve_elsewhere(self, _request: web.BaseRequest) -> web.StreamResponse:
        self.elsewhere += 1
        return web.json_response({"keys": self.jwks})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Issuer"]:
        app = web.Application()
        app.router.add_get("/jwks.json", self._serve)
        app.router.add_get("/{tail:.*}", self._serve_elsewhere)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/jwks.json"
        try:
            yield self
        finally:
            await runner.cleanup()


@asynccontextmanager
async def verifying(clock: Clock, **changes: Any) -> AsyncIterator[JwtVerifier]:
    usual = {"jwt_secret": SECRET, "issuer": ISSUER, "audience": "authenticated"}
    ttl_s = {
        name: changes.pop(name) for name in ("cache_ttl_s",) if name in changes
    }  # longer than is allowed
    settings = AuthSettings.model_validate({**usual, **changes}).model_copy(update=ttl_s)
    made = JwtVerifier(settings, clock=clock.wall, monotonic=clock.monotonic)
    try:
        yield made
    finally:
        await made.close()


async def refused(verifier: JwtVerifier, token: str, word: str = "") -> None:
    """Assert that a token is refused, with a message that names what is wrong and shows nothing of the token."""
    with pytest.raises(InvalidTokenError) as caught:
        await verifier.verify(token)
    message = str(caught.value)
    assert word in message
    assert message.startswith("The token")
    assert len(message) < 100
    assert not any(len(part) > 12 and part in message for part in token.split("."))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
