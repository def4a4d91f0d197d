"""Users' tokens: what a forger, a careless issuer or a broken network may try, against real keys and a real issuer."""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from billing.errors import InputError, InvalidKeyError, InvalidTokenError, JwksUnavailableError
from config.settings import AuthSettings
from proxy.http.errors import error_response, shape_of
from proxy.identity.jwks import KeySet, parse_jwks
from proxy.identity.jwt import Claims, JwtVerifier

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


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with Issuer(RSA, EC).serving() as serving:
        yield serving


@pytest.fixture
def clock() -> Clock:
    return Clock()


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


@pytest.fixture
async def verifier(clock: Clock, issuer: Issuer) -> AsyncIterator[JwtVerifier]:
    """Verifies all three kinds of tokens."""
    async with verifying(clock, jwks_url=issuer.url) as made:
        yield made


async def refused(verifier: JwtVerifier, token: str, word: str = "") -> None:
    """Assert that a token is refused, with a message that names what is wrong and shows nothing of the token."""
    with pytest.raises(InvalidTokenError) as caught:
        await verifier.verify(token)
    message = str(caught.value)
    assert word in message
    assert message.startswith("The token")
    assert len(message) < 100
    assert not any(len(part) > 12 and part in message for part in token.split("."))


# What is accepted


@pytest.mark.parametrize("key", [HS, RSA, EC], ids=lambda key: key.alg)
async def test_a_good_token_says_who_signed_in(verifier: JwtVerifier, key: Key) -> None:
    assert await verifier.verify(key.token()) == Claims(
        PERSON, "ada@example.com", "authenticated", datetime.fromtimestamp(NOW_S + 3540, UTC)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["authenticated"]},
        {"aud": ["others", "authenticated"]},
        {"role": None},
        {"email": None},
        {"email": ""},
        {"exp": NOW_S - 29},
        {"nbf": NOW_S + 30},
        {"iat": NOW_S + 30},
        {"iat": None},
        {"sub": "ж" * 255},
        {"exp": 253_402_300_799},
    ],
    ids=str,
)
async def test_what_issuers_also_write_is_accepted(verifier: JwtVerifier, changes: dict[str, Any]) -> None:
    claims = claims_of(**changes)
    found = await verifier.verify(HS.token(claims))
    assert found.subject == claims["sub"]
    assert found.email == (claims.get("email") or None)
    assert found.role == claims.get("role")


@pytest.mark.parametrize(
    "headers", [{"typ": None}, {"typ": "at+jwt"}, {"kid": "any"}, {"x5t": "thumb", "unknown": [1]}], ids=str
)
async def test_headers_that_change_nothing_are_ignored(
    verifier: JwtVerifier, headers: dict[str, Any]
) -> None:
    await verifier.verify(HS.token(headers=headers))


async def test_without_issuer_and_audience_any_will_do(clock: Clock) -> None:
    async with verifying(clock, issuer="", audience="") as verifier:
        await verifier.verify(HS.token(claims_of(iss="other", aud=["b"])))
        await verifier.verify(HS.token(claims_of(iss=None, aud=None)))


# Algorithms and keys


@pytest.mark.parametrize(
    "alg",
    [
        *("none", "None", "NONE", "nOnE", "none ", "", "hs256", "HS384", "HS512", "RS384", "RS512", "PS256"),
        *("ES384", "ES256K", "EdDSA", "HS256\u0000", "RSA1_5", None, 0, True, ["HS256"], {"HS256": 1}),
    ],
    ids=repr,
)
async def test_other_algorithms_are_refused(verifier: JwtVerifier, alg: Any) -> None:
    headers = {"alg": alg, "kid": "rsa-1"}
    signed = f"{b64(json.dumps(headers).encode())}.{b64(json.dumps(claims_of()).encode())}"
    for signature in ("", b64(HS.sign(signed.encode())), b64(RSA.sign(signed.encode())), "AA"):
        await refused(verifier, f"{signed}.{signature}")


def spellings(key: Key) -> list[bytes]:
    """The bytes that a forger may take for a secret, because everybody can read them."""
    public = key.public
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    found = [
        pem,
        pem.rstrip(),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(key.jwk).encode(),
        json.dumps(key.jwk, separators=(",", ":")).encode(),
        json.dumps({"keys": [key.jwk]}).encode(),
        public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        b"",
        str(key.kid).encode(),
    ]
    for name in ("n", "e", "x", "y"):
        if name in key.jwk:
            found += [unb64(key.jwk[name]), key.jwk[name].encode()]
    return found


@pytest.mark.parametrize("key", [RSA, EC], ids=lambda key: key.alg)
@pytest.mark.parametrize("secret", [SECRET, ""], ids=["with secret", "without"])
async def test_a_public_key_is_no_secret(clock: Clock, issuer: Issuer, key: Key, secret: str) -> None:
    async with verifying(clock, jwks_url=issuer.url, jwt_secret=secret) as verifier:
        await verifier.verify(key.token())
        for spelling in spellings(key):
            await refused(verifier, secret_key(spelling, kid=key.kid).token())
            await refused(verifier, secret_key(spelling, kid=key.kid).token(headers={"alg": key.alg}))


async def test_a_key_verifies_by_its_own_algorithm_alone(verifier: JwtVerifier) -> None:
    await refused(verifier, RSA.token(headers={"alg": "ES256"}), "alg")
    await refused(verifier, EC.token(headers={"alg": "RS256"}), "alg")
    await refused(verifier, RSA.token(headers={"kid": "ec-1"}), "alg")
    await refused(verifier, EC.token(headers={"kid": "rsa-1"}), "alg")
    await refused(verifier, EC.token(headers={"alg": "RS256", "kid": "rsa-1"}), "signature")
    await refused(verifier, HS.token(headers={"alg": "RS256", "kid": "rsa-1"}), "signature")
    await refused(verifier, RSA.token(headers={"alg": "HS256"}), "signature")


async def test_another_key_under_the_same_name_is_refused(verifier: JwtVerifier) -> None:
    await refused(verifier, ec_key("ec-1").token(), "signature")
    await refused(verifier, secret_key(b"another secret of thirty-two bytes or more").token(), "signature")


@pytest.mark.parametrize(
    "kid", [None, "", "rsa-2", "../rsa-1", "RSA-1", 7, ["rsa-1"], {"kid": "rsa-1"}], ids=repr
)
async def test_a_token_without_the_name_of_its_key_is_refused(verifier: JwtVerifier, kid: Any) -> None:
    await refused(verifier, RSA.token(headers={"kid": kid}), "kid")


async def test_keys_that_a_token_brings_along_are_not_looked_at(
    verifier: JwtVerifier, issuer: Issuer
) -> None:
    own = ec_key("own")
    await verifier.verify(EC.token())
    there = issuer.url.replace("jwks.json", "mine.json")
    for headers in (
        {"jwk": own.jwk},
        {"jwk": own.jwk, "kid": "ec-1"},
        {"jku": there, "kid": "ec-1"},
        {"x5u": there, "kid": "ec-1"},
        {"x5c": ["MII"], "kid": "ec-1"},
    ):
        name = next(iter(headers))
        await refused(verifier, own.token(headers=headers), name)
        await refused(verifier, EC.token(headers={**headers, "kid": "ec-1"}), name)
    assert (issuer.asked, issuer.elsewhere) == (1, 0)


@pytest.mark.parametrize("crit", [[], ["b64"], ["exp"], "b64", 0, {}], ids=repr)
async def test_critical_extensions_are_refused(verifier: JwtVerifier, crit: Any) -> None:
    for key in (HS, RSA, EC):
        await refused(verifier, key.token(headers={"crit": crit, "b64": False}), "crit")
        await refused(verifier, key.token(headers={"crit": crit, "exp": 1}), "crit")


async def test_tokens_for_other_purposes_are_refused(verifier: JwtVerifier) -> None:
    for kind in ("logout+jwt", "dpop+jwt", "JWE", "", 1, ["JWT"]):
        await refused(verifier, HS.token(headers={"typ": kind}), "typ")


@pytest.mark.parametrize("key", [HS, RSA, EC], ids=lambda key: key.alg)
async def test_signatures_are_whole_and_of_this_payload(verifier: JwtVerifier, key: Key) -> None:
    header, payload, signature = key.token().split(".")
    other = b64(json.dumps(claims_of(sub="somebody else")).encode())
    raw = unb64(signature)
    await refused(verifier, f"{header}.{other}.{signature}", "signature")
    await refused(verifier, f"{header}.{payload}.", "malformed")
    await refused(verifier, f"{header}.{payload}", "malformed")
    for wrong in (
        raw[:-1],
        raw + b"\0",
        b"\0" + raw,
        raw[::-1],
        bytes(len(raw)),
        b"\xff" * len(raw),
        raw * 2,
    ):
        await refused(verifier, f"{header}.{payload}.{b64(wrong)}", "signature")


async def test_an_es256_signature_is_r_and_s_in_full(verifier: JwtVerifier) -> None:
    header, payload, signature = EC.token().split(".")
    der = EC.private.sign(f"{header}.{payload}".encode(), ec.ECDSA(hashes.SHA256()))
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    r, s = unb64(signature)[:32], unb64(signature)[32:]
    for wrong in (
        der,
        bytes(64),
        r + bytes(32),
        bytes(32) + s,
        order.to_bytes(32, "big") * 2,
        s + r,
        b"\0" + r + b"\0" + s,
    ):
        await refused(verifier, f"{header}.{payload}.{b64(wrong)}", "signature")


async def test_rs256_is_pkcs1_with_sha256(verifier: JwtVerifier) -> None:
    header, payload, _ = RSA.token().split(".")
    signed = f"{header}.{payload}".encode()
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    for wrong in (
        RSA.private.sign(signed, pss, hashes.SHA256()),
        RSA.private.sign(signed, padding.PKCS1v15(), hashes.SHA512()),
    ):
        await refused(verifier, f"{header}.{payload}.{b64(wrong)}", "signature")


async def test_kinds_that_are_not_configured_are_refused(clock: Clock, issuer: Issuer) -> None:
    async with verifying(clock) as by_secret:
        assert by_secret.configured
        await by_secret.verify(HS.token())
        await refused(by_secret, RSA.token(), "alg")
    async with verifying(clock, jwt_secret="", jwks_url=issuer.url) as by_keys:
        assert by_keys.configured
        await by_keys.verify(RSA.token())
        await refused(by_keys, HS.token(), "alg")
    async with verifying(clock, jwt_secret="") as by_none:
        assert not by_none.configured
        for key in (HS, RSA, EC):
            await refused(by_none, key.token(), "alg")


# Claims


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("exp", {"exp": NOW_S - 30}),
        ("exp", {"exp": NOW_S - 31}),
        ("exp", {"exp": None}),
        ("exp", {"exp": 0}),
        ("exp", {"exp": -1}),
        ("exp", {"exp": str(NOW_S + 60)}),
        ("exp", {"exp": True}),
        ("exp", {"exp": [NOW_S + 60]}),
        ("exp", {"exp": {}}),
        ("exp", {"exp": (NOW_S + 60) * 1000}),
        ("exp", {"exp": 10**30}),
        ("exp", {"exp": 253_402_300_800}),
        ("nbf", {"nbf": NOW_S + 31}),
        ("nbf", {"nbf": "0"}),
        ("nbf", {"nbf": False}),
        ("iat", {"iat": NOW_S + 31}),
        ("iat", {"iat": NOW_S + 30.5}),
        ("iss", {"iss": None}),
        ("iss", {"iss": ISSUER + "/"}),
        ("iss", {"iss": ISSUER.upper()}),
        ("iss", {"iss": [ISSUER]}),
        ("iss", {"iss": ""}),
        ("aud", {"aud": None}),
        ("aud", {"aud": "anon"}),
        ("aud", {"aud": "authenticated,anon"}),
        ("aud", {"aud": "authenticate"}),
        ("aud", {"aud": []}),
        ("aud", {"aud": ["anon", "others"]}),
        ("aud", {"aud": ["authenticated", 1]}),
        ("aud", {"aud": [["authenticated"]]}),
        ("aud", {"aud": {"authenticated": True}}),
        ("role", {"role": "anon"}),
        ("role", {"role": "service_role"}),
        ("role", {"role": "supabase_admin"}),
        ("role", {"role": ""}),
        ("role", {"role": ["authenticated"]}),
        ("role", {"role": 1}),
        ("sub", {"sub": None}),
        ("sub", {"sub": ""}),
        ("sub", {"sub": " "}),
        ("sub", {"sub": " padded"}),
        ("sub", {"sub": "x" * 256}),
        ("sub", {"sub": 7}),
        ("sub", {"sub": True}),
        ("sub", {"sub": [PERSON]}),
        ("sub", {"sub": "nul\u0000"}),
        ("sub", {"sub": "line\n"}),
        ("sub", {"sub": "half \ud800"}),
        ("email", {"email": 7}),
        ("email", {"email": ["ada@example.com"]}),
        ("email", {"email": "a" * 321}),
        ("email", {"email": "ada@example.com\r\n"}),
    ],
    ids=str,
)
async def test_claims_that_are_wrong_are_named(
    verifier: JwtVerifier, word: str, changes: dict[str, Any]
) -> None:
    await refused(verifier, HS.token(claims_of(**changes)), f"'{word}'")


async def test_null_is_not_absent(verifier: JwtVerifier) -> None:
    for name in ("exp", "nbf", "iat", "iss", "aud", "role", "sub"):
        await refused(verifier, HS.token({**claims_of(), name: None}), f"'{name}'")


async def test_a_service_key_signs_nobody_in(clock: Clock) -> None:
    # As Supabase makes them: no sub, no aud, good for ten years, and one of them printed in every frontend.
    async with verifying(clock, issuer="", audience="") as verifier:
        for role in ("anon", "service_role"):
            payload = {"iss": "supabase", "ref": "project", "role": role, "iat": NOW_S, "exp": NOW_S + 10**8}
            await refused(verifier, HS.token(payload), "role")
            await refused(verifier, HS.token({**payload, "sub": PERSON}), "role")


@pytest.mark.parametrize(
    "payload",
    [
        *("[]", "null", "1", '"text"', "", "{", "{}}", "nonsense", "\ufeff{}", "[" * 3000, '{"a":' * 1000),
        '{"exp": NaN}',
        '{"exp": Infinity}',
        '{"exp": 1' + "0" * 5000 + "}",
    ],
    ids=lambda text: text[:12],
)
async def test_a_payload_that_is_no_object_is_refused(verifier: JwtVerifier, payload: str) -> None:
    for key in (HS, RSA):
        header = json.dumps({"alg": key.alg, "kid": key.kid or "x"})
        await refused(verifier, key.sign_texts(header, payload), "malformed")
        await refused(verifier, key.sign_texts(payload, json.dumps(claims_of())))


@pytest.mark.parametrize(
    "exp", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e12", "0x7fffffff", "1" * 400]
)
async def test_a_time_without_end_is_refused(verifier: JwtVerifier, exp: str) -> None:
    payload = json.dumps(claims_of(exp=12345)).replace("12345", exp)
    await refused(verifier, HS.sign_texts('{"alg": "HS256"}', payload))


async def test_a_time_may_have_a_fraction(verifier: JwtVerifier) -> None:
    """RFC 7519, 2: a NumericDate may; Python's ``time.time()`` has one."""
    token = HS.sign_texts('{"alg": "HS256"}', json.dumps(claims_of(exp=NOW_S + 60.5, iat=NOW_S - 0.25)))
    assert (await verifier.verify(token)).expires_at.microsecond == 500_000


async def test_a_name_that_occurs_twice_is_refused(verifier: JwtVerifier) -> None:
    good = json.dumps(claims_of())
    await verifier.verify(HS.sign_texts('{"alg": "HS256"}', good))
    await refused(verifier, HS.sign_texts('{"alg": "none", "alg": "HS256"}', good), "malformed")
    await refused(verifier, HS.sign_texts('{"alg": "HS256"}', good[:-1] + ', "sub": "other"}'), "malformed")
    await refused(
        verifier, HS.sign_texts('{"alg": "HS256"}', good[:-1] + ', "s\\u0075b": "other"}'), "malformed"
    )
    await refused(
        verifier, HS.sign_texts('{"alg": "HS256"}', good[:-1] + ', "x": {"a": 1, "a": 2}}'), "malformed"
    )


async def test_a_token_is_three_parts_in_canonical_base64url(verifier: JwtVerifier) -> None:
    good = HS.token()
    header, payload, signature = good.split(".")
    odd = signature[:-1] + chr(ord(signature[-1]) + 1)  # the same bytes: the last character has two idle bits
    assert unb64(odd) == unb64(signature)
    for wrong in (
        *("", ".", "..", "...", "a.b", "sk-tuma-abc", good + ".", "." + good, good + "." + signature),
        *(good + "=", good + " ", " " + good, good + "\n", good.replace(".", ".."), good.replace(".", ",")),
        f"{header}.{payload}.{odd}",
        f"{header}.{payload}=.{signature}",
        f"{header}.{payload[:40]}\n{payload[40:]}.{signature}",
        f"{header}.{payload[:40]}+{payload[41:]}.{signature}",
        f"{header}.{payload}.{signature}é",
        f"{header}\u200b.{payload}.{signature}",
        f"{header}.{payload}.{signature}\udcff",
        f".{payload}.{signature}",
        f"{header}..{signature}",
    ):
        await refused(verifier, wrong)
    await verifier.verify(good)


async def test_a_token_has_a_bound(verifier: JwtVerifier) -> None:
    spare = 8 * 1024 - len(HS.token(claims_of(filler="")))
    most = "x" * (spare * 3 // 4 - 4)
    assert 8100 < len(HS.token(claims_of(filler=most))) <= 8192
    await verifier.verify(HS.token(claims_of(filler=most)))
    for size in (spare, 10**6):
        await refused(verifier, HS.token(claims_of(filler="x" * size)), "too large")


# Random mutations


def flip(parts: list[bytes], dice: random.Random) -> str:
    """Change bytes below the base64."""
    part = dice.randrange(3)
    changed = bytearray(parts[part])
    for _ in range(dice.randint(1, 3)):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return ".".join(b64(bytes(changed) if place == part else data) for place, data in enumerate(parts))


def rewrite(token: str, dice: random.Random) -> str:
    """Change characters."""
    place = dice.randrange(len(token))
    other = dice.choice("ABCXYZabcxyz0189-_.=+/ \n\0é€\udcff")
    match dice.randrange(4):
        case 0:
            return token[:place] + other + token[place + 1 :]
        case 1:
            return token[:place] + other + token[place:]
        case 2:
            return token[:place] + token[place + dice.randint(1, 40) :]
        case _:
            parts = token.split(".")
            return ".".join(dice.choice(parts) for _ in range(dice.choice((2, 3, 3, 3, 4))))


@hypothesis_settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**64), rounds=st.integers(1, 3))
async def test_no_mutation_of_a_good_token_verifies(verifier: JwtVerifier, seed: int, rounds: int) -> None:
    dice = random.Random(seed)
    good = dice.choice([_GOOD_HS, _GOOD_RSA, _GOOD_EC])
    token = flip([unb64(part) for part in good.split(".")], dice)
    for _ in range(rounds if dice.random() < 0.5 else 0):
        token = rewrite(token or good, dice)
    for forged in {token, rewrite(good, dice)} - {good}:
        with pytest.raises((InvalidTokenError, JwksUnavailableError)):
            await verifier.verify(forged)
    await verifier.verify(good)


_GOOD_HS, _GOOD_RSA, _GOOD_EC = HS.token(), RSA.token(), EC.token()

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["exp", "nbf", "iat", "iss", "aud", "sub", "email", "role"])


@hypothesis_settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    claims=st.dictionaries(names, anything),
    headers=st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit"]), anything),
)
async def test_any_json_is_refused_or_read(
    verifier: JwtVerifier, claims: dict[str, Any], headers: dict[str, Any]
) -> None:
    for token in (
        HS.sign_texts('{"alg":"HS256"}', json.dumps({**claims_of(), **claims})),
        HS.sign_texts(json.dumps({"alg": "HS256", **headers}), json.dumps(claims_of())),
        RSA.sign_texts(json.dumps({"alg": "RS256", "kid": "rsa-1", **headers}), json.dumps(claims_of())),
    ):
        try:
            found = await verifier.verify(token)
        except (InvalidTokenError, JwksUnavailableError):
            continue
        assert 0 < len(found.subject) <= 255


@given(body=st.binary() | st.builds(lambda keys: json.dumps({"keys": keys}).encode(), st.lists(anything)))
def test_any_jwks_is_refused_or_read(body: bytes) -> None:
    with suppress(ValueError):
        parse_jwks(body)


@given(
    changes=st.dictionaries(
        st.sampled_from(["n", "e", "x", "y", "crv", "kty", "alg", "use", "key_ops", "kid"]),
        anything,
        min_size=1,
    )
)
def test_any_jwk_is_left_out_or_read(changes: dict[str, Any]) -> None:
    keys = [{**RSA.jwk, **changes}, {**EC.jwk, **changes}, ec_key("good").jwk]
    assert "good" in parse_jwks(json.dumps({"keys": keys}).encode())


# Which keys of a JWKS are used


def usable(*jwks: Any) -> set[str]:
    return set(parse_jwks(json.dumps({"keys": jwks}).encode()))


def test_keys_for_other_uses_are_left_out() -> None:
    assert usable(RSA.jwk, EC.jwk) == {"rsa-1", "ec-1"}
    bare = {name: value for name, value in RSA.jwk.items() if name not in ("use", "alg", "key_ops")}
    assert usable(bare) == {"rsa-1"}
    changes: dict[str, Any]
    for changes in (
        {"use": "enc"},
        {"use": None},
        {"key_ops": ["encrypt"]},
        {"key_ops": []},
        {"alg": "RS384"},
        {"alg": "PS256"},
        {"alg": "ES256"},
        {"alg": "HS256"},
        {"alg": "none"},
        {"kid": None},
        {"kid": ""},
        {"kid": 1},
        {"kty": "OKP"},
        {"n": "!!"},
        {"n": 5},
        {"e": "AQ"},  # 1: everything is its own signature
        {"e": ""},
    ):
        assert usable({**RSA.jwk, **changes}, EC.jwk) == {"ec-1"}, changes
    assert usable({**EC.jwk, "x": EC.jwk["y"]}, RSA.jwk) == {"rsa-1"}  # not on the curve


def test_weak_keys_and_other_curves_are_left_out() -> None:
    assert usable(rsa_key("weak", 1024).jwk, RSA.jwk) == {"rsa-1"}
    huge = {**RSA.jwk, "kid": "huge", "n": number((1 << 16_383) + 1)}
    assert usable(huge, RSA.jwk) == {"rsa-1"}
    for curve in (ec.SECP384R1(), ec.SECP256K1()):
        assert usable(ec_key("other", curve).jwk, EC.jwk) == {"ec-1"}


def test_private_keys_and_secrets_are_left_out() -> None:
    numbers = EC.private.private_numbers()
    assert usable({**EC.jwk, "d": number(numbers.private_value, 32)}, RSA.jwk) == {"rsa-1"}
    assert usable({**RSA.jwk, "d": number(RSA.private.private_numbers().d)}, EC.jwk) == {"ec-1"}
    for extra in ({}, {"alg": "HS256"}, {"alg": "RS256"}):
        assert usable({"kty": "oct", "kid": "s", "k": b64(SECRET.encode()), **extra}, EC.jwk) == {"ec-1"}


def test_a_name_that_two_keys_share_names_none() -> None:
    assert usable(RSA.jwk, {**EC.jwk, "kid": "rsa-1"}, EC.jwk) == {"ec-1"}
    assert usable(RSA.jwk, RSA.jwk, EC.jwk) == {"ec-1"}
    assert usable({**RSA.jwk, "use": "enc"}, RSA.jwk) == {"rsa-1"}


async def test_a_secret_in_the_jwks_verifies_nothing(clock: Clock, issuer: Issuer) -> None:
    forger = secret_key(b"published for everybody to read, thirty-two", kid="s")
    jwk = {"kty": "oct", "kid": "s", "k": b64(b"published for everybody to read, thirty-two"), "alg": "HS256"}
    issuer.jwks.append(jwk)
    for secret in (SECRET, ""):
        async with verifying(clock, jwks_url=issuer.url, jwt_secret=secret) as verifier:
            await refused(verifier, forger.token())
            await refused(verifier, forger.token(headers={"alg": "RS256"}), "kid")


# The issuer, fetched and kept


async def test_one_fetch_serves_many(verifier: JwtVerifier, issuer: Issuer) -> None:
    assert issuer.asked == 0
    await asyncio.gather(*(verifier.verify(key.token()) for key in [RSA, EC] * 50))
    assert issuer.asked == 1


async def test_unknown_names_cannot_make_us_hammer_the_issuer(
    verifier: JwtVerifier, issuer: Issuer, clock: Clock
) -> None:
    async def attack(names: str) -> None:
        tokens = [RSA.token(headers={"kid": f"{names}{n}"}) for n in range(100)]
        for found in await asyncio.gather(*map(verifier.verify, tokens), return_exceptions=True):
            assert isinstance(found, InvalidTokenError)

    await attack("a")
    assert issuer.asked == 1
    await attack("b")
    assert issuer.asked == 1
    clock.passed_s += 9.9
    await attack("c")
    assert issuer.asked == 1
    clock.passed_s += 0.1
    await attack("d")
    assert issuer.asked == 2
    await verifier.verify(RSA.token())
    assert issuer.asked == 2


async def test_a_new_key_is_found_at_once_and_an_old_one_dropped(
    verifier: JwtVerifier, issuer: Issuer, clock: Clock
) -> None:
    before, after = RSA.token(), ec_key("ec-2")
    await verifier.verify(before)
    await verifier.verify(_GOOD_EC)
    clock.passed_s += 10
    issuer.publish(EC, after)
    await verifier.verify(after.token())
    assert issuer.asked == 2
    await refused(verifier, before, "kid")  # though it was verified a moment ago
    await refused(verifier, RSA.token(claims_of(sub="x")), "kid")
    await verifier.verify(_GOOD_EC)
    assert issuer.asked == 2


async def test_a_token_seen_a_moment_ago_is_dropped_with_its_key(issuer: Issuer, clock: Clock) -> None:
    async with verifying(clock, jwks_url=issuer.url, cache_ttl_s=3600) as verifier:
        await verifier.verify(_GOOD_RSA)
        await verifier.verify(_GOOD_EC)
        clock.passed_s += 10
        impostor = rsa_key("rsa-1")  # the same name, another key
        issuer.publish(impostor, EC)
        await refused(verifier, RSA.token(headers={"kid": "unknown"}), "kid")
        assert issuer.asked == 2
        await refused(verifier, _GOOD_RSA, "signature")
        await verifier.verify(impostor.token())
        kept = len(verifier._cache)
        await verifier.verify(_GOOD_EC)
        assert len(verifier._cache) == kept == 2


async def settle(keys: KeySet | None) -> None:
    """Let a fetch in the background end."""
    assert keys is not None
    if keys._fetching is not None:
        await asyncio.wait({keys._fetching})


async def test_keys_are_fetched_anew_behind_the_calls(
    verifier: JwtVerifier, issuer: Issuer, clock: Clock
) -> None:
    gate = asyncio.Event()
    await verifier.verify(RSA.token())
    clock.passed_s += 600
    await verifier.verify(RSA.token(claims_of(n=1)))
    assert issuer.asked == 1

    async def slow() -> web.StreamResponse:
        await gate.wait()
        return web.json_response({"keys": [EC.jwk]})

    issuer.answer = slow
    clock.passed_s += 1
    async with asyncio.timeout(5):
        await verifier.verify(RSA.token(claims_of(n=2)))  # does not wait
        await verifier.verify(RSA.token(claims_of(n=3)))
        gate.set()
        await settle(verifier._keys)
    assert issuer.asked == 2
    await refused(verifier, RSA.token(claims_of(n=4)), "kid")
    await verifier.verify(EC.token())


async def broken() -> web.StreamResponse:
    return web.Response(status=500)


async def test_known_keys_outlive_an_issuer_that_is_away(
    verifier: JwtVerifier, issuer: Issuer, clock: Clock
) -> None:
    await verifier.verify(RSA.token())
    issuer.answer = broken
    for _ in range(3):
        clock.passed_s += 1000
        await verifier.verify(RSA.token(claims_of(exp=NOW_S + 10**6)))
        await settle(verifier._keys)
    assert issuer.asked == 4
    with pytest.raises(JwksUnavailableError):  # it may be a new key: nobody can tell
        await verifier.verify(RSA.token(headers={"kid": "new"}))
    clock.passed_s = 86_400
    good = RSA.token(claims_of(exp=NOW_S + 10**6))
    await verifier.verify(good)
    await settle(verifier._keys)
    clock.passed_s += 0.1
    with pytest.raises(JwksUnavailableError):
        await verifier.verify(good)
    issuer.answer = None
    clock.passed_s += 10
    await verifier.verify(good)


async def test_an_issuer_that_is_away_at_the_start_is_503(
    verifier: JwtVerifier, issuer: Issuer, clock: Clock
) -> None:
    issuer.answer = broken
    errors = await asyncio.gather(*(verifier.verify(RSA.token()) for _ in range(20)), return_exceptions=True)
    assert {type(error) for error in errors} == {JwksUnavailableError}
    assert issuer.asked == 1
    await verifier.verify(HS.token())  # needs nobody
    clock.passed_s += 4
    with pytest.raises(JwksUnavailableError) as caught:
        await verifier.verify(RSA.token())
    assert caught.value.retry_after_s == 6
    issuer.answer = None
    clock.passed_s += 6
    await verifier.verify(RSA.token())
    assert issuer.asked == 2


async def test_nobody_listens(clock: Clock) -> None:
    async with verifying(clock, jwks_url="http://127.0.0.1:1/jwks.json") as verifier:
        with pytest.raises(JwksUnavailableError):
            await verifier.verify(RSA.token())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(verifier: JwtVerifier, issuer: Issuer, status: int) -> None:
    async def moved() -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": "/elsewhere.json"})

    issuer.answer = moved
    with pytest.raises(JwksUnavailableError):
        await verifier.verify(RSA.token())
    assert issuer.elsewhere == 0


def padded(size: int, **headers: str) -> Callable[[], Awaitable[web.StreamResponse]]:
    async def answer() -> web.StreamResponse:
        body = json.dumps({"keys": [RSA.jwk], "filler": ""}).encode()
        filler = b"x" * (size - len(body))
        return web.Response(body=body[:-2] + filler + body[-2:], headers=headers)

    return answer


async def test_an_answer_has_a_bound(verifier: JwtVerifier, issuer: Issuer, clock: Clock) -> None:
    for size in (128 * 1024 + 1, 10**7):
        issuer.answer = padded(size)
        with pytest.raises(JwksUnavailableError):
            await verifier.verify(RSA.token())
        clock.passed_s += 10
    issuer.answer = padded(128 * 1024)
    await verifier.verify(RSA.token())


async def test_an_answer_is_not_unpacked(verifier: JwtVerifier, issuer: Issuer) -> None:
    import gzip

    async def packed() -> web.StreamResponse:
        body = gzip.compress(json.dumps({"keys": [RSA.jwk]}).encode())
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    issuer.answer = packed
    with pytest.raises(JwksUnavailableError):
        await verifier.verify(RSA.token())


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"keys": {}}', "<html>", "[" * 50_000, '{"keys": null}'])
async def test_an_answer_that_is_no_jwks_changes_nothing(
    verifier: JwtVerifier, issuer: Issuer, clock: Clock, body: str
) -> None:
    async def nonsense() -> web.StreamResponse:
        return web.Response(text=body)

    await verifier.verify(RSA.token())
    issuer.answer = nonsense
    clock.passed_s += 601
    await verifier.verify(RSA.token(claims_of(n=1)))
    await settle(verifier._keys)
    assert issuer.asked == 2
    await verifier.verify(RSA.token(claims_of(n=2)))


async def test_an_issuer_that_stalls_has_a_bound(clock: Clock, issuer: Issuer) -> None:
    async def stall() -> web.StreamResponse:
        await asyncio.sleep(5)
        return web.Response()

    issuer.answer = stall
    async with verifying(clock, jwks_url=issuer.url, jwks_timeout_s=0.1) as verifier, asyncio.timeout(3):
        with pytest.raises(JwksUnavailableError):
            await verifier.verify(RSA.token())


async def test_a_caller_that_leaves_does_not_end_the_fetch_for_others(
    verifier: JwtVerifier, issuer: Issuer
) -> None:
    gate = asyncio.Event()

    async def slow() -> web.StreamResponse:
        await gate.wait()
        return web.json_response({"keys": issuer.jwks})

    issuer.answer = slow
    async with asyncio.TaskGroup() as group:
        first = group.create_task(verifier.verify(RSA.token()))
        second = group.create_task(verifier.verify(RSA.token()))
        while not issuer.asked:
            await asyncio.sleep(0.001)
        first.cancel()
        await asyncio.sleep(0)
        gate.set()
    assert second.result().subject == PERSON
    assert issuer.asked == 1


async def test_closing_ends_a_fetch(clock: Clock, issuer: Issuer) -> None:
    async def stall() -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    issuer.answer = stall
    async with verifying(clock, jwks_url=issuer.url) as verifier, asyncio.timeout(5):
        waiting = asyncio.gather(verifier.verify(RSA.token()), return_exceptions=True)
        while not issuer.asked:
            await asyncio.sleep(0.001)
        await verifier.close()
        (error,) = await waiting
    assert isinstance(error, JwksUnavailableError)


# Tokens seen a moment ago


async def test_a_token_is_remembered_for_a_moment_and_never_past_its_end(clock: Clock) -> None:
    async with verifying(clock, cache_ttl_s=100, leeway_s=0) as verifier:
        token = HS.token(claims_of(exp=NOW_S + 50))
        first = await verifier.verify(token)
        clock.passed_s += 49
        assert await verifier.verify(token) is first
        clock.passed_s += 1
        await refused(verifier, token, "exp")
        assert not verifier._cache
        clock.passed_s = 0
        again = await verifier.verify(HS.token())
        clock.passed_s += 100
        assert await verifier.verify(HS.token()) == again
        assert await verifier.verify(HS.token()) is not again


async def test_only_good_tokens_are_remembered_and_not_too_many(clock: Clock) -> None:
    async with verifying(clock, cache_entries=10) as verifier:
        for number_ in range(30):
            await verifier.verify(HS.token(claims_of(n=number_)))
            await refused(verifier, HS.token(claims_of(n=number_, role="anon")), "role")
        assert len(verifier._cache) == 10


# Settings and errors


@pytest.mark.parametrize("secret", ["short", "x" * 31, "é" * 15])
def test_a_weak_secret_is_refused(secret: str) -> None:
    with pytest.raises(InputError, match="TUMA_AUTH__JWT_SECRET") as caught:
        JwtVerifier(AuthSettings.model_validate({"jwt_secret": secret}))
    assert secret not in str(caught.value)


def test_a_key_of_another_kind_is_no_secret() -> None:
    private = EC.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    public = EC.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    for text in (private, public, json.dumps(EC.jwk)):
        with pytest.raises(InputError, match="TUMA_AUTH__JWT_SECRET"):
            JwtVerifier(AuthSettings.model_validate({"jwt_secret": text}))


@pytest.mark.parametrize(
    "url",
    [
        *("http://project.example/jwks", "ftp://project.example/jwks", "file:///etc/jwks", "/jwks", "jwks"),
        *("https://", "https:///jwks", "http://127.0.0.1.example/jwks", "http://localhost.example/jwks"),
        *("http://10.0.0.1/jwks", "http://[::2]/jwks", "http://localhost:99999999/jwks", "http://[/jwks"),
        "http://127.0.0.1@project.example/jwks",
    ],
)
def test_an_address_that_cannot_be_trusted_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="TUMA_AUTH__JWKS_URL"):
        JwtVerifier(AuthSettings(jwks_url=url))


@pytest.mark.parametrize(
    "url",
    [
        "https://project.example/auth/v1/.well-known/jwks.json",
        "http://127.0.0.1:54321/jwks",
        "http://127.8.9.1/jwks",
        "http://localhost/jwks",
        "http://[::1]:1/jwks",
    ],
)
def test_https_and_this_machine_are_accepted(url: str) -> None:
    assert JwtVerifier(AuthSettings(jwks_url=url)).configured


def test_settings_have_bounds() -> None:
    for changes in ({"leeway_s": -1}, {"leeway_s": math.inf}, {"jwks_retry_s": 0}, {"jwt_bytes": 0}):
        with pytest.raises(ValidationError):
            AuthSettings.model_validate(changes)


def test_from_outside_it_is_401_or_503() -> None:
    shape = shape_of(InvalidTokenError("no"))
    assert (shape.status, shape.code) == (401, "invalid_api_key")
    assert issubclass(InvalidTokenError, InvalidKeyError)
    away = error_response(JwksUnavailableError("away", retry_after_s=7))
    assert (away.status, away.headers["Retry-After"]) == (503, "7")
