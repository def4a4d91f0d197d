"""The issuer's keys: fetched by one for all, kept while it is away, dropped when it drops them."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from billing.errors import InvalidTokenError, JwksUnavailableError
from proxy.identity.jwks import KeySet
from proxy.identity.jwt import JwtVerifier
from tests.unit.identity.issuing import (
    EC,
    GOOD_EC,
    GOOD_RSA,
    HS,
    NOW_S,
    PERSON,
    RSA,
    Clock,
    Issuer,
    claims_of,
    ec_key,
    refused,
    rsa_key,
    verifying,
)


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
    await verifier.verify(GOOD_EC)
    clock.passed_s += 10
    issuer.publish(EC, after)
    await verifier.verify(after.token())
    assert issuer.asked == 2
    await refused(verifier, before, "kid")  # though it was verified a moment ago
    await refused(verifier, RSA.token(claims_of(sub="x")), "kid")
    await verifier.verify(GOOD_EC)
    assert issuer.asked == 2


async def test_a_token_seen_a_moment_ago_is_dropped_with_its_key(issuer: Issuer, clock: Clock) -> None:
    async with verifying(clock, jwks_url=issuer.url, cache_ttl_s=3600) as verifier:
        await verifier.verify(GOOD_RSA)
        await verifier.verify(GOOD_EC)
        clock.passed_s += 10
        impostor = rsa_key("rsa-1")  # the same name, another key
        issuer.publish(impostor, EC)
        await refused(verifier, RSA.token(headers={"kid": "unknown"}), "kid")
        assert issuer.asked == 2
        await refused(verifier, GOOD_RSA, "signature")
        await verifier.verify(impostor.token())
        kept = len(verifier._cache)
        await verifier.verify(GOOD_EC)
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
