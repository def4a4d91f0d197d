"""``POST /v1/estimate``: what it says comes true, and it changes nothing."""

from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from billing.errors import CapExceededError, InsufficientFundsError, RateLimitError, TumaError
from billing.holds.hold import Hold
from billing.ids import new_id
from billing.limits import Limits
from billing.money import NANO
from billing.pricing.estimate import PROMPT_LEAST, PROMPT_MOST
from billing.pricing.price_book import ModelPrice, PriceBook
from scripts.office import Office
from scripts.sim.provider import SimulatedProvider
from tests.support.books import check_books
from tests.support.payers import Payer, make_payer, set_rate, sync_models
from tests.support.running import Running

MODEL = "openai/gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "hi"}]
MODELS = (MODEL, "anthropic/claude-sonnet-4.5", "mistralai/mistral-small-3.2", "sim/fee")
CORPUS = {
    "english": "The rain had not stopped since Tuesday, and the river was already over the lower road. "
    "Write a short letter to the council that asks, politely but firmly, for a higher bridge.",
    "code": "def merge(left, right):\n    out = []\n    while left and right:\n"
    "        out.append((left if left[0] <= right[0] else right).pop(0))\n    return out + left + right\n\n"
    "SELECT w.id, sum(e.amount_nano) FROM wallets w JOIN entries e ON e.wallet_id = w.id GROUP BY 1;",
    "swahili": "Mvua haijaacha kunyesha tangu Jumanne, na mto umeshafurika barabara ya chini. Tafadhali "
    "niandikie barua fupi kwa baraza, ikiomba kwa heshima lakini kwa msimamo daraja lililo juu zaidi.",
    "yoruba": "Òjò kò tíì dá láti ọjọ́ Ìṣẹ́gun, odò sì ti kún bo ọ̀nà ìsàlẹ̀. Jọ̀wọ́ bá mi kọ lẹ́tà kúkúrú sí "
    "ìgbìmọ̀, kí o béèrè pẹ̀lú ọ̀wọ̀ fún afárá tí ó ga jù.",
    "arabic": "لم يتوقف المطر منذ يوم الثلاثاء، وقد غمر النهر الطريق السفلي. من فضلك اكتب رسالة قصيرة إلى "
    "المجلس تطلب فيها بأدب ولكن بحزم جسرًا أعلى.",
    "chinese": "从星期二开始雨就没有停过,河水已经漫过了下面的道路。请帮我给市议会写一封短信,礼貌而坚定地要求修建一座更高的桥。",
    "emoji": "🌧️🌧️🌧️ since Tuesday 😩 the river 🌊 is over the road 🚧 please 🙏 a higher bridge 🌉 👩‍👩‍👧‍👦 thanks ❤️🇰🇪🇳🇬",
}


async def ask(proxy: Running, payer: Payer, *, status: int = 200, **body: Any) -> Any:
    return await post(proxy, payer, "/v1/estimate", status=status, **body)


async def post(proxy: Running, payer: Payer, path: str, *, status: int = 200, **body: Any) -> Any:
    told = {"model": MODEL, "messages": HELLO, **body}
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session,
        session.post(proxy.base_url + path, json=told) as response,
    ):
        assert response.status == status, await response.text()
        return await response.json()


@pytest.mark.parametrize("language", CORPUS)
async def test_the_settled_cost_lies_within_the_estimate(
    proxy: Running, office: Office, sim: SimulatedProvider, language: str
) -> None:
    payer = await make_payer(office)
    for model in MODELS:
        for stream, more in ((False, {}), (True, {}), (False, {"max_tokens": 7, "n": 2})):
            body: dict[str, Any] = {
                "model": model,
                "messages": [
                    {"role": "system", "content": "You are a clerk."},
                    {"role": "user", "content": CORPUS[language] * 3},
                ],
                "stream": stream,
                **more,
            }
            estimate = await ask(proxy, payer, **body)
            assert estimate["admitted"], estimate
            before = sim.books.total_nanousd
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {payer.secret}"}) as session:
                response = await session.post(f"{proxy.base_url}/v1/chat/completions", json=body)
                await response.read()
                assert response.status == 200
            await proxy.quiet()
            settled = Decimal(sim.books.total_nanousd - before).scaleb(-9)
            assert Decimal(estimate["cost_usd"]["least"]) <= settled <= Decimal(estimate["cost_usd"]["most"])
            counted = estimate["tokens_prompt"]
            billed = list(sim.books.generations.values())[-1]
            assert PROMPT_LEAST <= billed.prompt_tokens / counted["expected"] <= PROMPT_MOST
            assert counted["least"] <= billed.prompt_tokens <= counted["most"]
            completion = estimate["tokens_completion"]
            assert completion["least"] <= billed.completion_tokens <= completion["most"]
    await check_books(office)


async def test_what_would_be_held_is_held_in_the_wallets_currency(
    proxy: Running, office: Office, sim: SimulatedProvider
) -> None:
    await set_rate(office, "NGN", "1600.5", markup_bps=250)
    await proxy.services.fx.load()
    payer = await make_payer(office, amount="5000", currency="NGN")
    estimate = await ask(proxy, payer, max_tokens=100)
    assert (estimate["fx_rate"], estimate["markup_bps"], estimate["currency"]) == ("1600.5", 250, "NGN")
    assert sim.requests == sim.requests.__class__(), "the provider is not called"
    async with office.database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM calls") == 0
    await post(proxy, payer, "/v1/chat/completions", max_tokens=100)
    async with office.database.connection() as connection:
        hold = await connection.fetchrow("SELECT hold_nano, hold_nanousd, charge_nano FROM calls")
    assert Decimal(estimate["hold"]) == Decimal(hold["hold_nano"]).scaleb(-9)
    assert Decimal(estimate["hold_usd"]) == Decimal(hold["hold_nanousd"]).scaleb(-9)
    charge = estimate["charge"]
    paid = Decimal(hold["charge_nano"]).scaleb(-9)
    assert Decimal(charge["least"]) <= paid <= Decimal(charge["expected"]) <= Decimal(charge["most"])
    await check_books(office)


async def snapshot(office: Office) -> Any:
    """Everything in Redis, and how often Postgres wrote what money depends on."""
    keys = sorted(await office.pipe.run("KEYS", "*"))
    dumps = [await office.pipe.run("DUMP", key) for key in keys]
    async with office.database.connection() as connection:
        rows = await connection.fetchval(
            "SELECT (SELECT count(*) FROM calls) + (SELECT count(*) FROM journal_tx) + (SELECT count(*) FROM usage)"
        )
        wallets = await connection.fetch("SELECT id, posted_nano, held_nano FROM wallets ORDER BY id")
    return list(zip(keys, dumps, strict=True)), rows, wallets


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
async def test_it_says_which_check_would_refuse_and_changes_nothing(
    proxy: Running, office: Office, warm: bool
) -> None:
    rich = await make_payer(office)
    poor = await make_payer(office, amount="0.000001")
    frozen = await make_payer(office)
    async with office.database.connection() as connection:
        await connection.execute("UPDATE wallets SET status = 'frozen' WHERE id = $1", frozen.wallet_id)
    bound = await make_payer(office, models=("sim/*",))
    slow = await make_payer(office, requests_per_min=1)
    narrow = await make_payer(office, tokens_per_min=50)
    capped = await make_payer(office, caps={"day": 1000})
    await post(proxy, slow, "/v1/chat/completions", max_tokens=1)
    await proxy.quiet()
    wanted = {
        rich: None,
        poor: (402, "insufficient_funds"),
        frozen: (403, "wallet_frozen"),
        bound: (403, "model_not_allowed"),
        slow: (429, "rate_limit_exceeded"),
        narrow: (429, "rate_limit_exceeded"),
        capped: (402, "cap_exceeded"),
    }
    for payer in wanted:
        if warm:
            with_hold = Hold(
                new_id(), payer.user_id, payer.wallet_id, payer.key_id, 1, 1, Limits(10**6, 10**9)
            )
            try:
                await office.holds.reserve(with_hold)
            except TumaError:
                continue
            await office.holds.release(with_hold, charge_nano=0)
        else:
            await office.cool(payer.wallet_id)
    before = await snapshot(office)
    for payer, refusal in wanted.items():
        for _ in range(2):
            estimate = await ask(proxy, payer, max_tokens=100)
            found = estimate["refusal"] and (estimate["refusal"]["status"], estimate["refusal"]["code"])
            assert found == refusal
            assert estimate["admitted"] is (refusal is None)
    assert await snapshot(office) == before
    for payer, refusal in wanted.items():
        if refusal is not None:
            answer = await post(proxy, payer, "/v1/chat/completions", status=refusal[0], max_tokens=100)
            assert answer["error"]["code"] == refusal[1]
    await proxy.quiet()
    await check_books(office)


async def test_looking_agrees_with_reserving_to_the_nano(office: Office) -> None:
    """Near every edge, where one would be admitted and one more not, the words are the same, too."""
    await sync_models(office)
    payer = await make_payer(office, amount="9007199.254740993", caps={"day": 5 * NANO, "call": 3 * NANO})
    limits = Limits(requests_per_min=6, tokens_per_min=100, calls_in_flight=4)
    edges = [
        (3 * NANO, 10), (3 * NANO + 1, 10), (2 * NANO + 1, 10), (2 * NANO, 81), (1 * NANO, 80), (1 * NANO + 1, 0),
        (0, 11), (0, 10), (0, 1), (0, 0), (1, 0), (0, 0), (0, 0),
    ]  # fmt: skip
    verdicts: list[str] = []
    for amount, tokens in edges:
        hold = Hold(new_id(), payer.user_id, payer.wallet_id, payer.key_id, amount, tokens, limits)
        looked = await outcome(office.holds.look(hold))
        assert await outcome(office.holds.look(hold)) == looked
        assert await outcome(office.holds.reserve(hold)) == looked
        verdicts.append(looked)
    assert {"granted", RateLimitError.__name__, CapExceededError.__name__} == set(verdicts)
    big = await make_payer(office, amount="9007199.254740993")
    for amount, verdict in ((2**53 + 2, InsufficientFundsError.__name__), (2**53 + 1, "granted")):
        hold = Hold(new_id(), big.user_id, big.wallet_id, big.key_id, amount, 1, Limits(10**6, 10**9))
        assert await outcome(office.holds.look(hold)) == verdict
        assert await outcome(office.holds.reserve(hold)) == verdict


async def outcome(asked: Any) -> str:
    try:
        await asked
    except TumaError as error:
        return type(error).__name__
    return "granted"


async def test_a_provider_that_refuses_us_would_refuse_the_call(proxy: Running, office: Office) -> None:
    payer = await make_payer(office)
    proxy.services.quota.pause("401: no")
    estimate = await ask(proxy, payer)
    assert (estimate["admitted"], estimate["refusal"]["code"]) == (False, "provider_quota_exhausted")


async def test_what_has_no_price_has_no_estimate(proxy: Running, office: Office) -> None:
    payer = await make_payer(office)
    assert (await ask(proxy, payer, status=404, model="no/such"))["error"]["code"] == "model_not_found"
    assert (await ask(proxy, payer, status=400, messages=[]))["error"]["param"] == "messages"


async def test_what_no_wallet_could_hold_is_refused_for_its_funds(proxy: Running, office: Office) -> None:
    """The amount is beyond 64 bits, as Redis and Postgres keep them."""
    price = {"prompt_usd": Decimal("0.00015"), "completion_usd": Decimal("0.0006")}
    dear = ModelPrice("dear/model", "dear", None, None, {**price})
    await PriceBook(office.database).set_prices([dear], source="manual")
    await set_rate(office, "VND", "26000")
    await proxy.services.fx.load()
    await proxy.services.prices.load()
    payer = await make_payer(office, amount="500000", currency="VND")
    body: dict[str, Any] = {"model": "dear/model", "n": 100, "max_tokens": 9_000_000}
    estimate = await ask(proxy, payer, **body)
    assert estimate["refusal"]["code"] == "insufficient_funds"
    proxy.services.quota._unlimited = True  # nothing but the wallet refuses
    refused = await post(proxy, payer, "/v1/chat/completions", status=402, **body)
    assert refused["error"]["code"] == "insufficient_funds"
    rest = await post(proxy, payer, "/v1/chat/completions")
    assert rest["choices"]
    await check_books(office)


async def test_the_larger_of_two_bounds_is_held_for(proxy: Running, office: Office) -> None:
    """Servers differ in which of the two they go by."""
    payer = await make_payer(office)
    for bounds in (
        {"max_tokens": 9_000, "max_completion_tokens": 1},
        {"max_tokens": 1, "max_completion_tokens": 9_000},
    ):
        assert (await ask(proxy, payer, **bounds))["tokens_completion"]["most"] == 9_000
