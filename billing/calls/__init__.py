"""A call from its hold to its settlement: opened, kept alive, ended once, swept, corrected."""
