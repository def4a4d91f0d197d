"""Who calls, found out from a key or a token."""
