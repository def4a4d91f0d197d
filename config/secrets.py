"""What must never be shown: every secret of the settings, and what looks like a caller's key."""

import json
import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, SecretStr

from config.settings import SECRET_MIN, Settings, SettingsError

HIDDEN = "[hidden]"
_LENGTH_MIN = 6  # a shorter one would hide half of every line
_KEY = re.compile(r"sk-tuma-[A-Za-z0-9_-]{8,}")


class Redactor:
    """Takes secrets out of a text.

    Args:
        secrets: what to take out, beside callers' keys.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets if len(secret) >= _LENGTH_MIN for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return the text with every secret replaced."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, HIDDEN)
        return _KEY.sub(HIDDEN, text) if "sk-tuma-" in text else text


def _forms(secret: str) -> Iterator[str]:
    """A secret as it is, and as it looks inside JSON, inside JSON in JSON, or a ``repr``."""
    yield secret
    escaped = json.dumps(secret)[1:-1]
    yield escaped
    yield json.dumps(escaped)[1:-1]
    unescaped = json.dumps(secret, ensure_ascii=False)[1:-1]
    yield unescaped
    yield unescaped.replace("/", "\\/")
    yield repr(secret)[1:-1]


def find_secrets(settings: Settings) -> set[str]:
    """Return every secret value of the settings; of a URL, the whole and its password."""
    found: set[str] = set()
    for value in _values(settings):
        if value:
            found.add(value)
            found.update(_passwords(value))
    return found


def require_long_secrets(settings: Settings) -> None:
    """Refuse secrets of our own that can be guessed; the payment providers' and the upstream's keys are theirs.

    Raises:
        SettingsError: one is shorter than ``SECRET_MIN`` characters; the message names it.
    """
    own = {
        "TUMA_AUTH__KEY_PEPPER": settings.auth.key_pepper,
        **{
            f"TUMA_AUTH__OLD_KEY_PEPPERS[{at}]": pepper
            for at, pepper in enumerate(settings.auth.old_key_peppers)
        },
        "TUMA_AUTH__JWT_SECRET": settings.auth.jwt_secret,
        "TUMA_ADMIN__TOKEN": settings.admin.token,
        "TUMA_METRICS__TOKEN": settings.metrics.token,
        "TUMA_STRIPE__WEBHOOK_SECRET": settings.stripe.webhook_secret,
        "TUMA_FLUTTERWAVE__WEBHOOK_SECRET": settings.flutterwave.webhook_secret,
    }
    short = [name for name, value in own.items() if 0 < len(value.get_secret_value()) < SECRET_MIN]
    if short:
        raise SettingsError(
            f"{', '.join(short)}: shorter than {SECRET_MIN} characters, so that it could be guessed; give it a long random value"
        )


def _values(section: BaseModel) -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _values(value)
        elif isinstance(value, SecretStr):
            yield value.get_secret_value()
        elif isinstance(value, tuple):
            yield from (item.get_secret_value() for item in value if isinstance(item, SecretStr))


def _passwords(value: str) -> Iterator[str]:
    if "://" not in value:
        return
    try:
        password = urlsplit(value).password
    except ValueError:
        return
    if password:
        yield password
        yield unquote(password)
