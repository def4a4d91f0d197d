"""Adapters to providers: how a request goes out, what an answer says of its usage, what an error means."""
