"""The models on offer, and what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model, its prices and its manners.

    Prices per token are in femto-USD, which is nano-USD per million tokens: USD 0.15 per million is 150,000,000.
    ``cached_femtousd`` is for the cached part of the prompt; ``None`` means no discount. ``request_nanousd`` is added once
    per generation. ``manners`` are behaviour fields in which the model differs from the server's default.
    """

    id: str
    name: str
    prompt_femtousd: int
    completion_femtousd: int
    cached_femtousd: int | None = None
    request_nanousd: int = 0
    context_tokens: int = 128_000
    completion_tokens_max: int = 16_384
    manners: Mapping[str, Any] = field(default_factory=dict)

    def cost_nanousd(self, *, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """Return the cost of a generation in nano-USD, rounded up once.

        Args:
            prompt_tokens: all of the prompt, the cached part among them.
            cached_tokens: the cached part.
            completion_tokens: of all choices, reasoning among them.
        """
        cached_femtousd = self.prompt_femtousd if self.cached_femtousd is None else self.cached_femtousd
        femtousd = (
            (prompt_tokens - cached_tokens) * self.prompt_femtousd
            + cached_tokens * cached_femtousd
            + completion_tokens * self.completion_femtousd
        )
        return -(-femtousd // _MILLION) + self.request_nanousd


def sim_models() -> dict[str, SimModel]:
    """Return the models by id. Prices are of the real ones' order; those of ``sim/…`` need rounding."""
    return {model.id: model for model in (*_known_models(), *_own_models())}


def embedding_models() -> dict[str, SimModel]:
    """Return the models that make embeddings, which OpenRouter lists apart, by id."""
    return {
        model.id: model
        for model in (
            SimModel("openai/text-embedding-3-small", "OpenAI: Text Embedding 3 Small", 20_000_000, 0),
            SimModel("openai/text-embedding-3-large", "OpenAI: Text Embedding 3 Large", 130_000_000, 0),
        )
    }


def _known_models() -> tuple[SimModel, ...]:
    return (
        SimModel("openai/gpt-4o-mini", "OpenAI: GPT-4o-mini", 150_000_000, 600_000_000, 75_000_000),
        SimModel("openai/gpt-4o", "OpenAI: GPT-4o", 2_500_000_000, 10_000_000_000, 1_250_000_000),
        SimModel(
            "anthropic/claude-sonnet-4.5",
            "Anthropic: Claude Sonnet 4.5",
            3_000_000_000,
            15_000_000_000,
            300_000_000,
            context_tokens=1_000_000,
            completion_tokens_max=64_000,
        ),
        SimModel(
            "google/gemini-2.5-flash",
            "Google: Gemini 2.5 Flash",
            300_000_000,
            2_500_000_000,
            30_000_000,
            context_tokens=1_048_576,
            completion_tokens_max=65_536,
        ),
        SimModel(
            "meta-llama/llama-3.3-70b-instruct", "Meta: Llama 3.3 70B Instruct", 130_000_000, 390_000_000
        ),
        SimModel(
            "deepseek/deepseek-r1",
            "DeepSeek: R1",
            400_000_000,
            2_000_000_000,
            context_tokens=163_840,
            completion_tokens_max=163_840,
            manners={"reasoning_chunks": 5},
        ),
        SimModel("mistralai/mistral-small-3.2", "Mistral: Small 3.2", 60_000_000, 180_000_000),
        SimModel("qwen/qwen3-32b", "Qwen: Qwen3 32B", 51_000_000, 217_000_000),
    )


def _own_models() -> tuple[SimModel, ...]:
    return (
        SimModel(
            "sim/echo",
            "Sim: repeats the user's last message",
            234_567_891,
            987_654_321,
            manners={"echo": True},
        ),
        SimModel(
            "sim/slow",
            "Sim: 40 chunks, 50 ms apart",
            1_000_000_003,
            2_000_000_011,
            100_000_007,
            manners={"chunks": 40, "chunk_delay_ms": 50, "comments": 10},
        ),
        SimModel(
            "sim/stall", "Sim: silent after 3 chunks", 310_000_007, 620_000_021, manners={"stall_after": 3}
        ),
        SimModel(
            "sim/error",
            "Sim: breaks off after 3 chunks",
            320_000_017,
            640_000_009,
            manners={"error_after": 3},
        ),
        SimModel(
            "sim/reasoning",
            "Sim: thinks in 10 chunks",
            330_000_019,
            660_000_031,
            manners={"reasoning_chunks": 10},
        ),
        SimModel("sim/tools", "Sim: calls a tool", 340_000_001, 680_000_003, manners={"tool_calls": True}),
        SimModel("sim/fee", "Sim: a fee per request", 350_000_011, 700_000_001, request_nanousd=1_234_567),
    )
