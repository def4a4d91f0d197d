"""Users' tokens: one spelling, a bound, and random changes of good ones."""

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from billing.errors import InvalidTokenError, JwksUnavailableError
from proxy.identity.jwt import JwtVerifier
from tests.unit.identity.issuing import (
    GOOD_EC,
    GOOD_HS,
    GOOD_RSA,
    HS,
    RSA,
    anything,
    b64,
    claims_of,
    refused,
    unb64,
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
    good = dice.choice([GOOD_HS, GOOD_RSA, GOOD_EC])
    token = flip([unb64(part) for part in good.split(".")], dice)
    for _ in range(rounds if dice.random() < 0.5 else 0):
        token = rewrite(token or good, dice)
    for forged in {token, rewrite(good, dice)} - {good}:
        with pytest.raises((InvalidTokenError, JwksUnavailableError)):
            await verifier.verify(forged)
    await verifier.verify(good)


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
