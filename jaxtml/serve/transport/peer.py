"""A client over WebRTC: audio and pictures on its tracks, events on its data channel. Needs the extra `webrtc`.

`serve.protocols.signalling` makes a `Peer` from a client's offer. Before changing this file, know that it reaches into
private parts of aiortc, which has no other way to limit what a peer may cost.

The rules, which the tests hold:

- A peer makes one offer, which is answered once. It has one data channel, at most one audio track (Opus) and at most
  one video track (VP8), all over one port.
- The answer names the address at which the peer's HTTP request arrived. No other server is asked for an address: there
  is no STUN server and no TURN server.
- The server sends nothing to anyone who has not reached that address with the answer's password. It ignores the
  addresses (candidates) in an offer.
- Datagrams from unknown addresses are not read. From a peer at most `_DATAGRAMS_PER_SECOND` are read. Connection checks
  (STUN) have a lower limit of their own.
- UDP cannot hold back a fast sender, so the server ends the connection to a peer that sends too much. A peer sends too
  much if its messages arrive faster than they are handled, if they cost too much time, or if a track has too many
  sources.
- A session cannot be resumed over WebRTC. It can be resumed over a WebSocket, and then its audio is in the events.
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
from aioice.ice import Connection as IceConnection
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

from jaxtml.serve.transport.connection import CLOSE_TIMEOUT_S
from jaxtml.serve.transport.endings import ConnectionEnd
from jaxtml.serve.transport.sound import MediaSink
from jaxtml.serve.transport.token_bucket import TokenBucket
from jaxtml.serve.transport.tracks import IncomingTrack, OutgoingTrack, PacketReorderer, VideoJitterBuffer
from jaxtml.stream.timebase import MICRO_TURN_MS

_MAX_SDP_BYTES = 2**15  # of an offer; browsers' offers have 2 to 10 KB
_CODECS = {"audio": "audio/opus", "video": "video/VP8", "application": None}  # by kind of media
_IGNORED_LINES = ("a=candidate", "a=end-of-candidates", "a=ice-lite")  # of an offer
_DATAGRAMS_PER_SECOND, _DATAGRAMS_BURST = 1000, 2000  # audio needs 50, a camera 300
_STUN_PER_SECOND, _STUN_BURST = 20, 100
_STUN_SUCCESS = b"\1\1"  # begins a Binding success response (RFC 8489)
# Reassembling messages may take this share of the time, and this many seconds in a burst: tiny fragments cost much.
_BUSY_SHARE, _BUSY_BURST_S = 0.1, 0.3
_MAX_SOURCES = 8  # of one track (SSRCs): aiortc keeps state for each one for ever
_MAX_UNDECODED = 4  # frames that may wait to be decoded, or to be shown to the model; further frames are dropped
_MAX_MESSAGES, _INBOX_BYTES = 512, 2**20  # of messages that may wait to be handled
_MAX_UNSENT = 2**16  # bytes that may wait in a data channel before `send` waits
_POLL_S = 0.02
_SCTP_CHUNK_BYTES = 1200  # size of an SCTP chunk at most

_Address = tuple[Any, ...]  # as asyncio gives it: host and port, and more for IPv6


class Peer:
    """One WebRTC peer; a `connection.Transport`. `from_offer` creates one.

    Attributes:
      voice: the track on which the peer hears the model.
      heard_at: when anything last arrived from the peer, on the monotonic clock.
      end: LEFT if the peer closed the connection on purpose, else GONE.
      close_code: None, because WebRTC has no close codes.
    """

    def __init__(self) -> None:
        self.voice, self.heard_at, self.end = OutgoingTrack(), time.monotonic(), ConnectionEnd.GONE
        self.close_code: int | None = None
        self._pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._microphone = IncomingTrack(PacketReorderer())
        self._channel: RTCDataChannel | None = None
        self._camera: RTCRtpReceiver | None = None
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._over = False
        self._changed = asyncio.Event()
        self._datagrams = TokenBucket(_DATAGRAMS_PER_SECOND, _DATAGRAMS_BURST)
        self._stun = TokenBucket(_STUN_PER_SECOND, _STUN_BURST)
        self._busy_s = TokenBucket(_BUSY_SHARE, _BUSY_BURST_S)

    @classmethod
    async def from_offer(cls, sdp: str, address: str, takes_pictures: bool) -> Peer:
        """Returns the peer that made an offer. No port is open yet.

        Args:
          sdp: the offer.
          address: the server's address, at which the peer will find it.
          takes_pictures: the model takes pictures; if not, a video track is declined.

        Raises:
          ValueError: the offer cannot be read or cannot be answered.
        """
        peer = cls()
        try:
            await peer._negotiate(sdp, address, takes_pictures)
        except BaseException as error:
            await peer._pc.close()
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            # aiortc raises many kinds of errors on text that is no SDP.
            raise ValueError("this offer cannot be read, or offers nothing that this server speaks") from error
        return peer

    async def create_answer(self) -> str:
        """Returns the answer to the offer. From now on the peer can connect."""
        await self._pc.setLocalDescription(await self._pc.createAnswer())
        for port in self._ice()._protocols:
            # aioice types data as bytes or text, but only bytes arrive.
            receive = partial(self._on_datagram, port.datagram_received)
            port.datagram_received = receive  # pyright: ignore[reportAttributeAccessIssue]
        return self._pc.localDescription.sdp

    async def wait_open(self) -> None:
        """Waits until the peer is connected and its data channel is open. Raises `ConnectionError` if that fails."""
        await self._wait_until(lambda: self._channel is not None)
        self.heard_at = time.monotonic()

    @contextlib.asynccontextmanager
    async def feed_tracks(self, sink: MediaSink) -> AsyncIterator[None]:
        """While the context is open, passes the audio and the pictures of the peer's tracks to `sink`."""
        self._microphone.packets.ready.clear()
        tasks = [asyncio.create_task(self._feed_audio(sink))]
        if self._camera is not None:
            tasks.append(asyncio.create_task(self._feed_pictures(self._camera, sink)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    logging.error("a track failed", exc_info=result)

    # --- the methods of a Transport

    async def receive(self) -> bytes | None:
        with contextlib.suppress(ConnectionError):
            await self._wait_until(lambda: self._inbox)
        if not self._inbox:
            return None
        message = self._inbox.popleft()
        self._inbox_bytes -= len(message)
        return message

    async def send(self, frame: bytes) -> None:
        while not self._over and self.unsent() > _MAX_UNSENT:
            await asyncio.sleep(_POLL_S)
        if self._over or self._channel is None or self._channel.readyState != "open":
            raise ConnectionError("the data channel is closed")
        try:
            self._channel.send(frame.decode())
        except ValueError as error:  # larger than the peer's limit for one message; no event may be left out
            logging.error("a peer does not take an event of %d bytes", len(frame))
            raise ConnectionError(str(error)) from error

    async def ping(self) -> None:
        """Does nothing: ICE asks every five seconds (RFC 7675), and its answers count as signs of life."""

    def unsent(self) -> int:
        sctp, channel = self._pc.sctp, self._channel
        if sctp is None or channel is None:
            return 0
        return channel.bufferedAmount + _SCTP_CHUNK_BYTES * (len(sctp._outbound_queue) + len(sctp._sent_queue))

    async def close(self, code: int, reason: str) -> None:
        del code, reason  # WebRTC cannot carry them
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while not self._over and (self.unsent() or len(self.voice.waiting)) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        # aiortc's `close` runs in a separate task, which goes on if the caller of this method is cancelled. If aiortc
        # is closing already, `close` only awaits a future that the first `close` completes at its end. A caller that
        # was cancelled in this wait would cancel the future, and the first `close` would fail.
        closing = asyncio.ensure_future(self._pc.close())
        done, _ = await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)
        if not done:  # aiortc waits for ever if one of its own tasks has failed
            logging.error("a peer's connection does not close; it is cut off")
            for port in self._ice()._protocols:
                port.transport.abort()

    # --- negotiation

    async def _negotiate(self, sdp: str, address: str, takes_pictures: bool) -> None:
        sdp, kinds = _check_offer(sdp)
        for kind in kinds:
            if kind == "audio":
                _prefer_codec(self._pc.addTransceiver(self.voice, "sendrecv"), kind)
            elif kind == "video":
                _prefer_codec(self._pc.addTransceiver(kind, "recvonly" if takes_pictures else "inactive"), kind)
        self._pc.on("datachannel", self._on_channel)
        self._pc.on("connectionstatechange", self._on_state)
        await self._pc.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        sctp = self._pc.sctp
        assert sctp is not None
        transceivers = self._pc.getTransceivers()
        if len({transceiver.receiver.transport for transceiver in transceivers} | {sctp.transport}) > 1:
            raise ValueError("all parts of an offer must be in one bundle")
        for transceiver in transceivers:
            self._replace_jitter_buffer(transceiver)
            if transceiver.kind == "video" and takes_pictures:
                self._camera = transceiver.receiver
        ice = self._ice()
        gather, handle_data = ice.get_component_candidates, sctp._handle_data
        ice.get_component_candidates = lambda component, addresses, timeout=5: gather(component, [address], timeout)
        sctp._handle_data = partial(self._on_sctp_data, handle_data)

    def _replace_jitter_buffer(self, transceiver: RTCRtpTransceiver) -> None:
        """Puts our own buffer in the place of aiortc's. aiortc has no public way to do so."""
        receiver = transceiver.receiver
        if transceiver.kind == "audio":
            buffer = self._microphone.packets
        else:
            buffer = VideoJitterBuffer(partial(_decoder_is_behind, receiver))
        add = partial(self._on_packet, buffer.add, set())
        setattr(receiver, "_RTCRtpReceiver__jitter_buffer", SimpleNamespace(add=add))  # noqa: B010

    def _ice(self) -> IceConnection:
        """Returns aioice's connection, below aiortc."""
        sctp = self._pc.sctp
        assert sctp is not None
        return sctp.transport.transport._connection

    # --- what arrives

    def _on_datagram(self, receive: Callable[[bytes, _Address], None], data: bytes, address: _Address) -> None:
        """Passes a datagram on if it is within its rate limit, and either its sender is known or it is STUN.

        A sender becomes known through STUN, when it shows the answer's password.
        """
        known = any(pair.remote_addr[:2] == address[:2] for pair in self._ice()._check_list)
        stun = data[:1] < b"\4"  # a STUN message begins with a byte below 4 (RFC 7983)
        if known and (not stun or data[:2] == _STUN_SUCCESS):
            self.heard_at = time.monotonic()
        bucket = self._stun if stun else self._datagrams
        if (stun or known) and not self._over and bucket.try_take():
            receive(data, address)

    async def _on_sctp_data(self, handle_data: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
        """Passes on data for SCTP, the data channel's transport, and gives the peer up if the data costs too much."""
        if self._over:
            return
        started_at = time.thread_time()
        await handle_data(data)
        sctp = self._pc.sctp
        # The fragments of a message that never ends use up the receive window.
        never_ends = sctp is not None and sctp._advertised_rwnd < -_INBOX_BYTES
        if never_ends or not self._busy_s.try_take(time.thread_time() - started_at):
            self._give_up()

    def _on_packet(
        self, add: Callable[[RtpPacket], tuple[bool, JitterFrame | None]], sources: set[int], packet: RtpPacket
    ) -> tuple[bool, JitterFrame | None]:
        """Passes on a packet of a track, and gives the peer up if the track has too many sources."""
        sources.add(packet.ssrc)
        if len(sources) > _MAX_SOURCES:
            self._give_up()
        return (False, None) if self._over else add(packet)

    def _on_channel(self, channel: RTCDataChannel) -> None:
        """Takes the first data channel for events, whatever its name, and closes any other."""
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
        self._inbox_bytes += len(data)
        self._changed.set()
        if len(self._inbox) > _MAX_MESSAGES or self._inbox_bytes > _INBOX_BYTES:
            self._give_up()

    def _on_close(self) -> None:
        ice = None if self._pc.sctp is None else self._pc.sctp.transport.transport
        if not self._over and ice is not None and ice.state == "completed":
            self.end = ConnectionEnd.LEFT
        self._end()

    def _on_state(self) -> None:
        if self._pc.connectionState in ("failed", "closed"):
            self._end()

    def _give_up(self) -> None:
        """Ends the connection and drops the messages that wait."""
        self._inbox.clear()
        self._end()

    def _end(self) -> None:
        self._over = True
        self._changed.set()

    async def _wait_until(self, condition: Callable[[], object]) -> None:
        """Waits until the condition is true. Raises `ConnectionError` if the peer is gone before."""
        while not condition():
            if self._over:
                raise ConnectionError("the peer is gone")
            self._changed.clear()
            await self._changed.wait()

    # --- media

    async def _feed_audio(self, sink: MediaSink) -> None:
        while True:
            await sink.receive_track(await self._microphone.next_samples())

    async def _feed_pictures(self, camera: RTCRtpReceiver, sink: MediaSink) -> None:
        """Passes on one picture per micro-turn. aiortc decodes all pictures, because each builds on those before it."""
        due = 0.0
        with contextlib.suppress(MediaStreamError):
            track: Any = camera.track
            while True:
                frame = await track.recv()
                while track._queue.qsize():
                    frame = await track.recv()
                if (now := time.monotonic()) >= due:
                    due = now + MICRO_TURN_MS / 1000
                    with contextlib.suppress(ValueError):  # a shape that cannot be cut into patches
                        await sink.show_frame(frame)


def _check_offer(sdp: str) -> tuple[str, list[str]]:
    """Returns the offer without the lines that the server ignores, and the kinds of its media.

    Raises:
      ValueError: the offer is too long, or asks for something that this server does not have.
    """
    if len(sdp.encode()) > _MAX_SDP_BYTES:
        raise ValueError(f"an offer may have at most {_MAX_SDP_BYTES} bytes")
    sdp = "".join(f"{line}\r\n" for line in sdp.splitlines() if line and not line.startswith(_IGNORED_LINES))
    offered_media = SessionDescription.parse(sdp).media
    kinds = [media.kind for media in offered_media]
    if kinds.count("application") != 1 or len(kinds) > len(set(kinds)) or not set(kinds) <= set(_CODECS):
        raise ValueError("an offer must have one data channel, at most one audio track and at most one video track")
    if not all(media.dtls is not None and media.dtls.fingerprints for media in offered_media):
        raise ValueError("an offer must have the fingerprint of its certificate")
    return sdp, kinds


def _prefer_codec(transceiver: RTCRtpTransceiver, kind: str) -> None:
    """Restricts a track to its codec of `_CODECS`, and to the retransmissions of that codec."""
    capabilities = RTCRtpReceiver.getCapabilities(kind)
    codecs = [] if capabilities is None else capabilities.codecs
    transceiver.setCodecPreferences([codec for codec in codecs if codec.mimeType in (_CODECS[kind], f"{kind}/rtx")])


def _decoder_is_behind(receiver: RTCRtpReceiver) -> bool:
    """Returns whether pictures arrive faster than they are decoded, or faster than they are passed on."""
    undecoded: Any = getattr(receiver, "_RTCRtpReceiver__decoder_queue")  # noqa: B009
    decoded: Any = receiver.track
    return undecoded.qsize() > _MAX_UNDECODED or decoded._queue.qsize() > _MAX_UNDECODED
