"""Guards of ``billing/calls/``: what is learned of a call after somebody else ended it."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "a late figure by the price book is a correction, too",
        "billing/calls/calls.py",
        'ending.state == "settled" and ending.source != "counted":',
        "ending.provider_cost_nanousd is not None:",
        "tests/proxy/call/odd/test_late.py",
    ),
    Mutation(
        "a late guess is no correction",
        "billing/calls/calls.py",
        ' and ending.source != "counted":',
        ":",
        "tests/proxy/call/odd/test_late.py",
    ),
    Mutation(
        "a late estimate changes nothing that is exact",
        "billing/calls/corrections.py",
        '            if ending.accuracy != "exact" and (row',
        "            if False and (row",
        "tests/billing/calls/test_corrections.py",
    ),
)
