"""Speaks HTTP: the way of one call, upstream adapters, the user's own money. Knows no SQL."""
