"""What a person's requests may say."""

from datetime import datetime
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BeforeValidator, Field, RootModel

from billing.identity.key import KeyRules
from billing.wallets.caps import PERIODS
from proxy.http.forms import Amount, Form, _Count, _only_number, _only_text


class CapsForm(Form):
    """Limits by period, in major units of the wallet's currency; null lifts one, and what is not named stays."""

    call: Amount | None = None
    day: Amount | None = None
    week: Amount | None = None
    month: Amount | None = None
    total: Amount | None = None

    @property
    def limits(self) -> dict[str, int | None]:
        """What was named, in nano units."""
        return {period: getattr(self, period) for period in sorted(self.model_fields_set & set(PERIODS))}


class WalletAlertsForm(Form):
    """Below which balance its owner is told, in major units of the wallet's currency; null: never."""

    low: Amount | None


class KeyForm(Form):
    """What a key is made with; see ``KeyRules``."""

    name: Annotated[str, Field(max_length=200)] = ""
    wallet_id: UUID | None = None
    expires_at: Annotated[datetime | None, BeforeValidator(_only_text)] = None
    models: Annotated[list[str], Field(min_length=1, max_length=100)] | None = None
    networks: (
        Annotated[
            list[Annotated[IPv4Network | IPv6Network, BeforeValidator(_only_text)]],
            Field(min_length=1, max_length=100),
        ]
        | None
    ) = None
    manages: Annotated[bool, Field(strict=True)] | None = None
    requests_per_min: _Count | None = None
    tokens_per_min: _Count | None = None
    calls_in_flight: _Count | None = None
    caps: CapsForm = CapsForm()

    @property
    def rules(self) -> KeyRules:
        """The rules of the key to be made."""
        named = self.model_dump(exclude={"wallet_id", "caps"}, exclude_unset=True)
        limits = {period: amount for period, amount in self.caps.limits.items() if amount is not None}
        return KeyRules(**named, caps=limits)


class TopupForm(Form):
    """Money to be paid into the wallet, in major units of its currency.

    `return_url` is where the payer is sent afterwards; `email` is the payer's, where the account has none. With `save_method`
    the card that is paid with is saved at the provider, to be charged again; only Stripe does that.
    """

    provider: Literal["stripe", "paystack", "flutterwave"]
    amount: Amount
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$", examples=["NGN"])] | None = None
    return_url: Annotated[str, Field(max_length=2_000, pattern=r"^https?://[!-~]+$")] | None = None
    email: Annotated[str, Field(max_length=320, pattern=r"^[^@\s]+@[^@\s]+$")] | None = None
    save_method: bool = False


class AutoTopupForm(Form):
    """When and how a wallet tops itself up, in major units of its currency.

    Below `threshold` so much is charged as `amount` says, at most once in `pause_s` seconds. What is not named stays as it was.
    """

    enabled: Annotated[bool, Field(strict=True)]
    threshold: Amount | None = None
    amount: Amount | None = None
    pause_s: Annotated[int, Field(gt=0, le=366 * 86_400, strict=True)] | None = None


class BalanceAction(Form):
    """The wallet, as `GET /v1/wallet`."""

    action: Literal["balance"]


class TopupAction(TopupForm):
    """A top-up is begun, as by `POST /v1/wallet/topups`."""

    action: Literal["topup"]


class TopupStatusAction(Form):
    """How a top-up stands, as `GET /v1/wallet/topups/{id}`."""

    action: Literal["topup_status"]
    id: Annotated[str, Field(max_length=100)]


class CapAction(CapsForm):
    """Caps are set, as by `PUT /v1/wallet/caps`."""

    action: Literal["cap"]


class CapsAction(Form):
    """The caps, as `GET /v1/wallet/caps`."""

    action: Literal["caps"]


class TransactionsAction(Form):
    """The newest transactions, as `GET /v1/wallet/transactions`."""

    action: Literal["transactions"]


class WalletAction(
    RootModel[
        Annotated[
            BalanceAction | TopupAction | TopupStatusAction | CapAction | CapsAction | TransactionsAction,
            Field(discriminator="action"),
        ]
    ]
):
    """What to do with the caller's wallet."""


WALLET_ACTIONS: dict[str, type[Form]] = {
    "balance": BalanceAction,
    "topup": TopupAction,
    "topup_status": TopupStatusAction,
    "cap": CapAction,
    "caps": CapsAction,
    "transactions": TransactionsAction,
}


class RotateForm(Form):
    """How a key's secret is changed."""

    overlap_s: Annotated[float | None, Field(ge=0, allow_inf_nan=False), BeforeValidator(_only_number)] = None
