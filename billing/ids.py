"""Ids: UUIDv7, which sort by time and carry their partition."""

import os
import time
from datetime import UTC, datetime
from uuid import UUID

from asyncpg.pgproto.pgproto import UUID as FAST_UUID

from billing.errors import NotFoundError


def new_id(*, at_ms: int | None = None) -> UUID:
    """Mint a UUIDv7 (RFC 9562, section 5.7): 48 bits of unix milliseconds, 74 random bits.

    Args:
        at_ms: unix milliseconds; now, when left out.
    """
    moment = time.time_ns() // 1_000_000 if at_ms is None else at_ms
    noise = int.from_bytes(os.urandom(10), "big")
    high = (moment & 0xFFFF_FFFF_FFFF) << 80 | 0x7000 << 64 | (noise >> 62 & 0x0FFF) << 64
    made: UUID = FAST_UUID((high | 0b10 << 62 | noise & ((1 << 62) - 1)).to_bytes(16, "big"))
    return made


def minted_at(uuid7: UUID) -> datetime:
    """Return when a UUIDv7 was minted, to the millisecond, in UTC."""
    return datetime.fromtimestamp((uuid7.int >> 80) / 1000, tz=UTC)


def id_floor(moment: datetime) -> UUID:
    """Return the smallest UUIDv7 of a moment, to the millisecond, as ``uuid_floor`` does."""
    return UUID(int=round(moment.timestamp() * 1000) << 80)


def parse_id(text: str, what: str) -> UUID:
    """Parse a UUID.

    Raises:
        NotFoundError: it is none, so there is no such thing.
    """
    try:
        return UUID(text)
    except ValueError:
        raise NotFoundError(f"there is no {what} {text!r}") from None
