"""Simulated Stripe: its API, its objects, its way with HTTP."""
