"""``python -m scripts.cli``: the ``tuma`` command."""

from scripts.cli.main import main

main()
