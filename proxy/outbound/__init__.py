"""What Tuma asks of others beside model and payment providers: the alert webhook, FX sources."""
