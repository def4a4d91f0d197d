"""What the settings of tokens must be, and what a refusal is from outside."""

import json
import math

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from pydantic import ValidationError

from billing.errors import InputError, InvalidKeyError, InvalidTokenError, JwksUnavailableError
from config.settings import AuthSettings
from proxy.http.errors import error_response, shape_of
from proxy.identity.jwt import JwtVerifier
from tests.unit.identity.issuing import EC


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
