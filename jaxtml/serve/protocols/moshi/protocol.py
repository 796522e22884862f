"""The wire of Kyutai's Moshi, `/api/chat`: binary frames of a WebSocket, the first byte says what the rest is.

| byte | |
|---|---|
| 0 | the server is ready; clients send nothing before |
| 1 | sound, both ways: Ogg pages of Opus, 24 kHz, mono |
| 2 | text: what the model says; from a client, what the user types |
| 3, 4, 6 | control, metadata, ping of a client: there is nothing to control here, and they are not answered |
| 5 | an error, as text |
| 8 | a picture of a client's, JPEG or PNG (ours) |

Clients of this wire measure how late an answer is on the streams themselves: they lay what they get beside what they
sent, from an 80 ms frame of silence on. A micro-turn of 200 ms is heard before anything is said to it, so the stream
begins with the other 120 ms of silence, or it would seem to answer sooner than it does. There is no resuming: a session
ends with its connection. Query parameters that tune the sampling of the original are not held to.
"""

from __future__ import annotations

import numpy as np
import sphn

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.sessions.manager import ClientSession, ServedModel
from jaxtml.serve.transport.sound import SoundEncoder, SoundFormat
from jaxtml.stream.reading import Words
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control

SCOPE = "moshi"
READY, SOUND, TEXT, CONTROL, METADATA, ERROR, PING, IMAGE = (bytes([kind]) for kind in (0, 1, 2, 3, 4, 5, 6, 8))
_RATE = 24_000
_FRAME = 960  # samples of an Opus frame, 40 ms
_PAD_MS = 80  # of silence that clients lay before what they get
_PIECE = 512  # bytes that are decoded at a time: a page of 255 packets is 30 s of sound
_TEXT_TOKENS = 500


class MoshiProtocol:
    """One session's wire; a `SessionProtocol`. Begins with the handshake and the silence.

    Args:
      session: the session whose replay buffer it fills.
      model: the model that is served.
      metrics: what is counted.
    """

    scope = SCOPE

    def __init__(self, session: ClientSession, model: ServedModel, metrics: Metrics):
        self.session, self.model, self.metrics = session, model, metrics
        self.intake = Intake(session, model, SoundFormat("pcm", _RATE))
        self.outgoing = SoundEncoder(SoundFormat("pcm", _RATE))
        self.reader, self.writer = sphn.OpusStreamReader(_RATE), sphn.OpusStreamWriter(_RATE)
        self.unwritten = np.zeros((MICRO_TURN_MS - _PAD_MS) * _RATE // 1000, np.float32)
        session.replay_buffer.append(READY)
        self._sound(np.zeros(0, np.float32))

    def on_micro_turn(self, turn: TickResult, words: Words) -> None:
        if words.said:
            self.session.replay_buffer.append(TEXT + words.said.encode())
        self._sound(self.outgoing.format.decode(self.outgoing.encode(turn.wave)))
        self.intake.flush()

    def on_expiring(self, in_s: float) -> None:
        """The wire has no word for it."""
        del in_s

    def on_end(self, why: EndReason) -> None:
        if why is not EndReason.ASKED:
            self._fail(f"the session has ended: {why.value}")

    async def receive(self, data: bytes) -> None:
        """A frame of the client's. What is wrong with it becomes an error."""
        kind, rest = data[:1], data[1:]
        try:
            if kind == SOUND:
                await self._hear(rest)
            elif kind == TEXT:
                self.intake.queue_text(Control.TYPED, rest.decode(), "text", _TEXT_TOKENS)
            elif kind == IMAGE:
                await self.intake.show_image(rest)
            elif kind not in (CONTROL, METADATA, PING):
                raise ValueError(f"a frame begins with one of 1 to 6 and 8, not with {kind[0] if kind else 'nothing'}")
        except (InvalidMessage, ValueError) as error:  # a UnicodeDecodeError is a ValueError
            self.metrics.malformed_messages.labels(SCOPE).inc()
            self._fail(str(error))

    async def _hear(self, pages: bytes) -> None:
        for at in range(0, len(pages), _PIECE):
            try:
                samples = self.reader.append_bytes(pages[at : at + _PIECE])
            except ValueError as error:
                self.reader = sphn.OpusStreamReader(_RATE)
                raise ValueError(f"no Ogg pages of Opus ({error}); begin a new stream") from error
            if len(samples):
                await self.intake.push(self.intake.decoder.resample(samples))

    def _sound(self, samples: np.ndarray) -> None:
        self.unwritten = np.concatenate([self.unwritten, samples])
        pages = b""
        while len(self.unwritten) >= _FRAME:
            pages += self.writer.append_pcm(self.unwritten[:_FRAME])
            self.unwritten = self.unwritten[_FRAME:]
        if pages:
            self.session.replay_buffer.append(SOUND + pages)

    def _fail(self, why: str) -> None:
        self.session.replay_buffer.append(ERROR + why.encode())
