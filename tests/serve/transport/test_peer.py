"""Tests of WebRTC over real ports of the loopback interface, with aiortc and with Chromium as clients.

A peer hears the model and is heard, keeps to the rules of `serve.transport.peer`, and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from openai import AsyncOpenAI
from openai.types.live import ServerEvent
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

import jaxtml.serve.transport
from jaxtml.serve.protocols import signalling
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Access, Key
from jaxtml.serve.sessions.manager import Limits
from jaxtml.serve.transport import connection
from jaxtml.serve.transport.endings import ConnectionEnd
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control
from tests.serve.serving import Serving, eventually, serving
from tests.serve.stepped import scripted
from tests.serve.web.test_page import CHROMIUM, browser

pytest.importorskip("aiortc", reason="needs the extra webrtc")
from aiortc import VideoStreamTrack
from aiortc.rtp import RtpPacket

from jaxtml.serve.transport import peer
from jaxtml.serve.transport.tracks import IncomingTrack, OutgoingTrack, PacketReorderer, _frame_pixels
from tests.serve.peering import PeerClient, ToneTrack, loudest_hz, open_peer_client, scripted_tone, tone

SPEAKS = {n: (Control.SAY, "yes", Control.SPEAK) for n in range(1, 100)}
MODEL = {"model": "small_test"}
LIVE, REALTIME = TypeAdapter(ServerEvent), TypeAdapter(RealtimeServerEvent)


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    """Lets clients offer the loopback interface, which aioice leaves out."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


async def start_live(serving: Serving, client: PeerClient, **session) -> dict:
    """Starts a GPT-Live session for this client, and returns the session of its `session.started` event."""
    openai = AsyncOpenAI(api_key="any", base_url=f"{serving.url}/v1")
    transport = {"type": "webrtc", "sdp": await client.offer()}
    created = await openai.live.create(session=MODEL | session, transport=transport)
    assert created.transport.type == "webrtc" and created.session.id == serving.session().id
    await client.take_answer(created.transport.sdp)
    return (await client.until("session.started"))["session"]


async def at_rest(serving: Serving) -> set[asyncio.Task]:
    """Returns the tasks that run when nothing happens."""
    async with serving.http.get(f"{serving.url}/health"):  # keeps the connection of the HTTP client open
        return asyncio.all_tasks()


def test_peer_hears_and_is_heard_and_its_events_carry_no_audio(slots, engine):
    async def test(serving: Serving) -> None:
        async with open_peer_client(ToneTrack(500)) as client:
            started = await start_live(serving, client, instructions="be kind")
            session = serving.session()
            assert started["id"] == session.id and started["instructions"] == "be kind"
            await eventually(lambda: session.scheduled.jitter_buffer.waiting_samples > 2 * MICRO_TURN_SAMPLES)
            heard = np.concatenate(session.scheduled.jitter_buffer.chunks)[-MICRO_TURN_SAMPLES:]
            assert loudest_hz(heard, 16_000) == pytest.approx(500, abs=10)
            assert np.sqrt(np.mean(heard**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)
            async with serving.ticking(0.2):
                await eventually(lambda: len(client.heard()) > 48_000)
                client.send("session.commentary.append", content="abc", delegation_id=None, event_id="a")
                assert (await client.until("session.commentary.appended"))["client_event_id"] == "a"
                heard = client.heard()[-24_000:]
                assert loudest_hz(heard, 48_000) == pytest.approx(300, abs=10), "the model's tone"
                assert np.sqrt(np.mean(heard**2)) > 0.1, "few gaps, even on a busy machine"
                client.send("session.input_audio.append", audio="AAAA")
                assert (await client.until("error"))["error"]["code"] == "invalid_event_order"
                client.send("session.close")
                await eventually(lambda: session.closing_at)
                session.closing_at -= 10  # this model never stops speaking: let the time limit for closing run out
                closed = await client.until("session.closed")
            assert closed["reason"] == "close_requested"
            assert "session.output_transcript.delta" in client.kinds()
            assert "session.output_audio.delta" not in client.kinds()
            for event in client.events:
                LIVE.validate_python(event, strict=True)
            await client.closed()

    serving(slots, engine, test, model=scripted_tone(300, SPEAKS))


def test_realtime_over_webrtc_tells_when_its_audio_begins_and_ends(slots, engine):
    script = {n: (Control.SAY, "yes", Control.SPEAK) for n in (2, 3, 4, 20, 21, 22, 23, 24, 25, 26, 27)}

    async def test(serving: Serving) -> None:
        openai = AsyncOpenAI(api_key="any", base_url=f"{serving.url}/v1")
        async with open_peer_client(ToneTrack(500)) as client:
            session = {"type": "realtime", "model": "small_test", "instructions": "be kind"}
            created = await openai.realtime.calls.create(sdp=await client.offer(), session=session)
            location = created.response.headers["Location"]
            assert created.response.status_code == 201 and location == f"/v1/realtime/calls/{serving.session().id}"
            await client.take_answer(created.text)
            assert (await client.until("session.created"))["session"]["instructions"] == "be kind"
            await eventually(lambda: serving.session().scheduled.jitter_buffer.waiting_samples > 1_600)  # 100 ms
            client.send("input_audio_buffer.commit")
            await client.until("input_audio_buffer.committed")
            await serving.advance(8)
            await client.until("output_audio_buffer.stopped")
            kinds = client.kinds()
            order = ("response.content_part.added", "output_audio_buffer.started", "response.done")
            assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
            assert kinds[-1] == "output_audio_buffer.stopped" and "response.output_audio.delta" not in kinds
            await serving.advance(14)
            started = await client.until("output_audio_buffer.started")
            client.send("output_audio_buffer.clear")
            cleared = await client.until("output_audio_buffer.cleared")
            assert cleared["response_id"] == started["response_id"]
            done = [event["response"]["status"] for event in client.events if event["type"] == "response.done"]
            assert done == ["completed", "cancelled"]
            client.send("output_audio_buffer.clear")  # with nothing to clear, this is no error
            client.send("input_audio_buffer.append", audio="AAAA")
            assert (await client.until("error"))["error"]["code"] == "invalid_event_order"
            for event in client.events:
                REALTIME.validate_python(event)
            session = serving.session()
            await openai.realtime.calls.hangup(session.id)
            await client.closed()
            assert session.scheduled.end_reason is EndReason.ASKED
            await eventually(lambda: not serving.manager.sessions)

    serving(slots, engine, test, model=scripted_tone(300, script))


def test_short_lived_key_begins_a_peers_session_with_its_configuration(slots, engine):
    access = Access([Key(name="one", key="sk-first-key", sessions=1)])

    async def test(serving: Serving) -> None:
        openai = AsyncOpenAI(api_key="sk-first-key", base_url=f"{serving.url}/v1")
        secret = await openai.realtime.client_secrets.create(session={"type": "realtime", "instructions": "be brief"})
        url, headers = f"{serving.url}/v1/realtime/calls", {"Authorization": f"Bearer {secret.value}"}
        sdp = {"Content-Type": "application/sdp"}
        async with open_peer_client(ToneTrack(500)) as client:
            offer = await client.offer()
            async with serving.http.post(url, data=offer, headers=sdp) as refused:
                assert refused.status == 401
            async with serving.http.post(url, data=offer, headers=headers | sdp) as made:
                assert made.status == 201 and made.content_type == "application/sdp"
                await client.take_answer(await made.text())
            created = await client.until("session.created")
            assert created["session"]["instructions"] == "be brief"
            for data in (offer, "nonsense"):  # the limit is checked before the offer is read
                async with serving.http.post(url, data=data, headers=headers | sdp) as refused:
                    assert refused.status == 429 and int(refused.headers["Retry-After"]) > 0
            session = serving.session()
            async with serving.http.post(f"{url}/{session.id}/hangup") as refused:
                assert refused.status == 401
            await client.close()
            await eventually(lambda: session.scheduled.end_reason is EndReason.LEFT)

    serving(slots, engine, test, access=access, model=scripted({}))


def test_peer_that_vanishes_resumes_over_a_websocket(slots, engine, monkeypatch):
    monkeypatch.setattr(connection, "_SILENT_S", 0.5)

    async def test(serving: Serving) -> None:
        async with open_peer_client(ToneTrack(500)) as client:
            started = await start_live(serving, client)
            session = serving.session()
            assert session.scheduled.attached
            await serving.advance(2)
            client.vanish()
            await eventually(lambda: not session.scheduled.attached)
            assert not session.scheduled.end_reason
            back = await serving.open()
            resume = {"session_id": session.id, "resume_token": started["resume"]["token"], "after": 0}
            await back.send("session.resume", **resume)
            await back.until("session.resumed")
            before = session.scheduled.micro_turns
            await serving.advance(2)
            sound = await back.until("session.output_audio.delta")
            assert sound["start_ms"] == 200 * (before + 1), "from now on the audio is in the events"
            await back.send("session.input_audio.append", audio="AAAAAAAA")
            await back.send("session.close")
            async with serving.ticking():
                assert await back.closed() == 1000
            assert not back.events_of("error")

    serving(slots, engine, test, model=scripted({}))


def test_session_of_a_peer_that_does_not_come_back_is_ended(slots, engine, monkeypatch):
    monkeypatch.setattr(connection, "_SILENT_S", 0.5)

    async def test(serving: Serving) -> None:
        async with open_peer_client(ToneTrack(500)) as client:
            await start_live(serving, client)
            session = serving.session()
            client.vanish()
            await eventually(lambda: not session.scheduled.attached)
            await serving.advance(160)
            await eventually(lambda: not serving.manager.sessions)
            assert session.scheduled.end_reason is EndReason.GONE and slots.live == {}

    serving(slots, engine, test, model=scripted({}))


def test_silent_peer_stays_connected_as_long_as_it_answers(slots, engine, monkeypatch):
    monkeypatch.setattr(connection, "_WATCH_S", 0.05)
    monkeypatch.setattr(connection, "_SILENT_S", 0.5)
    monkeypatch.setattr("aioice.ice.CONSENT_INTERVAL", 0.1)

    async def test(serving: Serving) -> None:
        async with open_peer_client() as client:  # a data channel only
            await start_live(serving, client)
            await asyncio.sleep(1.5)
            assert serving.session().scheduled.attached
            client.vanish()
            await eventually(lambda: not serving.session().scheduled.attached)

    serving(slots, engine, test)


@pytest.mark.parametrize("flood", ["messages", "fragments", "sources"])
def test_peer_that_floods_is_given_up_and_its_messages_are_dropped(slots, engine, monkeypatch, flood):
    if flood == "messages":  # faster than they are handled
        monkeypatch.setattr(connection, "_MESSAGES_PER_SECOND", 1)
        monkeypatch.setattr(connection, "_MESSAGES_BURST", 10)

    async def test(serving: Serving) -> None:
        async with open_peer_client(ToneTrack(500)) as client:
            await start_live(serving, client)
            transport = serving.session().connection.transport
            if flood == "sources":
                (sender,) = client.pc.getSenders()
                for source in range(8):  # the first source is the track's own
                    assert serving.session().scheduled.attached, "eight sources are allowed"
                    sender._ssrc = source + 1
                    await asyncio.sleep(0.1)
                await eventually(lambda: not serving.session().scheduled.attached)
                return
            if flood == "fragments":  # reassembling them takes more time than is allowed
                transport._busy_s.burst = 1e-4
            for _ in range(1000):
                client.send("session.input_audio.mute")
            async with serving.ticking():
                await eventually(lambda: not serving.session().scheduled.attached)
            assert not transport._inbox and transport.end is ConnectionEnd.GONE
            async with serving.http.get(f"{serving.url}/health") as health:
                assert health.status == 200

    serving(slots, engine, test)


def test_peer_whose_message_limit_is_below_an_event_is_given_up_with_a_log_entry(slots, engine, caplog):
    async def test(serving: Serving) -> None:
        async with open_peer_client() as client:
            offer = re.sub("max-message-size:.*", "max-message-size:300", await client.offer())
            body = {"session": MODEL, "transport": {"type": "webrtc", "sdp": offer}}
            async with serving.http.post(f"{serving.url}/v1/live/sessions", json=body) as made:
                await client.take_answer((await made.json())["transport"]["sdp"])
            await client.closed()
            assert not serving.session().scheduled.attached

    serving(slots, engine, test)
    assert "a peer does not take an event of" in caplog.text


def test_ipv4_client_of_a_dual_stack_server_gets_an_ipv4_address(monkeypatch):
    answered = []

    async def from_offer(sdp: str, address: str, takes_pictures: bool) -> None:
        answered.append(address)

    monkeypatch.setattr(peer.Peer, "from_offer", from_offer)
    for server_address in ("::ffff:10.0.0.7", "10.0.0.7", "2001:db8::7"):
        transport = SimpleNamespace(get_extra_info=lambda name, address=server_address: (address, 8080))
        asyncio.run(signalling.open_peer(cast(Any, SimpleNamespace(transport=transport)), "", False))
    assert answered == ["10.0.0.7", "10.0.0.7", "2001:db8::7"]


def test_offer_without_a_connection_frees_its_slot_and_leaves_no_task(slots, engine):
    async def test(serving: Serving) -> None:
        async with open_peer_client(ToneTrack(500)) as client:
            offer = await client.offer()
        before = await at_rest(serving)
        body = {"session": MODEL, "transport": {"type": "webrtc", "sdp": offer}}
        async with serving.http.post(f"{serving.url}/v1/live/sessions", json=body) as made:
            assert made.status == 201
        session = serving.session()
        assert not session.scheduled.attached, "the session is paused until the client connects"
        await eventually(lambda: session.scheduled.end_reason)
        await serving.advance()
        await eventually(lambda: not serving.manager.sessions and asyncio.all_tasks() <= before)
        assert session.scheduled.micro_turns == 0

    serving(slots, engine, test, limits=Limits(first_message_s=0.3), model=scripted({}))


def test_offers_that_cannot_be_answered_are_refused_with_the_apis_error(slots, engine):
    async def test(serving: Serving) -> None:
        async with open_peer_client(ToneTrack(500)) as client:
            offer = await client.offer()
        two = offer + offer[offer.index("m=audio") : offer.index("m=application")]
        wrong = {
            "": "data channel",
            "hello": "data channel",
            "v=0\r\nm=audio": "cannot be read",
            offer[: offer.index("m=application")]: "data channel",
            two: "one audio track",
            offer.replace("a=ice-pwd", "a=nothing"): "ICE",
            offer.replace("opus/48000/2", "speex/8000"): "offers nothing that this server speaks",
            offer.replace("a=group:BUNDLE 0 1", "a=group:BUNDLE 0"): "bundle",
            offer.replace("a=fingerprint", "a=nothing"): "fingerprint",
            offer + "a=x\r\n" * 8_000: "at most 32768 bytes",
        }
        before = await at_rest(serving)
        for sdp, word in wrong.items():
            body = {"session": MODEL, "transport": {"type": "webrtc", "sdp": sdp}}
            async with serving.http.post(f"{serving.url}/v1/live/sessions", json=body) as refused:
                error = (await refused.json())["error"]
                assert refused.status == 400 and error["code"] == "invalid_sdp" and word in error["message"], sdp
            headers = {"Content-Type": "application/sdp"}
            async with serving.http.post(f"{serving.url}/v1/realtime/calls", data=sdp, headers=headers) as refused:
                assert refused.status == 400 and (await refused.json())["error"]["code"] == "invalid_sdp"
        transport = {"type": "webrtc", "sdp": offer}
        for body, word in (
            (b"{", "truncated"),
            ({"session": {"model": "other"}, "transport": transport}, "small_test"),
            ({"session": MODEL | {"store": True}, "transport": transport}, "store"),
            ({"session": MODEL | {"audio": {"format": {"type": "audio/pcmu"}}}, "transport": transport}, "format"),
            ({"session": MODEL | {"wake_policy": {"type": "speech"}}, "transport": transport}, "wake_policy"),
        ):
            kind = {"data": body} if isinstance(body, bytes) else {"json": body}
            async with serving.http.post(f"{serving.url}/v1/live/sessions", **kind) as refused:
                assert refused.status == 400 and word in (await refused.json())["error"]["message"]
        await eventually(lambda: asyncio.all_tasks() <= before)
        assert not serving.manager.sessions and not serving.counted("duplex_sessions_total", protocol="live")

    serving(slots, engine, test, model=scripted({}))


def test_model_sees_one_picture_of_a_camera_per_micro_turn(slots, engine):
    async def test(serving: Serving) -> None:
        async with open_peer_client(ToneTrack(500), VideoStreamTrack()) as client:
            await start_live(serving, client)
            session = serving.session()
            seen = []
            for _ in range(4):
                await eventually(lambda: session.scheduled.patches is not None)
                seen.append(session.scheduled.patches)
                await serving.advance()
            assert all(patches.shape[1:] == (2, 40, 40, 3) for patches in seen)
            assert [input.patches is not None for input in serving.model_inputs()] == [True] * 4

    serving(slots, engine, test, model=scripted({}))


def test_offer_without_the_webrtc_extra_is_refused_with_the_remedy(slots, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiortc", None)
    for name in ("peer", "tracks"):
        monkeypatch.delitem(sys.modules, f"jaxtml.serve.transport.{name}", raising=False)
        monkeypatch.delattr(jaxtml.serve.transport, name, raising=False)

    async def test(serving: Serving) -> None:
        body = {"session": MODEL, "transport": {"type": "webrtc", "sdp": "v=0"}}
        async with serving.http.post(f"{serving.url}/v1/live/sessions", json=body) as refused:
            assert refused.status == 501
            error = (await refused.json())["error"]
            assert error["code"] == "webrtc_not_installed" and "pip install -e '.[webrtc]'" in error["message"]

    serving(slots, engine, test, model=scripted({}))


# --- the rules of the tracks


def packets_with_sound(voice: OutgoingTrack, count: int) -> list[bool]:
    """Returns which of the next packets of 20 ms have sound."""
    return [bool(voice.next_samples().any()) for _ in range(count)]


def micro_turn(loud: bool = True) -> np.ndarray:
    """Returns a micro-turn of a tone or of silence, `[3200]` float32 at 16 kHz."""
    return tone(300, 1, MICRO_TURN_SAMPLES, 16_000) * loud


def test_voice_waits_for_the_lead_and_again_after_the_track_ran_dry():
    """The lead is 40 ms, two packets, for which the first micro-turn waits."""
    voice = OutgoingTrack()
    assert packets_with_sound(voice, 3) == [False] * 3
    voice.put(micro_turn())
    assert packets_with_sound(voice, 10) == [False] * 2 + [True] * 8
    voice.put(micro_turn())
    assert packets_with_sound(voice, 14) == [True] * 12 + [False] * 2, "it ran dry"
    voice.put(micro_turn())
    assert packets_with_sound(voice, 12) == [False] * 2 + [True] * 10


def test_older_part_of_the_waiting_audio_is_dropped_when_a_micro_turn_arrives():
    """Of waiting speech the last micro-turn is kept, and of waiting silence the last 40 ms (the lead)."""
    voice = OutgoingTrack()
    for _ in range(5):
        voice.put(micro_turn())
    assert len(voice.waiting) == 2 * MICRO_TURN_SAMPLES
    voice.clear()
    for _ in range(5):
        voice.put(micro_turn(loud=False))
    assert len(voice.waiting) == MICRO_TURN_SAMPLES + 640


def packet(number: int, data: bytes | None = None) -> RtpPacket:
    """Returns an RTP packet; without `data`, its payload is its number."""
    made = RtpPacket(sequence_number=number % 2**16)
    made._data = str(number).encode() if data is None else data
    return made


@pytest.mark.parametrize("first", [10, 65_533])
def test_packets_are_reordered_and_a_lost_packet_is_not_waited_for_long(first):
    packets = PacketReorderer()

    def add(*offsets: int) -> list[int | None]:
        """Adds packets by their distance from the first one, and returns those that are ready; None: lost."""
        for offset in offsets:
            assert packets.add(packet(first + offset)) == (False, None)
        ready = [None if data is None else int(data) - first for data in packets.ready]
        packets.ready.clear()
        return ready

    assert add(0, 1, 3) == [0, 1]
    assert add(2, 2, 1) == [2, 3]
    assert add(5, 6) == [None, 5, 6]
    assert add(4, 7) == [7], "a packet that was given up is dropped"
    assert add(500, 501) == [500, 501], "a large jump is another stream"


def test_packet_that_is_no_opus_becomes_silence_and_the_next_is_heard():
    async def main() -> None:
        packets = PacketReorderer()
        track = IncomingTrack(packets)
        for number, data in enumerate([b"\xff\xff nonsense", b"", b"\xf8\xff\xfe"]):
            packets.add(packet(number, data))
        samples = np.concatenate([await track.next_samples() for _ in range(3)])
        assert 700 < len(samples) <= 960 and np.abs(samples).max() < 1e-3

    asyncio.run(main())


def test_size_of_a_vp8_frame_is_known_before_it_is_decoded():
    key_frame = bytes([0x10, 0, 0, 0x9D, 0x01, 0x2A]) + (1280).to_bytes(2, "little") + (720).to_bytes(2, "little")
    assert _frame_pixels(key_frame) == 1280 * 720
    assert _frame_pixels(b"\x11" + key_frame[1:]) == 0, "no key frame"
    assert _frame_pixels(b"") == 0


# --- a browser

CONNECT = """(async () => {
  window.pc = new RTCPeerConnection();
  window.events = [];
  const media = await navigator.mediaDevices.getUserMedia({audio: true, video: true});
  media.getTracks().forEach((track) => pc.addTrack(track, media));
  window.channel = pc.createDataChannel('oai-events');
  channel.onmessage = (message) => events.push(JSON.parse(message.data));
  pc.ontrack = ({track}) => {
    window.player = new Audio();
    player.srcObject = new MediaStream([track]);
    player.play();
  };
  await pc.setLocalDescription();
  const headers = {'Content-Type': 'application/sdp'};
  const answer = await fetch('/v1/realtime/calls', {method: 'POST', headers, body: pc.localDescription.sdp});
  await pc.setRemoteDescription({type: 'answer', sdp: await answer.text()});
  return answer.headers.get('Location');
})()"""
AUDIO_STATISTICS = """(async () => {
  for (const stat of (await pc.getStats()).values())
    if (stat.type === 'inbound-rtp' && stat.kind === 'audio') {
      const delayMs = 1000 * stat.jitterBufferDelay / stat.jitterBufferEmittedCount;
      const concealed = stat.concealedSamples / stat.totalSamplesReceived;
      return JSON.stringify([stat.totalAudioEnergy, stat.totalSamplesDuration, delayMs, concealed]);
    }
})()"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_browser_talks_shows_its_camera_hears_and_hangs_up(slots, engine, tmp_path):
    async def test(serving: Serving) -> None:
        flags = "--allow-loopback-in-peer-connection"  # a test machine may have no other network
        async with browser(serving.url, tmp_path, flags) as tab:
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            where = await tab.run(CONNECT)
            session = serving.session()
            assert where == f"/v1/realtime/calls/{session.id}"
            await tab.until("events[0]?.type === 'session.created'")
            async with serving.ticking(0.2):
                await tab.until("events.some((one) => one.type === 'output_audio_buffer.started')")
                before = json.loads(await tab.run(AUDIO_STATISTICS))
                await asyncio.sleep(4)
                after = json.loads(await tab.run(AUDIO_STATISTICS))
            energy, seconds = (b - a for a, b in zip(before[:2], after[:2], strict=True))
            assert 0.15 < np.sqrt(energy / seconds) < 0.31, (
                "the power of the tone, with few gaps even on a busy machine"
            )
            assert after[2] < 500, f"the browser's own buffer has {after[2]:.0f} ms"
            assert (
                session.scheduled.jitter_buffer.missed_samples < session.scheduled.micro_turns * MICRO_TURN_SAMPLES / 2
            ), "the model hears the microphone"
            seen = [input.patches is not None for input in serving.model_inputs()]
            assert np.mean(seen) > 0.5, "the model sees the camera"
            await tab.run("pc.close()")
            await eventually(lambda: session.scheduled.end_reason)
            assert session.scheduled.end_reason is EndReason.LEFT and not tab.errors

    serving(slots, engine, test, model=scripted_tone(300, SPEAKS))


def test_size_of_an_offer_is_counted_in_bytes():
    with pytest.raises(ValueError, match="at most 32768 bytes"):
        peer._check_offer("v=0\r\n" + "\u00e9" * 20_000)
