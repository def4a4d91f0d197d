"""Users' tokens: claims that are missing, wrong, of another type, or there twice."""

import json
from typing import Any

import pytest

from proxy.identity.jwt import JwtVerifier
from tests.unit.identity.issuing import HS, ISSUER, NOW_S, PERSON, RSA, Clock, claims_of, refused, verifying


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
