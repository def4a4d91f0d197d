"""Users' tokens: what a good one says, how long it is remembered, and what a forger may try with algorithms and keys."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from proxy.identity.jwt import Claims, JwtVerifier
from tests.unit.identity.issuing import (
    EC,
    HS,
    NOW_S,
    PERSON,
    RSA,
    SECRET,
    Clock,
    Issuer,
    Key,
    b64,
    claims_of,
    ec_key,
    refused,
    secret_key,
    unb64,
    verifying,
)

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
