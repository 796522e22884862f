"""The intake of a session: the audio, text and pictures of its client, within limits.

Each protocol has one `Intake` per session, and the limits are the same in all protocols. Limits on text and pictures
raise `InvalidMessage`, which the protocol sends as its own error. A client that sends too much audio is not refused. It
is held back instead, because `push` waits for room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache

import av
import numpy as np

from jaxtml.serve.sessions.client_session import ClientSession, ServedModel
from jaxtml.serve.sessions.errors import InvalidMessage
from jaxtml.serve.transport.images import IMAGE_EXECUTOR, ImageIntake
from jaxtml.serve.transport.sound import SoundDecoder, SoundFormat
from jaxtml.serve.transport.token_bucket import TokenBucket
from jaxtml.stream.text import TextCodec
from jaxtml.stream.timebase import SAMPLE_RATE
from jaxtml.stream.tokens import Control

# The most text that may wait for its micro-turn, in each of a session's two queues of text. What the user types has its
# own queue, so long instructions cannot keep the user from typing.
_MAX_WAITING_TOKENS, _MAX_WAITING_PIECES = 24_576, 4096
_MAX_APPEND_BYTES = 15 * 2**20  # of audio in one message, as in OpenAI's Realtime API
_PIECE_S = 10  # seconds of audio that are decoded at a time, as much as a jitter buffer holds
_BYTES_PER_TOKEN = 8  # real text has fewer bytes per token than this, on average
_IMAGES_PER_SECOND, _IMAGES_BURST = 10.0, 20  # two pictures per micro-turn: the model sees pictures in pairs
_TEXT_PER_SECOND, _TEXT_BURST = 2**14, 2**18  # bytes; tokenising a megabyte takes half a second


class Intake:
    """Everything that the client of one session gives it; a `serve.transport.sound.MediaSink`.

    Args:
      session: the session.
      model: the model that is served.
      format: format of the client's audio.
      observe: called with all audio that arrives, `[N]` float32 at 16 kHz, whether the session is muted or not.

    Attributes:
      decoder: decodes the client's audio.
      images: the client's pictures.
      received_bytes: bytes of audio that have arrived. Audio from a track counts as 16 bits at 16 kHz.
      received_ms: duration of this audio.
    """

    def __init__(
        self,
        session: ClientSession,
        model: ServedModel,
        format: SoundFormat,
        observe: Callable[[np.ndarray], None] = lambda samples: None,
    ):
        self.session, self.model, self.observe = session, model, observe
        self.decoder, self.images = SoundDecoder(format), ImageIntake(model.config.duplex.max_patches)
        self.received_bytes, self.received_ms = 0, 0.0
        self._image_rate = TokenBucket(_IMAGES_PER_SECOND, _IMAGES_BURST)
        self._text_rate = TokenBucket(_TEXT_PER_SECOND, _TEXT_BURST)
        self._overflow = np.zeros(0, np.float32)  # audio that does not fit into the jitter buffer yet

    # --- audio

    async def receive_audio(self, data: bytes) -> None:
        """Takes audio in the client's format, and returns when there was room for it.

        The bytes of all messages are one stream: a message may end inside a sample, and the next one goes on there.
        Long audio is decoded piece by piece, as the session gets room for it. So a session holds little more than the
        message itself. All audio that is counted in `received_bytes` reaches the model, even if the connection is lost
        meanwhile.

        Raises:
          InvalidMessage: `data` is longer than OpenAI's API allows.
        """
        if len(data) > _MAX_APPEND_BYTES:
            text = f"one message has at most {_MAX_APPEND_BYTES // 2**20} MiB of audio: send several"
            raise InvalidMessage("string_above_max_length", text, "audio")
        format = self.decoder.format
        piece_bytes = _PIECE_S * format.rate * format.width
        for start in range(0, len(data), piece_bytes):
            await self.wait_for_room()
            piece = data[start : start + piece_bytes]
            samples = self.decoder.decode(piece)
            self.observe(samples)
            self.received_bytes += len(piece)
            self.received_ms += 1000 * _PIECE_S * len(piece) / piece_bytes
            await self.push(samples)

    async def receive_track(self, samples: np.ndarray) -> None:
        """Takes audio from a track, `[N]` float32 at 16 kHz, and returns when there was room for it."""
        self.observe(samples)
        await self.wait_for_room()
        self.received_bytes += 2 * len(samples)
        self.received_ms += 1000 * len(samples) / SAMPLE_RATE
        await self.push(samples)

    def drop_half_sample(self) -> None:
        """Forgets the first half of a sample whose second half has not come: the client's recording has ended.

        Called where a protocol ends a recording. What comes next begins with a whole sample.
        """
        self.decoder.drop_half_sample()

    async def push(self, samples: np.ndarray) -> None:
        """Adds audio, `[N]` float32 at 16 kHz, and returns when there was room for all of it.

        Protocols await this method before they read the next message. So a client that sends too much is held back.
        """
        await self.wait_for_room()
        self.push_nowait(samples)
        await self.wait_for_room()

    def push_nowait(self, samples: np.ndarray) -> None:
        """Adds audio without waiting. Audio that does not fit is kept for `flush`. Await `wait_for_room` first."""
        self._overflow = np.concatenate([self._overflow, samples])
        self.flush()

    @property
    def waiting_samples(self) -> int:
        """Samples that have arrived and have not reached the model."""
        return len(self._overflow) + self.session.scheduled.jitter_buffer.waiting_samples

    async def wait_for_room(self) -> None:
        """Waits until all audio that has arrived, even over a lost connection, is in the jitter buffer."""
        while len(self._overflow) and await self.session.wait_for_room():
            self.flush()

    def flush(self) -> None:
        """Moves waiting audio into the jitter buffer, as much as fits.

        Protocols call this at each micro-turn, so that audio from a lost connection moves on too.
        """
        free_samples = self.session.scheduled.jitter_buffer.free_samples()
        if len(self._overflow) and free_samples:
            self.session.scheduled.jitter_buffer.push(self._overflow[:free_samples])
            self._overflow = self._overflow[free_samples:]

    def clear(self) -> None:
        """Drops all audio that has not reached the model, half of a sample included."""
        self.drop_half_sample()
        self._overflow = self._overflow[:0]
        self.session.scheduled.jitter_buffer.clear()

    # --- pictures

    async def show_image(self, image: bytes) -> None:
        """Shows a JPEG or PNG to the model in the next micro-turn. Raises as `read_image`."""
        self.session.scheduled.set_patches(await self.read_image(image))

    async def read_image(self, image: bytes) -> np.ndarray:
        """Returns the patches of a JPEG or PNG, `[P, 2, 40, 40, 3]` float32.

        Raises:
          ValueError: as `ImageIntake.patches_of_image`.
          InvalidMessage: pictures arrive too fast.
        """
        if not self._image_rate.try_take():
            raise InvalidMessage("rate_limit_exceeded", f"pictures come faster than {_IMAGES_PER_SECOND:.0f} a second")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(IMAGE_EXECUTOR, self.images.patches_of_image, image)

    async def show_frame(self, frame: av.VideoFrame) -> None:
        """Shows a frame of a video to the model in the next micro-turn. Raises as `ImageIntake.patches_of_frame`."""
        loop = asyncio.get_running_loop()
        patches = await loop.run_in_executor(IMAGE_EXECUTOR, self.images.patches_of_frame, frame)
        self.session.scheduled.set_patches(patches)

    # --- text

    def queue_text(
        self,
        mark: Control,
        text: str,
        param: str,
        max_tokens: int = _MAX_WAITING_TOKENS,
        on_placed: Callable[[int], None] | None = None,
        in_order: bool = False,
    ) -> None:
        """Queues text for the next micro-turns.

        Background text is for models that read it: check `ServedModel.reads_background` before.

        Args:
          mark: control token before the text. TYPED: the user typed the text. BACKGROUND: it comes from elsewhere.
          text: the text.
          param: path of the text in the client's message, for errors.
          max_tokens: the most tokens that the text may have.
          on_placed: as in `ScheduledSession.queue_text`.
          in_order: as in `ScheduledSession.queue_of`.

        Raises:
          InvalidMessage: as `read_text`.
        """
        self.queue_tokens(mark, self.read_text(mark, text, param, max_tokens, in_order), on_placed, in_order)

    def queue_tokens(
        self,
        mark: Control,
        tokens: list[int],
        on_placed: Callable[[int], None] | None = None,
        in_order: bool = False,
    ) -> None:
        """Queues tokens from `read_text` for the next micro-turns; arguments as in `queue_text`."""
        # The mark takes one of the positions that a micro-turn has for text.
        max_tokens = self.model.config.duplex.max_typed - 1
        self.session.scheduled.queue_text(mark, tokens, max_tokens, on_placed, in_order)

    def read_text(
        self, mark: Control, text: str, param: str, max_tokens: int = _MAX_WAITING_TOKENS, in_order: bool = False
    ) -> list[int]:
        """Returns the tokens of a text, if the session has room for the text now.

        Args:
          mark: as in `queue_text`.
          text: the text.
          param: path of the text in the client's message, for errors.
          max_tokens: the most tokens that the text may have.
          in_order: as in `ScheduledSession.queue_of`.

        Raises:
          InvalidMessage: the text is empty or too long, text arrives too fast, or too much text waits already.
        """
        size = len(text.encode())
        if size <= max_tokens * _BYTES_PER_TOKEN and not self._text_rate.try_take(size):
            raise InvalidMessage(
                "rate_limit_exceeded", f"text comes faster than {_TEXT_PER_SECOND} bytes a second", param
            )
        check_length(self.model, text, max_tokens, param)
        tokens = _encode(self.model.codec, text)
        if not tokens:
            raise InvalidMessage("invalid_value", "there is no text", param)
        queue = self.session.scheduled.queue_of(mark, in_order)
        if queue.tokens + len(tokens) > _MAX_WAITING_TOKENS or len(queue.pieces) >= _MAX_WAITING_PIECES:
            raise InvalidMessage("rate_limit_exceeded", "too much text waits until the model can read it", param)
        return tokens


def check_length(model: ServedModel, text: str, max_tokens: int, param: str) -> None:
    """Raises `InvalidMessage` if a text has more than `max_tokens` tokens; `param` is its path in the message."""
    size = len(text.encode())
    # A token has at least one byte, so a text with fewer bytes than `max_tokens` need not be tokenised.
    if size > max_tokens * _BYTES_PER_TOKEN or size >= max_tokens and len(_encode(model.codec, text)) > max_tokens:
        raise InvalidMessage("string_above_max_length", f"{param} has more than {max_tokens} tokens", param)


@lru_cache(maxsize=1)  # a text is tokenised once to check its length, and again just after that to queue it
def _encode(codec: TextCodec, text: str) -> list[int]:
    return codec.encode(text)
