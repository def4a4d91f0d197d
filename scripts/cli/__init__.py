"""The ``tuma`` command."""
