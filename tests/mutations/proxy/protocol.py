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
        "zeros do not take figures back",
        "proxy/protocol/usage_found.py",
        "merged[name] = max(before, value)",
        "merged[name] = value",
        "tests/transcripts/test_usage_dialects.py",
    ),
    Mutation(
        "usage after the end is noted",
        "proxy/protocol/meter.py",
        "                self._note_usage(found.fields)\n",
        "                pass\n",
        "tests/transcripts/test_usage_dialects.py",
    ),
    Mutation(
        "an empty reason is no end",
        "proxy/protocol/transcript.py",
        'bool(choice.get("finish_reason"))',
        '(choice.get("finish_reason") is not None)',
        "tests/proxy/call/test_odd_answers.py::test_an_empty_reason_is_no_end",
    ),
    Mutation(
        "numbers beyond all sense are floats",
        "proxy/protocol/json_spans.py",
        "return number if abs(number.adjusted()) <= _EXPONENT_MAX else float(literal)",
        "return number",
        "tests/unit/protocol/test_json_spans.py",
    ),
)
