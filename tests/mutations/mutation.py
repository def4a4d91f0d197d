"""One guard, and what breaks it."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Mutation:
    """A guard's text, what replaces it, and the tests that must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


class Verdict(StrEnum):
    """What the tests said of a broken guard; ``unclear`` where they could not be run."""

    CAUGHT = "caught"
    SURVIVED = "survived"
    UNCLEAR = "unclear"
