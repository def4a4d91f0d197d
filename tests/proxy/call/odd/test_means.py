"""A provider that refuses a bound which was ours for want of money is told smaller ones; nothing of that is sent twice as asked."""

import asyncio
from typing import Any

import pytest

from config.settings import Settings
from scripts.office import Office
from tests.proxy.call.scripted import DONE, USAGE, Scripted, Turn, chunk, completion, running
from tests.support.payers import Payer

OUT_OF_MONEY = "This request requires more credits, or fewer max_tokens."
EMPTY = {"error": {"message": "No quota.", "type": "insufficient_quota", "code": "insufficient_quota"}}


def refusal(asked: int, afforded: int | None) -> dict[str, Any]:
    """As OpenRouter says it."""
    said = f" You requested up to {asked} tokens, but can only afford {afforded}."
    return {"error": {"message": OUT_OF_MONEY + ("" if afforded is None else said), "code": 402}}


class Poor:
    """A provider whose money is enough for so many tokens; it may say so."""

    def __init__(self, tokens: int, *, says: bool, then: int | None = None) -> None:
        self.tokens, self.says, self.then = tokens, says, then
        self.told: list[int] = []

    async def __call__(self, turn: Turn) -> None:
        told = next(turn.body[name] for name in ("max_completion_tokens", "max_tokens") if name in turn.body)
        self.told.append(told)
        if told > self.tokens:
            said = refusal(told, self.tokens if self.says else None)
            self.tokens = self.tokens if self.then is None else self.then
            await turn.plain(said, status=402)
        elif turn.body.get("stream"):
            await turn.stream(chunk("Hello"), chunk("", "stop", usage=USAGE), DONE)
        else:
            await turn.plain(completion(usage=USAGE))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["openai", "openrouter"])
async def test_what_it_would_serve_is_asked_for(
    settings: Settings, provider: Scripted, office: Office, payer: Payer, kind: str, stream: bool
) -> None:
    poor = Poor(3_919, says=True)
    provider.records["gen-1"] = {"id": "gen-1", "total_cost": 0.0003, "native_tokens_prompt": 1000}
    async with running(settings, provider, office, payer, kind=kind) as case:
        status, body = await case.ask(poor, stream=stream)
        assert status == 200, body
        assert poor.told == [16_384, 3_919 - 3_919 // 16]
        stands = await case.call()
        assert (stands["state"], stands["outcome"]) == ("settled", "completed")


@pytest.mark.parametrize(
    ("tokens", "says", "then", "told"),
    [
        (10_000, False, None, [16_384, 4_096]),
        (500, False, None, [16_384, 4_096, 1_024, 256]),
        (
            4_000,
            True,
            2_000,
            [16_384, 3_750, 937],
        ),  # others were paid meanwhile: what it says is believed once
    ],
)
async def test_it_is_asked_for_less_and_less(
    settings: Settings,
    provider: Scripted,
    office: Office,
    payer: Payer,
    tokens: int,
    says: bool,
    then: int | None,
    told: list[int],
) -> None:
    poor = Poor(tokens, says=says, then=then)
    async with running(settings, provider, office, payer) as case:
        assert (await case.ask(poor))[0] == 200
        assert poor.told == told


@pytest.mark.parametrize(
    ("poor", "members", "told"),
    [
        (Poor(30, says=True), {}, 1),
        (Poor(0, says=False), {}, 5),
        (Poor(100, says=True), {"max_tokens": 12_000}, 1),  # the caller's own bound is the caller's own
    ],
)
async def test_a_refusal_that_stands_costs_nothing(
    settings: Settings,
    provider: Scripted,
    office: Office,
    payer: Payer,
    poor: Poor,
    members: dict[str, Any],
    told: int,
) -> None:
    async with running(settings, provider, office, payer) as case:
        assert (await case.ask(poor, **members))[0] == 503
        assert len(poor.told) == told
        stands = await case.call()
        assert (stands["state"], await case.charged()) == ("void", 0)
        assert (await case.ask(lambda turn: turn.plain(completion(usage=USAGE)), max_tokens=5))[0] == 200


async def test_an_account_that_is_empty_is_not_asked_again(
    settings: Settings, provider: Scripted, office: Office, payer: Payer
) -> None:
    asked = []

    async def script(turn: Turn) -> None:
        asked.append(turn.body)
        await turn.plain(EMPTY, status=402)

    async with running(settings, provider, office, payer) as case:
        assert (await case.ask(script))[0] == 503
        assert len(asked) == 1


async def test_one_that_falls_silent_after_a_refusal_may_be_billed(
    settings: Settings, provider: Scripted, office: Office, payer: Payer
) -> None:
    async def script(turn: Turn) -> None:
        if turn.body["max_tokens"] > 10_000:
            await turn.plain(refusal(16_384, 9_000), status=402)
        else:
            await asyncio.sleep(20)

    async with running(settings, provider, office, payer, first_byte_timeout_s=0.4) as case:
        status, _ = await case.ask(script)
        assert (status, case.headers["x-should-retry"]) == (504, "false")
