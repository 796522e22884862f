"""A client over WebRTC: sound and pictures on its tracks, events on its data channel. Needs the extra `webrtc`.

The rules. A peer makes one offer, with a data channel, at most one track of sound (Opus) and one of pictures (VP8), all
over one port; it is answered once. It is found at the address at which the request for it came in, no other server is
asked for one (no STUN, no TURN), and nothing is sent to anyone who has not reached that address with the answer's
password: the candidates of an offer are not looked at. Datagrams of strangers are not read, and of a peer no more than
`_PER_SECOND`; of those that look for a way (STUN) fewer. UDP cannot hold back who sends too much, so a peer whose
messages are not taken as fast as they come, cost too much time, or come from too many sources, is given up. There is no
way back to a session over WebRTC; over a WebSocket there is, and then its sound is in the events.

Called by the server's addresses, when the first offer comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from absl import logging
from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCPeerConnection,
    RTCRtpReceiver,
    RTCRtpTransceiver,
    RTCSessionDescription,
)
from aiortc.jitterbuffer import JitterFrame
from aiortc.mediastreams import MediaStreamError
from aiortc.rtp import RtpPacket
from aiortc.sdp import SessionDescription

from jaxtml.serve.transport.connection import GOODBYE_S, MESSAGE_BYTES
from jaxtml.serve.transport.sound import MediaSink
from jaxtml.serve.transport.token_bucket import TokenBucket
from jaxtml.serve.transport.tracks import IncomingTrack, OutgoingTrack, PacketReorderer, VideoJitterBuffer
from jaxtml.stream.timebase import MICRO_TURN_MS

_SDP_BYTES = 2**15  # of an offer; browsers' have 2 to 10 KB
_KINDS = {"audio": "audio/opus", "video": "video/VP8", "application": None}
_NOT_READ = ("a=candidate", "a=end-of-candidates", "a=ice-lite")
_PER_SECOND, _BURST = 1000, 2000  # datagrams: sound is 50, a camera's pictures 300
_STUN_PER_SECOND, _STUN_BURST = 20, 100
_STUN_ANSWER = b"\1\1"  # begins a binding's success response (RFC 8489)
_BUSY, _BUSY_S = 0.1, 0.3  # of the time, and at once, for putting messages together: tiny parts of them cost much
_SOURCES = 8  # of one track: aiortc forgets none
_UNDECODED = 4  # pictures that wait for the decoder, or to be looked at: those that come then are dropped
_MESSAGES = 512  # that wait to be taken, beside their bytes
_UNSENT = 2**16  # bytes that a data channel is given in advance
_LOOK_S = 0.02
_CHUNK = 1200  # bytes of SCTP's, at most


class Peer:
    """One peer, a `connection.Line`. Use `offered`.

    Attributes:
      voice: the track on which it hears the model.
    """

    def __init__(self) -> None:
        self.voice, self.heard_at, self.left = OutgoingTrack(), time.monotonic(), False
        self._pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._ear = IncomingTrack(PacketReorderer())
        self._channel: RTCDataChannel | None = None
        self._camera: RTCRtpReceiver | None = None
        self._inbox: deque[bytes] = deque()
        self._waiting = 0  # bytes in it
        self._over = False
        self._changed = asyncio.Event()
        self._datagrams, self._stun, self._time = (
            TokenBucket(*rate) for rate in ((_PER_SECOND, _BURST), (_STUN_PER_SECOND, _STUN_BURST), (_BUSY, _BUSY_S))
        )

    @classmethod
    async def from_offer(cls, sdp: str, address: str, sees: bool) -> Peer:
        """One that has made an offer. No port is open yet.

        Args:
          sdp: the offer.
          address: of this server, where the peer will find it.
          sees: the model does; else pictures are declined.

        Raises:
          ValueError: what is wrong with the offer.
        """
        peer = cls()
        try:
            await peer._negotiate(sdp, address, sees)
        except BaseException as error:
            await peer._pc.close()
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            # aiortc's reading of what is no SDP fails in many ways.
            raise ValueError("this offer cannot be read, or has nothing in it that this server speaks") from error
        return peer

    async def create_answer(self) -> str:
        """The answer to the offer; from now on the peer can connect."""
        await self._pc.setLocalDescription(await self._pc.createAnswer())
        for port in self._ice()._protocols:
            port.datagram_received = partial(self._arrived, port.datagram_received)
        return self._pc.localDescription.sdp

    async def wait_open(self) -> None:
        """Returns when the peer is connected and its data channel open. Raises `ConnectionError` where that fails."""
        await self._until(lambda: self._channel is not None)
        self.heard_at = time.monotonic()

    @contextlib.asynccontextmanager
    async def feed_tracks(self, to: MediaSink) -> AsyncIterator[None]:
        """Meanwhile what the peer's tracks have goes to its protocol."""
        self._ear.arrivals.ready.clear()
        tasks = [asyncio.create_task(self._hear(to))]
        if self._camera is not None:
            tasks.append(asyncio.create_task(self._see(self._camera, to)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    logging.error("a track failed", exc_info=result)

    # --- the line

    async def receive(self) -> bytes | None:
        with contextlib.suppress(ConnectionError):
            await self._until(lambda: self._inbox)
        if not self._inbox:
            return None
        message = self._inbox.popleft()
        self._waiting -= len(message)
        return message

    async def send(self, frame: bytes) -> None:
        while not self._over and self.unsent() > _UNSENT:
            await asyncio.sleep(_LOOK_S)
        if self._over or self._channel is None or self._channel.readyState != "open":
            raise ConnectionError("the data channel is closed")
        try:
            self._channel.send(frame.decode())
        except ValueError as error:  # it has said how much it takes at once; and nothing may be left out
            logging.error("a peer does not take an event of %d bytes", len(frame))
            raise ConnectionError(str(error)) from error

    async def ping(self) -> None:
        """ICE does, every five seconds (RFC 7675), and the answer is heard."""

    def unsent(self) -> int:
        sctp, channel = self._pc.sctp, self._channel
        if sctp is None or channel is None:
            return 0
        return channel.bufferedAmount + _CHUNK * (len(sctp._outbound_queue) + len(sctp._sent_queue))

    async def close(self, code: int, why: str) -> None:
        del code, why  # WebRTC has no words for it
        until = time.monotonic() + GOODBYE_S
        while not self._over and (self.unsent() or len(self.voice.waiting)) and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)
        # aiortc's own may be under way: it fails where we are cancelled.
        closing = asyncio.ensure_future(self._pc.close())
        done, _ = await asyncio.wait([closing], timeout=GOODBYE_S)
        if not done:  # a task of its own has failed, which it waits for
            logging.error("a peer's connection does not close; it is cut off")
            for port in self._ice()._protocols:
                port.transport.abort()

    # --- inside

    async def _negotiate(self, sdp: str, address: str, sees: bool) -> None:
        if len(sdp) > _SDP_BYTES:
            raise ValueError(f"an offer has {_SDP_BYTES} bytes at most")
        sdp = "".join(f"{line}\r\n" for line in sdp.splitlines() if line and not line.startswith(_NOT_READ))
        offer = SessionDescription.parse(sdp).media
        kinds = [media.kind for media in offer]
        if kinds.count("application") != 1 or len(kinds) > len(set(kinds)) or not set(kinds) <= set(_KINDS):
            raise ValueError("an offer has one data channel, and one track of sound and one of pictures at most")
        if not all(media.dtls is not None and media.dtls.fingerprints for media in offer):
            raise ValueError("an offer has the fingerprint of its certificate")
        for kind in kinds:
            if kind == "audio":
                self._prefer(self._pc.addTransceiver(self.voice, "sendrecv"), kind)
            elif kind == "video":
                self._prefer(self._pc.addTransceiver(kind, "recvonly" if sees else "inactive"), kind)
        self._pc.on("datachannel", self._on_channel)
        self._pc.on("connectionstatechange", self._on_state)
        await self._pc.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        sctp = self._pc.sctp
        assert sctp is not None
        transports = {one.receiver.transport for one in self._pc.getTransceivers()} | {sctp.transport}
        if len(transports) > 1:
            raise ValueError("an offer has all of it in one bundle")
        for transceiver in self._pc.getTransceivers():
            sound = transceiver.kind == "audio"
            # aiortc has no way to be given one.
            buffer = self._ear.arrivals if sound else VideoJitterBuffer(partial(self._piled_up, transceiver.receiver))
            add = partial(self._added, buffer.add, set())
            setattr(transceiver.receiver, "_RTCRtpReceiver__jitter_buffer", SimpleNamespace(add=add))  # noqa: B010
            if not sound and sees:
                self._camera = transceiver.receiver
        ice = self._ice()
        gathered, handle = ice.get_component_candidates, sctp._handle_data
        ice.get_component_candidates = lambda component, addresses: gathered(component, [address])
        sctp._handle_data = partial(self._handled, handle)

    def _prefer(self, transceiver: RTCRtpTransceiver, kind: str) -> None:
        known = RTCRtpReceiver.getCapabilities(kind)
        codecs = [] if known is None else known.codecs
        transceiver.setCodecPreferences([one for one in codecs if one.mimeType in (_KINDS[kind], f"{kind}/rtx")])

    def _ice(self) -> Any:
        sctp = self._pc.sctp
        assert sctp is not None
        return sctp.transport.transport._connection

    def _arrived(self, received: Callable[[bytes, Any], None], data: bytes, address: Any) -> None:
        """A datagram, of anyone. Those of STUN begin with a byte below 4 (RFC 7983)."""
        known = any(pair.remote_addr[:2] == address[:2] for pair in self._ice()._check_list)
        stun = data[:1] < b"\4"
        if known and (not stun or data[:2] == _STUN_ANSWER):
            self.heard_at = time.monotonic()
        allowance = self._stun if stun else self._datagrams
        if (stun or known) and not self._over and allowance.take():
            received(data, address)

    async def _handled(self, handle: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
        """What the data channel's transport (SCTP) gets."""
        if self._over:
            return
        began = time.thread_time()
        await handle(data)
        sctp = self._pc.sctp
        # Parts of a message that never ends wait there.
        endless = sctp is not None and sctp._advertised_rwnd < -MESSAGE_BYTES
        if endless or not self._time.take(time.thread_time() - began):
            self._flooded()

    def _added(
        self, add: Callable[[RtpPacket], Any], sources: set[int], packet: RtpPacket
    ) -> tuple[bool, JitterFrame | None]:
        """A packet of a track."""
        sources.add(packet.ssrc)
        if len(sources) > _SOURCES:
            self._flooded()
        return (False, None) if self._over else add(packet)

    def _piled_up(self, receiver: RTCRtpReceiver) -> bool:
        """Whether pictures come faster than they are decoded and looked at."""
        undecoded: Any = getattr(receiver, "_RTCRtpReceiver__decoder_queue")  # noqa: B009
        unseen: Any = receiver.track
        return undecoded.qsize() > _UNDECODED or unseen._queue.qsize() > _UNDECODED

    def _flooded(self) -> None:
        self._inbox.clear()
        self._end()

    def _on_channel(self, channel: RTCDataChannel) -> None:
        """The first one is for events, whatever its name."""
        if self._channel is not None:
            channel.close()
            return
        self._channel = channel
        channel.on("message", self._on_message)
        channel.on("close", self._on_close)
        self._changed.set()

    def _on_message(self, message: str | bytes) -> None:
        if self._over:
            return
        data = message.encode() if isinstance(message, str) else message
        self._inbox.append(data)
        self._waiting += len(data)
        self._changed.set()
        if len(self._inbox) > _MESSAGES or self._waiting > MESSAGE_BYTES:
            self._flooded()

    def _on_close(self) -> None:
        ice = None if self._pc.sctp is None else self._pc.sctp.transport.transport
        self.left = not self._over and ice is not None and ice.state == "completed"
        self._end()

    def _on_state(self) -> None:
        if self._pc.connectionState in ("failed", "closed"):
            self._end()

    def _end(self) -> None:
        self._over = True
        self._changed.set()

    async def _until(self, what: Callable[[], object]) -> None:
        """Until `what` is true; raises `ConnectionError` where the peer is gone before."""
        while not what():
            if self._over:
                raise ConnectionError("the peer is gone")
            self._changed.clear()
            await self._changed.wait()

    async def _hear(self, to: MediaSink) -> None:
        while True:
            await to.receive_track(await self._ear.next_samples())

    async def _see(self, camera: RTCRtpReceiver, to: MediaSink) -> None:
        """A picture a micro-turn. All are decoded, as each is told by those before it, but few are looked at."""
        due = 0.0
        with contextlib.suppress(MediaStreamError):
            track: Any = camera.track
            while True:
                frame = await track.recv()
                while track._queue.qsize():
                    frame = await track.recv()
                if (now := time.monotonic()) >= due:
                    due = now + MICRO_TURN_MS / 1000
                    with contextlib.suppress(ValueError):  # of a shape that has no patches
                        await to.show_frame(frame)
