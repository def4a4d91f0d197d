"""Guards of ``proxy/account/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a watcher that takes nothing is cut off",
        "proxy/account/events.py",
        "        async with asyncio.timeout(services.settings.feed.write_timeout_s):\n",
        "        async with asyncio.timeout(None):\n",
        "tests/proxy/live/test_feed.py::test_a_slow_reader_is_dropped",
    ),
    Mutation(
        "a key for calls alone sets no alerts",
        "proxy/account/alerts.py",
        "    services, caller, _ = await enter_as_owner(request)\n",
        "    services, caller = await enter(request)\n",
        "tests/proxy/outbound/test_alerts.py",
    ),
    Mutation(
        "no model's name is a formula in a table of usage",
        "proxy/account/usage.py",
        '_TEXTS = ("model", "key_name")',
        '_TEXTS = ("key_name",)',
        "tests/proxy/account/test_usage.py",
    ),
    Mutation(
        "only who can saves a card",
        "proxy/account/topups.py",
        "        worker.saver_of(form.provider)\n",
        "        pass\n",
        "tests/proxy/payments/test_topups.py",
    ),
    Mutation(
        "a bound key sets no caps by an action",
        "proxy/account/wallet_management.py",
        "        case CapAction():\n            owner_of(caller)\n",
        "        case CapAction():\n",
        "tests/proxy/account/test_wallet_management.py",
    ),
    Mutation(
        "a bound key begins no top-up by an action",
        "proxy/account/wallet_management.py",
        "        case TopupAction():\n            owner_of(caller)\n",
        "        case TopupAction():\n",
        "tests/proxy/account/test_wallet_management.py",
    ),
    Mutation(
        "caps are set by who may manage",
        "proxy/account/caps.py",
        "    services, caller, _ = await enter_as_owner(request)\n",
        "    services, caller = await enter(request)\n",
        "tests/proxy/account/test_keys.py",
    ),
    Mutation(
        "what is answered has the shape that is documented",
        "proxy/account/keys.py",
        '"has_more": len(found) > limit,',
        '"has_more": None,',
        "tests/proxy/openapi/test_openapi.py",
    ),
    Mutation(
        "a text is no markup",
        "proxy/account/transactions.py",
        "<p>{escape(month.email or '')}<br>",
        "<p>{month.email or ''}<br>",
        "tests/proxy/account/test_transactions.py",
    ),
    Mutation(
        "a frontend's changes have the same rate",
        "proxy/account/wallet_management.py",
        "        case CapAction():\n            owner_of(caller)\n            await services.writes.count(caller.user_id)\n",
        "        case CapAction():\n            owner_of(caller)\n",
        "tests/proxy/account/test_rates.py::test_changes_have_a_rate_per_user",
    ),
)
