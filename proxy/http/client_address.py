"""Where a client calls from, through proxies that are trusted; and which servers we ask ourselves may be believed."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp import web

Address = IPv4Address | IPv6Address
_HOPS_MAX = 32


def client_address(request: web.Request, trusted: tuple[IPv4Network | IPv6Network, ...]) -> Address | None:
    """Return the client's address; None when it is unknown.

    ``X-Forwarded-For`` is read from its end, as each proxy appends whom it heard from: the first that is not itself a
    trusted proxy is the client. From anybody else the header is not read at all.

    Args:
        request: as it came.
        trusted: networks of the proxies that are believed.
    """
    peer = None if request.transport is None else request.transport.get_extra_info("peername")
    address = parse_address(peer[0]) if isinstance(peer, tuple) and peer else None
    if address is None or not trusted:
        return address
    hops = ",".join(request.headers.getall("X-Forwarded-For", ())).split(",")
    for hop in reversed(hops[-_HOPS_MAX:]):
        if not any(address in network for network in trusted):
            return address
        if not hop.strip():
            continue
        before = parse_address(hop.strip())
        if before is None:
            return None  # a trusted proxy says what is no address: nobody in particular
        address = before
    return address


def parse_address(text: str) -> Address | None:
    """Parse an address, with or without a port; an IPv4 address inside IPv6 is the IPv4 address."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def network_of(address: Address | None) -> str:
    """Return what one client has to itself: an IPv4 address, or the /64 of an IPv6 one."""
    if isinstance(address, IPv6Address):
        return str(IPv6Network((int(address) >> 64 << 64, 64)))
    return str(address)
