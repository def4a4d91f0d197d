"""Reading what a provider says was used, in the spellings that providers have for it. Pure; never raises.

Who says it how:

* OpenAI's chat completions: cached tokens, audio, reasoning and predictions (rejected ones, too) are parts of the totals above them.
  https://platform.openai.com/docs/api-reference/chat/object; its Responses API says ``input_tokens`` and ``output_tokens``.
* xAI: reasoning is beside ``completion_tokens``, and in ``total_tokens``. https://docs.x.ai/docs/key-information/consumption-and-rate-limits
* Gemini's endpoint for OpenAI's clients: thoughts are in ``total_tokens`` alone. https://ai.google.dev/gemini-api/docs/openai
* Perplexity: ``reasoning_tokens`` at the top, beside ``completion_tokens``, and in no total. https://docs.perplexity.ai/api-reference
* DeepSeek: ``prompt_cache_hit_tokens`` and ``prompt_cache_miss_tokens``, together the prompt. https://api-docs.deepseek.com/guides/kv_cache
* Moonshot: ``cached_tokens`` at the top. https://platform.moonshot.ai/docs/api/chat
* OpenRouter: ``prompt_tokens_details.cache_write_tokens``. https://openrouter.ai/docs/use-cases/usage-accounting
* LiteLLM: ``prompt_tokens_details.cache_creation_tokens``, and Anthropic's names at the top, as parts of ``prompt_tokens``.
  https://docs.litellm.ai/docs/completion/prompt_caching
* Anthropic: ``input_tokens`` without what was read from or written to the cache, which comes in addition. https://docs.anthropic.com/en/api/messages

Where figures contradict each other the larger (of cached tokens, which are cheap: the smaller) is taken, and the reading says so.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from billing.pricing.cost import TOKENS_MAX, Usage

_PROMPT = ("prompt_tokens", "input_tokens")
_COMPLETION = ("completion_tokens", "output_tokens")
_PROMPT_DETAILS = ("prompt_tokens_details", "input_tokens_details")
_COMPLETION_DETAILS = ("completion_tokens_details", "output_tokens_details")
_CACHED_READ = ("cache_read_input_tokens", "prompt_cache_hit_tokens", "cached_tokens")
_CACHED_READ_DETAIL = ("cached_tokens",)
_CACHED_WRITE = ("cache_creation_input_tokens",)
_CACHED_WRITE_DETAIL = ("cache_write_tokens", "cache_creation_tokens")
_ANTHROPIC = ("cache_creation_input_tokens", "cache_read_input_tokens")
_PREDICTED = ("accepted_prediction_tokens", "rejected_prediction_tokens")
# Output that is dearer than text where it is sold at all, and for which the price book has no unit.
_MEDIA = ("audio_tokens", "image_tokens", "video_tokens")
# What is billed beside tokens: by xAI and Perplexity; by Anthropic and OpenRouter, for tools that they run.
_BESIDE_TOKENS = ("num_sources_used", "num_search_queries")
_SERVER_TOOLS = ("server_tool_use", "server_tool_use_details")
_SEARCHES = ("web_search_requests", "web_fetch_requests")


@dataclass(frozen=True, slots=True)
class UsageReading:
    """What a ``usage`` object says.

    Args:
        usage: the counts, at the dearer figure where two contradict each other.
        adds_up: whether they prove each other, and each can be priced by the book: only then is a cost made of them exact.
    """

    usage: Usage
    adds_up: bool


class _Counts:
    """Reads the counts of a ``usage`` object, and notes whether all could be read and spellings agreed.

    Args:
        said: the object.
    """

    def __init__(self, said: Mapping[str, Any]) -> None:
        self.said = said
        self.are_clear = True

    def find(self, *names: str, inside: Iterable[str] = ()) -> list[int]:
        """Return what these names say, each that says something.

        Args:
            names: of the members.
            inside: members whose own members they are; without, they are the object's.
        """
        found = []
        for fields in self._details(inside) if inside else (self.said,):
            for name in names:
                value = fields.get(name)
                count = _count(value)
                if count is not None:
                    found.append(count)
                elif value is not None:
                    self.are_clear = False
        return found

    def most(self, *names: str, inside: Iterable[str] = ()) -> int:
        """Return the larger where names say different things; a zero beside a figure is no figure."""
        return self.agreed([count for count in self.find(*names, inside=inside) if count])

    def agreed(self, found: list[int], *, least: bool = False) -> int:
        """Return the figure that several names say; the larger, or the smaller, if they do not agree."""
        if len(set(found)) > 1:
            self.are_clear = False
        return (min if least else max)(found, default=0)

    def has_any(self, names: Iterable[str]) -> bool:
        """Tell whether one of these members is an object that says something."""
        return bool(self._details(names))

    def _details(self, names: Iterable[str]) -> list[Mapping[str, Any]]:
        return [value for name in names if isinstance(value := self.said.get(name), Mapping) and value]


def read_usage(said: Mapping[str, Any], *, has_output: bool = True) -> UsageReading:
    """Read a ``usage`` object in any of the spellings above.

    What is missing or is no sensible count is taken as zero. Parts are never larger than their whole.

    Args:
        said: the object.
        has_output: false for embeddings, where all of the total is the prompt's: Voyage and Jina name nothing else.
    """
    counts = _Counts(said)
    total = counts.most("total_tokens")
    made = counts.most(*_COMPLETION)
    prompt, read, write = _prompt_of(counts, made=made, total=total)
    if has_output:
        completion, reasoning = _completion_of(counts, made=made, prompt=prompt, total=total)
    else:
        counts.are_clear = counts.are_clear and (not prompt or total in (0, prompt + made))
        prompt, completion, reasoning = max(prompt, total), made, 0
    audio = counts.most("audio_tokens", inside=_PROMPT_DETAILS)
    if read + write + audio > prompt:  # parts that overlap count as the dearer one
        counts.are_clear = False
        prompt = max(prompt, write, audio)
    audio = min(audio, prompt)
    write = min(write, prompt - audio)
    read = min(read, prompt - audio - write)
    if (completion and not prompt) or _is_beyond_the_book(counts):
        counts.are_clear = False
    usage = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_read_tokens=read,
        cached_write_tokens=write,
        reasoning_tokens=reasoning,
        audio_tokens=audio,
    )
    return UsageReading(usage, counts.are_clear)


def _prompt_of(counts: _Counts, *, made: int, total: int) -> tuple[int, int, int]:
    """Return the prompt's tokens, and of them those read from a cache and those written to one."""
    read = counts.agreed(
        counts.find(*_CACHED_READ) + counts.find(*_CACHED_READ_DETAIL, inside=_PROMPT_DETAILS), least=True
    )
    write = counts.agreed(
        counts.find(*_CACHED_WRITE) + counts.find(*_CACHED_WRITE_DETAIL, inside=_PROMPT_DETAILS)
    )
    prompt = counts.most(*_PROMPT)
    missed = counts.find("prompt_cache_miss_tokens")
    if missed and read + missed[0] != prompt:
        counts.are_clear = counts.are_clear and not prompt
        prompt = max(prompt, read + missed[0])
    in_cache = read + write
    if counts.said.get("prompt_tokens") is None and not counts.has_any(_PROMPT_DETAILS):
        if counts.find(*_ANTHROPIC):  # in addition to the prompt's own
            prompt += in_cache
    elif prompt < in_cache:
        # Named in OpenAI's way and counted in Anthropic's; the total may prove it.
        counts.are_clear = counts.are_clear and total == prompt + in_cache + made
        prompt += in_cache
    return prompt, read, write


def _completion_of(counts: _Counts, *, made: int, prompt: int, total: int) -> tuple[int, int]:
    """Return the completion's tokens, and of them those of reasoning.

    Args:
        counts: what is said.
        made: what it says of the completion.
        prompt: tokens of the whole prompt.
        total: what it says of both together; 0 if nothing.
    """
    reasoning = counts.agreed(
        counts.find("reasoning_tokens") + counts.find("reasoning_tokens", inside=_COMPLETION_DETAILS)
    )
    others = sum(counts.most(name, inside=_COMPLETION_DETAILS) for name in (*_MEDIA, *_PREDICTED))
    is_inside = reasoning + others <= made
    if is_inside and (total == prompt + made or not (total or reasoning)):
        return made, reasoning
    if others <= made and total == prompt + made + reasoning:
        return made + reasoning, reasoning
    counts.are_clear = False
    if total or not is_inside:
        made = max(made + reasoning, reasoning + others)
    made = max(made, counts.most("text_tokens", inside=_COMPLETION_DETAILS))
    unexplained = max(total - prompt - made, 0)
    return made + unexplained, reasoning + unexplained


def _is_beyond_the_book(counts: _Counts) -> bool:
    """Tell whether something was used that has no price in the book: it is dearer than text, or billed beside tokens."""
    return bool(
        counts.most(*_MEDIA, inside=_COMPLETION_DETAILS)
        or counts.most(*_BESIDE_TOKENS)
        or counts.most("ephemeral_1h_input_tokens", inside=("cache_creation",))
        or counts.most(*_SEARCHES, inside=_SERVER_TOOLS)
    )


@dataclass(frozen=True, slots=True)
class ReportedCost:
    """A provider's own figure for one answer, in USD.

    Args:
        total_usd: what the call cost in all.
        own_key_usd: the part of it that a provider behind OpenRouter bills to a key of ours there (BYOK), and not OpenRouter to us.
    """

    total_usd: Decimal
    own_key_usd: Decimal = Decimal(0)


def read_cost(said: Mapping[str, Any]) -> ReportedCost | None:
    """Return the provider's own figure, as OpenRouter sends it in ``usage``; None where there is none.

    ``cost`` is what OpenRouter charges; where ``is_byok`` says that a key of ours was used, that is its fee alone, and
    ``cost_details.upstream_inference_cost`` is billed beside it by the provider. Without ``is_byok`` the same name repeats what ``cost``
    is made of. https://openrouter.ai/docs/use-cases/usage-accounting
    """
    cost = _usd(said.get("cost"))
    if cost is None or said.get("is_byok") is not True:
        return None if cost is None else ReportedCost(cost)
    details = said.get("cost_details")
    own = _usd(details.get("upstream_inference_cost")) if isinstance(details, Mapping) else None
    if own is None:
        return None  # what the provider bills is not known from this
    return ReportedCost(cost + own, own)


def _usd(value: Any) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    exact = value if isinstance(value, Decimal) else Decimal(repr(value))
    return exact if exact.is_finite() and exact >= 0 else None


def with_prompt(reading: UsageReading, counted_tokens: int) -> UsageReading:
    """Return the reading with our own count of the prompt, where the provider told of the completion only."""
    usage = reading.usage
    if usage.prompt_tokens or not usage.completion_tokens:
        return reading
    return UsageReading(replace(usage, prompt_tokens=counted_tokens), adds_up=False)


def _count(value: Any) -> int | None:
    """Return a count; None if it is none. An int made of 1E+99999999 would fill the memory."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return min(value, TOKENS_MAX) if value >= 0 else None
    if isinstance(value, Decimal | float):
        finite = value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)
        return int(value) if finite and 0 <= value <= TOKENS_MAX and value == int(value) else None
    return None
