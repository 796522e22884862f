"""What one client gives its session: sound, text and pictures, within the limits that all protocols share."""

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
from jaxtml.stream.tokens import Control

_WAITING, _PIECES = 24_576, 4096  # tokens, and pieces of text, that wait for their micro-turn
_TOKEN_BYTES = 8  # of a token, in the mean of any text that is one
_IMAGES_PER_SECOND, _IMAGES_BURST = 10.0, 20  # a micro-turn sees two
_TEXT_PER_SECOND, _TEXT_BURST = 2**14, 2**18  # bytes: to find the tokens of a megabyte takes half a second


class Intake:
    """One session's.

    Args:
      session: whose it is.
      model: the model that is served.
      format: of the sound.
      observe: called with all sound that comes, `[N]` float32 at 16 kHz, whether the session is muted or not.

    Attributes:
      taken: bytes of sound that came; of a track, as if it were 16 bits at 16 kHz.
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
        self.received_bytes = 0
        self._pictures = TokenBucket(_IMAGES_PER_SECOND, _IMAGES_BURST)
        self._texts = TokenBucket(_TEXT_PER_SECOND, _TEXT_BURST)
        self._unheard = np.zeros(0, np.float32)  # waits for room

    async def receive_audio(self, data: bytes) -> None:
        """Sound in the client's format, as `push`.

        What is counted as taken is heard, also where the connection is lost meanwhile. Raises `ValueError` on what is
        not whole samples.
        """
        await self.wait_for_room()
        samples = self.decoder.decode(data)
        self.observe(samples)
        self.received_bytes += len(data)
        await self.push(samples)

    async def receive_track(self, samples: np.ndarray) -> None:
        """As `push`, of a track."""
        self.observe(samples)
        await self.wait_for_room()
        self.received_bytes += 2 * len(samples)
        await self.push(samples)

    async def push(self, samples: np.ndarray) -> None:
        """Returns when there was room for all of them, which is what holds a client back that sends too much."""
        await self.wait_for_room()
        self.push_nowait(samples)
        await self.wait_for_room()

    def push_nowait(self, samples: np.ndarray) -> None:
        """As `hear`, and waits for nothing: what there is no room for waits here, so wait for `settled` before."""
        self._unheard = np.concatenate([self._unheard, samples])
        self.flush()

    @property
    def waiting_samples(self) -> int:
        """Samples that came and were not heard yet."""
        return len(self._unheard) + self.session.scheduled.jitter_buffer.waiting_samples

    async def wait_for_room(self) -> None:
        """When all that has come, over a connection that was lost too, had room."""
        while len(self._unheard) and await self.session.wait_for_room():
            self.flush()

    def flush(self) -> None:
        """Of the sound that came, what there is room for: the rest waits, even where its connection is lost."""
        room = self.session.scheduled.jitter_buffer.free_samples()
        if len(self._unheard) and room:
            self.session.scheduled.jitter_buffer.push(self._unheard[:room])
            self._unheard = self._unheard[room:]

    def clear(self) -> None:
        """What came and was not heard yet is never heard."""
        self._unheard = self._unheard[:0]
        self.session.scheduled.jitter_buffer.clear()

    async def show_image(self, image: bytes) -> None:
        """JPEG or PNG. Raises as `seen`."""
        self.session.scheduled.set_patches(await self.read_image(image))

    async def read_image(self, image: bytes) -> np.ndarray:
        """The patches of a JPEG or PNG.

        Raises `ValueError` as `ImageIntake.patches_of_image`, `InvalidMessage` where pictures come too fast.
        """
        if not self._pictures.try_take():
            raise InvalidMessage("rate_limit_exceeded", f"pictures come faster than {_IMAGES_PER_SECOND:.0f} a second")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(IMAGE_EXECUTOR, self.images.patches_of_image, image)

    async def show_frame(self, frame: av.VideoFrame) -> None:
        """A frame of a video."""
        loop = asyncio.get_running_loop()
        patches = await loop.run_in_executor(IMAGE_EXECUTOR, self.images.patches_of_frame, frame)
        self.session.scheduled.set_patches(patches)

    def queue_text(
        self,
        mark: Control,
        text: str,
        param: str,
        most: int = _WAITING,
        placed: Callable[[int], None] | None = None,
    ) -> None:
        """Text of at most so many tokens for the next micro-turns, behind its mark. Raises as `read`.

        `placed` as `hub.Session.queue_text` has it.
        """
        self.queue_tokens(mark, self.read_text(text, param, most), placed)

    def queue_tokens(self, mark: Control, tokens: list[int], placed: Callable[[int], None] | None = None) -> None:
        """As `say`, of a text that was read."""
        self.session.scheduled.queue_text(mark, tokens, self.model.config.duplex.max_typed - 1, placed)

    def read_text(self, text: str, param: str, most: int = _WAITING) -> list[int]:
        """The tokens of a text that may be said now.

        Raises `InvalidMessage` where there are none, they are too many, came too fast, or too much waits.
        """
        size = len(text.encode())
        if size <= most * _TOKEN_BYTES and not self._texts.try_take(size):
            raise InvalidMessage(
                "rate_limit_exceeded", f"text comes faster than {_TEXT_PER_SECOND} bytes a second", param
            )
        check_length(self.model, text, most, param)
        tokens = _tokens(self.model.codec, text)
        if not tokens:
            raise InvalidMessage("invalid_value", "there is no text", param)
        session = self.session.scheduled
        if session.waiting_tokens + len(tokens) > _WAITING or len(session.text_queue) >= _PIECES:
            raise InvalidMessage("rate_limit_exceeded", "too much text waits for its micro-turn", param)
        return tokens


def check_length(model: ServedModel, text: str, most: int, param: str) -> None:
    """Raises `InvalidMessage` where a text has more than `most` tokens."""
    size = len(text.encode())
    if size > most * _TOKEN_BYTES or size >= most and len(_tokens(model.codec, text)) > most:  # a token has a byte
        raise InvalidMessage("string_above_max_length", f"{param} has more than {most} tokens", param)


@lru_cache(maxsize=1)  # what is counted is said next
def _tokens(codec: TextCodec, text: str) -> list[int]:
    return codec.encode(text)
