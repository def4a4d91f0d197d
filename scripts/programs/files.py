"""How many files a process may open: each connection is one, so as many connections as there are files for."""

import resource

from config.settings import Settings

FILES_MIN = 1_024  # fewer are not enough for pools, logs and some calls
_OWN_FILES = 256  # pools of Postgres and Redis, listeners, logs, modules
_FOR_EVER = 1 << 30  # where there is no limit
_SHARES = 2  # a call takes two files: its client's and the provider's


def find_file_limit() -> int:
    """Return how many files a process could open at most: what ``raise_file_limit`` would raise it to."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _FOR_EVER if hard == resource.RLIM_INFINITY else hard


def raise_file_limit() -> int:
    """Let this process and its children open as many files as they may; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # some systems have a bound of their own below it
        return soft
    return find_file_limit()


def bound_connections(settings: Settings, files: int) -> Settings:
    """Return the settings with no more connections than there are files for: one refused at once beats one that hangs.

    Args:
        settings: as configured.
        files: that the process may open.
    """
    share = max((files - _OWN_FILES) // _SHARES, 1)
    limits, upstream = settings.limits, settings.upstream
    if share >= max(limits.connections, upstream.connections_max):
        return settings
    bounded = limits.model_copy(update={"connections": min(limits.connections, share)})
    there = upstream.model_copy(update={"connections_max": min(upstream.connections_max, share)})
    return settings.model_copy(update={"limits": bounded, "upstream": there})
