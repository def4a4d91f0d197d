"""What the way of a call uses. Nobody else is given it: it can reserve, send, and end a call."""

from dataclasses import dataclass

from aiohttp import web

from billing.calls.calls import Calls
from billing.fx.book import FxBook
from billing.pricing.price_book import PriceBook
from billing.pricing.tokens import TokenCounter
from billing.provider.quota import Quota
from billing.tasks import TrackedTasks
from billing.threads import FairThreads
from config.settings import Settings
from proxy.protocol.members import Policy
from proxy.upstream.adapter import Upstream


@dataclass(frozen=True, slots=True)
class CallServices:
    """The way of a call. ``conclusions`` are ends of calls, which the worker waits for; ``threads`` do what would stop the others."""

    settings: Settings
    calls: Calls
    quota: Quota
    prices: PriceBook
    fx: FxBook
    counter: TokenCounter
    threads: FairThreads
    upstream: Upstream
    conclusions: TrackedTasks
    policy: Policy  # of members of a request that no table has


CALL = web.AppKey("call", CallServices)
