"""The way of one call; begin with ``chat.py``."""
