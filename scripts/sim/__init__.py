"""A simulated provider with books of its own. It shares no code with what it checks."""
