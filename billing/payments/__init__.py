"""Money from people: top-ups, webhooks, refunds, disputes."""
