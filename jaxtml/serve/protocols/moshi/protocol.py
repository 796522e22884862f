"""The wire protocol of Kyutai's Moshi: binary frames over a WebSocket. The first byte of a frame is its kind.

| kind | frame |
|---|---|
| 0 | the server is ready; clients send nothing before it |
| 1 | sound, both ways: Ogg pages of Opus, 24 kHz, mono |
| 2 | text: from the server what the model says, from a client what the user types |
| 3 | control of a client: 0 starts the session, which has started already; others are refused |
| 4 | metadata; a client's are refused |
| 5 | an error, as text |
| 6 | ping of a client: a sign of life, without an answer |
| 8 | a picture of a client, JPEG or PNG (our own addition) |

Moshi's clients measure the latency of an answer by comparing two streams: the sound that they send, and one 80 ms frame
of silence followed by the sound that they receive. This model hears a whole micro-turn of 200 ms before it can answer.
So the server begins its stream with 120 ms of silence: with the client's 80 ms this makes 200 ms. Without this silence,
the model would seem to answer sooner than it does.

A session cannot be resumed: it ends with its connection.

Moshi's web client always sends query parameters that tune the sampling of Moshi's own model. Clients of variants of
Moshi send a prompt or a picture as query parameters. None of these parameters has an effect here. The header
`Jaxtml-No-Effect` of the answer names the parameters that a client has sent, and so does the server's log. The
protocol has no frame for this that all clients can take.
"""

from __future__ import annotations

import numpy as np
import sphn
from aiohttp import WSMsgType

from jaxtml.serve.monitoring.metrics import Metrics
from jaxtml.serve.runtime.scheduler import EndReason, TickResult
from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.sessions.intake import Intake
from jaxtml.serve.transport.sound import SoundEncoder, SoundFormat
from jaxtml.stream.reading import Words
from jaxtml.stream.timebase import MICRO_TURN_MS
from jaxtml.stream.tokens import Control

SCOPE = "moshi"
READY, SOUND, TEXT, CONTROL, METADATA, ERROR, PING, IMAGE = (bytes([kind]) for kind in (0, 1, 2, 3, 4, 5, 6, 8))
_START = b"\0"  # body of a control frame
_RATE = 24_000
_FRAME_SAMPLES = 960  # of an Opus frame, 40 ms
_CLIENT_SILENCE_MS = 80  # silence that clients put before what they receive
# Bytes that are decoded at a time. Even so few bytes may give 30 s of sound, if they complete an Ogg page of 255 small
# packets. After each piece the protocol waits until the session has room for the sound.
_DECODED_BYTES = 512
_TEXT_TOKENS = 500  # of one text frame


class MoshiProtocol:
    """Moshi's wire protocol for one session; fulfils `SessionProtocol`. Begins with READY and the silence.

    Args:
      session: the session.
      model: the model that is served.
      metrics: counts wrong frames.
    """

    scope = SCOPE
    frame_kind = WSMsgType.BINARY
    resumable = False

    def __init__(self, session: ClientSession, model: ServedModel, metrics: Metrics):
        format = SoundFormat("pcm", _RATE)
        self.session, self.metrics = session, metrics
        self.intake = Intake(session, model, format)
        self._encoder = SoundEncoder(format)
        self._opus_reader, self._opus_writer = sphn.OpusStreamReader(_RATE), sphn.OpusStreamWriter(_RATE)
        # Sound at 24 kHz that does not fill an Opus frame yet.
        self._unsent = np.zeros((MICRO_TURN_MS - _CLIENT_SILENCE_MS) * _RATE // 1000, np.float32)
        session.replay_buffer.append(READY)
        self._send_sound(np.zeros(0, np.float32))

    def on_micro_turn(self, result: TickResult, words: Words) -> None:
        if words.said:
            self.session.replay_buffer.append(TEXT + words.said.encode())
        self._send_sound(self._encoder.format.decode(self._encoder.encode(result.wave)))
        self.intake.flush()

    def on_expiring(self, in_s: float) -> None:
        """Does nothing: the protocol has no message for this."""
        del in_s

    def on_resume(self) -> None:
        """Is never called: a session of this protocol is not resumable."""

    def on_end(self, reason: EndReason) -> None:
        if reason is not EndReason.ASKED:
            self._send_error(f"the session has ended: {reason.value}")

    async def receive(self, message: bytes) -> None:
        kind, body = message[:1], message[1:]
        try:
            if kind == SOUND:
                await self._receive_sound(body)
            elif kind == TEXT:
                self.intake.queue_text(Control.TYPED, body.decode(), "text", _TEXT_TOKENS)
            elif kind == IMAGE:
                await self.intake.show_image(body)
            elif kind == METADATA or kind == CONTROL and body != _START:
                raise ValueError(f"this server does not support frames of kind {kind[0]} with this content")
            elif kind not in (CONTROL, PING):
                found = kind[0] if kind else "nothing"
                raise ValueError(f"the first byte of a frame must be one of 1 to 6 and 8, not {found}")
        except (InvalidMessage, ValueError) as error:  # a UnicodeDecodeError is a ValueError
            self._refuse(str(error))

    def on_unreadable(self, invalid: InvalidMessage) -> None:
        self._refuse(str(invalid))

    def _refuse(self, text: str) -> None:
        self.metrics.malformed_messages.labels(SCOPE).inc()
        self._send_error(text)

    async def _receive_sound(self, pages: bytes) -> None:
        """Passes Ogg pages of Opus to the session. Raises `ValueError` on anything else."""
        for at in range(0, len(pages), _DECODED_BYTES):
            try:
                samples = self._opus_reader.append_bytes(pages[at : at + _DECODED_BYTES])
            except ValueError as error:
                self._opus_reader = sphn.OpusStreamReader(_RATE)
                raise ValueError(f"these are no Ogg pages of Opus ({error}); begin a new stream") from error
            if len(samples):
                await self.intake.push(self.intake.decoder.resample(samples))

    def _send_sound(self, samples: np.ndarray) -> None:
        """Sends `samples`, `[N]` float32 at 24 kHz, as far as they fill Opus frames."""
        self._unsent = np.concatenate([self._unsent, samples])
        pages = b""
        while len(self._unsent) >= _FRAME_SAMPLES:
            pages += self._opus_writer.append_pcm(self._unsent[:_FRAME_SAMPLES])
            self._unsent = self._unsent[_FRAME_SAMPLES:]
        if pages:
            self.session.replay_buffer.append(SOUND + pages)

    def _send_error(self, text: str) -> None:
        self.session.replay_buffer.append(ERROR + text.encode())
