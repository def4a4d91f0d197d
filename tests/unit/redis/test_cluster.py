"""The cluster's map, its URL, and what its nodes may answer; the nodes are played."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from pydantic import SecretStr
from redis.crc import key_slot

from billing.errors import BrokenInvariantError, InputError, RedisUnavailableError
from billing.redis.client import make_redis
from billing.redis.cluster import Node, RedisCluster, SlotMap, _Address
from billing.redis.pipeline import RedisPipe, Script
from config.settings import RedisSettings

KEY = "tuma:{s05}:u:1"
SLOT = key_slot(KEY.encode())
SCRIPT = Script("look", "return 1", "0" * 40)


class FakeNode:
    """Speaks the protocol, and answers as it is told; ``None`` cuts the connection."""

    def __init__(self) -> None:
        self.port = 0
        self.asked: list[list[str]] = []
        self.answer: Callable[[list[str]], bytes | None] = lambda _: b"+OK\r\n"
        self.owner: FakeNode = self
        self.silent = False
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        while line := await reader.readline():
            command = []
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                command.append((await reader.readexactly(size + 2))[:-2].decode())
            reply = b"" if self.silent else self._reply(command)
            if reply is None:
                break
            writer.write(reply)
        writer.close()

    def _reply(self, command: list[str]) -> bytes | None:
        match command:
            case ["CLUSTER", "SLOTS"]:
                reply: bytes | None = (
                    f"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:{self.owner.port}\r\n".encode()
                )
            case ["HELLO" | "AUTH" | "CLIENT" | "SELECT", *_]:
                return b"+OK\r\n"
            case ["PING"]:
                reply = b"+PONG\r\n"
            case _:
                reply = self.answer(command)
        self.asked.append(command)
        return reply

    def count(self, name: str) -> int:
        return sum(command[0] == name for command in self.asked)


@asynccontextmanager
async def two_nodes(**more: Any) -> AsyncIterator[tuple[FakeNode, FakeNode, RedisCluster]]:
    """Two nodes, the first of which has all slots, and a link to them."""
    first, second = FakeNode(), FakeNode()
    async with AsyncExitStack() as stack:
        for node in (first, second):
            await node.start()
            stack.push_async_callback(node.stop)
        options = {"timeout_s": 1.0, "redirect_pause_s": 0.01, "map_pause_s": 0.05, **more}
        url = SecretStr(f"redis+cluster://127.0.0.1:{first.port}")
        link = RedisCluster(RedisSettings(url=url, **options))
        stack.push_async_callback(link.close)
        yield first, second, link


def moved(node: FakeNode) -> Callable[[list[str]], bytes]:
    return lambda _: f"-MOVED {SLOT} 127.0.0.1:{node.port}\r\n".encode()


async def test_moved_is_followed_and_the_map_is_learned_once_per_burst() -> None:
    async with two_nodes() as (first, second, link):
        assert await link.run("SET", KEY, "1") == b"OK"
        learned = first.count("CLUSTER")
        first.answer = moved(second)
        first.owner = second.owner = second
        assert await asyncio.gather(*(link.run("SET", KEY, "1") for _ in range(300))) == [b"OK"] * 300
        assert second.count("SET") == 300
        async with asyncio.timeout(5):
            while first.count("CLUSTER") + second.count("CLUSTER") == learned:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert first.count("CLUSTER") + second.count("CLUSTER") - learned <= 3
        before = first.count("SET")
        assert await link.call(SCRIPT, [KEY], ()) == b"OK"
        assert (first.count("SET"), first.count("EVALSHA")) == (before, 0)


async def test_moved_is_believed_before_the_map_is_learned() -> None:
    async with two_nodes() as (first, second, link):
        assert await link.run("SET", KEY, "1") == b"OK"

        async def nobody_tells() -> None:
            pass

        link._learn = nobody_tells  # type: ignore[method-assign]
        first.answer = moved(second)
        for _ in range(5):
            assert await link.run("SET", KEY, "1") == b"OK"
        assert (first.count("SET"), second.count("SET")) == (2, 5)


async def test_many_failures_have_the_map_learned_by_one() -> None:
    async with two_nodes() as (first, _, link):
        await link._known_map()
        first.answer = lambda _: None
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(fail(link, f"tuma:{{s05}}:u:{number}"))
        assert len(link._tasks) == 1


async def fail(link: RedisCluster, key: str) -> None:
    with pytest.raises(RedisUnavailableError):
        await link.run("SET", key, "1")


async def test_one_sends_the_other_back_and_there_is_an_end() -> None:
    async with two_nodes(redirects_max=4) as (first, second, link):
        first.answer, second.answer = moved(second), moved(first)
        with pytest.raises(RedisUnavailableError, match="Moved"):
            await link.run("SET", KEY, "1")
        assert first.count("SET") + second.count("SET") == 5


async def test_ask_counts_for_one_command_and_goes_behind_asking() -> None:
    async with two_nodes() as (first, second, link):
        first.answer = lambda _: f"-ASK {SLOT} 127.0.0.1:{second.port}\r\n".encode()
        assert await asyncio.gather(*(link.run("SET", KEY, "1") for _ in range(20))) == [b"OK"] * 20
        assert await link.call(SCRIPT, [KEY], ("2",)) == b"OK"
        behind = [command for command in second.asked if command[0] != "CLUSTER"]
        assert [command[0] for command in behind[::2]] == ["ASKING"] * 21
        assert behind[-1] == ["EVAL", SCRIPT.text, "1", KEY, "2"]
        first.answer = lambda _: b"+OK\r\n"
        await link.run("SET", KEY, "1")
        assert second.count("SET") == 20


async def test_what_is_being_moved_is_tried_again_for_a_while() -> None:
    async with two_nodes() as (first, _, link):
        answers = [b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"] * 3
        first.answer = lambda _: answers.pop() if answers else b"+OK\r\n"
        began_s = time.monotonic()
        assert await link.call(SCRIPT, [KEY], ()) == b"OK"
        assert first.count("EVALSHA") == 4
        assert time.monotonic() - began_s >= 3 * 0.01
        first.answer = lambda _: b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n"
        with pytest.raises(RedisUnavailableError):
            await link.call(SCRIPT, [KEY], ())


@pytest.mark.parametrize("reply", [b"-CLUSTERDOWN The cluster is down\r\n", b"-LOADING loading\r\n"])
async def test_a_cluster_that_is_down_fails_closed_at_once(reply: bytes) -> None:
    async with two_nodes() as (first, _, link):
        first.answer = lambda _: reply
        await link._known_map()
        learned = first.count("CLUSTER")
        with pytest.raises(RedisUnavailableError):
            await link.run("SET", KEY, "1")
        assert first.count("SET") == 1
        async with asyncio.timeout(5):
            while first.count("CLUSTER") == learned:
                await asyncio.sleep(0.01)


async def test_a_command_of_unknown_fate_is_never_sent_again() -> None:
    """It may have run: the node took it, and did not answer. The successor is found all the same."""
    async with two_nodes() as (first, second, link):
        first.answer = lambda _: None
        with pytest.raises(RedisUnavailableError):
            await link.call(SCRIPT, [KEY], ())
        assert first.count("EVALSHA") + second.count("EVALSHA") == 1
        first.owner = second
        async with asyncio.timeout(5):
            while not second.count("EVALSHA"):
                try:
                    await link.call(SCRIPT, [KEY], ())
                except RedisUnavailableError:
                    await asyncio.sleep(0.05)


async def test_keys_of_two_slots_are_a_bug() -> None:
    async with two_nodes() as (first, _, link):
        first.answer = lambda _: b"-CROSSSLOT Keys in request don't hash to the same slot\r\n"
        with pytest.raises(BrokenInvariantError, match="look has keys of several slots"):
            await link.call(SCRIPT, [KEY, "tuma:{s06}:u:1"], ())
        with pytest.raises(BrokenInvariantError, match="no key"):
            await link.run("TIME")


async def test_a_seed_that_is_silent_keeps_nobody_from_the_others() -> None:
    """Its host is gone: nothing even refuses a connection."""
    async with two_nodes() as (first, second, _):
        first.silent = True
        seeds = f"redis+cluster://127.0.0.1:{first.port},127.0.0.1:{second.port}"
        link = RedisCluster(RedisSettings(url=SecretStr(seeds), timeout_s=0.3))
        assert await link.run("SET", KEY, "1") == b"OK"
        await link.close()


async def test_nobody_there() -> None:
    link = RedisCluster(
        RedisSettings(url=SecretStr("redis+cluster://127.0.0.1:1,127.0.0.1:2"), timeout_s=0.5)
    )
    for question in (link.run("GET", KEY), link.call(SCRIPT, [KEY], ()), link.ping(), link.survey()):
        async with asyncio.timeout(5):
            with pytest.raises(RedisUnavailableError):
                await question
    await link.close()


def test_the_map_is_read() -> None:
    asked = Node("seed", 7)
    reply = [
        [5461, 16383, [b"10.0.0.2", 6379, b"id"], [b"10.0.0.3", 6379, b"id", []]],
        [0, 5459, [None, 6380, b"id"]],
        [5460, 5460, [b"?", 6381, b"id"]],
    ]
    found = SlotMap.read(reply, asked)
    assert [found.find(slot) for slot in (0, 5459, 5460, 5461, 16383)] == [
        Node("seed", 6380),
        Node("seed", 6380),
        None,
        Node("10.0.0.2", 6379),
        Node("10.0.0.2", 6379),
    ]
    assert found.served == 16383
    assert found.alone == {Node("seed", 6380)}
    assert found.nodes == {Node("seed", 6380), Node("10.0.0.2", 6379), Node("10.0.0.3", 6379)}
    assert SlotMap.read([], asked).find(0) is None


@pytest.mark.parametrize(
    ("url", "seeds", "node"),
    [
        ("redis+cluster://h", [Node("h", 6379)], "redis://x:1/0"),
        ("redis+cluster://:p%40w@h:1,i:2/0", [Node("h", 1), Node("i", 2)], "redis://:p%40w@x:1/0"),
        ("rediss+cluster://me:pw@[::1]:7/", [Node("::1", 7)], "rediss://me:pw@x:1/0"),
    ],
)
def test_the_url_is_read(url: str, seeds: list[Node], node: str) -> None:
    address = _Address.read(url)
    assert list(address.seeds) == seeds
    assert address.url(Node("x", 1)).get_secret_value() == node
    assert (
        address.url(Node("::1", 1)).get_secret_value().endswith("@[::1]:1/0" if "@" in url else "[::1]:1/0")
    )
    assert isinstance(make_redis(RedisSettings(url=SecretStr(url))), RedisCluster)


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://",
        "redis+cluster://h:1/3",
        "redis+cluster://h:canary",
        "redis+cluster://:can/ary@h:1",
        "redis+cluster://:can@ary@h:1",
        "redis+cluster://canary@h:1",
        "redis+cluster://h:1,,i:2",
        "redis+cluster://h:1?canary=1",
    ],
)
async def test_a_url_that_cannot_be_read_is_said_and_not_shown(url: str) -> None:
    link = RedisCluster(RedisSettings(url=SecretStr(url)))
    with pytest.raises(InputError, match=r"redis\+cluster://:password@host") as caught:
        await link.ping()
    assert "canary" not in str(caught.value)
    await link.close()


def test_one_server_needs_no_map() -> None:
    for url in ("", "redis://127.0.0.1", "rediss://127.0.0.1"):
        assert isinstance(make_redis(RedisSettings(url=SecretStr(url))), RedisPipe)
