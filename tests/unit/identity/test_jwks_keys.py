"""Which keys of a JWKS are used."""

import json
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from proxy.identity.jwks import parse_jwks
from tests.unit.identity.issuing import (
    EC,
    RSA,
    SECRET,
    Clock,
    Issuer,
    anything,
    b64,
    ec_key,
    number,
    refused,
    rsa_key,
    secret_key,
    verifying,
)


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
