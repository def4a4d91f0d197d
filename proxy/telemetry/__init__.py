"""Metrics, traces, and one log line per request."""
