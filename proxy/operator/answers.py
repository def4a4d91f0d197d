"""The shapes of what the operator is answered, where they are not those of billing."""

from typing import Generic, Literal, TypeVar

from typing_extensions import TypedDict

from billing.identity.key import KeyFields
from billing.monitoring.audit import AuditRowJson
from billing.payments.answers import (
    PaymentJson,
    ReviewJson,
    WebhookEventJson,
    WholePaymentJson,
)
from billing.payments.payment import RefundState
from billing.reports.answers import WholeCallJson
from billing.reports.revenue import RevenueFields
from billing.shapes import Amount, Id
from billing.wallets.caps import CapsByPeriod, Scope
from billing.wallets.wallets import UserJson, WalletFields
from config.settings import LogLevel


class Identified(TypedDict):
    """What has an id."""

    id: Id


_Item = TypeVar("_Item", bound=Identified)


class PageOf(TypedDict, Generic[_Item]):
    """A page of a list; the components of the document are written out below."""

    object: Literal["list"]
    data: list[_Item]
    has_more: bool
    last_id: Id | None


class _PageFields(TypedDict):
    object: Literal["list"]
    has_more: bool
    last_id: Id | None


class AnyWalletJson(WalletFields):
    """A wallet, and whose it is; major units of its currency. ``available`` = posted + overdraft - held."""

    object: Literal["wallet"]
    user_id: Id


class AnyWalletWithCapsJson(AnyWalletJson):
    """A wallet with its caps, in its currency."""

    caps: CapsByPeriod


class AnyWalletsJson(_PageFields):
    """A page of wallets, by age."""

    data: list[AnyWalletJson]


class CreditJson(AnyWalletJson):
    """Money that came into a wallet, and the wallet after it."""

    transaction_id: Id


class UserWithWalletsJson(UserJson):
    """A person with their wallets, and the caps over all of them in USD."""

    wallets: list[AnyWalletJson]
    caps: CapsByPeriod


class UsersJson(_PageFields):
    """A page of people, by age."""

    data: list[UserJson]


class AnyCapsJson(TypedDict):
    """The caps of a user, in USD, or of a wallet or key, in the wallet's currency."""

    object: Literal["caps"]
    scope: Scope
    id: Id
    currency: str
    caps: CapsByPeriod


class AnyKeyJson(KeyFields):
    """A key, and whose it is; moments in ISO 8601, limits per minute."""

    object: Literal["api_key"]
    user_id: Id
    currency: str


class AnyNewKeyJson(AnyKeyJson):
    """A key just made, with its secret, which is never shown again."""

    secret: str


class AnyKeysJson(_PageFields):
    """A page of keys, by age."""

    data: list[AnyKeyJson]


class RefundedCallJson(WholeCallJson):
    """A call of which something was given back: ``refunded``, in major units of the wallet's currency."""

    transaction_id: Id | None
    refunded: Amount


class AuditRowsJson(TypedDict):
    """Rows of the audit log, the oldest first."""

    object: Literal["list"]
    data: list[AuditRowJson]


class LogLevelJson(TypedDict):
    """How much is logged."""

    level: LogLevel


class PaymentsJson(TypedDict):
    """Payments, the newest first."""

    object: Literal["list"]
    data: list[PaymentJson]


class ReviewsJson(TypedDict):
    """Payments that wait for a decision, the oldest first."""

    object: Literal["list"]
    data: list[ReviewJson]


class WebhookEventsJson(TypedDict):
    """Webhooks, the newest first."""

    object: Literal["list"]
    data: list[WebhookEventJson]


class RetriedWebhookJson(TypedDict):
    """A webhook that is looked at again."""

    id: Id
    state: Literal["new"]


class AcceptedPaymentJson(WholePaymentJson):
    """A payment, of which a wallet was given what lay in suspense: ``accepted``, in major units."""

    accepted: Amount


class RefundedPaymentJson(WholePaymentJson):
    """A payment that is sent back: the refund's id, its amount in major units, and how it stands."""

    id: Id
    refunded: Amount
    refund_state: RefundState


class RevenueJson(RevenueFields):
    """What the house earned and owes, per currency, in major units."""

    object: Literal["revenue"]
