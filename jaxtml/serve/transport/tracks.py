"""Sound and pictures of a peer: Opus both ways in packets of 20 ms, and VP8 of its camera. Called by `peer`.

aiortc has a thread for each track that it decodes, and hands what is to be encoded to others. Where tracks are many, so
are those that wait for Python's lock, and a packet is a tenth of a second late with eight sessions. So Opus is decoded
and encoded here, in the one thread there is, and aiortc gets and gives packets alone.

The rule for what is said. A micro-turn comes all at once, every 200 ms, now and then late. The first one waits for
`_LEAD_MS`, and so does the first after the track ran dry; while it is dry it sends silence. What was late stays late:
where silence waits when more comes, no more of it than the lead is kept, and never more than `_MOST_MS` of anything, of
which the oldest goes. The rule for what is heard is that of `serve.runtime.jitter_buffer`; here packets are only put in
order. One that is missing is waited for until two others are there, and then is silence.
"""

from __future__ import annotations

import asyncio
import fractions
import time
from collections import deque
from collections.abc import Callable

import av
import numpy as np
from aiortc import MediaStreamTrack
from aiortc.jitterbuffer import JitterBuffer, JitterFrame
from aiortc.mediastreams import MediaStreamError
from aiortc.rtp import RtpPacket
from av.error import FFmpegError

from jaxtml.serve.transport.images import PIXELS
from jaxtml.serve.transport.sound import SoundDecoder, SoundFormat
from jaxtml.stream.timebase import SAMPLE_RATE

_CLOCK = 48_000  # of Opus in RTP, whatever is in it
_PACKET_MS = 20
_PIECE = SAMPLE_RATE * _PACKET_MS // 1000  # samples
_LEAD_MS, _MOST_MS = 40, 200
_LEAD, _MOST = (SAMPLE_RATE * ms // 1000 for ms in (_LEAD_MS, _MOST_MS))
_QUIET = 10 ** (-50 / 20)  # root mean square, of full scale
_STALLED_S = 0.2  # behind which packets are not made up for
_BITS = "32000"  # a second: speech of 8 kHz is not better with more
_EFFORT = "5"  # of the encoder's 10: half the time
_EARLY = 2  # packets that wait for one before them
_LOST = 10  # packets in a row that are silence: where more are missing, it is another stream
_WAITING = 50  # packets that nobody has taken: the oldest go


class OutgoingTrack(MediaStreamTrack):
    """What the model says, a `sound.VoiceTrack`."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.waiting = np.zeros(0, np.float32)
        self._hold = 0  # pieces of silence before what waits
        self._dry = True
        self._due, self._number = time.monotonic(), 0
        self._codec = av.AudioCodecContext.create("libopus", "w")
        self._codec.sample_rate, self._codec.format, self._codec.layout = SAMPLE_RATE, "s16", "mono"
        self._codec.time_base = fractions.Fraction(1, SAMPLE_RATE)
        self._codec.options = {"application": "voip", "compression_level": _EFFORT, "b": _BITS}

    def put(self, wave: np.ndarray) -> None:
        quiet = np.square(self.waiting).sum() < len(self.waiting) * _QUIET**2
        kept = self.waiting[max(0, len(self.waiting) - (_LEAD if quiet else _MOST)) :]
        if self._dry:
            self._hold, self._dry = _LEAD_MS // _PACKET_MS, False
        self.waiting = np.concatenate([kept, wave])

    def clear(self) -> None:
        self.waiting = self.waiting[:0]

    def piece(self) -> np.ndarray:
        """`[320]` float32 at 16 kHz: the next 20 ms."""
        self._dry = self._dry or not len(self.waiting)
        if self._hold or self._dry:
            self._hold = max(0, self._hold - 1)
            return np.zeros(_PIECE, np.float32)
        piece, self.waiting = self.waiting[:_PIECE], self.waiting[_PIECE:]
        return piece

    async def recv(self) -> av.Packet:
        """The next packet, when it is due. Raises `MediaStreamError` where the track has ended."""
        while self.readyState == "live":
            now = time.monotonic()
            self._due = max(self._due + _PACKET_MS / 1000, now - _STALLED_S)
            await asyncio.sleep(self._due - now)
            frame = av.AudioFrame.from_ndarray(
                np.clip(np.round(self.piece() * 2**15), -(2**15), 2**15 - 1).astype(np.int16)[None], "s16", "mono"
            )
            frame.sample_rate, frame.pts = SAMPLE_RATE, self._number * _PIECE
            self._number += 1
            for packet in self._codec.encode(frame):
                packet.pts, packet.time_base = self._number * _CLOCK * _PACKET_MS // 1000, fractions.Fraction(1, _CLOCK)
                return packet
        raise MediaStreamError


class PacketReorderer:
    """Packets of Opus in the order in which they were sent; stands where aiortc has its jitter buffer, and decoder."""

    def __init__(self) -> None:
        self.next: int | None = None  # number of the packet that is due
        self.early: dict[int, bytes] = {}
        self.ready: deque[bytes | None] = deque(maxlen=_WAITING)  # None: lost
        self.changed = asyncio.Event()

    def add(self, packet: RtpPacket) -> tuple[bool, None]:
        """As `JitterBuffer.add`, which has the packet's payload in `_data`; never gives a frame to decode."""
        number = packet.sequence_number
        ahead = 0 if self.next is None else (number - self.next) % 2**16
        if ahead >= 2**16 - 2 * _LOST:  # it is too late
            return False, None
        if self.next is None or ahead > _LOST:
            self.early.clear()
            self.next = number
        self.early[number] = packet._data  # type: ignore[attr-defined]
        while self.next in self.early or len(self.early) >= _EARLY:
            self.ready.append(self.early.pop(self.next, None))
            self.next = (self.next + 1) % 2**16
        self.changed.set()
        return False, None


class IncomingTrack:
    """What a peer's microphone has, as the model hears it."""

    def __init__(self, arrivals: PacketReorderer):
        self.arrivals = arrivals
        self._codec = av.AudioCodecContext.create("libopus", "r")
        self._codec.layout, self._codec.sample_rate = "mono", _CLOCK
        self._incoming = SoundDecoder(SoundFormat("pcm", _CLOCK))
        self._length = _CLOCK * _PACKET_MS // 1000  # samples of the packet before

    async def next_samples(self) -> np.ndarray:
        """`[N]` float32 at 16 kHz, as soon as there is any."""
        while not self.arrivals.ready:
            self.arrivals.changed.clear()
            await self.arrivals.changed.wait()
        found = self._decoded(self.arrivals.ready.popleft())
        self._length = len(found)
        return self._incoming.resample(found)

    def _decoded(self, data: bytes | None) -> np.ndarray:
        """`[N]` float32 at 48 kHz; of what is lost, or no Opus, silence."""
        try:
            frames = self._codec.decode(av.Packet(data)) if data else []
        except FFmpegError:
            frames = []
        if not frames:
            return np.zeros(self._length, np.float32)
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames]).astype(np.float32) / 2**15


class VideoJitterBuffer(JitterBuffer):
    """Frames of VP8 of a size that is decoded at all.

    Args:
      piled_up: so many wait already that the next ones are dropped; the peer is then asked to begin anew.
    """

    def __init__(self, piled_up: Callable[[], bool]):
        super().__init__(capacity=512, is_video=True)
        self.piled_up = piled_up

    def add(self, packet: RtpPacket) -> tuple[bool, JitterFrame | None]:
        lost, frame = super().add(packet)
        if frame is None or _size(frame.data) > PIXELS:
            return lost, None
        return (True, None) if self.piled_up() else (lost, frame)


def _size(frame: bytes) -> int:
    """Pixels of a key frame (RFC 6386, 9.1); 0 of one that has the size of those before it."""
    if len(frame) < 10 or frame[0] & 1:
        return 0
    width, height = (int.from_bytes(frame[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    return width * height
