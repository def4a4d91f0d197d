"""What is measured: the calls of each scenario, and how many of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from billing.errors import InputError

_LONG_WORDS = 30_000
# Each is one token of the usual vocabularies, with the space before it.
_WORDS = (
    "wallet money time people way day man thing woman life child world school state family student group country"
    " problem hand part place case week company system program question work government number night point home"
    " water room mother area story fact month lot right study book eye job word business issue side kind head"
)
NUMBER = "@@@@@@@@"  # the load generator writes the number of a call there
_SHORT = "In one sentence: what is a wallet?"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Calls of one kind over so many connections.

    Args:
        name: for ``--only``; the part before the dash is the kind.
        about: for people.
        model: of the bench's provider; it says how fast the answer comes.
        calls: of one round.
        long: the prompt is long, and none comes twice.
        talk: the prompt is a long text that came before, and a short one that did not.
        half: made at half the pace that Tuma had with as many connections as fast as they go: what waits then is not a queue.
    """

    name: str
    about: str
    connections: int
    calls: int
    stream: bool = False
    model: str = "bench/fast"
    long: bool = False
    talk: bool = False
    half: bool = False

    @property
    def paced(self) -> bool:
        """Whether the provider pauses between chunks, so that their pauses at the client mean something."""
        return self.model == "bench/paced"

    def body(self) -> str:
        """Return the request's body."""
        asked = {"model": self.model, "messages": self._messages()}
        return json.dumps({**asked, "stream": True} if self.stream else asked)

    def _messages(self) -> list[dict[str, str]]:
        if self.talk:
            before = ({"role": "user", "content": _long_text()}, {"role": "assistant", "content": _SHORT})
            return [*before, {"role": "user", "content": f"{NUMBER} {_SHORT}"}]
        return [{"role": "user", "content": f"{NUMBER} {_long_text()}" if self.long else _SHORT}]


def _long_text() -> str:
    """Return words in no simple order: a text that repeats itself would be counted faster than one that does not."""
    words = _WORDS.split()
    return " ".join(words[number * number * 31 // 7 % len(words)] for number in range(_LONG_WORDS))


# Rounds are short and many, so that both sides of one have the same neighbours.
SCENARIOS = (
    Scenario("plain-8", "plain calls, 8 connections", 8, 400),
    Scenario("plain-32", "plain calls, 32 connections", 32, 400),
    Scenario("stream-8", "streams of 64 chunks, 8 connections", 8, 160, stream=True),
    Scenario("stream-32", "streams of 64 chunks, 32 connections", 32, 160, stream=True),
    Scenario(
        "paced-8",
        "streams of 64 chunks, one every 10 ms, 8 connections",
        8,
        16,
        stream=True,
        model="bench/paced",
    ),
    Scenario(
        "paced-32",
        "streams of 64 chunks, one every 10 ms, 32 connections",
        32,
        64,
        stream=True,
        model="bench/paced",
    ),
    Scenario(
        "half-plain", "plain calls at half the pace that Tuma can keep, 8 connections", 8, 600, half=True
    ),
    Scenario(
        "half-stream",
        "streams of 64 chunks at half the pace that Tuma can keep, 8 connections",
        8,
        300,
        stream=True,
        half=True,
    ),
    Scenario(
        "long-8", "plain calls with prompts of 30,000 tokens, none twice, 8 connections", 8, 48, long=True
    ),
    Scenario(
        "talk-8", "plain calls with 30,000 tokens that came before and a new question", 8, 48, talk=True
    ),
)
WAITING = "waiting"
SETTLE = "settle"
WORKERS = "workers"
BIG = "big"
CAPACITY = "capacity"
EXTRA = (WORKERS, BIG, CAPACITY)  # measured only where they are asked for
NAMES = (*(scenario.name for scenario in SCENARIOS), WAITING, SETTLE, *EXTRA)
SLOW = Scenario("slow", "slow streams", 1, 1, stream=True, model="bench/slow")


def choose(only: Sequence[str], *, everything: bool = False) -> frozenset[str]:
    """Return the names that were asked for: whole, or the kind before the dash; if nothing was, all but the extra ones.

    Raises:
        InputError: one of them is none.
    """
    if everything:
        return frozenset(NAMES)
    chosen: set[str] = set()
    for word in only:
        found = {name for name in NAMES if word in (name, name.partition("-")[0])}
        if not found:
            raise InputError(f"nothing is called {word!r}; there are {', '.join(NAMES)}")
        chosen |= found
    return frozenset(chosen or set(NAMES) - set(EXTRA))
