"""One session as its client knows it, whichever connections carry it.

A `ClientSession` holds the session in the scheduler, its protocol, and the frames that wait for its client. Connections
come and go; the session stays. The model runs it in micro-turns: 200 ms of sound in, and 200 ms of sound out.
`serve.sessions.manager` creates client sessions, and the protocols and their routes use them.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from jaxtml.config import Config
from jaxtml.serve.monitoring import tracing
from jaxtml.serve.runtime.scheduler import ScheduledSession
from jaxtml.serve.sessions.access import Grant
from jaxtml.serve.sessions.protocol import SessionProtocol
from jaxtml.serve.transport.replay_buffer import ReplayBuffer
from jaxtml.stream.reading import Reader
from jaxtml.stream.text import TextCodec

BACKGROUND_UNREAD = "this model was not trained on text that the user does not type, so it is not given this text"


@dataclass(frozen=True)
class ServedModel:
    """The model that a server serves: its name, its config, its tokenizer, and further names for clients."""

    name: str
    config: Config
    codec: TextCodec
    aliases: tuple[str, ...] = ()

    def is_called(self, name: str) -> bool:
        """Returns whether a client that asks for the model `name` means this one."""
        return name == self.name or name in self.aliases

    def refuse(self, name: str) -> str:
        """Returns the text of the error for a client that asks for another model, `name`."""
        return (
            f"this server has no model {name!r:.100}: ask for {self.name!r}, or start the server with --model-alias "
            "and the name that your client sends"
        )

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return self.config.duplex.max_patches > 0

    @property
    def reads_background(self) -> bool:
        """Whether the model is given background text: all text that the user does not type, such as instructions.

        To a client that sends background text to another model, a protocol says `BACKGROUND_UNREAD`.
        """
        return self.config.serve.background_text


class Carrier(Protocol):
    """A connection that carries a session. `serve.transport.connection.Connection` is one."""

    def replace(self) -> None:
        """Stops reading from the client: another connection carries the session from now on."""
        ...


@dataclass
class ClientSession:
    """One session as its client knows it. `SessionManager.admit` creates one.

    Attributes:
      id: public name of the session.
      resume_token: secret with which the client may continue the session over another connection.
      grant: what the client's key allows.
      scheduled: the session in the scheduler.
      reader: turns generated tokens into words.
      expires_at: Unix time in seconds at which the session will be ended.
      span: trace span of the session.
      protocol: translates between the session and its client.
      replay_buffer: frames for the client; they outlive a lost connection.
      connection: the connection that carries the session; None: the client is away.
      closing_at: when the client asked to close the session, on the monotonic clock; None: it did not.
      warned: whether the client has been told when the session will end.
      micro_turn_done: set after each micro-turn and when the session ends.
    """

    id: str
    resume_token: str
    grant: Grant
    scheduled: ScheduledSession
    reader: Reader
    expires_at: float
    span: tracing.Span
    protocol: SessionProtocol = field(init=False)
    replay_buffer: ReplayBuffer = field(default_factory=ReplayBuffer)
    connection: Carrier | None = None
    closing_at: float | None = None
    warned: bool = False
    micro_turn_done: asyncio.Event = field(default_factory=asyncio.Event)

    def attach(self, connection: Carrier) -> None:
        """Lets `connection` carry the session, in place of the connection before."""
        if self.connection is not None:
            self.connection.replace()
        self.connection = connection
        self.scheduled.attach()

    def detach(self, connection: Carrier, away: bool = False) -> None:
        """Pauses the session because `connection` has ended, unless another connection carries the session already.

        Args:
          connection: the connection that has ended.
          away: the client announced that it will be back at once.
        """
        if self.connection is connection and not self.scheduled.end_reason:
            self.connection = None
            self.scheduled.detach(away)
            self.span.add_event("client gone")

    def prepare_resume(self) -> None:
        """Prepares the session for the connection over which its client continues.

        The old connection takes nothing more from here on. So the protocol can now tell the client exactly how much of
        its sound has arrived.
        """
        if self.connection is not None:
            self.connection.replace()
        self.protocol.on_resume()

    def close(self) -> None:
        """Closes the session: the model no longer hears the client.

        The session ends when the model is silent and no input waits to be heard or read. It ends after `closing_s` of
        `Limits` at the latest.
        """
        self.closing_at = self.closing_at or time.monotonic()
        self.scheduled.jitter_buffer.muted = True

    async def wait_for_room(self) -> bool:
        """Waits until the jitter buffer has room for sound. Returns False if the session ended instead."""
        while not self.scheduled.end_reason and not self.scheduled.jitter_buffer.free_samples():
            self.micro_turn_done.clear()
            await self.micro_turn_done.wait()
        return not self.scheduled.end_reason
