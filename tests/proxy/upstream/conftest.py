"""Event loops of both kinds."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from tests.proxy.upstream.client_server import (
    Scenario,
)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on an event loop of its own, in a thread of its own; exceptions that nobody saw are failures."""

    def run_on(scenario: Scenario) -> None:
        found: list[BaseException | dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
            await scenario()

        def main() -> None:
            try:
                with asyncio.Runner(loop_factory=request.param) as runner:
                    runner.run(watched())
            except BaseException as error:  # noqa: BLE001 - raised again below
                found.append(error)

        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
        for error in found:
            raise error if isinstance(error, BaseException) else AssertionError(error)

    return run_on
