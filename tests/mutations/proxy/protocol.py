"""Guards of ``proxy/protocol/``."""

from tests.mutations.mutation import Mutation

MUTATIONS = (
    Mutation(
        "an item reference without its type is one",
        "proxy/protocol/dialects.py",
        ' or (kind is None and not {"role", "content"} <= item.keys())',
        "",
        "tests/proxy/call/test_kinds.py::test_what_would_escape_the_meter_is_refused",
    ),
    Mutation(
        "work in the background is refused",
        "proxy/protocol/dialects.py",
        '    if fields.get("background") not in (None, False):',
        "    if False:",
        "tests/proxy/call/test_kinds.py",
    ),
    Mutation(
        "what the provider has stored is refused",
        "proxy/protocol/dialects.py",
        "        if fields.get(name) is not None:\n            raise",
        "        if False:\n            raise",
        "tests/proxy/call/test_kinds.py",
    ),
    Mutation(
        "the provider's own tools are refused",
        "proxy/protocol/dialects.py",
        '        if tool.get("type") not in _OWN_TOOLS:',
        "        if False:",
        "tests/proxy/call/test_kinds.py",
    ),
    Mutation(
        "every prompt of a completion is held for",
        "proxy/protocol/dialects.py",
        ' * _count_inputs(fields["prompt"])',
        "",
        "tests/proxy/call/test_kinds.py",
    ),
    Mutation(
        "the end of a response is held back",
        "proxy/protocol/responses_meter.py",
        '        self.done, self.done_event = True, close_event(event)\n        return b""',
        "        return event",
        "tests/transcripts tests/unit/protocol/test_responses_meter.py",
    ),
    Mutation(
        "what a response repeats is counted once",
        "proxy/protocol/transcript.py",
        "        if self.mark in events or b'\"type\"' not in events:\n",
        "        if True:\n",
        "tests/unit/protocol/test_responses_meter.py",
    ),
    Mutation(
        "a body of too many values is refused before it is read",
        "proxy/protocol/json_bounds.py",
        "        if nodes > bounds.nodes:\n",
        "        if False:\n",
        "tests/unit/protocol/test_json_bounds.py",
    ),
    Mutation(
        "a body that is nested too deep is refused",
        "proxy/protocol/json_bounds.py",
        " and max(accumulate(steps, initial=depth)) > bounds.depth",
        " and False",
        "tests/unit/protocol/test_json_bounds.py",
    ),
    Mutation(
        "numbers of thousands of digits are weighed",
        "proxy/protocol/json_bounds.py",
        "max(digits - _USUAL_DIGITS * (len(signs) + 1), 0) // _DIGITS_OF_A_NODE",
        "0",
        "tests/unit/protocol/test_json_bounds.py",
    ),
    Mutation(
        "depth goes on from piece to piece",
        "proxy/protocol/json_bounds.py",
        "        depth += sum(steps)\n",
        "",
        "tests/unit/protocol/test_json_bounds.py",
    ),
    Mutation(
        "a piece does not end between a backslash and what it escapes",
        "proxy/protocol/json_bounds.py",
        "    return end + slashes % 2\n",
        "    return end\n",
        "tests/unit/protocol/test_json_bounds.py",
    ),
    Mutation(
        "what calls send is weighed",
        "proxy/protocol/ask.py",
        "        nodes = yield from weighing(body, bounds)\n",
        "        nodes = 0\n",
        "tests/proxy/call/test_nobody_stops_others.py::test_many_values_are_refused_and_stop_nobody",
    ),
)
