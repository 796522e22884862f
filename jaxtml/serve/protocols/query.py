"""Query parameters of the protocols' addresses: each of them is used, named as without effect, or refused.

Called by the routes of the protocols.
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web

from jaxtml.serve.monitoring import log
from jaxtml.serve.sessions.errors import Refused

KEY = "auth_id"  # the key, in every protocol: `Service.authorise` reads it
_NAME_CHARACTERS = 64  # of a name in an error or in the log


def check_query(
    request: web.Request, protocol: str, used: Collection[str] = (), no_effect: Collection[str] = ()
) -> dict[str, str]:
    """Checks that the query of a request has only parameters that this address knows.

    Args:
      request: the request.
      protocol: name of the protocol, for the log.
      used: names of the parameters that the address uses. `auth_id` need not be among them.
      no_effect: names of the parameters that stock clients of the protocol send and that have no effect here.

    Returns:
      Headers of the answer. `Jaxtml-No-Effect` names the parameters of the request that have no effect.

    Raises:
      Refused: the query has another parameter, or a parameter with an effect twice.
    """
    names = set(request.query)
    for name in sorted(names - set(used) - set(no_effect) - {KEY}):
        text = f"this address does not know the query parameter {name[:_NAME_CHARACTERS]}"
        raise Refused(400, "unknown_parameter", text)
    for name in sorted(names - set(no_effect)):
        if len(request.query.getall(name)) > 1:
            raise Refused(400, "invalid_value", f"the query has the parameter {name} more than once")
    unused = ", ".join(sorted(names & set(no_effect)))
    if not unused:
        return {}
    log.event("query parameters have no effect", protocol=protocol, names=unused)
    return {"Jaxtml-No-Effect": unused}
