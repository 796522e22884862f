"""The media tracks of a WebRTC peer: Opus both ways in packets of 20 ms, and VP8 from its camera.

Called by `serve.transport.peer`.

Left to itself, aiortc decodes each track in a thread of its own, and encodes in further threads. With many tracks, many
threads wait for Python's global lock: with eight sessions a packet is a tenth of a second late. So this module decodes
and encodes Opus itself, in the event loop's thread, and aiortc only carries packets.

The rule for the model's voice. A micro-turn, 200 ms of audio, arrives all at once every 200 ms, and sometimes late. A
track without audio sends silence; it has run dry. The first micro-turn waits for `_LEAD_MS`, and so does the first one
after the track ran dry. A late micro-turn delays all audio after it. The delay shrinks only when a micro-turn arrives
while other audio still waits. Of waiting silence only the last `_LEAD_MS` are then kept. Of waiting speech only the
last `_MAX_WAITING_MS` are kept.

The rule for the user's voice is that of `serve.runtime.jitter_buffer`. Here packets are only put in order. A missing
packet is waited for until two later packets have arrived; then silence takes its place.
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

from jaxtml.serve.transport.sound import SoundDecoder, SoundFormat
from jaxtml.stream.timebase import SAMPLE_RATE

_RTP_RATE = 48_000  # Hz, the clock of Opus in RTP whatever the audio's own rate
_PACKET_MS = 20
_PACKET_SAMPLES = SAMPLE_RATE * _PACKET_MS // 1000
_LEAD_MS, _MAX_WAITING_MS = 40, 200
_LEAD_SAMPLES, _MAX_WAITING_SAMPLES = (SAMPLE_RATE * ms // 1000 for ms in (_LEAD_MS, _MAX_WAITING_MS))
_QUIET_RMS = 10 ** (-50 / 20)  # root mean square relative to full scale, -50 dBFS
_STALLED_S = 0.2  # after a pause, the server makes up for at most this much time of packets and skips the others
_BIT_RATE = "32000"  # bits per second: more does not improve speech with a bandwidth of 8 kHz
_COMPRESSION_LEVEL = "5"  # 0 to 10; 5 takes half of the computing time of 10
_MAX_FRAME_PIXELS = 2**22  # a larger frame of a camera is not decoded
_MAX_EARLY = 2  # packets that may wait for a missing one before them
_MAX_LOST = 10  # missing packets in a row that become silence; if more are missing, it is another stream
_MAX_READY = 50  # packets in order that nobody has taken yet; beyond this the oldest are dropped


class OutgoingTrack(MediaStreamTrack):
    """The model's voice on its way to a peer; a `sound.VoiceTrack`.

    Attributes:
      waiting: `[N]` float32 at 16 kHz, the audio that is not sent yet.
    """

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.waiting = np.zeros(0, np.float32)
        self._lead_packets = 0  # packets of silence to send before `waiting`
        self._dry = True
        self._due, self._packet_number = time.monotonic(), 0
        self._codec = av.AudioCodecContext.create("libopus", "w")
        self._codec.sample_rate, self._codec.format, self._codec.layout = SAMPLE_RATE, "s16", "mono"
        self._codec.time_base = fractions.Fraction(1, SAMPLE_RATE)
        self._codec.options = {"application": "voip", "compression_level": _COMPRESSION_LEVEL, "b": _BIT_RATE}

    def put(self, wave: np.ndarray) -> None:
        """Adds one micro-turn, `[3200]` float32 at 16 kHz."""
        quiet = np.square(self.waiting).sum() < len(self.waiting) * _QUIET_RMS**2
        kept = self.waiting[max(0, len(self.waiting) - (_LEAD_SAMPLES if quiet else _MAX_WAITING_SAMPLES)) :]
        if self._dry:
            self._lead_packets, self._dry = _LEAD_MS // _PACKET_MS, False
        self.waiting = np.concatenate([kept, wave])

    def clear(self) -> None:
        """Drops all audio that is not sent yet."""
        self.waiting = self.waiting[:0]

    def next_samples(self) -> np.ndarray:
        """Returns the samples of the next packet, `[320]` float32 at 16 kHz."""
        self._dry = self._dry or not len(self.waiting)
        if self._lead_packets or self._dry:
            self._lead_packets = max(0, self._lead_packets - 1)
            return np.zeros(_PACKET_SAMPLES, np.float32)
        samples, self.waiting = self.waiting[:_PACKET_SAMPLES], self.waiting[_PACKET_SAMPLES:]
        return samples

    async def recv(self) -> av.Packet:
        """Waits until the next packet is due and returns it. Raises `MediaStreamError` when the track has ended."""
        while self.readyState == "live":
            now = time.monotonic()
            self._due = max(self._due + _PACKET_MS / 1000, now - _STALLED_S)
            await asyncio.sleep(self._due - now)
            pcm = np.clip(np.round(self.next_samples() * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(pcm[None], "s16", "mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, self._packet_number * _PACKET_SAMPLES
            self._packet_number += 1
            for packet in self._codec.encode(frame):
                packet.pts = self._packet_number * _RTP_RATE * _PACKET_MS // 1000
                packet.time_base = fractions.Fraction(1, _RTP_RATE)
                return packet
        raise MediaStreamError


class PacketReorderer:
    """Puts the RTP packets of an Opus track in the order in which they were sent.

    It takes the place of aiortc's jitter buffer and never hands a frame to aiortc's decoder.

    Attributes:
      due: sequence number of the next packet in order; None: no packet has arrived.
      early: payloads that wait for a packet before them, by sequence number.
      ready: payloads in order; None stands for a lost packet.
      changed: set when a packet arrives.
    """

    def __init__(self) -> None:
        self.due: int | None = None
        self.early: dict[int, bytes] = {}
        self.ready: deque[bytes | None] = deque(maxlen=_MAX_READY)
        self.changed = asyncio.Event()

    def add(self, packet: RtpPacket) -> tuple[bool, None]:
        """Takes a packet; the signature is that of `JitterBuffer.add`. aiortc has put the payload into `_data`."""
        number = packet.sequence_number
        ahead = 0 if self.due is None else (number - self.due) % 2**16
        if ahead >= 2**16 - 2 * _MAX_LOST:  # it arrives too late
            return False, None
        if self.due is None or ahead > _MAX_LOST:
            self.early.clear()
            self.due = number
        self.early[number] = packet._data  # type: ignore[attr-defined]
        while self.due in self.early or len(self.early) >= _MAX_EARLY:
            self.ready.append(self.early.pop(self.due, None))
            self.due = (self.due + 1) % 2**16
        self.changed.set()
        return False, None


class IncomingTrack:
    """The audio of a peer's microphone, decoded for the model.

    Args:
      packets: the track's packets.
    """

    def __init__(self, packets: PacketReorderer):
        self.packets = packets
        self._codec = av.AudioCodecContext.create("libopus", "r")
        self._codec.layout, self._codec.sample_rate = "mono", _RTP_RATE
        self._decoder = SoundDecoder(SoundFormat("pcm", _RTP_RATE))
        self._packet_samples = _RTP_RATE * _PACKET_MS // 1000  # length of the last packet, at 48 kHz

    async def next_samples(self) -> np.ndarray:
        """Waits for the next packet and returns its audio, `[N]` float32 at 16 kHz."""
        while not self.packets.ready:
            self.packets.changed.clear()
            await self.packets.changed.wait()
        samples = self._decode(self.packets.ready.popleft())
        self._packet_samples = len(samples)
        return self._decoder.resample(samples)

    def _decode(self, data: bytes | None) -> np.ndarray:
        """Returns a packet's audio, `[N]` float32 at 48 kHz. A packet that is lost, or is not Opus, becomes silence."""
        try:
            frames = self._codec.decode(av.Packet(data)) if data else []
        except FFmpegError:
            frames = []
        if not frames:
            return np.zeros(self._packet_samples, np.float32)
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames]).astype(np.float32) / 2**15


class VideoJitterBuffer(JitterBuffer):
    """aiortc's jitter buffer for VP8, which drops frames that are too large and frames that nobody will decode in time.

    Args:
      decoder_is_behind: returns whether too many frames wait already. The next frame is then dropped, and aiortc asks
        the peer for a new key frame.
    """

    def __init__(self, decoder_is_behind: Callable[[], bool]):
        super().__init__(capacity=512, is_video=True)
        self.decoder_is_behind = decoder_is_behind

    def add(self, packet: RtpPacket) -> tuple[bool, JitterFrame | None]:
        """Takes a packet; returns whether to ask for a key frame, and a frame to decode if one is complete."""
        lost, frame = super().add(packet)
        if frame is None or _frame_pixels(frame.data) > _MAX_FRAME_PIXELS:
            return lost, None
        return (True, None) if self.decoder_is_behind() else (lost, frame)


def _frame_pixels(frame: bytes) -> int:
    """Returns the number of pixels of a VP8 key frame (RFC 6386, section 9.1).

    Returns 0 for any other frame: only key frames state their size.
    """
    if len(frame) < 10 or frame[0] & 1:
        return 0
    width, height = (int.from_bytes(frame[start : start + 2], "little") & 0x3FFF for start in (6, 8))
    return width * height
