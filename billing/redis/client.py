"""The way to Redis, whether it is one server or a cluster: what both can do, and which of them a URL names."""

from collections.abc import Awaitable, Iterable
from typing import Any, Protocol

from billing.meters import Meters
from billing.redis.cluster import RedisCluster, is_cluster
from billing.redis.connection import Argument
from billing.redis.pipeline import RedisPipe, Script
from billing.redis.survey import Survey
from config.settings import RedisSettings


class RedisWay(Protocol):
    """Runs commands and scripts. All keys of one script lie in one shard, by the tag in braces."""

    def run(self, *command: Argument) -> Awaitable[Any]:
        """Send one command, whose first argument is its key.

        Raises:
            RedisUnavailableError: Redis is away or slow; whether the command ran is unknown.
        """

    def call(self, script: Script, keys: Iterable[str], args: Iterable[Argument]) -> Awaitable[Any]:
        """Run a script; its text is sent only if the server does not know it.

        Raises:
            RedisUnavailableError: Redis is away or slow; whether the script ran is unknown.
        """

    async def ping(self) -> None:
        """Return if calls, be it those of a part of the shards, can be admitted.

        Raises:
            RedisUnavailableError: none can.
        """

    async def survey(self) -> Survey:
        """Ask every server who it is.

        Raises:
            RedisUnavailableError: none answers.
        """

    async def close(self) -> None:
        """Finish what is queued, then close the connections."""


def make_redis(settings: RedisSettings, meters: Meters | None = None) -> RedisWay:
    """Return the way to the Redis that the URL names; it connects when first used."""
    if is_cluster(settings.url.get_secret_value()):
        return RedisCluster(settings, meters)
    return RedisPipe(settings, meters)
