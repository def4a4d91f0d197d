"""``./scripts/dev``: everything on this machine, started, tried, walked through."""
