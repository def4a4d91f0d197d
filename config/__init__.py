"""Settings, logging and data; imports nothing of Tuma."""
