"""The address that a browser used for a request, where a reverse proxy stands between the browser and the server.

A proxy may change the scheme, the host and the path of a request, and says so in headers: `Forwarded` (RFC 7239), or
`X-Forwarded-Proto`, `X-Forwarded-Host`, `X-Forwarded-Port` and `X-Forwarded-Prefix`. Anyone can send these headers, so
they count only in requests from the addresses that `--trust-proxy` names. Called by `serve.web.middleware`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aiohttp import web

from jaxtml.errors import InputError
from jaxtml.serve.web.origins import Host

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")


@dataclass(frozen=True)
class PublicAddress:
    """Where a browser believes the server to be.

    Attributes:
      scheme: "http" or "https"; None: not known, because a proxy may speak TLS for the server.
      host: the host and the port.
      prefix: begins the path of every address of the server and was removed by the proxy; usually empty.
    """

    scheme: str | None
    host: Host
    prefix: str


def read_proxies(values: Iterable[str]) -> tuple[Network, ...]:
    """Reads the values of `--trust-proxy`: IP addresses and networks.

    Raises:
      InputError: a value is neither.
    """
    networks: list[Network] = []
    for value in values:
        try:
            networks.append(ipaddress.ip_network(value, strict=False))
        except ValueError as error:
            text = "give the IP address of the proxy, or its network, for example 127.0.0.1 or 10.0.0.0/8"
            raise InputError(f"--trust-proxy {value}: {text}") from error
    return tuple(networks)


def read_prefix(value: str) -> str:
    """Returns the value of `--path-prefix` without a slash at its end; empty: there is no prefix.

    Raises:
      InputError: the value is no path.
    """
    prefix = value.rstrip("/")
    if not _PREFIX.fullmatch(prefix):
        raise InputError(f"--path-prefix {value}: give a path of letters, digits and - . _ ~, for example /talk")
    return prefix


def public_address(request: web.Request, proxies: Sequence[Network]) -> PublicAddress:
    """Returns the address that the browser used.

    Raises:
      ValueError: the request has no usable Host header, or a trusted proxy sends a wrong header.
    """
    headers, forwarded = request.headers, {}
    scheme = "https" if request.secure else None
    host, port, prefix = request.host, "", ""
    if _is_trusted(request, proxies):
        # The first proxy, which the browser talks to, comes first in a list.
        forwarded = dict(request.forwarded[0]) if request.forwarded else {}
        scheme = forwarded.get("proto") or _first(headers.get("X-Forwarded-Proto")) or scheme
        host = forwarded.get("host") or _first(headers.get("X-Forwarded-Host")) or host
        port = _first(headers.get("X-Forwarded-Port"))
        prefix = _first(headers.get("X-Forwarded-Prefix")).rstrip("/")
    parsed = Host.parse(host)
    if parsed.port is None and port:
        parsed = Host(parsed.name, int(port))
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"X-Forwarded-Prefix {prefix[:200]!r} is no path")
    return PublicAddress(scheme.lower() if scheme else None, parsed, prefix)


def _is_trusted(request: web.Request, proxies: Sequence[Network]) -> bool:
    try:
        address = ipaddress.ip_address(request.remote or "")
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address  # a server that listens on both families sees IPv4 in this form
    return any(address in network for network in proxies)


def _first(values: str | None) -> str:
    return (values or "").split(",")[0].strip()
