"""The protocols that the server speaks, one line each.

To add a protocol:

1. Make a folder beside this file with the messages, the protocol's class (it fulfils
   `serve.sessions.protocol.SessionProtocol`) and a `routes.py` with `SCOPE` and `routes`. Messages in JSON are declared
   with `serve.protocols.messages`. The smallest example is `TextProtocol` in
   `tests/serve/protocols/test_registry.py`; `moshi/` is the smallest protocol that is served.
2. Import its routes here and add an entry below. The key of the entry is the protocol's scope, as in the keys file.
3. Name it in the tests that hold for all protocols, each in `tests/serve/protocols/`: `REQUESTS` and `FIELDS` in
   `test_fields.py` (its types, and what becomes of each field), `PROTOCOLS` in `test_fuzz.py` (wrong messages) and
   `ADDRESSES` in `test_large_messages.py`. `test_registry.py` fails as long as one of them does not name it.
4. Check the queries of its addresses with `serve.protocols.query`, and list refused ones in `test_fields.py`.
5. Test it with a client of its own.
6. Name it in README.md, docs/serving.md and CHANGELOG.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiohttp import web

from jaxtml.serve.protocols.live import routes as live
from jaxtml.serve.protocols.moshi import routes as moshi
from jaxtml.serve.protocols.realtime import routes as realtime
from jaxtml.serve.protocols.service import Service

PROTOCOLS: Mapping[str, Callable[[Service], list[web.RouteDef]]] = {
    live.SCOPE: live.routes,
    realtime.SCOPE: realtime.routes,
    moshi.SCOPE: moshi.routes,
}
