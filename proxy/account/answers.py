"""The shapes of what a person is answered about their own money."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypeAliasType, TypedDict

from billing.identity.key import KeyFields
from billing.payments.auto_topups import AutoTopupFields
from billing.payments.payment import IntentState
from billing.payments.units import PaymentProvider
from billing.reports.answers import CallJson, SumsFields, UsageJson
from billing.reports.statement import TransactionJson
from billing.shapes import Amount, Id, Moment
from billing.wallets.caps import CapsByPeriod
from billing.wallets.wallets import WalletFields


class _PageFields(TypedDict):
    object: Literal["list"]
    has_more: bool
    first_id: Id | None
    last_id: Id | None


class WalletJson(WalletFields):
    """A wallet; major units of its currency. ``available`` = posted + overdraft - held."""

    object: Literal["wallet"]


class WalletAlertsJson(TypedDict):
    """Below which balance its owner is told, in major units of the wallet's currency; null: never."""

    object: Literal["wallet.alerts"]
    wallet_id: Id
    currency: str
    low: Amount | None


class CapsJson(TypedDict):
    """`key_caps` as well, for who came with a key. A user's caps are in USD, the others in the wallet's currency."""

    object: Literal["wallet.caps"]
    wallet_id: Id
    currency: str
    caps: CapsByPeriod
    user_caps: CapsByPeriod
    key_caps: NotRequired[CapsByPeriod]


class KeyJson(KeyFields):
    """A key, with its caps in the currency of its wallet; moments in ISO 8601, limits per minute."""

    object: Literal["api_key"]
    currency: str
    caps: CapsByPeriod


class NewKeyJson(KeyJson):
    """A key just made, with its secret, which is never shown again."""

    secret: Annotated[str, Field(pattern="^sk-tuma-")]


class KeysJson(_PageFields):
    """A page of keys, by age."""

    data: list[KeyJson]


class DeletedKeyJson(TypedDict):
    """A key that is good for nothing any more."""

    id: Id
    object: Literal["api_key"]
    deleted: Literal[True]
    status: Literal["revoked"]


class CallsJson(_PageFields):
    """A page of calls, the newest first."""

    data: list[CallJson]


class TransactionsJson(_PageFields):
    """A page of transactions, the newest first."""

    data: list[TransactionJson]


class TotalsJson(SumsFields):
    """What all of it sums to; amounts in major units of the currency or in USD, latencies in milliseconds."""

    currency: str


class UsageListJson(TypedDict):
    """What calls used, by groups; ``until`` is not included."""

    object: Literal["list"]
    wallet_id: Id
    since: Moment
    until: Moment
    timezone: str
    group_by: list[str]
    data: list[UsageJson]
    totals: TotalsJson


class TopupJson(TypedDict):
    """A wish to pay into a wallet; major units of its currency."""

    object: Literal["topup"]
    id: Id
    wallet_id: Id
    provider: PaymentProvider
    amount: Amount
    currency: str
    state: IntentState
    url: Annotated[str | None, Field(description="Where it is paid.")]
    reference: str
    note: str
    created_at: Moment
    expires_at: Moment
    ended_at: Moment | None


class AutoTopupJson(AutoTopupFields):
    """When and how a wallet tops itself up; major units of its currency, seconds."""

    object: Literal["auto_topup"]
    wallet_id: Id
    currency: str


ActionResult = WalletJson | TopupJson | CapsJson | TransactionsJson
WalletAnswerJson = TypeAliasType(
    "WalletAnswerJson",
    Annotated[
        ActionResult,
        Field(description="By the action: a top-up's own answer has the status 201."),
    ],
)
