"""How many tokens an image may be, by family of models. Pure.

Sources: OpenAI, "Images and vision", section "Calculating costs" (https://platform.openai.com/docs/guides/images-vision): a
base and up to eight tiles of 512 pixels, or up to 1,536 patches times a factor; Anthropic, "Vision"
(https://docs.anthropic.com/en/docs/build-with-claude/vision): width x height / 750 after scaling. Of other families nobody
says a bound: an image may fill their context.
"""

import re
from functools import lru_cache

_TILES = 8  # 2,048 by 768 pixels, in squares of 512
_PATCHES = 1_536
# Base and tokens per tile, or the factor per patch; the first that matches counts.
_OPENAI: tuple[tuple[str, int, int, float], ...] = (
    (r"gpt-4o-mini", 2_833, 5_667, 0),
    (r"(gpt-4\.1-mini|gpt-5-mini)", 0, 0, 1.62),
    (r"(gpt-4\.1-nano|gpt-5-nano)", 0, 0, 2.46),
    (r"o4-mini", 0, 0, 1.72),
    (r"gpt-5(-chat-latest|-chat|-\d{4}-\d\d-\d\d)?$", 70, 140, 0),
    (r"(gpt-4o|gpt-4\.1|gpt-4\.5|gpt-4-turbo|gpt-4-vision)", 85, 170, 0),
    (r"o[13](-pro)?(-\d{4}-\d\d-\d\d)?$", 75, 150, 0),
    (r"computer-use-preview", 65, 129, 0),
)
_ANTHROPIC = 4_800  # 2,576 pixels on the longer side, as of the models that see finest
_LOW = "low"


@lru_cache(maxsize=4096)
def image_tokens_max(model: str, detail: str) -> int | None:
    """Return a bound on the tokens of one image; None where nobody says one.

    Args:
        model: with or without its vendor.
        detail: as asked for: ``low``, ``high``, ``auto``.
    """
    vendor, _, name = model.lower().partition(":")[0].rpartition("/")
    if vendor == "anthropic" or (not vendor and name.startswith("claude-")):
        return _ANTHROPIC
    if vendor not in ("", "openai"):
        return None
    for pattern, base, tile, factor in _OPENAI:
        if re.match(pattern, name):
            if factor:
                return int(_PATCHES * factor) + 1
            return base if detail == _LOW else base + _TILES * tile
    return None
