"""Where a client calls from, through proxies that are trusted; and which servers we ask ourselves may be believed."""

from ipaddress import ip_address

from yarl import URL

from billing.errors import InputError


def check_url(url: str, *, name: str) -> URL:
    """Return an address to ask, unless someone on the way could answer for it.

    Args:
        url: the address.
        name: of the setting.

    Raises:
        InputError: it is not https, nor on this machine.
    """
    try:
        parsed = URL(url)
        host = parsed.host or ""
    except ValueError:
        raise InputError(f"{name} is not a URL") from None
    if not host or (parsed.scheme != "https" and not (parsed.scheme == "http" and _is_loopback(host))):
        raise InputError(f"{name} must start with https:// (http:// only for this machine)")
    return parsed


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
