"""Whether a call would be admitted, judged without admitting it: the same checks as ``lua/reserve.lua``'s, in its order. Pure.

Numbers that decide on money are Python's integers; those of the rate windows are the same doubles as Lua's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from billing.holds.hold import Hold

_MINUTE_US = 60_000_000
_ROUNDING = 0.000001  # as in reserve.lua


class Window(NamedTuple):
    """What Redis keeps of a key or a user: theoretical arrival times in microseconds, and calls in flight."""

    requests_us: int
    tokens_us: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Room:
    """What a call of this caller could take just now, at most.

    Args:
        nano: of the wallet, and of its caps and the key's, in nano units of its currency.
        nanousd: of the user's caps; None where there are none.
        tokens: of the windows of tokens.
    """

    nano: int
    nanousd: int | None
    tokens: int


@dataclass(frozen=True, slots=True)
class _Rate:
    """One window as a call would find it; ``used_us`` and ``after_us`` of a minute."""

    used_us: int
    after_us: float
    left: int


class _Cap(NamedTuple):
    scope: str
    period: str
    ends_ms: int
    limit: int
    left: int


def is_warm(mirror: Mapping[str, str], hold: "Hold") -> bool:
    """Tell whether a mirror can be judged by: it has the wallet, and no window of a cap that is over."""
    return f"available:{hold.wallet_id}" in mirror and not any(
        hold.arrived_ms >= ends_ms for scope in _scopes(hold) for _, _, ends_ms, _ in _windows(mirror, scope)
    )


def judge(mirror: Mapping[str, str], windows: Sequence[Window], hold: "Hold", *, now_us: int) -> list[Any]:
    """Return what ``reserve.lua`` would answer.

    Args:
        mirror: of the call's user, warm, or as Postgres would fill it.
        windows: of the call's limiters, in their order.
        hold: that would be taken.
        now_us: Redis's time.
    """
    rates = [
        (
            _rate(window.requests_us, limits.requests_per_min, 1, now_us),
            _rate(window.tokens_us, limits.tokens_per_min, hold.tokens, now_us),
        )
        for window, (_, limits) in zip(windows, hold.limiters, strict=True)
    ]
    state: list[Any] = []
    for kind in (0, 1):
        least = min(range(len(rates)), key=lambda index: rates[index][kind].left)
        rate = rates[least][kind]
        state += [least + 1, rate.left, math.ceil(rate.used_us / 1000)]
    verdict, wait_ms, *more = _verdict(mirror, windows, rates, hold)
    return [verdict, wait_ms, *state, *more]


def _verdict(
    mirror: Mapping[str, str], windows: Sequence[Window], rates: Sequence[tuple[_Rate, _Rate]], hold: "Hold"
) -> list[Any]:
    if f"frozen:{hold.wallet_id}" in mirror:
        return ["wallet_frozen", 0]
    for index, (window, pair, (_, limits)) in enumerate(zip(windows, rates, hold.limiters, strict=True)):
        for name, rate in zip(("requests", "tokens"), pair, strict=True):
            if rate.after_us > _MINUTE_US:
                return [name, math.ceil((rate.after_us - _MINUTE_US) / 1000), index + 1]
        if 0 < limits.calls_in_flight <= window.in_flight:
            return ["calls_in_flight", 1000, index + 1]
    if int(mirror[f"available:{hold.wallet_id}"]) < hold.amount_nano:
        return ["insufficient_funds", 0]
    for cap in _caps(mirror, hold):
        amount = hold.amount_nanousd if cap.scope == str(hold.user_id) else hold.amount_nano
        if cap.left < amount:
            return ["cap_exceeded", 0, *(str(part).encode() for part in cap)]
    return ["granted", 0]


def room_of(mirror: Mapping[str, str], windows: Sequence[Window], hold: "Hold", *, now_us: int) -> Room:
    """Return what there is room for.

    Args:
        mirror: as for ``judge``, which has granted.
        windows: as there.
        hold: of the caller; its amounts do not count.
        now_us: Redis's time.
    """
    user = str(hold.user_id)
    caps = list(_caps(mirror, hold))
    return Room(
        nano=min(
            [int(mirror[f"available:{hold.wallet_id}"]), *(cap.left for cap in caps if cap.scope != user)]
        ),
        nanousd=min((cap.left for cap in caps if cap.scope == user), default=None),
        tokens=min(
            _rate(window.tokens_us, limits.tokens_per_min, 0, now_us).left
            for window, (_, limits) in zip(windows, hold.limiters, strict=True)
        ),
    )


def _rate(arrival_us: int, per_min: int, cost: int, now_us: int) -> _Rate:
    """GCRA (ITU-T I.371), as in ``reserve.lua``."""
    step_us = _MINUTE_US / per_min
    used_us = max(arrival_us - now_us, 0)
    left = math.floor((_MINUTE_US - used_us) / step_us + _ROUNDING)
    return _Rate(used_us, used_us + step_us * cost, left)


def _caps(mirror: Mapping[str, str], hold: "Hold") -> Iterator[_Cap]:
    """Yield the caps that the call counts in; before its window began it belongs to an earlier one."""
    for scope in _scopes(hold):
        for period, starts_ms, ends_ms, limit in _windows(mirror, scope):
            if hold.arrived_ms >= starts_ms:
                yield _Cap(scope, period, ends_ms, limit, int(mirror[f"left:{scope}:{period}"]))


def _windows(mirror: Mapping[str, str], scope: str) -> Iterator[tuple[str, int, int, int]]:
    for word in mirror.get(f"caps:{scope}", "").split():
        period, starts_ms, ends_ms, limit = word.split(":")
        yield period, int(starts_ms), int(ends_ms), int(limit)


def _scopes(hold: "Hold") -> tuple[str, ...]:
    place = hold.find_place()
    return place.wallet, place.key, place.user


def window_of(reply: Sequence[Any]) -> Window:
    """Read a limiter's part of ``look.lua``'s answer."""
    requests, tokens, in_flight = reply
    return Window(int(requests), int(tokens), in_flight)
