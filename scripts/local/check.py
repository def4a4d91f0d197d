"""``./scripts/dev --check``: one streamed and one plain call with the OpenAI SDK, and what each cost."""

import json
import urllib.request
from decimal import Decimal
from typing import Any

from billing.errors import TumaError

_MODEL = "openai/gpt-4o-mini"
_PROMPT = "In one sentence: what is a wallet?"


class CheckError(TumaError):
    """A call did not do what it should."""


def check(details: dict[str, str]) -> dict[str, Any]:
    """Make the calls against a running server.

    Args:
        details: as ``./scripts/dev --json`` prints them.

    Raises:
        CheckError: an answer is empty, or the balance did not move by exactly what the calls cost.
    """
    from openai import APIError, OpenAI  # noqa: PLC0415 - a development dependency

    try:
        return _check(OpenAI(base_url=details["base_url"], api_key=details["api_key"]), details)
    except (APIError, OSError) as error:
        raise CheckError(f"{details['base_url']} does not answer as it should: {error}") from error


def _check(client: Any, details: dict[str, str]) -> dict[str, Any]:
    model = (
        _MODEL
        if any(model.id == _MODEL for model in client.models.list())
        else client.models.list().data[0].id
    )
    messages: Any = [{"role": "user", "content": _PROMPT}]
    balances = [_balance(details)]

    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, stream=True, stream_options={"include_usage": True}
    )
    text, stream_usd = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        if chunk.usage is not None:
            stream_usd = Decimal(str((chunk.usage.model_extra or {})["cost"]))
    balances.append(_balance(details))

    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=64)
    answer = raw.parse().choices[0].message.content or ""
    charge, currency = raw.headers["x-tuma-charge"].split()
    balances.append(_balance(details))

    paid = [balances[0] - balances[1], balances[1] - balances[2]]
    if not text.strip() or not answer.strip() or stream_usd is None:
        raise CheckError("an answer came back empty")
    if paid[1] != Decimal(charge) or paid[0] <= 0:
        raise CheckError(f"the balance moved by {paid}, the plain call's charge was {charge}")
    result = {
        "ok": True,
        "model": model,
        "stream_cost_usd": f"{stream_usd:f}",
        "stream_charge": f"{paid[0]:f}",
        "plain_cost_usd": raw.headers["x-tuma-cost-usd"],
        "plain_charge": charge,
        "currency": currency,
        "balance_before": f"{balances[0]:f}",
        "balance_after": f"{balances[2]:f}",
    }
    result["report"] = (
        f"streamed call   {result['stream_cost_usd']} USD, charged {result['stream_charge']} {currency}\n"
        f"plain call      {result['plain_cost_usd']} USD, charged {result['plain_charge']} {currency}\n"
        f"balance before  {result['balance_before']} {currency}\n"
        f"balance after   {result['balance_after']} {currency}\n"
        "both calls are settled, and the balance moved by exactly what they cost"
    )
    return result


def _balance(details: dict[str, str]) -> Decimal:
    request = urllib.request.Request(  # noqa: S310 - our own server on loopback
        f"{details['base_url']}/wallet", headers={"Authorization": f"Bearer {details['api_key']}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - the same
        return Decimal(json.loads(response.read())["posted"])
