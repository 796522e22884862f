"""Where browsers find a server, and the pages that may use it besides its own.

Made by `serve.serving` from the options of `jaxtml serve`, and read by `serve.web.application` and its middleware.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtml.serve.web.origins import Origin, read_allowed
from jaxtml.serve.web.proxies import Network, read_prefix, read_proxies


@dataclass(frozen=True)
class Site:
    """How browsers see a server.

    Attributes:
      origins: origins of other pages that may use the server; also `origins.ALL` and `origins.OPAQUE`.
      proxies: addresses of reverse proxies whose headers are believed.
      prefix: path under which the server has all its addresses a second time, for example "/talk"; empty: none.
    """

    origins: frozenset[Origin | str] = frozenset()
    proxies: tuple[Network, ...] = ()
    prefix: str = ""

    @classmethod
    def read(cls, origins: Iterable[str] = (), proxies: Iterable[str] = (), prefix: str = "") -> Site:
        """Reads the values of `--allow-origin`, `--trust-proxy` and `--path-prefix`.

        Raises:
          InputError: one of them cannot be used.
        """
        return cls(read_allowed(origins), read_proxies(proxies), read_prefix(prefix))
