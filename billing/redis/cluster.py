"""Redis Cluster: a pipe to each primary, and a map of who has which slot.

A command goes to the pipe of its slot's primary, where it is coalesced as on a single server. What may come back:

* ``MOVED``: it did not run; it goes to the node named, and the map is learned anew;
* ``ASK``: it did not run; this once it goes to the node named, behind ``ASKING``;
* ``TRYAGAIN``: it did not run, as its keys are just being moved; it is sent again after a pause;
* ``CLUSTERDOWN``, or no answer: ``RedisUnavailableError``, and the map is learned anew until its node answers or has a
  successor. A command that was not answered may have run, and is never sent again.

See https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/. What a promoted replica has lost is no matter of this file: lua/lineage.lua, docs/decisions/0017-redis-cluster.md.
"""

import asyncio
import contextlib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import structlog
from pydantic import SecretStr
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterDownError,
    MovedError,
    ResponseError,
    TryAgainError,
)

from billing.errors import BrokenInvariantError, InputError, RedisUnavailableError
from billing.meters import Meters
from billing.redis.connection import Argument, Command
from billing.redis.pipeline import RedisPipe, Script, ScriptCommand
from billing.redis.survey import Server, Survey
from billing.tasks import TrackedTasks
from config.settings import RedisSettings

_log = structlog.get_logger("tuma.redis")
_SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_SLOTS = 16_384
_PORT = 6379
_UNKNOWN_HOST = "?"  # of a node that does not know by which name it is reached
# Replies that are no outage of the node that gave them.
_ROUTED = (AskError, TryAgainError, ClusterDownError, ClusterCrossSlotError)  # MovedError is an AskError


class Node(NamedTuple):
    """Where a node listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SlotMap:
    """Who has which slot.

    Args:
        starts: the first slot of each range, rising.
        ends: its last slot.
        primaries: of each range.
        replicas: of each range.
    """

    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    primaries: tuple[Node, ...] = ()
    replicas: tuple[frozenset[Node], ...] = ()

    @classmethod
    def read(cls, reply: list[Any], asked: Node) -> "SlotMap":
        """Read the reply to CLUSTER SLOTS; a node that it does not name by a host is where we asked."""
        ranges = []
        for start, end, *nodes in reply:
            primary, *replicas = (_read_node(node, asked) for node in nodes)
            if primary is not None:
                ranges.append((int(start), int(end), primary, frozenset(filter(None, replicas))))
        ranges.sort(key=lambda found: found[0])
        starts, ends, primaries, replicas_of = zip(*ranges, strict=True) if ranges else ((), (), (), ())
        return cls(starts, ends, primaries, replicas_of)

    def find(self, slot: int) -> Node | None:
        """Return the primary of a slot, None if nobody has it."""
        place = bisect_right(self.starts, slot) - 1
        return self.primaries[place] if place >= 0 and slot <= self.ends[place] else None

    @property
    def served(self) -> int:
        """How many slots have a primary."""
        return sum(end - start + 1 for start, end in zip(self.starts, self.ends, strict=True))

    @property
    def nodes(self) -> frozenset[Node]:
        """Primaries and replicas."""
        return frozenset(self.primaries).union(*self.replicas)

    @property
    def alone(self) -> frozenset[Node]:
        """Primaries that have no replica."""
        pairs = zip(self.primaries, self.replicas, strict=True)
        return frozenset(primary for primary, replicas in pairs if not replicas)


def _read_node(node: list[Any], asked: Node) -> Node | None:
    host = node[0].decode() if isinstance(node[0], bytes) else (node[0] or "")
    return None if host == _UNKNOWN_HOST else Node(host or asked.host, int(node[1]))


@dataclass(frozen=True, slots=True)
class _Address:
    """A cluster's URL, read: as whom its nodes are spoken to, and which of them are asked first."""

    scheme: str
    credentials: str
    seeds: tuple[Node, ...]

    @classmethod
    def read(cls, url: str) -> "_Address":
        scheme, _, rest = url.partition("://")
        credentials, at, hosts = rest.rpartition("@")
        hosts = hosts.removesuffix("/").removesuffix("/0")
        try:
            seeds = tuple(cls._read_seed(text) for text in hosts.split(","))
        except ValueError:
            seeds = ()
        if not seeds or any(mark in credentials for mark in "/?#@") or (at and ":" not in credentials):
            # Its text may show a part of the password, as a host.
            raise InputError(
                "TUMA_REDIS__URL is not of the form redis+cluster://:password@host:6379,host:6379 (or rediss+cluster://),"
                " without a database's number; in a password, write / ? # @ : % as %2F %3F %23 %40 %3A %25"
            )
        return cls(_SCHEMES[scheme], credentials + at, seeds)

    @staticmethod
    def _read_seed(text: str) -> Node:
        parts = urlsplit(f"//{text}")
        if not parts.hostname or parts.netloc != text or "@" in text:
            raise ValueError
        return Node(parts.hostname, parts.port or _PORT)

    def url(self, node: Node) -> SecretStr:
        return SecretStr(f"{self.scheme}://{self.credentials}{node}/0")


def is_cluster(url: str) -> bool:
    """Tell whether a URL names a cluster."""
    return url.partition("://")[0] in _SCHEMES


class _RoutedError(Exception):
    """A node's word that a command did not run there, and why."""

    def __init__(self, reply: ResponseError) -> None:
        super().__init__(str(reply))
        self.reply = reply


class _NodePipe(RedisPipe):
    """The pipe to one node; what the cluster says of slots is told from the answers of commands."""

    def __init__(self, settings: RedisSettings, meters: Meters, node: Node) -> None:
        super().__init__(settings, meters)
        self.node = node

    def send(self, words: tuple[Argument, ...], script: Script | None) -> asyncio.Future[Any]:
        """Queue a command for the next pipeline."""
        return self._submit(Command(words) if script is None else ScriptCommand(script, words))

    async def ask(self, words: tuple[Argument, ...]) -> Any:
        """Send a command behind ASKING, which counts for the next command of its connection only."""
        asking = Command(("ASKING",))
        try:
            return await self._submit(asking, Command(words))
        finally:
            if asking.answer.done() and not asking.answer.cancelled():
                asking.answer.exception()  # looked at: it is the command's, too

    def _take(self, command: Command, reply: Any) -> None:
        if isinstance(reply, _ROUTED):
            self._fail((command,), _RoutedError(reply))
        else:
            super()._take(command, reply)


class RedisCluster:
    """Sends every command to the primary of its slot.

    Args:
        settings: URL, timeout, connections and commands per pipeline, of each node; redirects and pauses.
        meters: where pipelines are counted.
    """

    def __init__(self, settings: RedisSettings, meters: Meters | None = None) -> None:
        self._settings = settings
        self._meters = meters or Meters()
        self._address: _Address | None = None
        self._map = SlotMap()
        self._pipes: dict[Node, _NodePipe] = {}
        self._owners: dict[str, _NodePipe] = {}  # by the tag of a shard, of which there are few
        self._suspects: set[Node] = set()  # did not answer
        self._why: Exception | None = None  # nobody could tell the map
        self._told: asyncio.Event | None = None  # somebody waits for the map
        self._keeper: asyncio.Task[None] | None = None
        self._turn = 0
        self._tasks = TrackedTasks()

    async def run(self, *command: Argument) -> Any:
        """Send one command, whose first argument is its key.

        Raises:
            RedisUnavailableError: its shard is away or slow; whether the command ran is unknown.
        """
        if len(command) < 2:  # noqa: PLR2004 - a name and a key
            raise BrokenInvariantError(f"{command[0]!r} has no key to find its node by")
        return await self._send(str(command[1]), command, None)

    async def call(self, script: Script, keys: Iterable[str], args: Iterable[Argument]) -> Any:
        """Run a script; its text is sent only if the node does not know it.

        Raises:
            RedisUnavailableError: its shard is away or slow; whether the script ran is unknown.
        """
        names = tuple(keys)
        return await self._send(names[0], script.words(names, args), script)

    async def _send(self, key: str, command: tuple[Argument, ...], script: Script | None) -> Any:
        pipe = self._owners.get(_tag(key))
        if pipe is None:
            pipe = await self._find_owner(key)
        try:
            return await pipe.send(command, script)
        except _RoutedError as routed:
            return await self._follow(routed.reply, key, command, script, pipe)
        except RedisUnavailableError:
            self._suspect(pipe.node)
            raise

    async def _follow(
        self,
        reply: ResponseError,
        key: str,
        command: tuple[Argument, ...],
        script: Script | None,
        pipe: _NodePipe,
    ) -> Any:
        """Send a command that did not run where it ought to run; each reply says where, or when."""
        for _ in range(self._settings.redirects_max):
            try:
                match reply:
                    case MovedError():
                        pipe = self._own(key, self._named(reply, pipe))
                        self._doubt()  # of the other shards the map will tell
                        return await pipe.send(command, script)
                    case AskError():
                        pipe = self._named(reply, pipe)
                        return await self._ask(pipe, command, script)
                    case TryAgainError():
                        await asyncio.sleep(self._settings.redirect_pause_s)
                        pipe = await self._find_owner(key)
                        return await pipe.send(command, script)
                    case _:
                        break
            except _RoutedError as routed:
                reply = routed.reply
            except RedisUnavailableError:
                self._suspect(pipe.node)
                raise
        what = script.name if script is not None else str(command[0])
        if isinstance(reply, ClusterCrossSlotError):
            raise BrokenInvariantError(f"{what} has keys of several slots")
        self._doubt()
        raise RedisUnavailableError(f"Redis refused {what}: {type(reply).__name__} {reply}")

    def _named(self, reply: AskError, pipe: _NodePipe) -> _NodePipe:
        return self._pipe(Node(reply.host or pipe.node.host, reply.port))

    async def _ask(self, pipe: _NodePipe, command: tuple[Argument, ...], script: Script | None) -> Any:
        """Ask the node that a slot is moving to; a script goes as its text, which that node may not know yet."""
        if script is not None:
            command = ("EVAL", script.text, *command[2:])
        return await pipe.ask(command)

    def _pipe(self, node: Node) -> _NodePipe:
        pipe = self._pipes.get(node)
        if pipe is None:
            settings = self._settings.model_copy(update={"url": self._read_address().url(node)})
            pipe = self._pipes[node] = _NodePipe(settings, self._meters, node)
        return pipe

    def _read_address(self) -> _Address:
        if self._address is None:
            self._address = _Address.read(self._settings.url.get_secret_value())
        return self._address

    async def _find_owner(self, key: str) -> _NodePipe:
        """Return the pipe to the primary of a key; the map is learned first where it is not known.

        Raises:
            RedisUnavailableError: nobody tells the map, or no node has the slot.
        """
        slot = key_slot(key.encode())
        node = self._map.find(slot)
        if node is None:
            await self._wait_for_map()
            node = self._map.find(slot)
        if node is None:
            raise RedisUnavailableError(
                f"Redis is unavailable: {self._why or 'no node of the cluster has the slot'}"
            )
        return self._own(key, self._pipe(node))

    def _own(self, key: str, pipe: _NodePipe) -> _NodePipe:
        if "{" in key:
            self._owners[_tag(key)] = pipe
        return pipe

    async def _wait_for_map(self) -> None:
        """Wait until somebody has told the map, or nobody could; they are asked one after the other.

        Raises:
            InputError: the URL or the CA file cannot be used.
        """
        asked = len(self._read_address().seeds) + 1
        told = self._doubt()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.timeout_s * asked):
                await told.wait()
        if isinstance(self._why, InputError):
            raise self._why

    def _suspect(self, node: Node) -> None:
        if node not in self._suspects:
            self._suspects.add(node)
            _log.warning("node.lost", node=str(node))
        self._doubt()

    def _doubt(self) -> asyncio.Event:
        """Have the map learned anew, once for all who doubt meanwhile; return what is set after that."""
        if self._told is None:
            self._told = asyncio.Event()
        if self._keeper is None or self._keeper.done():
            self._keeper = self._tasks.start(self._keep_map(), name="redis cluster map")
        return self._told

    async def _keep_map(self) -> None:
        """Learn the map until nobody doubts it and every node that was lost answers or has a successor."""
        while self._told is not None or self._suspects:
            told, self._told = self._told, None
            await self._learn()
            if told is not None:
                told.set()
            await self._look_at_suspects()
            await asyncio.sleep(self._settings.map_pause_s)

    async def _learn(self) -> None:
        for node in self._whom_to_ask():
            try:
                found = SlotMap.read(await self._pipe(node).run("CLUSTER", "SLOTS"), node)
            except (RedisUnavailableError, InputError) as error:
                self._why = error
                continue
            if found.served:
                self._why = None
                self._take(found)
                return
            self._why = RedisUnavailableError("the node asked knows of no slots")

    def _whom_to_ask(self) -> list[Node]:
        """Return all nodes that are known: first those that answer, beginning with another one every time."""
        self._turn += 1
        known = sorted(self._map.nodes - self._suspects)
        turn = self._turn % len(known) if known else 0
        return list(
            dict.fromkeys((*known[turn:], *known[:turn], *self._read_address().seeds, *self._suspects))
        )

    def _take(self, found: SlotMap) -> None:
        self._owners.clear()
        self._suspects &= found.nodes
        if found == self._map:
            return
        _log.info("map.learned", primaries=len(set(found.primaries)), slots=found.served)
        self._map = found
        for node in self._pipes.keys() - found.nodes:
            self._tasks.start(self._pipes.pop(node).close(), name=f"close {node}")

    async def _look_at_suspects(self) -> None:
        for node in tuple(self._suspects):
            with contextlib.suppress(RedisUnavailableError):
                await self._pipe(node).run("PING")
                self._suspects.discard(node)

    async def ping(self) -> None:
        """Return if any primary serves its slots; the other shards' calls are refused one by one.

        Raises:
            RedisUnavailableError: none does.
        """
        primaries = set((await self._known_map()).primaries)
        if not any(await asyncio.gather(*(self._serves(node) for node in primaries))):
            raise RedisUnavailableError("Redis is unavailable: no primary of the cluster serves its slots")

    async def _known_map(self) -> SlotMap:
        if not self._map.served:
            await self._wait_for_map()
        if not self._map.served:
            raise RedisUnavailableError(f"Redis is unavailable: {self._why or 'nobody tells the slots'}")
        return self._map

    async def _serves(self, node: Node) -> bool:
        try:
            return b"cluster_state:ok" in await self._pipe(node).run("CLUSTER", "INFO")
        except RedisUnavailableError:
            self._suspect(node)
            return False

    async def survey(self) -> Survey:
        """Ask every node who it is, and whether all slots are served.

        Raises:
            RedisUnavailableError: nobody tells the slots.
        """
        await self._known_map()
        await self._wait_for_map()  # as it is now
        found = self._map
        primaries, nodes = set(found.primaries), sorted(found.nodes)
        answers = await asyncio.gather(*(self._ask_node(node) for node in nodes))
        serving = await asyncio.gather(*(self._serves(node) for node in primaries))
        away = [str(node) for node, server in zip(nodes, answers, strict=True) if server is None]
        faults = []
        if found.served < _SLOTS:
            faults.append(f"{_SLOTS - found.served} slots have no node: assign them (CLUSTER ADDSLOTS)")
        if not all(serving) and not away:
            faults.append("it says that it is down: look at CLUSTER INFO")
        return Survey(
            servers=tuple(server for server in answers if server is not None),
            away=tuple(away),
            shape=f"a cluster of {len(primaries)} primaries, {len(primaries - found.alone)} of them with a replica",
            faults=tuple(faults),
        )

    async def _ask_node(self, node: Node) -> Server | None:
        try:
            return (await self._pipe(node).survey()).servers[0]
        except RedisUnavailableError:
            return None

    async def close(self) -> None:
        """Finish what is queued, then close the connections."""
        self._tasks.cancel()
        await self._tasks.drain(self._settings.timeout_s)
        await asyncio.gather(*(pipe.close() for pipe in self._pipes.values()))
        self._pipes.clear()
        self._owners.clear()


def _tag(key: str) -> str:
    return key[key.find("{") + 1 : key.find("}")]
