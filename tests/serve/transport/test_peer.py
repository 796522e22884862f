"""WebRTC over real ports of the loopback: a peer hears what is said, is heard, and costs nothing when it is gone."""

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
from tests.serve.peering import Caller, Mouth, calling, loudest, singing, tone

SPEAKS = {n: (Control.SAY, "yes", Control.SPEAK) for n in range(1, 100)}
MODEL = {"model": "small_test"}
LIVE, REALTIME = TypeAdapter(ServerEvent), TypeAdapter(RealtimeServerEvent)


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    """aioice leaves the loopback out of where a client may be found."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


async def live(serving: Serving, caller: Caller, **session) -> dict:
    """A GPT-Live session of this caller, started."""
    openai = AsyncOpenAI(api_key="any", base_url=f"{serving.url}/v1")
    transport = {"type": "webrtc", "sdp": await caller.offer()}
    created = await openai.live.create(session=MODEL | session, transport=transport)
    assert created.transport.type == "webrtc" and created.session.id == serving.session().id
    await caller.answered(created.transport.sdp)
    return (await caller.until("session.started"))["session"]


async def at_rest(serving: Serving) -> set[asyncio.Task]:
    """The tasks that there are when nothing happens."""
    async with serving.http.get(f"{serving.url}/health"):  # whose connection stays
        return asyncio.all_tasks()


def test_a_peer_is_heard_and_hears_and_its_events_have_no_sound(slots, engine):
    async def test(serving: Serving) -> None:
        async with calling(Mouth(500)) as caller:
            started = await live(serving, caller, instructions="be kind")
            session = serving.session()
            assert started["id"] == session.id and started["instructions"] == "be kind"
            await eventually(lambda: session.scheduled.jitter_buffer.waiting_samples > 2 * MICRO_TURN_SAMPLES)
            heard = np.concatenate(session.scheduled.jitter_buffer.chunks)[-MICRO_TURN_SAMPLES:]
            assert loudest(heard, 16_000) == pytest.approx(500, abs=10)
            assert np.sqrt(np.mean(heard**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)
            async with serving.ticking(0.2):
                await eventually(lambda: len(caller.heard()) > 48_000)
                caller.send("session.commentary.append", content="abc", delegation_id=None, event_id="a")
                assert (await caller.until("session.commentary.appended"))["client_event_id"] == "a"
                said = caller.heard()[-24_000:]
                assert loudest(said, 48_000) == pytest.approx(300, abs=10), "the model's tone"
                assert np.sqrt(np.mean(said**2)) > 0.1, "with few holes, even on a busy machine"
                caller.send("session.input_audio.append", audio="AAAA")
                assert (await caller.until("error"))["error"]["code"] == "invalid_event_order"
                caller.send("session.close")
                await eventually(lambda: session.closing_at)
                session.closing_at -= 10  # it speaks on and on
                closed = await caller.until("session.closed")
            assert closed["reason"] == "close_requested"
            assert "session.output_transcript.delta" in caller.kinds()
            assert "session.output_audio.delta" not in caller.kinds()
            for event in caller.events:
                LIVE.validate_python(event, strict=True)
            await caller.closed()

    serving(slots, engine, test, model=singing(300, SPEAKS))


def test_the_realtime_api_over_webrtc_says_when_its_sound_begins_and_ends(slots, engine):
    script = {n: (Control.SAY, "yes", Control.SPEAK) for n in (2, 3, 4, 20, 21, 22, 23, 24, 25, 26, 27)}

    async def test(serving: Serving) -> None:
        openai = AsyncOpenAI(api_key="any", base_url=f"{serving.url}/v1")
        async with calling(Mouth(500)) as caller:
            session = {"type": "realtime", "model": "small_test", "instructions": "be kind"}
            made = await openai.realtime.calls.create(sdp=await caller.offer(), session=session)
            where = made.response.headers["Location"]
            assert made.response.status_code == 201 and where == f"/v1/realtime/calls/{serving.session().id}"
            await caller.answered(made.text)
            assert (await caller.until("session.created"))["session"]["instructions"] == "be kind"
            await eventually(lambda: serving.session().scheduled.jitter_buffer.waiting_samples)
            caller.send("input_audio_buffer.commit")
            await caller.until("input_audio_buffer.committed")
            await serving.advance(8)
            await caller.until("output_audio_buffer.stopped")
            kinds = caller.kinds()
            order = ("response.content_part.added", "output_audio_buffer.started", "response.done")
            assert [kinds.index(kind) for kind in order] == sorted(kinds.index(kind) for kind in order)
            assert kinds[-1] == "output_audio_buffer.stopped" and "response.output_audio.delta" not in kinds
            await serving.advance(14)
            started = await caller.until("output_audio_buffer.started")
            caller.send("output_audio_buffer.clear")
            cleared = await caller.until("output_audio_buffer.cleared")
            assert cleared["response_id"] == started["response_id"]
            assert [one["response"]["status"] for one in caller.events if one["type"] == "response.done"] == [
                "completed",
                "cancelled",
            ]
            caller.send("output_audio_buffer.clear")  # there is nothing to clear, and nothing wrong
            caller.send("input_audio_buffer.append", audio="AAAA")
            assert (await caller.until("error"))["error"]["code"] == "invalid_event_order"
            for event in caller.events:
                REALTIME.validate_python(event)
            session = serving.session()
            await openai.realtime.calls.hangup(session.id)
            await caller.closed()
            assert session.scheduled.end_reason is EndReason.ASKED
            await eventually(lambda: not serving.manager.sessions)

    serving(slots, engine, test, model=singing(300, script))


def test_a_short_lived_key_is_enough_and_says_what_the_session_is(slots, engine):
    access = Access([Key(name="one", key="sk-first-key", sessions=1)])

    async def test(serving: Serving) -> None:
        openai = AsyncOpenAI(api_key="sk-first-key", base_url=f"{serving.url}/v1")
        secret = await openai.realtime.client_secrets.create(session={"type": "realtime", "instructions": "be brief"})
        url, headers = f"{serving.url}/v1/realtime/calls", {"Authorization": f"Bearer {secret.value}"}
        sdp = {"Content-Type": "application/sdp"}
        async with calling(Mouth(500)) as caller:
            offer = await caller.offer()
            async with serving.http.post(url, data=offer, headers=sdp) as refused:
                assert refused.status == 401
            async with serving.http.post(url, data=offer, headers=headers | sdp) as made:
                assert made.status == 201 and made.content_type == "application/sdp"
                await caller.answered(await made.text())
            created = await caller.until("session.created")
            assert created["session"]["instructions"] == "be brief"
            for data in (offer, "nonsense"):  # which nobody looks at
                async with serving.http.post(url, data=data, headers=headers | sdp) as refused:
                    assert refused.status == 429 and int(refused.headers["Retry-After"]) > 0
            session = serving.session()
            async with serving.http.post(f"{url}/{session.id}/hangup") as refused:
                assert refused.status == 401
            await caller.close()  # who closes is done
            await eventually(lambda: session.scheduled.end_reason is EndReason.LEFT)

    serving(slots, engine, test, access=access, model=scripted({}))


def test_a_peer_that_vanishes_comes_back_over_a_websocket(slots, engine, monkeypatch):
    monkeypatch.setattr(connection, "_SILENT_S", 0.5)

    async def test(serving: Serving) -> None:
        async with calling(Mouth(500)) as caller:
            started = await live(serving, caller)
            session = serving.session()
            assert session.scheduled.attached
            await serving.advance(2)
            caller.vanish()
            await eventually(lambda: not session.scheduled.attached)
            assert not session.scheduled.end_reason
            back = await serving.open()
            resume = {"session_id": session.id, "resume_token": started["resume"]["token"], "after": 0}
            await back.send("session.resume", **resume)
            await back.until("session.resumed")
            before = session.scheduled.micro_turns
            await serving.advance(2)
            sound = await back.until("session.output_audio.delta")
            assert sound["start_ms"] == 200 * (before + 1), "and from now on its sound is in the events"
            await back.send("session.input_audio.append", audio="AAAAAAAA")
            await back.send("session.close")
            async with serving.ticking():
                assert await back.closed() == 1000
            assert not back.events_of("error")

    serving(slots, engine, test, model=scripted({}))


def test_a_peer_that_does_not_come_back_is_ended(slots, engine, monkeypatch):
    monkeypatch.setattr(connection, "_SILENT_S", 0.5)

    async def test(serving: Serving) -> None:
        async with calling(Mouth(500)) as caller:
            await live(serving, caller)
            session = serving.session()
            caller.vanish()
            await eventually(lambda: not session.scheduled.attached)
            await serving.advance(160)
            await eventually(lambda: not serving.manager.sessions)
            assert session.scheduled.end_reason is EndReason.GONE and slots.live == {}

    serving(slots, engine, test, model=scripted({}))


def test_a_peer_that_says_nothing_is_there_as_long_as_it_answers(slots, engine, monkeypatch):
    monkeypatch.setattr(connection, "_WATCH_S", 0.05)
    monkeypatch.setattr(connection, "_SILENT_S", 0.5)
    monkeypatch.setattr("aioice.ice.CONSENT_INTERVAL", 0.1)

    async def test(serving: Serving) -> None:
        async with calling() as caller:  # a data channel, no track
            await live(serving, caller)
            await asyncio.sleep(1.5)
            assert serving.session().scheduled.attached
            caller.vanish()
            await eventually(lambda: not serving.session().scheduled.attached)

    serving(slots, engine, test)


@pytest.mark.parametrize("flood", ["messages", "parts", "sources"])
def test_a_peer_that_floods_is_given_up_and_nothing_of_it_waits(slots, engine, monkeypatch, flood):
    if flood == "messages":  # more than are taken
        monkeypatch.setattr(connection, "_MESSAGES_PER_SECOND", 1)
        monkeypatch.setattr(connection, "_MESSAGES_BURST", 10)

    async def test(serving: Serving) -> None:
        async with calling(Mouth(500)) as caller:
            await live(serving, caller)
            line = serving.session().connection.transport
            if flood == "sources":
                (sender,) = caller.pc.getSenders()
                for source in range(8):  # after its own
                    assert serving.session().scheduled.attached, "eight are not too many"
                    sender._ssrc = source + 1
                    await asyncio.sleep(0.1)
                await eventually(lambda: not serving.session().scheduled.attached)
                return
            if flood == "parts":  # that take longer to put together than they may
                line._busy_s.burst = 1e-4
            for _ in range(1000):
                caller.send("session.input_audio.mute")
            async with serving.ticking():
                await eventually(lambda: not serving.session().scheduled.attached)
            assert not line._inbox and not line.left
            async with serving.http.get(f"{serving.url}/health") as health:
                assert health.status == 200

    serving(slots, engine, test)


def test_a_peer_that_takes_less_than_an_event_is_given_up_and_it_is_logged(slots, engine, caplog):
    async def test(serving: Serving) -> None:
        async with calling() as caller:
            offer = re.sub("max-message-size:.*", "max-message-size:300", await caller.offer())
            body = {"session": MODEL, "transport": {"type": "webrtc", "sdp": offer}}
            async with serving.http.post(f"{serving.url}/v1/live/sessions", json=body) as made:
                await caller.answered((await made.json())["transport"]["sdp"])
            await caller.closed()
            assert not serving.session().scheduled.attached

    serving(slots, engine, test)
    assert "a peer does not take an event of" in caplog.text


def test_who_comes_over_ipv4_to_a_server_of_both_families_is_answered_there(monkeypatch):
    answered = []

    async def offered(sdp: str, address: str, sees: bool) -> None:
        answered.append(address)

    monkeypatch.setattr(peer.Peer, "from_offer", offered)
    for ours in ("::ffff:10.0.0.7", "10.0.0.7", "2001:db8::7"):
        transport = SimpleNamespace(get_extra_info=lambda name, ours=ours: (ours, 8080))
        asyncio.run(signalling.open_peer(cast(Any, SimpleNamespace(transport=transport)), "", False))
    assert answered == ["10.0.0.7", "10.0.0.7", "2001:db8::7"]


def test_an_offer_that_comes_to_nothing_frees_its_slot_and_leaves_nothing(slots, engine):
    async def test(serving: Serving) -> None:
        async with calling(Mouth(500)) as caller:
            offer = await caller.offer()
        before = await at_rest(serving)
        body = {"session": MODEL, "transport": {"type": "webrtc", "sdp": offer}}
        async with serving.http.post(f"{serving.url}/v1/live/sessions", json=body) as made:
            assert made.status == 201
        session = serving.session()
        assert not session.scheduled.attached, "it stands still until there is someone"
        await eventually(lambda: session.scheduled.end_reason)
        await serving.advance()
        await eventually(lambda: not serving.manager.sessions and asyncio.all_tasks() <= before)
        assert session.scheduled.micro_turns == 0

    serving(slots, engine, test, limits=Limits(first_message_s=0.3), model=scripted({}))


def test_offers_that_cannot_be_answered_are_refused_in_the_apis_words(slots, engine):
    async def test(serving: Serving) -> None:
        async with calling(Mouth(500)) as caller:
            offer = await caller.offer()
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


def test_a_camera_is_seen_once_a_micro_turn(slots, engine):
    async def test(serving: Serving) -> None:
        async with calling(Mouth(500), VideoStreamTrack()) as caller:
            await live(serving, caller)
            session = serving.session()
            seen = []
            for _ in range(4):
                await eventually(lambda: session.scheduled.patches is not None)
                seen.append(session.scheduled.patches)
                await serving.advance()
            assert all(one.shape[1:] == (2, 40, 40, 3) for one in seen)
            given = [one.patches is not None for one in serving.model_inputs()]
            assert given == [True] * 4

    serving(slots, engine, test, model=scripted({}))


def test_where_the_extra_is_not_installed_it_is_said(slots, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiortc", None)
    for name in ("peer", "tracks"):
        monkeypatch.delitem(sys.modules, f"jaxtml.serve.transport.{name}", raising=False)
        monkeypatch.delattr(jaxtml.serve.transport, name, raising=False)

    async def test(serving: Serving) -> None:
        body = {"session": MODEL, "transport": {"type": "webrtc", "sdp": "v=0"}}
        async with serving.http.post(f"{serving.url}/v1/live/sessions", json=body) as refused:
            assert refused.status == 501
            error = (await refused.json())["error"]
            assert error["code"] == "webrtc_not_installed" and "jaxtml[webrtc]" in error["message"]

    serving(slots, engine, test, model=scripted({}))


# --- the rules of the tracks


def pieces(voice: OutgoingTrack, count: int) -> list[bool]:
    """Which of the next 20 ms have sound."""
    return [bool(voice.next_samples().any()) for _ in range(count)]


def turn(loud: bool = True) -> np.ndarray:
    return tone(300, 1, MICRO_TURN_SAMPLES, 16_000) * loud


def test_what_is_said_waits_for_a_lead_and_goes_on_after_silence_where_it_was_late():
    voice = OutgoingTrack()
    assert pieces(voice, 3) == [False] * 3
    voice.put(turn())
    assert pieces(voice, 10) == [False] * 2 + [True] * 8
    voice.put(turn())
    assert pieces(voice, 14) == [True] * 12 + [False] * 2, "it ran dry"
    voice.put(turn())
    assert pieces(voice, 12) == [False] * 2 + [True] * 10


def test_no_more_than_a_micro_turn_of_speech_and_the_lead_of_silence_waits_for_the_next():
    voice = OutgoingTrack()
    for _ in range(5):
        voice.put(turn())
    assert len(voice.waiting) == 2 * MICRO_TURN_SAMPLES
    voice.clear()
    for _ in range(5):
        voice.put(turn(loud=False))
    assert len(voice.waiting) == MICRO_TURN_SAMPLES + 640


def packet(number: int, data: bytes | None = None) -> RtpPacket:
    made = RtpPacket(sequence_number=number % 2**16)
    made._data = str(number).encode() if data is None else data
    return made


@pytest.mark.parametrize("first", [10, 65_533])
def test_packets_are_put_in_order_and_those_that_are_lost_are_not_waited_for_long(first):
    arrivals = PacketReorderer()

    def got(*ahead: int) -> list[int | None]:
        for one in ahead:
            assert arrivals.add(packet(first + one)) == (False, None)
        found = [None if data is None else int(data) - first for data in arrivals.ready]
        arrivals.ready.clear()
        return found

    assert got(0, 1, 3) == [0, 1]
    assert got(2, 2, 1) == [2, 3]
    assert got(5, 6) == [None, 5, 6]
    assert got(4, 7) == [7], "too late is too late"
    assert got(500, 501) == [500, 501], "another stream"


def test_what_is_no_opus_is_silence_and_what_follows_is_heard():
    async def main() -> None:
        arrivals = PacketReorderer()
        ear = IncomingTrack(arrivals)
        for number, data in enumerate([b"\xff\xff nonsense", b"", b"\xf8\xff\xfe"]):
            arrivals.add(packet(number, data))
        found = np.concatenate([await ear.next_samples() for _ in range(3)])
        assert 700 < len(found) <= 960 and np.abs(found).max() < 1e-3

    asyncio.run(main())


def test_a_picture_says_its_size_before_it_is_decoded():
    key = bytes([0x10, 0, 0, 0x9D, 0x01, 0x2A]) + (1280).to_bytes(2, "little") + (720).to_bytes(2, "little")
    assert _frame_pixels(key) == 1280 * 720 and _frame_pixels(b"\x11" + key[1:]) == 0 and _frame_pixels(b"") == 0


# --- a browser

CALLS = """(async () => {
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
HEARD = """(async () => {
  for (const one of (await pc.getStats()).values())
    if (one.type === 'inbound-rtp' && one.kind === 'audio') {
      const waits = 1000 * one.jitterBufferDelay / one.jitterBufferEmittedCount;
      const made = one.concealedSamples / one.totalSamplesReceived;
      return JSON.stringify([one.totalAudioEnergy, one.totalSamplesDuration, waits, made]);
    }
})()"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_talks_is_seen_hears_and_hangs_up(slots, engine, tmp_path):
    async def test(serving: Serving) -> None:
        flags = "--allow-loopback-in-peer-connection"  # where there is no other network
        async with browser(serving.url, tmp_path, flags) as tab:
            await tab.until("document.getElementById('state')?.textContent === 'Ready'")
            where = await tab.run(CALLS)
            session = serving.session()
            assert where == f"/v1/realtime/calls/{session.id}"
            await tab.until("events[0]?.type === 'session.created'")
            async with serving.ticking(0.2):
                await tab.until("events.some((one) => one.type === 'output_audio_buffer.started')")
                before = json.loads(await tab.run(HEARD))
                await asyncio.sleep(4)
                after = json.loads(await tab.run(HEARD))
            energy, seconds = (b - a for a, b in zip(before[:2], after[:2], strict=True))
            assert 0.15 < np.sqrt(energy / seconds) < 0.31, (
                "the peaks of the tone, with few holes even if it is busy here"
            )
            assert after[2] < 500, f"the browser's own buffer has {after[2]:.0f} ms"
            assert (
                session.scheduled.jitter_buffer.missed_samples < session.scheduled.micro_turns * MICRO_TURN_SAMPLES / 2
            ), "its microphone is heard"
            seen = [one.patches is not None for one in serving.model_inputs()]
            assert np.mean(seen) > 0.5, "and its camera"
            await tab.run("pc.close()")
            await eventually(lambda: session.scheduled.end_reason)
            assert session.scheduled.end_reason is EndReason.LEFT and not tab.errors

    serving(slots, engine, test, model=singing(300, SPEAKS))
