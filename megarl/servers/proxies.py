"""Whether requests to a server go through a proxy that the environment names, as HTTP libraries let them."""

from __future__ import annotations

import ipaddress
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def is_local(url: str) -> bool:
    """Whether `url` is of this machine, which no proxy reaches: a proxy's 127.0.0.1 is its own."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", socket.gethostname()) or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def proxy_of(url: str) -> str | None:
    """The proxy by which `url` is asked, without name and password, and the variable that says so; None without one.

    >>> proxy_of("http://127.0.0.1:8000/v1") is None
    True
    """
    parts = urlsplit(url)
    found = getproxies()
    kind = next((kind for kind in (parts.scheme, "all") if found.get(kind)), None)
    if kind is None or is_local(url) or proxy_bypass(parts.netloc):
        return None
    # In any case of letters; of several the one in lower case counts.
    variable = max(name for name, value in os.environ.items() if value and name.lower() == f"{kind}_proxy")
    return f"{found[kind].rpartition('@')[2]} of {variable}"
