"""Wallets, their caps, and the feed of what happens to them."""
