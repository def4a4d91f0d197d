"""The screen of ``tuma watch``."""

import io

from rich.console import Console

from scripts.cli.watch import Screen


def test_what_others_wrote_is_shown_as_it_is() -> None:
    """A description or a provider's word is no markup, which would end the command, and no order to the terminal."""
    screen = Screen()
    standing = {"posted": "1", "held": "0", "available": "1", "currency": "USD", "status": "active"}
    screen.add({"type": "grant", **standing, "description": "[/] and [red]\x1b[2J"})
    screen.add({"type": "auto_topup", **standing, "auto_topup": {"note": "[/bold] declined"}})
    written = io.StringIO()
    Console(file=written, width=200).print(screen)
    shown = written.getvalue()
    assert "[/] and [red]" in shown
    assert "[/bold] declined" in shown
    assert "\x1b" not in shown
