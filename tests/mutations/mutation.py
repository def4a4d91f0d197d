"""One guard, and what breaks it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """A guard's text, what replaces it, and the tests that must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str
