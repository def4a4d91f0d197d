"""What a person's own account uses: by the role that reads as that person, and may end no call."""

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from aiohttp import web

from billing.identity.auth_failures import UserWrites
from billing.identity.keys import Keys
from billing.payments.auto_topups import AutoTopups
from billing.payments.intents import Intents
from billing.payments.status_checks import StatusChecks
from billing.payments.worker import PaymentWorker
from billing.reports.call_view import OwnCalls
from billing.reports.statement import Statements
from billing.reports.usage import UsageBook
from billing.tasks import TrackedTasks
from billing.wallets.caps import Caps
from billing.wallets.wallets import Wallets
from config.settings import Settings
from proxy.live.watchers import Watchers


@dataclass(frozen=True, slots=True)
class AccountServices:
    """A person's own money. ``cool_user`` drops what Redis knows of a user whose caps have changed."""

    settings: Settings
    keys: Keys
    wallets: Wallets
    caps: Caps
    statements: Statements
    usage: UsageBook
    own_calls: OwnCalls
    intents: Intents
    auto_topups: AutoTopups
    payments: PaymentWorker
    status_checks: StatusChecks
    watchers: Watchers
    tasks: TrackedTasks
    writes: UserWrites
    cool_user: Callable[[UUID], None]


ACCOUNT = web.AppKey("account", AccountServices)
