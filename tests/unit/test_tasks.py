"""Waiting for one future that goes on whoever waits."""

import asyncio

import pytest

from billing.tasks import wait_until_done


async def test_a_done_future_is_not_waited_for() -> None:
    future = asyncio.get_running_loop().create_future()
    future.set_exception(ValueError("not raised here"))
    assert await wait_until_done(future, 0)
    assert isinstance(future.exception(), ValueError)


async def test_what_ends_in_time_is_done() -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.call_later(0.01, future.set_result, 1)
    assert await wait_until_done(future, 30)


async def test_what_does_not_end_goes_on() -> None:
    future = asyncio.get_running_loop().create_future()
    assert not await wait_until_done(future, 0.01)
    assert not future.done()
    future.set_result(None)
    assert await wait_until_done(future, 0.01)


async def test_who_waits_may_be_cancelled_and_the_future_goes_on() -> None:
    future = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(wait_until_done(future))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not future.done()


async def test_a_cancelled_future_is_done() -> None:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.call_later(0.01, future.cancel)
    assert await wait_until_done(future, 30)
    assert future.cancelled()
