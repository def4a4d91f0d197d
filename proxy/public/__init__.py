"""What needs no key: webhooks of payment providers, health, the metrics page."""
