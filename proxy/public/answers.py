"""The shapes of what anybody is answered."""

from typing import Literal

from typing_extensions import TypedDict


class HealthJson(TypedDict):
    """The process lives."""

    status: Literal["ok"]


class ReadinessJson(TypedDict):
    """Whether it can serve calls; ``checks``: ``ok``, or what is missing."""

    status: Literal["ready", "not ready"]
    checks: dict[str, str]


class ReceivedJson(TypedDict):
    """The event is kept."""

    received: Literal[True]
