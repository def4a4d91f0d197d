"""Which provider of models the settings name."""

from config.settings import Settings
from proxy.upstream.adapter import Upstream
from proxy.upstream.openai import OpenAIUpstream
from proxy.upstream.openrouter import OpenRouterUpstream


def make_upstream(settings: Settings) -> Upstream:
    """Return the adapter for the configured provider, not started."""
    kinds: dict[str, type[Upstream]] = {"openrouter": OpenRouterUpstream, "openai": OpenAIUpstream}
    return kinds[settings.upstream.kind](settings.upstream)
