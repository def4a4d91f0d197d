"""OpenAI's protocol, read and metered. Pure: no IO."""
