"""The contract that every protocol of the server fulfils.

A protocol translates between one session and the messages that the session's client sends and reads. The session
manager, the connections and the shared routes know a protocol by this contract alone, so they work with any protocol.
The protocols are in `serve.protocols`, one folder each; `serve.protocols.registry` lists them.

All methods are called in the thread of the event loop.
"""

from __future__ import annotations

from typing import Protocol

from aiohttp import WSMsgType

from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.transport.sound import MediaSink
from jaxtml.stream.reading import Words


class SessionProtocol(Protocol):
    """Translates one session into the messages of one protocol, and back.

    A protocol writes everything that its client shall read into the session's replay buffer
    (`session.replay_buffer.append`). The constructor may write the first messages.

    What every protocol does: it owns an `Intake(session, model, SoundFormat(...))` for what the client sends; it calls
    `intake.flush()` in `on_micro_turn`; it counts messages that it cannot use in `metrics.malformed_messages`.
    `InvalidMessage` (`serve.sessions.errors`) says what is wrong with a message.
    """

    @property
    def scope(self) -> str:
        """Name of the protocol in keys, metrics and the log."""
        ...

    @property
    def frame_kind(self) -> WSMsgType:
        """Kind of the WebSocket messages that the server sends: TEXT or BINARY."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether a client that lost its connection may continue the session over another one.

        A session that is not resumable ends with its connection.
        """
        ...

    @property
    def intake(self) -> MediaSink:
        """Takes sound and pictures for the session. A WebRTC peer passes the sound and pictures of its tracks to it."""
        ...

    async def receive(self, message: bytes) -> None:
        """Handles one message of the client.

        Answers a message that it cannot use with the protocol's own error. While this method waits, for example for
        room in the jitter buffer, the server reads no further message from the connection.
        """
        ...

    def on_unreadable(self, invalid: InvalidMessage) -> None:
        """Answers a message that could not be handed to `receive`, with the protocol's own error."""
        ...

    def on_micro_turn(self, result: TickResult, words: Words) -> None:
        """Writes the output of one micro-turn. Called once per micro-turn, in order.

        Args:
          result: sound and time of the micro-turn, and whether the model spoke in it.
          words: text that the micro-turn added.
        """
        ...

    def on_expiring(self, in_s: float) -> None:
        """Tells the client that the session will end in `in_s` seconds."""
        ...

    def on_resume(self) -> None:
        """Prepares for a client that continues the session over a new WebSocket.

        A WebSocket has no tracks: from now on sound goes into the messages.
        """
        ...

    def on_end(self, reason: EndReason) -> None:
        """Writes the last messages of the session, which has ended for `reason`."""
        ...
