"""A person's own money over HTTP: wallet, keys, caps, top-ups, transactions, usage."""
