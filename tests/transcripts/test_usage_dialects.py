"""How providers say what was used: each as a stream (``usage/*.sse``) and as a plain answer (``usage/*.json``).

The members are those that ``billing/pricing/usage.py`` names the documents of; the figures are made up.
"""

from decimal import Decimal
from pathlib import Path

import pytest

from billing.pricing.cost import Usage
from billing.pricing.usage import UsageReading, read_cost, read_usage
from proxy.protocol.meter import StreamMeter, read_plain

_HERE = Path(__file__).parent / "usage"
EXPECTED = {
    "xai": UsageReading(Usage(32, 97, cached_read_tokens=6, reasoning_tokens=94), adds_up=True),
    "gemini": UsageReading(Usage(30, 203, reasoning_tokens=200), adds_up=False),
    "deepseek": UsageReading(Usage(1000, 33, cached_read_tokens=832, reasoning_tokens=30), adds_up=True),
    "moonshot": UsageReading(Usage(1000, 3, cached_read_tokens=768), adds_up=True),
    "groq": UsageReading(Usage(24, 3), adds_up=True),
    "litellm": UsageReading(Usage(1000, 3, cached_read_tokens=300, cached_write_tokens=600), adds_up=True),
    "anthropic_names": UsageReading(Usage(1500, 3, 800, 500), adds_up=True),
    "openrouter_byok": UsageReading(Usage(1000, 3, 300, 600), adds_up=True),
    "openai_prediction": UsageReading(Usage(20, 80, audio_tokens=12), adds_up=True),
    "openai_audio": UsageReading(Usage(20, 60, audio_tokens=12), adds_up=False),
    "vllm_continuous": UsageReading(Usage(30, 3), adds_up=True),
    "zeros_after_figures": UsageReading(Usage(30, 3), adds_up=True),
    "after_done": UsageReading(Usage(30, 3), adds_up=True),
    "prompt_not_told": UsageReading(Usage(0, 3), adds_up=False),
    "perplexity": UsageReading(Usage(9, 9400, reasoning_tokens=9000), adds_up=False),
}
_NAMES = sorted(EXPECTED)


def test_every_transcript_is_expected() -> None:
    assert sorted(path.stem for path in _HERE.glob("*.sse")) == _NAMES
    assert sorted(path.stem for path in _HERE.glob("*.json")) == _NAMES


@pytest.mark.parametrize("name", _NAMES)
def test_plain(name: str) -> None:
    usage = read_plain((_HERE / f"{name}.json").read_bytes()).usage
    assert usage is not None
    assert read_usage(usage) == EXPECTED[name]


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("asked", [False, True])
def test_stream_however_it_is_split(name: str, asked: bool) -> None:
    whole = (_HERE / f"{name}.sse").read_bytes()
    expected = None
    for size in (len(whole), 1, 7, 60, 200):
        meter = StreamMeter(include_usage=asked)
        pieces = [meter.feed(whole[at : at + size]) for at in range(0, len(whole), size)]
        out = b"".join(pieces) + meter.finish()
        assert meter.usage is not None
        assert read_usage(meter.usage) == EXPECTED[name]
        assert (meter.done, meter.finished, meter.done_event) == (True, True, b"data: [DONE]\n\n")
        assert expected in (None, out)
        expected = out
    assert expected is not None
    assert b"Habari" in expected or b"bari" in expected
    assert b"[DONE]" not in expected
    # What asks for usage gets all of it; without, only what stands in places of a provider's own.
    assert (b'"usage"' in expected) == ((asked and name != "after_done") or name in ("groq", "moonshot"))


def test_own_keys_behind_openrouter() -> None:
    usage = read_plain((_HERE / "openrouter_byok.json").read_bytes()).usage
    assert usage is not None
    cost = read_cost(usage)
    assert cost is not None
    assert (cost.total_usd, cost.own_key_usd) == (Decimal("0.07182"), Decimal("0.0684"))
