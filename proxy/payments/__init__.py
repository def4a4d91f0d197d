"""Payment providers: what they sign, and how each is asked."""
