"""API keys: made once, shown once, kept as HMAC-SHA256 under a pepper, recognised by it."""

import hashlib
import hmac
import secrets
import string
import zlib

PREFIX = "sk-tuma-"


_SECRET_BYTES = 32


_RANDOM_LENGTH = 43


_SUM_LENGTH = 6


_SUM_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase


_SECRET_LENGTH_MAX = 200


def make_secret() -> str:
    """Return a new secret, with its checksum."""
    random = secrets.token_urlsafe(_SECRET_BYTES)
    return PREFIX + random + _checksum(random)


def is_well_formed(secret: str) -> bool:
    """Tell whether a text can be a secret at all. Those from before there was a checksum are shorter."""
    if not secret.startswith(PREFIX) or len(secret) > _SECRET_LENGTH_MAX:
        return False
    random = secret[len(PREFIX) : len(PREFIX) + _RANDOM_LENGTH]
    return len(secret) != len(PREFIX) + _RANDOM_LENGTH + _SUM_LENGTH or secret.endswith(_checksum(random))


def _checksum(random: str) -> str:
    number = zlib.crc32(random.encode("utf-8", "surrogatepass"))
    digits = ""
    for _ in range(_SUM_LENGTH):
        number, digit = divmod(number, len(_SUM_DIGITS))
        digits = _SUM_DIGITS[digit] + digits
    return digits


def digest_secret(pepper: bytes, secret: str) -> bytes:
    """Return what a secret is kept as, and recognised by."""
    return hmac.digest(pepper, secret.encode("utf-8", "surrogatepass"), hashlib.sha256)


def hint_of(secret: str) -> str:
    """Return what is shown of a secret."""
    return secret[: len(PREFIX) + 4]


def name_pepper(pepper: bytes) -> str:
    """Return the name that a pepper goes by; it tells nothing of it."""
    return hmac.digest(pepper, b"tuma: the name of a pepper", hashlib.sha256).hex()[:8]
