"""What the end of a connection means for its session: the session ends, waits for its client, or goes on.

This file is the server's one table of these rules. The section "How a session ends" of docs/serving.md shows the same
table, and tests/serve/transport/test_endings.py compares the two. `serve.transport.connection` finds out how a
connection ended, and `serve.protocols.service` applies the rules. Before changing the table, know that a browser
tells the server nothing but a close code when its user leaves the page.

The codes are those of the WebSocket protocol (RFC 6455, section 7.4, and IANA's registry). 1005 stands for a Close
frame without a code, and 1006 for a connection that ends without a Close frame. Neither number is ever sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from jaxtml.serve.runtime.scheduler import EndReason

AWAY_CODE = 4001
"""Close code of a client that will be back at once. A page sends it when it is left, because the page cannot know
whether it is left or reloaded."""

NO_CODE, NO_CLOSE_FRAME = 1005, 1006


class ConnectionEnd(Enum):
    """How a connection ended."""

    DONE = auto()  # the session has ended, and all its frames were sent
    LEFT = auto()  # the client closed it on purpose
    AWAY = auto()  # the client closed it, and will be back at once
    GONE = auto()  # the connection or the client failed
    INVALID = auto()  # the client sent what is no WebSocket message, or a message that is too large
    SLOW = auto()  # the client read so slowly that the replay buffer dropped frames for it
    REPLACED = auto()  # the client is back over another connection


# The end of a connection that its client closed, by close code. All other codes mean LEFT.
_CLIENT_CODES = {
    NO_CLOSE_FRAME: ConnectionEnd.GONE,
    1011: ConnectionEnd.GONE,  # the client failed, or no longer believes in the connection
    1012: ConnectionEnd.GONE,  # the client, or a proxy in between, restarts
    1013: ConnectionEnd.GONE,  # the client, or a proxy in between, is overloaded
    1014: ConnectionEnd.GONE,  # a proxy in between got no valid answer
    AWAY_CODE: ConnectionEnd.AWAY,
}

# Codes with which the server closes a connection because of what the client sent: a violation of the protocol, text
# that is no UTF-8, a message that is too large.
INVALID_CODES = (1002, 1007, 1009)

ENDS_SESSION: Mapping[ConnectionEnd, EndReason] = {
    ConnectionEnd.LEFT: EndReason.LEFT,
    ConnectionEnd.INVALID: EndReason.INVALID,
    ConnectionEnd.SLOW: EndReason.SLOW,
}
"""The ends of a connection that end the session at once, with the reason of the session's end. After AWAY and GONE the
session waits for its client, if its protocol can resume sessions; otherwise the session ends too."""


def client_closed(code: int | None) -> ConnectionEnd:
    """Returns the end of a connection that its client closed with `code`. 0 and None stand for no code."""
    return _CLIENT_CODES.get(code or NO_CODE, ConnectionEnd.LEFT)
