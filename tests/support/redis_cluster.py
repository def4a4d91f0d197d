"""A Redis Cluster on loopback: three primaries with a replica each, small, and quick to find a successor."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from billing.holds.hold import SHARDS
from scripts.programs.embedded import EmbeddedRedis

_PASSWORD = "of@the:cluster"
_QUOTED_PASSWORD = "of%40the%3Acluster"
_BUS = 10_000
_PORTS = range(20_000, 32_000)  # below those that the system gives away, and so are their ports of the bus
_WAIT_S = 30.0
_NODE_TIMEOUT_MS = 2_000  # less, and a busy machine takes a node for dead
_SLOTS = 16_384


class ClusterNode(EmbeddedRedis):
    """One node."""

    @property
    def url(self) -> str:
        """The URL of this node alone."""
        return f"redis://:{_QUOTED_PASSWORD}@127.0.0.1:{self.port}/0"

    @property
    def admin(self) -> "Redis":
        """A connection of one's own to this very node."""
        return Redis.from_url(self.url, decode_responses=True, socket_timeout=5)

    def ask(self, *command: object) -> Any:
        """Send one command."""
        with contextlib.closing(self.admin) as admin:
            return admin.execute_command(*command)  # type: ignore[no-untyped-call]

    def info(self) -> dict[str, str]:
        """What CLUSTER INFO says."""
        said = self.ask("CLUSTER", "INFO")
        if isinstance(said, dict):
            return {str(name): str(value) for name, value in said.items()}
        return dict(line.split(":", 1) for line in str(said).split())

    def _prepare(self) -> None:
        self._password_file.write_text(_PASSWORD)

    def _command(self) -> Any:
        command = super()._command()
        more = {
            "cluster-enabled": "yes",
            "cluster-config-file": "nodes.conf",
            "cluster-node-timeout": str(_NODE_TIMEOUT_MS),
            "cluster-require-full-coverage": "no",
            "cluster-migration-barrier": "10",  # replicas stay where they are
            "cluster-replica-validity-factor": "0",
            "repl-diskless-sync-delay": "0",
            "masterauth": _PASSWORD,
        }
        with self._configuration.open("a") as file:
            file.writelines(f"{name} {value}\n" for name, value in more.items())
        return command

    def _is_ready(self, pid: int) -> bool:
        try:
            return bool(self.ask("INFO", "server")["process_id"] == pid)
        except (RedisError, OSError):
            return False


class LocalCluster:
    """Starts the nodes, makes a cluster of them, and stops them.

    Args:
        folder: for their data.
        program: another ``redis-server`` than the wheel's.
    """

    def __init__(self, folder: Path, *, program: Path | None = None) -> None:
        ports = _find_ports(6)
        self.nodes = [ClusterNode(folder / str(port), port=port, program=program) for port in ports]

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.start()
            self._join()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for node in self.nodes:
            node.kill()

    @property
    def url(self) -> str:
        """The cluster's URL, naming two of its nodes."""
        first, second, *_ = self.nodes
        return f"redis+cluster://:{_QUOTED_PASSWORD}@127.0.0.1:{first.port},127.0.0.1:{second.port}"

    def _join(self) -> None:
        primaries, replicas = self.nodes[:3], self.nodes[3:]
        for place, node in enumerate(primaries):
            node.ask("CLUSTER", "ADDSLOTS", *range(_SLOTS * place // 3, _SLOTS * (place + 1) // 3))
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        for node in self.nodes[1:]:
            node.ask("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port)
        wait_for(lambda: all(node.info()["cluster_known_nodes"] == "6" for node in self.nodes))
        for primary, replica in zip(primaries, replicas, strict=True):
            wait_for(partial(self._follow, replica, primary))
        self.wait_whole()

    @staticmethod
    def _follow(replica: ClusterNode, primary: ClusterNode) -> bool:
        try:
            replica.ask("CLUSTER", "REPLICATE", primary.ask("CLUSTER", "MYID"))
        except RedisError:
            return False  # has not heard of it yet
        return True

    def wait_whole(self) -> None:
        """Wait until all nodes run, agree on the slots, and every primary has its replica in step."""
        wait_for(self._is_whole)

    def _is_whole(self) -> bool:
        try:
            views = set()
            for node in self.nodes:
                if node.info()["cluster_state"] != "ok":
                    return False
                slots = self._slots(node)
                if not slots or not all(replicas for _, _, _, replicas in slots):
                    return False
                views.add(str(sorted(slots)))
                role = node.ask("ROLE")
                if role[0] == "slave" and role[3] != "connected":
                    return False
                if role[0] == "master" and len(role[2]) != 1:
                    return False
        except (RedisError, OSError):
            return False
        return len(views) == 1

    @staticmethod
    def _slots(node: ClusterNode) -> list[tuple[int, int, int, tuple[int, ...]]]:
        return [
            (start, end, primary[1], tuple(sorted(replica[1] for replica in replicas)))
            for start, end, primary, *replicas in node.ask("CLUSTER", "SLOTS")
        ]

    def by_port(self, port: int) -> ClusterNode:
        """Return the node on a port."""
        return next(node for node in self.nodes if node.port == port)

    def running(self) -> list[ClusterNode]:
        """Return the nodes that run."""
        return [node for node in self.nodes if node._process is not None]

    def owner_of(self, key: str) -> ClusterNode:
        """Return the primary of a key, as the first running node sees it."""
        slot = key_slot(key.encode())
        for start, end, port, _ in self._slots(self.running()[0]):
            if start <= slot <= end:
                return self.by_port(port)
        raise AssertionError(slot)

    def primaries(self) -> list[ClusterNode]:
        """Return the primaries that have shards, as the first running node sees them."""
        owners = {self.owner_of(f"{{s{shard:02d}}}").port for shard in range(SHARDS)}
        return [self.by_port(port) for port in sorted(owners)]

    def replica_of(self, primary: ClusterNode) -> ClusterNode:
        """Return the replica of a primary."""
        ports = next(replicas for _, _, port, replicas in self._slots(primary) if port == primary.port)
        return self.by_port(ports[0])

    def flush(self) -> None:
        """Empty all primaries."""
        for node in self.primaries():
            node.ask("FLUSHALL")

    def wait_promoted(self, lost: ClusterNode) -> None:
        """Wait until no node that runs believes that a lost primary serves anything."""
        wait_for(
            lambda: all(
                lost.port not in {port for _, _, port, _ in self._slots(node)}
                and sum(end - start + 1 for start, end, _, _ in self._slots(node)) == _SLOTS
                for node in self.running()
            )
        )

    def move_slot(self, key: str, target: ClusterNode) -> None:
        """Move a key's slot as ``redis-cli --cluster reshard`` does."""
        source = self.begin_move(key, target)
        self.finish_move(key, source, target)

    def begin_move(self, key: str, target: ClusterNode) -> ClusterNode:
        """Let a slot be on its way from its owner, which is returned, to a target; no key is moved yet."""
        slot, source = key_slot(key.encode()), self.owner_of(key)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.ask("CLUSTER", "MYID"))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.ask("CLUSTER", "MYID"))
        return source

    def finish_move(self, key: str, source: ClusterNode, target: ClusterNode) -> None:
        """Move a slot's keys, and give it to its new owner."""
        slot = key_slot(key.encode())
        where = ("127.0.0.1", target.port, "", 0, 5000, "REPLACE", "AUTH", _PASSWORD, "KEYS")
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.ask("MIGRATE", *where, *keys)
        for node in (target, source):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.ask("CLUSTER", "MYID"))
        wait_for(lambda: all(self.owner_is(node, slot, target.port) for node in self.running()))

    def owner_is(self, node: ClusterNode, slot: int, port: int) -> bool:
        """Tell whether a node believes that a slot belongs to a port."""
        return any(start <= slot <= end and owner == port for start, end, owner, _ in self._slots(node))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the cluster does not get there"
        time.sleep(0.05)


def _find_ports(count: int) -> list[int]:
    """Return ports that are free, and whose ports of the bus are."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if all(_is_free(one) for one in (port, port + _BUS)):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


async def wait_for_async(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition, as ``wait_for`` does."""
    async with asyncio.timeout(_WAIT_S):
        while not await condition():
            await asyncio.sleep(0.05)
