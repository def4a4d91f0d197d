"""Guards, and how each is broken on purpose to show that a test notices: ``python -m tests.mutations``."""
