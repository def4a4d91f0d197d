"""Counting tokens before the provider does, with tiktoken and the vocabularies that lie in this package.

The count is for the quote, and for answers whose provider reports nothing; see ``docs/metering.md`` for the figures.
Nothing is fetched at run time. Pure but for reading the vocabularies once.
"""

import base64
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from hashlib import blake2b
from importlib.resources import files
from typing import Any

import tiktoken

from billing.errors import BrokenInvariantError
from billing.pricing.images import image_tokens_max
from billing.threads import FairThreads, Work, finish

# Published vocabularies, under the names and with the hashes of tiktoken's own cache (tiktoken_ext/openai_public.py).
_VOCABULARIES = {
    "o200k_base": (
        "fb374d419588a4632f3f557e76b4b70aebbca790",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
    "cl100k_base": (
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
}
_PATTERNS = {
    "o200k_base": "|".join(  # noqa: FLY002 - one alternative a line, as published
        (
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        )
    ),
    "cl100k_base": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
}
_SPECIAL = {
    "o200k_base": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    "cl100k_base": {
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
}

# How much larger than o200k_base a family's own tokenizer may count; measured figures and sources in docs/metering.md.
_FAMILY_SAFETY = {
    "anthropic": Fraction(3, 2),
    "google": Fraction(6, 5),
    "meta-llama": Fraction(5, 4),
    "mistralai": Fraction(7, 5),
    "deepseek": Fraction(5, 4),
    "qwen": Fraction(5, 4),
    "x-ai": Fraction(5, 4),
    "cohere": Fraction(5, 4),
}
_UNKNOWN_SAFETY = Fraction(3, 2)
_OPENAI_CL100K = re.compile(r"(gpt-4(?!o|\.|-?5)|gpt-3\.5|gpt-35|text-embedding-|text-davinci)")
_OPENAI = re.compile(r"(gpt-|chatgpt-|o[1345](-|$)|text-embedding-|text-davinci|codex|computer-use)")

_PIECE_CHARS = 20_000  # tiktoken's time grows with the square of a piece without spaces
_TEXT_CHARS_MAX = (
    2_000_000  # above this a text is bounded by its bytes: three bytes a token, see docs/metering.md
)
_BYTES_PER_TOKEN_BOUND = 3
_REMEMBERED_CHARS_MIN = 1_000  # below this counting is about as cheap as remembering

_PER_MESSAGE = 3  # OpenAI cookbook, "How to count tokens with tiktoken"
_PER_NAME = 1
_PRIMING = 3
_PER_TOOLS = 16
_AUDIO_BYTES_PER_TOKEN = 200  # 10 tokens a second (OpenAI), at the 16 kbit/s of dense speech
_UNKNOWN_PART_TOKENS = 1_445
_DEPTH_MAX = 40
_TEXTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
_IMAGES = ("image_url", "input_image", "image")
# A file may be compressed, and grow when it is read; a video's tokens are by its length; an address leads anywhere.
_UNMEASURED = ("video_url", "input_video", "file", "input_file", "input_audio", "audio_url")
# Items of the Responses API that are no messages.
_ITEMS = (
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    "reasoning",
    "additional_tools",
)


@dataclass(frozen=True, slots=True)
class EncodingChoice:
    """Which vocabulary counts for a model, and by how much the count is raised."""

    name: str
    safety: Fraction

    def raised(self, tokens: int) -> int:
        """Return a count raised by the safety factor, rounded up."""
        return -(-tokens * self.safety.numerator // self.safety.denominator)


@dataclass(frozen=True, slots=True)
class PromptCount:
    """A prompt, counted upward: tokens, with images and audio at their bounds; and how many images.

    ``open_ended``: there is something in it that cannot be measured (a file, a video, what an address leads to), and that may
    fill the model's context.

    Args:
        bound: it was not counted: ``tokens`` is as many as counting can come to.
        most_tokens: what it may be beyond that, for what cannot be measured: held, and never charged.
    """

    tokens: int
    images: int = 0
    open_ended: bool = False
    bound: bool = False
    most_tokens: int = 0

    @property
    def held_tokens(self) -> int:
        """For how many tokens money is held."""
        return max(self.tokens, self.most_tokens)


class TokenCounter:
    """Counts tokens; large prompts off the event loop.

    Args:
        threads: where that is done, in turn; None for one of its own.
        offload_bytes: a request at least so large is counted in a thread (tiktoken releases the GIL).
        remembered: long texts of which the count is remembered: a conversation comes again with each of its turns.
    """

    def __init__(
        self,
        threads: FairThreads | None = None,
        *,
        offload_bytes: int = 32_768,
        remembered: int = 10_000,
    ) -> None:
        self._remembered_max = remembered
        self._remembered: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        self._remembering = threading.Lock()
        self._offload_bytes = offload_bytes
        self._threads = threads or FairThreads(name="tokens")
        self._encodings: dict[str, tiktoken.Encoding] = {}
        self._loading = threading.Lock()

    def warm(self) -> None:
        """Read the vocabulary that most models use, a fraction of a second, so that no call waits for it."""
        self._encoding("o200k_base")

    def close(self) -> None:
        """Stop the threads."""
        self._threads.close()

    @staticmethod
    def encoding_for(model: str) -> EncodingChoice:
        """Return the vocabulary for a model, by its name with or without a vendor: ``openai/gpt-4o``, ``gpt-4o``."""
        return _choose(model)

    def count_text(self, model: str, text: str) -> int:
        """Count the tokens of a text for a model, raised by its family's safety factor."""
        choice = _choose(model)
        return choice.raised(finish(self._count(choice.name, text)))

    def count_prompt(self, ask: Mapping[str, Any], model: str) -> PromptCount:
        """Count a request's prompt. Never raises: what is odd is counted as the JSON that it is."""
        return finish(self._counting(ask, model))

    async def count_prompt_async(
        self,
        ask: Mapping[str, Any],
        model: str,
        work: int,
        *,
        owner: Hashable = None,
        wanted: Callable[[], bool] | None = None,
    ) -> PromptCount:
        """Count a prompt, in a thread when that is much work.

        Args:
            ask: the request's members.
            model: that shall answer.
            work: the bytes to go over, or as many as take as long.
            owner: whose turn it takes.
            wanted: see ``FairThreads.run``.
        """
        if work < self._offload_bytes:
            return self.count_prompt(ask, model)
        return await self._threads.run(owner, self._counting(ask, model), wanted=wanted)

    def bound_prompt(self, ask: Mapping[str, Any], model: str) -> PromptCount:
        """Return how many tokens counting a prompt can come to, without counting it: a byte is at most one token.

        A text has about four times fewer, so this is for a wallet that does not feel the difference.
        """
        choice = _choose(model)
        tally = _Tally(model)
        for text in tally.texts_of(ask):
            tally.tokens += _most_tokens(text)
        return PromptCount(
            choice.raised(tally.tokens) + tally.fixed_tokens, tally.images, tally.open_ended, bound=True
        )

    def _counting(self, ask: Mapping[str, Any], model: str) -> Work[PromptCount]:
        """Count a prompt in steps, none of which takes long."""
        choice = _choose(model)
        tally = _Tally(model)
        for text in tally.texts_of(ask):
            tally.tokens += yield from self._count(choice.name, text)
            yield
        return PromptCount(choice.raised(tally.tokens) + tally.fixed_tokens, tally.images, tally.open_ended)

    def _count(self, name: str, text: str) -> Work[int]:
        if len(text) > _TEXT_CHARS_MAX:
            return _tokens_of_bytes(text)
        if len(text) < _REMEMBERED_CHARS_MIN:
            return len(self._encoding(name).encode_ordinary(text))
        # By its digest: no prompt is kept, and one that comes again costs a hundredth of counting it.
        key = (name, blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        with self._remembering:
            known = self._remembered.get(key)
            if known is not None:
                self._remembered.move_to_end(key)
                return known
        encoding = self._encoding(name)
        tokens = 0
        for piece in _pieces(text):
            tokens += len(encoding.encode_ordinary(piece))
            yield
        with self._remembering:
            self._remembered[key] = tokens
            if len(self._remembered) > self._remembered_max:
                self._remembered.popitem(last=False)
        return tokens

    def _encoding(self, name: str) -> tiktoken.Encoding:
        found = self._encodings.get(name)
        if found is None:
            with self._loading:
                found = self._encodings.get(name) or _load_encoding(name)
                self._encodings[name] = found
        return found


@lru_cache(maxsize=4096)
def _choose(model: str) -> EncodingChoice:
    vendor, _, name = model.lower().rpartition("/")
    if vendor in ("", "openai") and _OPENAI.match(name):
        return EncodingChoice("cl100k_base" if _OPENAI_CL100K.match(name) else "o200k_base", Fraction(1))
    return EncodingChoice("o200k_base", _FAMILY_SAFETY.get(vendor, _UNKNOWN_SAFETY))


@cache  # it takes half a second of a processor, never changes, and threads may share it
def _load_encoding(name: str) -> tiktoken.Encoding:
    file_name, digest = _VOCABULARIES[name]
    data = files("config").joinpath("data", "encodings", file_name).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise BrokenInvariantError(f"the vocabulary {name} in this package is damaged")
    ranks = {}
    for line in data.splitlines():
        token, _, rank = line.partition(b" ")
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        name, pat_str=_PATTERNS[name], mergeable_ranks=ranks, special_tokens=_SPECIAL[name]
    )


def _tokens_of_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN_BOUND + 1


def _most_tokens(text: str) -> int:
    """Return as many tokens as ``_count`` can come to: the vocabularies are of bytes."""
    if len(text) > _TEXT_CHARS_MAX:
        return _tokens_of_bytes(text)
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _pieces(text: str) -> Iterator[str]:
    if len(text) <= _PIECE_CHARS:
        yield text
        return
    for start in range(0, len(text), _PIECE_CHARS):
        yield text[start : start + _PIECE_CHARS]


class _Tally:
    """Walks a request and sums what costs tokens; ``texts_of`` yields what must be encoded."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.tokens = 0
        self.fixed_tokens = 0
        self.images = 0
        self.open_ended = False

    def texts_of(self, ask: Mapping[str, Any]) -> Iterator[str]:
        messages = ask.get("messages")
        if isinstance(messages, list):
            self.fixed_tokens += _PRIMING
            for message in messages:
                yield from self._message(message)
        if isinstance(ask.get("input"), str) or ask.get("instructions") is not None:
            self.fixed_tokens += _PRIMING + 2 * _PER_MESSAGE  # the Responses API makes messages of these
        for name in ("prompt", "suffix", "input", "instructions"):
            if ask.get(name) is not None:
                yield from self._content(ask[name])
        for name in ("tools", "functions", "response_format", "text"):
            if ask.get(name):
                self.fixed_tokens += _PER_TOOLS
                yield _as_json(ask[name])

    def _message(self, message: object, depth: int = 0) -> Iterator[str]:
        self.fixed_tokens += _PER_MESSAGE
        if not isinstance(message, Mapping):
            yield _as_json(message)
            return
        for key, value in message.items():
            if key == "content":
                yield from self._content(value, depth)
            elif key == "name":
                self.fixed_tokens += _PER_NAME
                yield str(value)
            elif value is not None:
                yield value if isinstance(value, str) else _as_json(value)

    def _content(self, content: object, depth: int = 0) -> Iterator[str]:
        if isinstance(content, str):
            yield content
        elif isinstance(content, list) and depth < _DEPTH_MAX:
            if content and all(isinstance(item, int) for item in content):
                self.fixed_tokens += len(content)  # a prompt given as token ids
                return
            for part in content:
                yield from self._content(part, depth + 1)
        elif isinstance(content, Mapping) and depth < _DEPTH_MAX:
            yield from self._part(content, depth + 1)
        elif content is not None:
            yield _as_json(content)

    def _part(self, part: Mapping[str, Any], depth: int) -> Iterator[str]:
        kind, text = part.get("type"), part.get("text")
        if isinstance(text, str):
            yield text
            if kind in _TEXTS or (kind is None and "content" not in part):
                return  # beside anything else a text says nothing of what that costs
        yield from self._other_part(part, kind, depth)

    def _other_part(self, part: Mapping[str, Any], kind: object, depth: int) -> Iterator[str]:
        if kind in _IMAGES:
            image = part.get("image_url")
            detail = image.get("detail") if isinstance(image, Mapping) else part.get("detail")
            self.images += 1
            bound = image_tokens_max(self._model, detail if isinstance(detail, str) else "auto")
            self.fixed_tokens += _UNKNOWN_PART_TOKENS if bound is None else bound
            self.open_ended |= bound is None
        elif kind == "input_audio" and not _is_address(part):
            self.fixed_tokens += _payload_bytes(part) // _AUDIO_BYTES_PER_TOKEN + 1
        elif kind in _UNMEASURED:
            self.fixed_tokens += _UNKNOWN_PART_TOKENS
            self.open_ended = True
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            yield part["refusal"]
        elif kind in _ITEMS:
            self.fixed_tokens += _PER_TOOLS if kind == "additional_tools" else _PER_MESSAGE
            yield _as_json({name: value for name, value in part.items() if name != "output"})
            yield from self._content(part.get("output"), depth)
        elif "content" in part:
            yield from self._message(part, depth)
        else:
            self.fixed_tokens += _UNKNOWN_PART_TOKENS
            written = _as_json(part)
            if len(written) < _PIECE_CHARS:
                yield written
            else:
                self.fixed_tokens += len(written.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN_BOUND


def _is_address(part: Mapping[str, Any]) -> bool:
    audio = part.get("input_audio")
    data = audio.get("data") if isinstance(audio, Mapping) else None
    return not isinstance(data, str) or data.startswith(("http:", "https:"))


def _payload_bytes(part: object, depth: int = 0) -> int:
    """Return the bytes behind a part's base64, roughly."""
    if isinstance(part, str):
        return len(part) * 3 // 4
    if depth < _DEPTH_MAX and isinstance(part, Mapping):
        return sum(_payload_bytes(value, depth + 1) for value in part.values())
    if depth < _DEPTH_MAX and isinstance(part, list):
        return sum(_payload_bytes(value, depth + 1) for value in part)
    return 0


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except (ValueError, RecursionError):
        return repr(value)
