"""GPT-Live over a real socket: a client gets what the model says, whatever happens to its connection.

The server (`tests.serve.serving`) has no real time. The test runs its ticks (200 ms of every session) one by one, so a
session runs as fast as the test wants.
"""

from __future__ import annotations

import asyncio
import base64
import json

import numpy as np
import pytest
from openai import AsyncOpenAI
from openai.types.live import ServerEvent
from pydantic import TypeAdapter

from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.manager import Limits
from jaxtml.serve.transport.sound import SoundFormat
from jaxtml.session.converse import converse
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control
from tests.serve.serving import Client, Serving, eventually, jpeg, serving
from tests.serve.stepped import scripted

PCM = SoundFormat("pcm", 16_000)
MICRO_TURNS = 14
DELTAS = ("output_audio", "input_transcript", "output_transcript")
OPENAI_EVENT = TypeAdapter(ServerEvent)  # refuses what is no event of OpenAI's API


def as_base64(sound: bytes) -> str:
    return base64.b64encode(sound).decode()


async def send_sound(serving: Serving, client: Client, sound: bytes) -> None:
    """Sends `sound`, 16-bit PCM at 16 kHz, in packets of 20 ms. Makes a tick after the packets of each micro-turn."""
    size = 2 * MICRO_TURN_SAMPLES
    for start in range(0, len(sound), size):
        before = serving.session().scheduled.jitter_buffer.waiting_samples
        for at in range(start, start + size, size // 10):
            await client.send("session.input_audio.append", audio=as_base64(sound[at : at + size // 10]))
        await eventually(
            lambda before=before: (
                serving.session().scheduled.jitter_buffer.waiting_samples == before + MICRO_TURN_SAMPLES
            )
        )
        await serving.advance()


def expected_output(engine, sound: bytes, seed: int) -> tuple[list[bytes], str, str]:
    """Returns what `converse` makes of `sound`: its speech by micro-turn, the words heard and the words said."""
    waves, heard, text = [], "", ""
    for outputs, (record,) in converse(engine, [PCM.decode(sound)], seed=seed):
        waves.append(PCM.encode(outputs.wave[0]))
        heard, text = heard + record.heard, text + record.text
    return waves, heard, text


def received_output(events: list[dict]) -> tuple[list[bytes], str, str]:
    """Returns the same as `expected_output`, from the events that a client received."""
    of = {kind: [e["delta"] for e in events if e["type"] == f"session.{kind}.delta"] for kind in DELTAS}
    waves = [base64.b64decode(delta) for delta in of["output_audio"]]
    return waves, "".join(of["input_transcript"]), "".join(of["output_transcript"])


@pytest.fixture(scope="module")
def sound(wave) -> bytes:
    return PCM.encode(wave)


def test_client_gets_the_speech_and_words_of_converse_with_their_micro_turns(slots, engine, sound):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        seed = serving.session().scheduled.seed
        await send_sound(serving, client, sound)
        await client.send("session.close", event_id="bye")
        async with serving.ticking():
            assert await client.closed() == 1000
        waves, heard, text = received_output(client.events)
        expected = expected_output(engine, sound, seed)
        assert waves[:MICRO_TURNS] == expected[0] and heard.startswith(expected[1]) and text.startswith(expected[2])
        assert expected[1] and expected[2], "without words, this test would prove nothing"
        for event in client.events_of("session.input_transcript.delta") + client.events_of(
            "session.output_transcript.delta"
        ):
            assert event["start_ms"] % 200 == 0 and event["end_ms"] == event["start_ms"] + 200
        assert [event["sequence_number"] for event in client.events] == list(range(1, len(client.events) + 1))
        closed = client.events[-1]
        assert closed["reason"] == "close_requested" and closed["usage"]["seconds"] == len(waves) // 5
        for event in client.events:
            OPENAI_EVENT.validate_python(event, strict=True)

    serving(slots, engine, test)


def test_openai_client_starts_talks_appends_mutes_updates_and_closes(slots, engine, sound):
    async def test(serving: Serving) -> None:
        openai = AsyncOpenAI(api_key="any", base_url=f"{serving.url}/v1")
        assert [model.id async for model in openai.models.list()] == ["small_test"]
        assert (await openai.models.retrieve("small_test")).owned_by == "jaxtml"
        async with openai.live.connect() as live:
            await live.session.start(session={"model": "small_test", "instructions": "be kind"})
            started = await live.recv()
            assert started.type == "session.started" and started.session.audio.format.rate == 24_000
            assert started.session.instructions == "be kind"
            await live.session.input_audio.append(audio=as_base64(sound[:9_600]))
            await live.session.thinking.append(content="the number", delegation_id=None, event_id="thought")
            await live.session.input_audio.mute(event_id="hush")
            await live.session.input_audio.unmute()
            await live.session.update(session={"delegation": {"type": "client"}}, event_id="changed")
            kinds = {}
            while "session.updated" not in kinds:
                event = await live.recv()
                kinds[event.type] = event
            assert kinds["session.input_audio.muted"].client_event_id == "hush"
            assert kinds["session.updated"].client_event_id == "changed"
            async with serving.ticking():
                while "session.thinking.appended" not in kinds:
                    event = await live.recv()
                    kinds[event.type] = event
            thought = kinds["session.thinking.appended"]
            assert thought.client_event_id == "thought" and thought.start_ms % 200 == 0
            marks = [one.mark for one in serving.model_inputs() if one.text]
            assert set(marks) == {Control.BACKGROUND} and len(marks) > 1
            await live.session.close()
            async with serving.ticking():
                while event.type != "session.closed":
                    event = await live.recv()
            assert event.reason == "close_requested"

    serving(slots, engine, test)


@pytest.mark.parametrize("cut", ["aborted", "silently"])
def test_client_that_lost_its_connection_resumes_without_losing_an_event(slots, engine, sound, cut):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session, half = serving.session(), 6 * 2 * MICRO_TURN_SAMPLES
        for event_id in ("first", "last", None):
            await client.send("session.input_audio.unmute", event_id=event_id)
        await send_sound(serving, client, sound[:half])
        await client.until("session.output_audio.delta")  # later events are on their way and get lost
        last = client.events[-1]["sequence_number"]
        if cut == "aborted":
            await client.cut_off(session)
            ticks = len(serving.model.ticks)
            await serving.advance(20)
            assert len(serving.model.ticks) == ticks, "the session is paused"
        back = await serving.open()
        resume = {"session_id": session.id, "resume_token": client.started["resume"]["token"], "after": last}
        await back.send("session.resume", event_id="again", **resume)
        resumed = await back.event()
        assert resumed["type"] == "session.resumed" and resumed["client_event_id"] == "again"
        assert (resumed["input_audio_bytes"], resumed["last_client_event_id"]) == (half, "last")
        await send_sound(serving, back, sound[half:])
        while len(received_output(back.events)[0]) + 1 < MICRO_TURNS:
            await back.event()
        events = client.events + back.events[1:]
        assert [event["sequence_number"] for event in events] == list(range(1, len(events) + 1))
        assert received_output(events) == expected_output(engine, sound, session.scheduled.seed)
        if cut == "silently":
            assert await client.closed() == 1008, "the server closes the old connection"
        assert serving.counted("duplex_resume_total", result="resumed") == 1

    serving(slots, engine, test)


def test_refused_resume_names_its_reason(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session, token = serving.session(), client.started["resume"]["token"]
        for name, secret, after, code in (
            ("sess_other", token, 0, "session_not_found"),
            (session.id, "guess", 0, "invalid_resume_token"),
            (session.id, token, 99, "resync_required"),
            (session.id, token, -1, "resync_required"),
        ):
            other = await serving.open()
            await other.send("session.resume", session_id=name, resume_token=secret, after=after)
            assert (await other.event())["error"]["code"] == code
            assert await other.closed() in (1008,)
        assert session.scheduled.attached and not session.scheduled.end_reason
        assert token not in str(serving.metrics.text()), "metrics contain no secrets"

    serving(slots, engine, test)


def test_session_ends_if_its_client_does_not_come_back_in_time(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        await client.cut_off(session)
        await serving.advance(160)
        await eventually(lambda: not serving.manager.sessions)
        assert session.scheduled.end_reason is EndReason.GONE and slots.live == {}
        other = await serving.open()
        await other.send(
            "session.resume", session_id=session.id, resume_token=client.started["resume"]["token"], after=0
        )
        assert (await other.event())["error"]["code"] == "session_not_found"

    serving(slots, engine, test)


def test_client_that_asked_to_close_stays_muted(slots, engine, sound):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        await send_sound(serving, client, sound[:6_400])
        await client.send("session.close")
        await client.send("session.input_audio.unmute")
        await client.until("session.input_audio.muted")
        waiting, taken = session.scheduled.jitter_buffer.waiting_samples, session.protocol.intake.received_bytes
        await client.send("session.input_audio.append", audio=as_base64(sound[:6_400]))
        await eventually(lambda: session.protocol.intake.received_bytes > taken)
        assert session.scheduled.jitter_buffer.waiting_samples == waiting
        async with serving.ticking():
            await client.until("session.closed")
        assert "session.input_audio.unmuted" not in [event["type"] for event in client.events]

    serving(slots, engine, test, model=scripted({}))


def test_session_ends_when_its_client_closes_the_connection(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        await client.ws.close(code=1000)
        await eventually(lambda: session.scheduled.end_reason is EndReason.LEFT)
        await serving.advance()
        await eventually(lambda: not serving.manager.sessions)
        assert json.loads(session.replay_buffer.frames[-1])["reason"] == "remote_hangup"

    serving(slots, engine, test)


DELEGATION = "delegation_id"
# Message, expected error code (None: no error) and expected `param`.
WRONG = [
    (b"", "invalid_json", None),
    (b"{", "invalid_json", None),
    (b"\xff\xfe", "invalid_json", None),
    (b"[]", "invalid_json", None),
    (b"[" * 10_000, "invalid_json", None),
    (b'{"type": "session.fly"}', "invalid_event_type", "type"),
    (b'{"type": "response.create"}', "unsupported_event", "type"),
    (b'{"type": "session.start", "session": {"model": "small_test"}}', "invalid_event_order", "type"),
    (b'{"type": "session.input_audio.append"}', "missing_required_parameter", "audio"),
    (b'{"type": "session.input_audio.append", "audio": "%%%"}', "invalid_value", "audio"),
    (b'{"type": "session.input_audio.append", "audio": "AAA="}', None, None),
    (b'{"type": "session.input_audio.append", "audio": 7}', "invalid_value", "audio"),
    (b'{"type": "session.input_audio.append", "audio": "AAA=", "rate": 8000}', "unknown_parameter", "rate"),
    (b'{"type": "session.thinking.append", "content": "x"}', "missing_required_parameter", "delegation_id"),
    (b'{"type": "session.thinking.append", "content": "", "delegation_id": null}', "invalid_value", "content"),
    (b'{"type": "session.thinking.append", "content": "x", "delegation_id": "d"}', "delegation_not_found", DELEGATION),
    (b'{"type": "session.input_image.append", "image": "AAAA"}', "invalid_value", None),
    (b'{"type": "session.update", "session": {"voice": "b"}}', "unknown_parameter", "session.voice"),
    (b'{"type": "session.update", "session": {"triggers": [{}]}}', "unsupported_parameter", "session.triggers"),
]  # fmt: skip


def test_wrong_messages_are_named_and_disturb_no_other_session(slots, engine, sound):
    async def test(serving: Serving) -> None:
        bad, good = await serving.start(), None
        for data, code, param in WRONG:
            await bad.ws.send_bytes(data)
            if code is None:
                continue
            error = (await bad.until("error"))["error"]
            assert (error["code"], error.get("param")) == (code, param), data
            assert error["type"] == "invalid_request_error" and error["message"]
        long = "word " * 800
        await bad.send("session.commentary.append", content=long, delegation_id=None, event_id="long")
        error = (await bad.until("error"))["error"]
        assert error["code"] == "string_above_max_length" and error["client_event_id"] == "long"
        assert serving.counted("duplex_malformed_messages_total", protocol="live") == len(WRONG)
        for event in bad.events:
            OPENAI_EVENT.validate_python(event, strict=True)
        (first,) = serving.manager.sessions.values()
        good = await serving.start()
        session = next(one for one in serving.manager.sessions.values() if one is not first)
        for at in range(0, len(sound), 2 * MICRO_TURN_SAMPLES):
            await bad.ws.send_bytes(b"noise")
            await good.send("session.input_audio.append", audio=as_base64(sound[at : at + 2 * MICRO_TURN_SAMPLES]))
            await eventually(lambda: session.scheduled.jitter_buffer.waiting_samples)
            await serving.advance()
        while len(received_output(good.events)[0]) < MICRO_TURNS:
            await good.event()
        waves, heard, text = received_output(good.events)
        expected = expected_output(engine, sound, session.scheduled.seed)
        assert (heard, text) == expected[1:]
        # Two sessions run in a larger batch bucket than the single session of `converse`. There the same numbers are
        # summed in another order; with one seed in sixty that changes a sampled bin.
        np.testing.assert_allclose(PCM.decode(b"".join(waves)), PCM.decode(b"".join(expected[0])), atol=1e-3)

    serving(slots, engine, test)


@pytest.mark.parametrize(
    ("session", "code", "param"),
    [
        ({"model": "gpt-live-1"}, "model_not_found", "session.model"),
        ({"model": "small_test", "store": True}, "unsupported_parameter", "session.store"),
        ({"model": "small_test", "delegation": {"type": "responses"}}, "unsupported_value", "session.delegation.type"),
        ({"model": "small_test", "instructions": "x " * 20_000}, "string_above_max_length", "session.instructions"),
        ({"model": "small_test", "temperature": 1}, "unknown_parameter", "session.temperature"),
        (
            {"model": "small_test", "audio": {"format": {"type": "audio/pcm", "rate": 44100}}},
            "invalid_value",
            "session.audio.format.rate",
        ),
        (
            {"model": "small_test", "input": [{"role": "user", "content": [{"text": ""}]}]},
            "invalid_value",
            "session.input",
        ),
    ],
)  # fmt: skip
def test_impossible_session_is_refused_and_the_client_may_ask_again(slots, engine, session, code, param):
    async def test(serving: Serving) -> None:
        client = await serving.open()
        await client.send("session.start", event_id="first", session=session)
        error = (await client.event())["error"]
        assert (error["code"], error["param"], error["client_event_id"]) == (code, param, "first")
        assert not serving.manager.sessions
        await client.send("session.start", session={"model": "small_test"})
        assert (await client.event())["type"] == "session.started"

    serving(slots, engine, test)


def test_full_server_says_when_to_come_again_and_draining_server_warns_all_clients(slots, engine):
    async def test(serving: Serving) -> None:
        clients = [await serving.start() for _ in range(4)]
        late = await serving.open()
        await late.send("session.start", session={"model": "small_test"})
        error = (await late.event())["error"]
        assert error["code"] == "server_full" and error["retry_after_s"] >= 1 and error["type"] == "rate_limit_error"
        assert await late.closed() == 1013
        draining = asyncio.create_task(
            serving.manager.drain(3)
        )  # s; enough for a client to close its session, even on a busy machine
        for client in clients:
            info = await client.until("info")
            assert info["code"] == "going_away" and 0 < info["time_left_ms"] <= 3000
        async with serving.http.get(f"{serving.url}/ready") as refused:
            assert refused.status == 503 and int(refused.headers["Retry-After"]) >= 1
        async with serving.http.get(f"{serving.url}/health") as health:
            assert health.status == 200
        await clients[0].send("session.close")
        async with serving.ticking():
            assert (await clients[0].until("session.closed"))["reason"] == "close_requested"
            await draining
        for client in clients[1:]:
            assert (await client.until("session.closed"))["reason"] == "expired"
            assert await client.closed() == 1012
        assert not serving.manager.sessions

    serving(slots, engine, test)


def test_session_warns_its_client_before_the_time_limit_ends_it(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        async with serving.ticking():
            await eventually(lambda: not serving.manager.sessions)
        assert (await client.until("info"))["code"] == "going_away"
        assert (await client.until("session.closed"))["reason"] == "expired"

    serving(slots, engine, test, limits=Limits(session_s=1.0))


DELEGATES = scripted(
    {
        2: (Control.SAY, " one moment", Control.DELEGATE, " the number", Control.LISTEN),
        3: (Control.SAY, " forty two", Control.END, Control.LISTEN),
    }
)


def test_delegation_goes_to_the_client_and_its_answer_becomes_background_text(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        await serving.advance(3)
        created = await client.until("session.delegation.created")
        assert created["offset_ms"] == 600 and created["delegation"]["target"] == "client"
        assert created["delegation"]["task"] == "the number forty two"
        assert client.events_of("session.output_transcript.delta")[-1]["delta"].strip() == "one moment"
        answer = {"content": "the sky", "delegation_id": created["delegation"]["id"]}
        for n in range(2):  # a second part of the answer
            await client.send("session.commentary.append", event_id=f"answer{n}", **answer)
        session = serving.session()
        await eventually(lambda: len(session.scheduled.text_queue) >= 2)
        async with serving.ticking():
            await client.until("session.commentary.appended")
        given = [one for one in serving.model_inputs() if one.text]
        assert given[0].mark is Control.BACKGROUND
        tokens = [token for one in given for token in one.text]
        expected = engine.codec.encode("the sky")
        assert tokens[: len(expected)] == expected and all(len(one.text) < 4 for one in given)
        assert serving.counted("duplex_delegation_duration_seconds_count") == 1

    serving(slots, engine, test, model=DELEGATES)


def test_text_history_and_pictures_reach_the_model_at_the_edge_of_a_micro_turn(slots, engine):
    picture = as_base64(jpeg(200))

    async def test(serving: Serving) -> None:
        history = [
            {"role": "user", "content": [{"text": "a sky", "type": "input_text"}]},
            {"role": "assistant", "content": [{"text": "forty", "type": "output_text"}]},
        ]
        client = await serving.start(input=history)
        await client.send("session.input_image.append", image=picture)
        await client.send("session.input_text.append", content="café", event_id="typed")
        await eventually(lambda: serving.session().scheduled.patches is not None)
        async with serving.ticking():
            await client.until("session.input_text.appended")
            await eventually(lambda: not serving.session().scheduled.text_queue)
        given = serving.model_inputs()
        assert given[0].patches is not None and given[0].patches.shape[1:] == (2, 40, 40, 3)
        texts = [(one.mark, token) for one in given for token in one.text]
        # What the user types now goes before the history, which keeps its order.
        expected = [(Control.TYPED, "café"), (Control.TYPED, "a sky"), (Control.BACKGROUND, "forty")]
        assert texts == [(mark, token) for mark, text in expected for token in engine.codec.encode(text)]
        for _ in range(25):
            await client.send("session.input_image.append", image=picture)
        assert (await client.until("error"))["error"]["code"] == "rate_limit_exceeded"

    serving(slots, engine, test)


def test_sideband_hears_both_voices_and_directs_the_session(slots, engine, sound):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        openai = AsyncOpenAI(api_key="any", base_url=f"{serving.url}/v1")
        async with openai.live.sideband.connect(session_id=session.id) as beside:
            await eventually(lambda: session.protocol.sidebands)
            await beside.session.input_audio.mute()
            assert (await beside.recv()).type == "session.input_audio.muted"
            assert (await client.until("session.input_audio.muted"))["sequence_number"] == 2
            await client.send("session.input_audio.append", audio=as_base64(sound[: 2 * MICRO_TURN_SAMPLES]))
            reflected = await beside.recv()
            assert reflected.type == "session.input_audio.append", (
                "the sideband hears the user even while the session is muted"
            )
            assert len(base64.b64decode(reflected.audio)) == 9_600
            await serving.advance()
            while (event := await beside.recv()).type != "session.output_audio.delta":
                pass
            assert (event.start_ms, event.end_ms, len(base64.b64decode(event.delta))) == (200, 400, 9_600)
            assert session.scheduled.jitter_buffer.missed_samples == MICRO_TURN_SAMPLES, "the model heard silence"
            await beside.send({"type": "session.input_audio.append", "audio": ""})
            while (event := await beside.recv()).type != "error":
                pass
            assert event.error.code == "invalid_event_order" and not client.events_of("error")
            await beside.session.close()
            async with serving.ticking():
                while (event := await beside.recv()).type != "session.closed":
                    pass
        assert (await client.until("session.closed"))["reason"] == "close_requested"
        async with serving.http.get(f"{serving.url}/v1/live/sessions/{session.id}/attach") as gone:
            assert gone.status == 404

    serving(slots, engine, test)


def test_client_that_lost_its_connection_resumes_while_the_server_drains(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        session = serving.session()
        draining = asyncio.create_task(serving.manager.drain(15))
        await client.until("info")
        await client.cut_off(session)
        back = await serving.open()
        token = client.started["resume"]["token"]
        await back.send("session.resume", session_id=session.id, resume_token=token, after=0)
        assert (await back.until("info"))["code"] == "going_away"
        late = await serving.open()
        await late.send("session.start", session={"model": "small_test"})
        assert (await late.event())["error"]["code"] == "draining" and await late.closed() == 1013
        async with serving.ticking():
            await back.send("session.close")
            await back.until("session.closed")
            await draining

    serving(slots, engine, test)
