"""An issuer that serves its keys, and a verifier that trusts it."""

from collections.abc import AsyncIterator

import pytest

from proxy.identity.jwt import JwtVerifier
from tests.unit.identity.issuing import EC, RSA, Clock, Issuer, verifying


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with Issuer(RSA, EC).serving() as serving:
        yield serving


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def verifier(clock: Clock, issuer: Issuer) -> AsyncIterator[JwtVerifier]:
    """Verifies all three kinds of tokens."""
    async with verifying(clock, jwks_url=issuer.url) as made:
        yield made
