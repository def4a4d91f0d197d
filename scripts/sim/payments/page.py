"""The page on which a person pays at a simulated provider: plain HTML, a form, no scripts. Pure."""

from html import escape

from scripts.sim.payments.books import Checkout, Payment
from scripts.sim.payments.currencies import to_major

_STYLE = """
body{font:1rem/1.5 system-ui,sans-serif;max-width:34rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c;background:#fff}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:#555}dd{margin:0;overflow-wrap:anywhere}
.note{padding:.5rem .8rem;border-left:.3rem solid #b25d00;background:#fff6e8}
.row{display:grid;grid-template-columns:14rem 1fr;gap:.2rem 1rem;align-items:center;margin:.6rem 0}.row p{margin:0;color:#444}
button{font:inherit;padding:.5rem;border:1px solid #1c1c1c;border-radius:.3rem;background:#fff;cursor:pointer}
button.main{background:#0a5c36;border-color:#0a5c36;color:#fff}:focus-visible{outline:.2rem solid #0b57d0}
@media(max-width:32rem){.row{grid-template-columns:1fr}}
"""
_Action = tuple[str, str, str]
_OPEN: tuple[_Action, ...] = (
    ("pay", "Pay {amount}", "The money arrives at once."),
    ("decline", "Let the card be declined", "Nothing is paid, and you may try again."),
    ("pending", "Pay by a slow bank", "The money is on its way until you come back here and let it arrive."),
    ("less", "Pay half of it", "Less than was asked is not credited: an operator has to decide."),
    ("more", "Pay twice as much", "At most what was asked is credited; an operator decides about the rest."),
    ("cancel", "Go back without paying", "Nothing is paid."),
)
_ON_ITS_WAY: tuple[_Action, ...] = (
    ("arrive", "Let the money arrive", "The bank sends what it promised."),
    ("bounce", "Let the bank refuse", "The money never comes."),
)
_ENDED: tuple[_Action, ...] = (
    (
        "pay",
        "Pay {amount} once more",
        "As people do by mistake. It is not credited twice: an operator decides.",
    ),
)
ACTIONS = frozenset(action for action, _, _ in (*_OPEN, *_ON_ITS_WAY, *_ENDED))


def show_checkout(checkout: Checkout, payment: Payment | None, back: str | None) -> str:
    """Return the page of a checkout as it stands.

    Args:
        checkout: which.
        payment: the one that says how it went, if any was tried.
        back: where its payer goes afterwards.
    """
    amount = f"{to_major(checkout.provider, checkout.amount_minor, checkout.currency):f} {checkout.currency}"
    title, said, actions = _standing(checkout, payment, amount)
    facts = {
        "Amount": amount,
        "Paid by": checkout.email or "not said",
        "Paid to": "the operator of this Tuma",
        "Through": f"simulated {checkout.provider.capitalize()}",
        "Reference": checkout.reference,
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    ended = checkout.status != "open"
    return _html(
        title, f"<p>{escape(said)}{_link(back) if ended else ''}</p><dl>{rows}</dl>{_form(actions, amount)}"
    )


def _standing(
    checkout: Checkout, payment: Payment | None, amount: str
) -> tuple[str, str, tuple[_Action, ...]]:
    """Return a title, a sentence and what can be done."""
    if checkout.status == "expired":
        return "This page has expired", "Nothing was paid, and nothing can be paid here any more.", ()
    if payment is None:
        return f"Pay {amount}", "Choose what happens.", _OPEN
    if payment.status == "pending":
        return (
            "On its way",
            "The bank has promised the money. You may go back and wait, or decide here.",
            _ON_ITS_WAY,
        )
    if payment.status == "succeeded":
        paid = f"{to_major(payment.provider, payment.amount_minor, payment.currency):f} {payment.currency}"
        return f"Paid: {paid}", "You may go back now.", _ENDED
    failed = f"Not paid: {payment.failure}. "
    if checkout.status == "open":
        return f"Pay {amount}", failed + "You may try again.", _OPEN
    return "Not paid", failed + "You may go back now.", _ENDED


def show_message(title: str, said: str) -> str:
    """Return a page that says something and asks nothing."""
    return _html(title, f"<p>{escape(said)}</p>")


def _form(actions: tuple[_Action, ...], amount: str) -> str:
    rows = "".join(
        f'<div class="row"><button type="submit" name="do" value="{action}" aria-describedby="{action}-does"'
        f"{' class=main' if number == 0 else ''}>{escape(label.format(amount=amount))}</button>"
        f'<p id="{action}-does">{escape(does)}</p></div>'
        for number, (action, label, does) in enumerate(actions)
    )
    return f'<form method="post"><h2>What you can do</h2>{rows}</form>' if rows else ""


def _link(back: str | None) -> str:
    if back is None or not back.startswith(("https://", "http://")):
        return " You may close this page."
    return f' <a href="{escape(back)}" rel="noreferrer">Go back to {escape(back.split("/")[2])}</a>'


def _html(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} · simulated payment</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body><main>'
        f'<p class="note">This is a simulation: no real money moves.</p><h1>{escape(title)}</h1>{body}</main></body></html>'
    )
