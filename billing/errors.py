"""What billing refuses, and why.

* TumaError
  * RefusalError: the caller's to mend; nothing was written
    - InvalidKeyError
      - InvalidTokenError
      - InvalidSignatureError
    - NotPermittedError: the caller is known, and may not do this
      - ModelNotAllowedError
      - AddressNotAllowedError
    - WalletFrozenError
    - InsufficientFundsError
    - CapExceededError
    - RateLimitError
    - ModelNotFoundError
    - InputError: a command's or a form's value is unusable
      - NotFoundError: no such wallet, key, call or user
  * UnavailableError: ours to mend; the caller may try again later
    - PostgresUnavailableError
    - RedisUnavailableError
    - FxUnavailableError
    - FxStaleError
    - FxSourceError
    - ProviderUnavailableError
    - ProviderQuotaError
    - PaymentsUnavailableError
    - OverloadedError
    - FeedFullError
    - JwksUnavailableError
    - AlertNotTakenError
    - WorkerStalledError: this worker stood still, and a call of its is nobody's any more
  * BrokenInvariantError: the books would stop being right; nothing was written
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from billing.limits import RateState


class TumaError(Exception):
    """The root of what Tuma raises on purpose; ``str(error)`` is fit for the caller's eyes."""


class RefusalError(TumaError):
    """An expected refusal: nothing was written, nothing is held."""


class InvalidKeyError(RefusalError):
    """The API key is unknown, revoked or malformed."""


class InvalidTokenError(InvalidKeyError):
    """The user's token is malformed, expired, not for us, or not signed by the issuer."""


class InvalidSignatureError(InvalidKeyError):
    """A webhook that its provider did not sign, or whose provider is not set up."""


class NotPermittedError(RefusalError):
    """The caller may not do this with the key that they came with."""


class ModelNotAllowedError(NotPermittedError):
    """The key is for other models."""


class AddressNotAllowedError(NotPermittedError):
    """The key may not be used from where the client is."""


class WalletFrozenError(RefusalError):
    """The wallet may not spend until an operator unfreezes it."""


class InsufficientFundsError(RefusalError):
    """The wallet's available amount does not cover the hold."""


class CapExceededError(RefusalError):
    """A cap on the wallet, its key or its user does not cover the hold."""


class RateLimitError(RefusalError):
    """A window of the key or the user is full.

    Args:
        message: what is full.
        retry_after_ms: milliseconds until the same request would be admitted.
        state: what is left of the windows.
        hopeless: waiting does not help: the request is larger than the whole window.
    """

    def __init__(
        self, message: str, *, retry_after_ms: int, state: "RateState | None" = None, hopeless: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms
        self.state = state
        self.hopeless = hopeless


class ModelNotFoundError(RefusalError):
    """The model is unknown or has no price: refused, never free."""


class PriceMissingError(RefusalError):
    """A request asks for what is billed apart from tokens, and the price book has no price for it."""


class InputError(RefusalError):
    """A value given to a command or a form is unusable."""


class NotFoundError(InputError):
    """There is no such user, wallet, key or call."""


class UnavailableError(TumaError):
    """A part that money depends on is away; retrying later is right.

    Args:
        message: what is away.
        retry_after_s: a reasonable pause in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: int = 2) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PostgresUnavailableError(UnavailableError):
    """Postgres, the truth, cannot be reached or does not answer in time."""


class RedisUnavailableError(UnavailableError):
    """Redis, which admits, cannot be reached or does not answer in time."""


class WorkerStalledError(UnavailableError):
    """This worker stood still for so long that its call was ended without it: nothing of the answer is passed on."""


class FxUnavailableError(UnavailableError):
    """There is no exchange rate for the wallet's currency."""


class FxStaleError(UnavailableError):
    """The exchange rate for the wallet's currency was not confirmed for too long; running calls keep theirs."""


class FxSourceError(UnavailableError):
    """A source of exchange rates does not answer, or what it says cannot be believed."""


class ProviderUnavailableError(UnavailableError):
    """The provider's own records cannot be read now."""


class ProviderQuotaError(UnavailableError):
    """The provider's quota does not cover the call, or the provider refuses our key or account: ours to mend."""


class PaymentsUnavailableError(UnavailableError):
    """A payment provider does not answer now, or not as it should: nothing is known, so it is asked again."""


class OverloadedError(UnavailableError):
    """A worker has as much to do as it can do at once."""


class FeedFullError(UnavailableError):
    """No more watchers are taken here: there are too many, or the worker stops."""


class JwksUnavailableError(UnavailableError):
    """The issuer's keys cannot be fetched, and none that is known would do."""


class AlertNotTakenError(UnavailableError):
    """The receiver of alerts did not acknowledge a message; it is delivered again."""


class BrokenInvariantError(TumaError):
    """Going on would make the books wrong; the operation stopped and changed nothing."""
