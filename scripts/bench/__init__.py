"""``tuma bench``: what metering costs beside a proxy that does not meter."""
