"""The shapes of what is told of the provider's account and of reconciliations."""

from typing import Literal

from typing_extensions import TypedDict

from billing.shapes import Amount, Id, Moment


class LeaseJson(TypedDict):
    """What a worker may still spend of the quota; USD."""

    worker_id: Id
    left_usd: Amount


class ShadowLedgerJson(TypedDict):
    """Rows of one kind, and their sum; USD."""

    rows: int
    amount_usd: Amount


class QuotaJson(TypedDict):
    """What was consumed of the provider's quota, and what is left; USD. ``shadow_ledger`` is by kind."""

    object: Literal["quota"]
    consumed_usd: Amount
    left_usd: Amount | None
    granted_usd: Amount | None
    low: bool
    asked_at: Moment | None
    paused: bool
    pause_reason: str | None
    calls_in_flight: int
    held_usd: Amount
    leases: list[LeaseJson]
    shadow_ledger: dict[str, ShadowLedgerJson]


class RunJson(TypedDict):
    """A reconciliation; ``drift_usd``: the provider's total less ours, USD; ``away``: its records that did not answer."""

    id: Id
    started_at: Moment
    ended_at: Moment | None
    calls_checked: int | None
    drift_usd: Amount | None
    complete: bool
    away: list[str]


class NotedDifferenceJson(TypedDict):
    """What a reconciliation found; USD. With a ``transaction_id`` it was corrected."""

    run_id: Id
    call_id: Id | None
    cause: str
    ours_usd: Amount
    provider_usd: Amount | None
    transaction_id: Id | None
    note: str


class ReconciliationsJson(TypedDict):
    """The latest reconciliations and differences, the newest first."""

    object: Literal["list"]
    data: list[RunJson]
    differences: list[NotedDifferenceJson]


class DifferenceJson(TypedDict):
    """A difference between our books and the provider's; USD."""

    call_id: Id | None
    cause: str
    ours_usd: Amount
    provider_usd: Amount | None
    corrected: bool
    note: str
    known: bool


class ReconciliationJson(TypedDict):
    """What a reconciliation found; ``drift_usd``: the provider's total less ours, USD. ``report`` says it in words.

    ``away`` names the provider's records that did not answer, and with which nothing was compared: then it is not complete.
    """

    drift_usd: Amount | None
    differences: list[DifferenceJson]
    calls_checked: int
    days_checked: int
    calls_in_flight: int
    complete: bool
    away: list[str]
    report: str
