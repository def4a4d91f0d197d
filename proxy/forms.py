"""What self-service paths are sent: JSON forms, checked by pydantic, amounts exact."""

import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel, ValidationError, WithJsonSchema

from billing.caps import PERIODS
from billing.errors import InputError
from billing.keys import KeyRules
from billing.money import AMOUNT_MAX_NANO, NANO, parse_amount
from config.settings import LimitSettings, LogLevel
from proxy.ask import read_body
from proxy.errors import BadRequestError

_Form = TypeVar("_Form", bound=BaseModel)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AMOUNT = re.compile(r"[0-9]{1,10}(\.[0-9]{1,9})?", re.ASCII)


def _read_amount(value: object) -> int:
    """Read an amount in major units into nano units: a string, or a whole number; another number was a float somewhere."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("give an amount in major units as a string, as '12.50'")  # noqa: TRY004 - pydantic reads ValueError
    text = str(value)
    if not _AMOUNT.fullmatch(text):
        raise ValueError("the amount must have at most ten digits and nine decimals, as '12.50'")
    try:
        amount_nano = parse_amount(text)
    except InputError as error:
        raise ValueError(str(error)) from None
    return amount_nano


Amount = Annotated[
    int,
    BeforeValidator(_read_amount),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{_AMOUNT.pattern}$"},
                {"type": "integer", "minimum": 0, "maximum": AMOUNT_MAX_NANO // NANO},
            ],
            "examples": ["12.50"],
            "description": "Major units: a string, or a whole number; not a number with decimals.",
        }
    ),
]


def _only_text(value: object) -> object:
    """Let pydantic read a text; from a number it would make a moment since 1970, or an address."""
    if value is not None and (not isinstance(value, str) or value.strip("-+. ").isnumeric()):
        raise ValueError("give it as a text")
    return value


def _only_number(value: object) -> object:
    """Let through what is a number in JSON, as the number that pydantic expects."""
    if value is None or (isinstance(value, int | Decimal) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise ValueError("give it as a number")


_Limit = Annotated[int, Field(ge=0, lt=2**40, strict=True)]
_Count = Annotated[int, Field(gt=0, lt=2**40, strict=True)]


class Form(BaseModel):
    """A JSON object with known members only."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


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


async def read_form(request: web.Request, form: type[_Form], limits: LimitSettings) -> _Form:
    """Read and check a form; an empty body is an empty form.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: nothing was changed.
    """
    return check_form(await read_fields(request, limits), form)


async def read_fields(request: web.Request, limits: LimitSettings) -> object:
    """Read the JSON of a form, of whichever kind; an empty body is an empty object.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: it is none.
    """
    body = await read_body(request, limits)
    try:
        return json.loads(
            body or b"{}", parse_float=Decimal, parse_constant=_refuse, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"The body is not a valid JSON object: {str(error)[:200]}") from None


def check_form(fields: object, form: type[_Form]) -> _Form:
    """Check the fields of a form.

    Raises:
        BadRequestError: they do not fit; it names the first.
    """
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:200] or None
        raise BadRequestError(f"{name or 'The body'}: {first['msg']}", param=name) from None


def read_query(request: web.Request, name: str) -> str | None:
    """Return a parameter of the query; None when it is not there.

    Raises:
        BadRequestError: it is there twice: somebody else may read the other.
    """
    given = request.query.getall(name, [])
    if len(given) > 1:
        raise BadRequestError(f"'{name}' is there {len(given)} times.", param=name)
    return given[0] if given else None


def read_flag(request: web.Request, name: str) -> bool:
    """Read a flag of the query; False when it is not there.

    Raises:
        BadRequestError: it is neither true nor false.
    """
    given = read_query(request, name)
    found = {None: False, "true": True, "1": True, "false": False, "0": False}.get(given and given.lower())
    if found is None:
        raise BadRequestError(f"'{name}' must be true or false.", param=name)
    return found


def read_limit(request: web.Request, *, most: int) -> int:
    """Read how long a page shall be; the longest, without one.

    Raises:
        BadRequestError: it is no number from 1 to ``most``.
    """
    text = read_query(request, "limit") or str(most)
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most))) or not 1 <= int(text) <= most:
        raise BadRequestError(f"'limit' must be a whole number from 1 to {most}.", param="limit")
    return int(text)


def read_moment(request: web.Request, name: str) -> datetime | None:
    """Read a moment of the query, in UTC where it names no zone; None when it is not there.

    What is before 1970 is 1970: ids count from there.

    Raises:
        BadRequestError: it is none.
    """
    text = read_query(request, name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.astimezone(UTC) if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return max(moment, _EPOCH)
    except (ValueError, OverflowError):
        raise BadRequestError(f"'{name}' must be a moment as 2027-01-31T00:00:00Z.", param=name) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is named twice")
    return found
