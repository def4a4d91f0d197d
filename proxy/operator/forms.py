"""What the operator's requests may say."""

from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field

from config.settings import LogLevel
from proxy.http.forms import Amount, Form, _Limit


class UserForm(Form):
    """A person to be registered."""

    email: Annotated[str, Field(max_length=320, examples=["ada@example.com"])]
    subject: Annotated[str, Field(min_length=1, max_length=255)] | None = None


class UserChangeForm(Form):
    """What changes of a person; what is not named stays, a limit of 0 is none."""

    status: Literal["active", "disabled"] | None = None
    requests_per_min: _Limit | None = None
    tokens_per_min: _Limit | None = None
    calls_in_flight: _Limit | None = None
    timezone: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    week_starts: Annotated[int, Field(ge=1, le=7, strict=True)] | None = None


class WalletForm(Form):
    """A wallet to be opened; the overdraft is in major units."""

    user: Annotated[
        str, Field(max_length=320, examples=["ada@example.com"], description="Id or e-mail address.")
    ]
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$", examples=["USD"], description="ISO 4217.")]
    overdraft: Amount = 0


class OverdraftForm(Form):
    """How far below zero a wallet may go, in major units."""

    overdraft: Amount


class ReasonForm(Form):
    """Why; operators see it, and the audit log."""

    reason: Annotated[str, Field(max_length=500)] = ""


class LogLevelForm(Form):
    """How much is logged."""

    level: LogLevel


class CreditForm(Form):
    """Money for a wallet, in major units of its currency. The user sees the reason; a repeat with the key posts nothing."""

    amount: Amount
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    key: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class RefundForm(Form):
    """A charge to be given back, all of it when no amount is named."""

    amount: Amount | None = None
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    key: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class DecideForm(Form):
    """What a call in review cost, in USD, and whether the house pays it; at nothing the call is void."""

    cost_usd: Amount
    house: bool = False
    reason: Annotated[str, Field(min_length=1, max_length=500)]


class AcceptForm(Form):
    """What of a payment lies in suspense is given to a wallet: the one named, or the top-up's."""

    wallet_id: UUID | None = None
    reason: Annotated[str, Field(min_length=1, max_length=500)]


class PaymentRefundForm(Form):
    """A payment to be sent back, all that is left of it when no amount is named; ``below_zero``: though it was spent."""

    amount: Amount | None = None
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    below_zero: Annotated[bool, Field(strict=True)] = False
    key: Annotated[str, Field(min_length=1, max_length=200)] | None = None
