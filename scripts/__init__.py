"""The `tuma` command, `./scripts/dev`, embedded servers and the simulated provider."""
