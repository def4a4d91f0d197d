"""Processes that the bench starts beside Tuma: the floor, the provider, the load, Redis's load."""
