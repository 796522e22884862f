"""Origins of web pages (RFC 6454): how two of them are compared, and which of them may use a server.

A browser names the origin of the page in the header `Origin` of each WebSocket, of each POST, and of each request to
another origin. `serve.web.middleware` asks here whether the page may use the server. `serve.serving` reads the option
`--allow-origin` here.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from jaxtml.errors import InputError

ALL, OPAQUE = "*", "null"
"""`ALL` stands for every origin in `--allow-origin`. `OPAQUE` is what a browser sends for a page that has no
origin: a page from a file or in a sandbox."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


@dataclass(frozen=True)
class Host:
    """The host and the port of an address, in one spelling.

    Attributes:
      name: small letters, without a dot at the end; an IPv6 address without brackets.
      port: None: the address names no port.
    """

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Host:
        """Reads `host`, `host:port` or `[IPv6]:port`, for example a Host header. Raises `ValueError` if it is none."""
        parts = urlsplit(f"//{text}")
        rest = (parts.path.removeprefix("/"), parts.query, parts.fragment)
        name = (parts.hostname or "").removesuffix(".")
        name = name if name.isascii() else name.encode("idna").decode()  # as browsers write other alphabets
        if any(rest) or any(character in "@?# \t" for character in text):
            raise ValueError(f"{text[:200]!r} is more than a host and a port")
        if ":" in name:
            name = str(ipaddress.IPv6Address(name))
        elif not _NAME.fullmatch(name):
            raise ValueError(f"{text[:200]!r} is no host")
        return cls(name, parts.port)

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port is None else f"{name}:{self.port}"

    @property
    def is_certain(self) -> bool:
        """Whether no other site can stand behind this name: it means this machine, or is an IP address.

        Any other name is looked up in the DNS, and whoever owns it can let it mean this machine.
        """
        try:
            return bool(ipaddress.ip_address(self.name))
        except ValueError:
            return self.is_loopback

    @property
    def is_loopback(self) -> bool:
        """Whether the name means the loopback interface: 127.0.0.0/8, ::1, localhost or a name under it (RFC 6761)."""
        try:
            return ipaddress.ip_address(self.name).is_loopback
        except ValueError:
            return self.name == "localhost" or self.name.endswith(".localhost")


@dataclass(frozen=True)
class Origin:
    """The origin of a page. Two are equal if a browser takes them for the same.

    Attributes:
      scheme: small letters.
      host: its port is never None if the scheme has a default port.
    """

    scheme: str
    host: Host

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Reads `scheme://host` or `scheme://host:port`. Raises `ValueError` if it is something else."""
        scheme, found, rest = text.partition("://")
        scheme = scheme.lower()
        if not found or not _SCHEME.fullmatch(scheme):
            raise ValueError(f"{text[:200]!r} has no scheme such as https://")
        host = Host.parse(rest)
        return cls(scheme, Host(host.name, _DEFAULT_PORTS.get(scheme) if host.port is None else host.port))

    def is_at(self, scheme: str | None, host: Host) -> bool:
        """Returns whether this is the origin of an address. `scheme` is None if it is not known."""
        port = _DEFAULT_PORTS.get(scheme or self.scheme) if host.port is None else host.port
        return scheme in (None, self.scheme) and Host(host.name, port) == self.host

    def __str__(self) -> str:
        is_default = self.host.port == _DEFAULT_PORTS.get(self.scheme)
        return f"{self.scheme}://{Host(self.host.name, None) if is_default else self.host}"


def read_allowed(values: Iterable[str]) -> frozenset[Origin | str]:
    """Reads the values of `--allow-origin`: origins, `ALL` and `OPAQUE`.

    Raises:
      InputError: a value is no origin.
    """
    return frozenset(value if value in (ALL, OPAQUE) else _read_allowed(value.strip()) for value in values)


def _read_allowed(value: str) -> Origin:
    example = "give it as a browser's address line begins, for example https://app.example or http://localhost:5173"
    try:
        origin = Origin.parse(value)
    except ValueError as error:
        hint = "repeat the option for each origin, or give * for all" if "*" in value or "," in value else example
        raise InputError(f"--allow-origin {value}: {error}; {hint}") from error
    if origin.scheme in ("ws", "wss", "file"):
        raise InputError(f"--allow-origin {value}: a page has http or https, and a page from a file has {OPAQUE}")
    return origin
