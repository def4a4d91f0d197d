"""What a caller is told of a call's cost: in the headers of every plain answer, and as the ``tuma`` object of ``/api/chat``."""

import json

from billing.calls.outcome import Settlement
from billing.fx.quote import FxQuote
from billing.money import format_amount, format_usd
from proxy.call.answer import Answer
from proxy.call.answers import CostJson, FxFields


def cost_headers(answer: Answer, settlement: Settlement | None) -> dict[str, str]:
    """Return the headers of a plain answer; without a balance while its settlement is not posted."""
    ending = answer.ending
    headers = {}
    if ending is not None:
        headers["x-tuma-cost-usd"] = format_usd(ending.cost_nanousd)
        headers["x-tuma-charge"] = f"{format_amount(ending.charge_nano)} {answer.call.caller.currency}"
    if settlement is not None:
        headers["x-tuma-balance"] = format_amount(settlement.posted_nano)
    return headers


def cost_json(answer: Answer, settlement: Settlement | None) -> str:
    """Return the ``tuma`` object as JSON text: ASCII, on one line."""
    return json.dumps(_cost_of(answer, settlement), separators=(",", ":"))


def _cost_of(answer: Answer, settlement: Settlement | None) -> CostJson:
    """Return the ``tuma`` object.

    ``state`` is ``pending`` while the settlement is not posted; what is not known by then is null.
    """
    ending, fx = answer.ending, answer.call.quote.fx
    charge_nano = None if ending is None else ending.charge_nano
    if settlement is not None:
        charge_nano = settlement.charge_nano  # the sweeper may have been first
    return {
        "call_id": str(answer.call.call_id),
        "state": "pending" if settlement is None else settlement.state,
        "accuracy": None if ending is None else ending.accuracy,
        "cost_usd": None if ending is None else format_usd(ending.cost_nanousd),
        "charge": None if charge_nano is None else format_amount(charge_nano),
        "currency": fx.currency,
        **fx_json(fx),
        "balance": None if settlement is None else format_amount(settlement.posted_nano),
        "tokens_prompt": None if ending is None else ending.usage.prompt_tokens,
        "tokens_completion": None if ending is None else ending.usage.completion_tokens,
    }


def fx_json(fx: FxQuote) -> FxFields:
    """Return an exchange rate and its markup: units of the wallet's currency per USD, and hundredths of a percent."""
    rate = f"{fx.rate:f}"
    return {"fx_rate": rate.rstrip("0").rstrip(".") if "." in rate else rate, "markup_bps": fx.markup_bps}
