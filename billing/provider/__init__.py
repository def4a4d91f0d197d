"""Our account at the provider: its records, and our quota there."""
