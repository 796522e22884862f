"""OpenAI's Realtime API, event by event: with turn detection, a response begins and ends with the model's speech.

In each micro-turn (200 ms) the model decides whether it speaks. While it speaks, its gate is open.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

from jaxtml.serve.protocols.realtime.function_calls import function_call
from jaxtml.serve.protocols.realtime.messages import Tool
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.manager import Limits
from jaxtml.stream.tokens import Control
from tests.serve.serving import Client, Serving, eventually, forget_text, serving, unread
from tests.serve.stepped import scripted

OPENAI_EVENT = TypeAdapter(RealtimeServerEvent)
HEARD, SAY, SPEAK, LISTEN = Control.HEARD, Control.SAY, Control.SPEAK, Control.LISTEN
# The user says two words, the model answers in two micro-turns, and later the user says one more word.
TALK = scripted(
    {
        2: (HEARD, " what", LISTEN),
        3: (HEARD, " number", LISTEN),
        5: (SAY, " it is", SPEAK),
        6: (SAY, " forty", SPEAK),
        12: (HEARD, " thanks", LISTEN),
    }
)
RESPONSE_EVENTS = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
    "rate_limits.updated",
]
USER_TURN_EVENTS = [
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.input_audio_transcription.delta",
    "conversation.item.input_audio_transcription.completed",
    "conversation.item.done",
]
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}


EMPTY = {"type": "message", "role": "user", "content": [{"type": "input_text"}]}


def session_update(**session: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "realtime", **session}}


async def open_session(serving: Serving, **session: Any) -> Client:
    client = await serving.open("/v1/realtime?model=small_test")
    client.started = (await client.until("session.created"))["session"]
    if session:
        await client.send("session.update", session={"type": "realtime", **session})
        await client.until("session.updated")
    return client


def event_types(client: Client) -> list[str]:
    return [event["type"] for event in client.events]


def check_events(client: Client) -> None:
    """Asserts that every event is an event of OpenAI's API and that no event is missing."""
    for event in client.events:
        OPENAI_EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in client.events] == list(range(1, len(client.events) + 1))


def test_gate_opens_and_ends_a_response_and_heard_words_become_a_user_turn(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await serving.advance(20)
        while event_types(client).count(USER_TURN_EVENTS[-1]) < 3:  # items of the user, the model and the user
            await client.event()
        assert event_types(client)[1:] == USER_TURN_EVENTS + RESPONSE_EVENTS + USER_TURN_EVENTS
        check_events(client)
        started, stopped = (client.events_of(kind)[0] for kind in USER_TURN_EVENTS[:2])
        assert (started["audio_start_ms"], stopped["audio_end_ms"]) == (200, 600)
        assert [event["transcript"].strip() for event in client.events_of(USER_TURN_EVENTS[5])] == [
            "what number",
            "thanks",
        ]
        done = client.events_of("response.done")[0]["response"]
        assert done["status"] == "completed"
        assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": " it is forty"}]
        sound = [base64.b64decode(event["delta"]) for event in client.events_of("response.output_audio.delta")]
        assert [len(one) for one in sound] == 4 * [9_600] and any(map(any, sound))
        items = client.events_of("conversation.item.added")
        assert items[1]["previous_item_id"] == items[0]["item"]["id"]

    serving(slots, engine, test, model=TALK)


def test_interruption_is_announced_when_the_model_yields(slots, engine):
    talk = {
        2: (SAY, " it is", SPEAK),
        3: (HEARD, " no", SAY, " a", SPEAK),
        4: (HEARD, " wait", SPEAK),
        12: (SAY, " yes", SPEAK),
        13: (HEARD, " mhm", SPEAK),
        **{at: (SAY, " a", SPEAK) for at in range(14, 20)},
    }

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await serving.advance(30)
        while event_types(client).count("response.done") < 2 or event_types(client)[-1] != USER_TURN_EVENTS[-1]:
            await client.event()
        check_events(client)
        first, second = (event["response"] for event in client.events_of("response.done"))
        assert first["status_details"] == {"type": "cancelled", "reason": "turn_detected"}
        assert first["output"][0]["status"] == "incomplete"
        at = event_types(client).index("response.done")
        assert USER_TURN_EVENTS[0] not in event_types(client)[:at] and USER_TURN_EVENTS[0] in event_types(client)[at:]
        assert second["status"] == "completed", "the model spoke on, long after the user's word"
        assert event_types(client).count(USER_TURN_EVENTS[0]) == 2

    serving(slots, engine, test, model=scripted(talk))


def test_without_turn_detection_a_response_has_what_the_model_said_just_before_the_request(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio={"input": {"turn_detection": None}})
        await client.send("input_audio_buffer.append", audio=base64.b64encode(bytes(9_600)).decode())
        await eventually(lambda: serving.session().scheduled.jitter_buffer.waiting_samples)
        await serving.advance(9)
        assert event_types(client)[-1] == "session.updated", "without turn detection, only the client begins a response"
        await client.send("input_audio_buffer.commit")
        committed = await client.until("input_audio_buffer.committed")
        metadata = {"client_event_id": "ours"}
        await client.send("response.create", event_id="r1", response={"metadata": metadata})
        done = (await client.until("response.done"))["response"]
        transcript = client.events_of("conversation.item.input_audio_transcription.completed")[0]
        assert transcript["item_id"] == committed["item_id"] and transcript["transcript"].strip() == "what number"
        assert USER_TURN_EVENTS[0] not in event_types(client)
        assert done["metadata"] == metadata
        assert done["output"][0]["content"][0]["transcript"] == " it is forty"
        assert len(client.events_of("response.output_audio.delta")) == 4
        await serving.advance(2)  # to tick 11, where the model speaks again
        await client.send("response.create")
        await client.until("response.output_audio.delta")
        await client.send("response.create", event_id="r2")
        error = (await client.until("error"))["error"]
        assert (error["code"], error["event_id"]) == ("conversation_already_has_active_response", "r2")
        await serving.advance(3)
        done = (await client.until("response.done"))["response"]
        assert done["output"][0]["content"][0]["transcript"] == " the sky is", (
            "the response has everything since the gate opened"
        )
        await client.send("response.create")
        await client.until("response.created")
        await client.send("response.create")
        done = (await client.until("response.done"))["response"]
        assert (done["status"], done["output"]) == ("cancelled", []), "a response without speech gives way to the next"
        await client.until("response.created")
        await serving.advance(51)
        done = (await client.until("response.done"))["response"]
        assert done["status"] == "completed" and done["output"] == [], "the model had nothing to say"
        check_events(client)

    talk = {
        2: (HEARD, " what", LISTEN),
        3: (HEARD, " number", LISTEN),
        5: (SAY, " it is", SPEAK),
        6: (SAY, " forty", SPEAK),
        11: (SAY, " the sky", SPEAK),
        12: (SAY, " is", SPEAK),
    }
    serving(slots, engine, test, model=scripted(talk))


def test_speech_that_nobody_asked_for_does_not_answer_the_next_words(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio={"input": {"turn_detection": None}})
        await serving.advance(8)  # past the model's " it is" and the user's " what"
        await client.send("response.create")
        await serving.advance(3)
        done = (await client.until("response.done"))["response"]
        assert done["output"][0]["content"][0]["transcript"] == " forty"
        await client.send("response.create")
        await client.until("response.created")
        await client.send("response.cancel")
        await client.until("response.done")
        check_events(client)

    talk = {2: (SAY, " it is", SPEAK), 7: (HEARD, " what", LISTEN), 9: (SAY, " forty", SPEAK)}
    serving(slots, engine, test, model=scripted(talk))


def test_each_commit_becomes_an_item(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio={"input": {"turn_detection": None}})
        await serving.advance(2)
        found = []
        for _ in range(2):
            await client.send("input_audio_buffer.append", audio=base64.b64encode(bytes(9_600)).decode())
            await client.send("input_audio_buffer.commit")
            found.append((await client.until("input_audio_buffer.committed"))["item_id"])
            await serving.advance(1)
        await serving.advance(5)
        while len(client.events_of("conversation.item.done")) < 2:
            await client.event()
        said = client.events_of("conversation.item.input_audio_transcription.completed")
        assert [(one["item_id"], one["transcript"].strip()) for one in said] == [
            (found[0], "what number"),
            (found[1], ""),
        ]
        check_events(client)

    serving(slots, engine, test, model=scripted({2: (HEARD, " what", LISTEN), 3: (HEARD, " number", LISTEN)}))


def test_speech_started_comes_while_a_response_waits_but_not_when_its_speech_begins(slots, engine):
    """At `speech_started`, LiveKit's client cancels its response, and Pipecat's client stops its playback."""

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await client.send("response.create")
        waits = (await client.until("response.created"))["response"]["id"]
        await serving.advance(2)
        await client.until(USER_TURN_EVENTS[0])
        for name in ("other", waits):
            await client.send("response.cancel", response_id=name)
        error = (await client.until("error"))["error"]
        assert error["code"] == "response_cancel_not_active" and error["message"].startswith("Cancellation failed")
        await client.until("response.done")
        await serving.advance(12)
        while event_types(client).count("response.done") < 3:
            await client.event()
        check_events(client)
        said = [one["response"]["output"] for one in client.events_of("response.done")]
        assert [one[0]["content"][0]["transcript"] if one else "" for one in said] == ["", " yes", " forty"]
        assert event_types(client).count(USER_TURN_EVENTS[0]) == event_types(client).count(USER_TURN_EVENTS[1]) == 1, (
            "the second word came in the micro-turn of its answer"
        )
        assert event_types(client).count(USER_TURN_EVENTS[2]) == 2

    talk = {2: (HEARD, " what", LISTEN), 3: (SAY, " yes", SPEAK), 9: (HEARD, " number", SAY, " forty", SPEAK)}
    serving(slots, engine, test, model=scripted(talk))


def test_function_call_ends_a_waiting_response_and_may_have_an_empty_result(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, tools=[WEATHER], audio={"input": {"turn_detection": None}})
        await client.send("response.create")
        await client.until("response.created")
        await serving.advance(3)
        call = (await client.until("response.done"))["response"]["output"][0]
        await serving.advance(3)  # past the model's " one"
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": ""}
        await client.send("conversation.item.create", item=output)
        await client.until("conversation.item.done")
        await client.send("response.create")
        await client.until("response.created")
        await serving.advance(5)
        done = (await client.until("response.done"))["response"]
        assert done["output"][0]["content"][0]["transcript"] == " it is", (
            "speech from before the result is no answer to it"
        )
        assert not client.events_of("error")
        check_events(client)

    talk = {
        2: (SAY, Control.DELEGATE, " weather", Control.END, LISTEN),
        4: (SAY, " one", SPEAK),
        9: (SAY, " it is", SPEAK),
    }
    serving(slots, engine, test, model=scripted(talk))


def test_whole_recording_is_heard_before_its_response_is_given_up(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio={"input": {"turn_detection": None}})
        for _ in range(9):
            await client.send("input_audio_buffer.append", audio=base64.b64encode(bytes(48_000)).decode())
        await client.send("input_audio_buffer.commit")
        await client.send("response.create")
        await client.until("response.created")
        async with serving.ticking():  # the sound is heard micro-turn by micro-turn
            done = (await client.until("response.done"))["response"]
        assert done["output"][0]["content"][0]["transcript"] == " forty"

    serving(slots, engine, test, model=scripted({52: (SAY, " forty", SPEAK)}))


def test_rest_of_a_cancelled_response_is_dropped_until_the_gate_closes(slots, engine):
    talk = {at: (SAY, " a", SPEAK) for at in (*range(2, 8), *range(12, 14))}

    async def test(serving: Serving) -> None:
        client = await open_session(serving, output_modalities=["text"])
        await client.send("response.cancel", event_id="early")
        assert (await client.until("error"))["error"]["code"] == "response_cancel_not_active"
        await serving.advance(3)
        await client.until("response.output_text.delta")
        await client.send("response.cancel")
        done = await client.until("response.done")
        assert done["response"]["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
        await serving.advance(15)
        done = (await client.until("response.done"))["response"]
        assert done["output"][0]["content"] == [{"type": "output_text", "text": " a a"}]
        assert event_types(client).count("response.created") == 2 and not client.events_of(
            "response.output_audio.delta"
        )
        check_events(client)

    serving(slots, engine, test, model=scripted(talk))


def test_delegation_calls_the_clients_function_and_its_result_becomes_background_text(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, tools=[WEATHER], instructions="be kind")
        assert {piece.mark for piece in serving.session().scheduled.text_queue} == {Control.BACKGROUND}
        await serving.advance(3)
        done = (await client.until("response.done"))["response"]
        call = done["output"][0]
        assert (call["type"], call["name"], json.loads(call["arguments"])) == (
            "function_call",
            "weather",
            {"city": "sky"},
        )
        forget_text(serving.session().scheduled)
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "the sky is a number"}
        await client.send("conversation.item.create", item=output)
        await client.until("conversation.item.done")
        text = unread(serving.session().scheduled)
        assert text == engine.codec.encode("the sky is a number")
        await client.send("conversation.item.create", event_id="again", item=output)
        assert (await client.until("error"))["error"]["code"] == "item_call_id_not_found"
        check_events(client)

    talk = {2: (SAY, Control.DELEGATE, " weather", LISTEN), 3: (SAY, " sky", Control.END, LISTEN)}
    serving(slots, engine, test, model=scripted(talk))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("weather sky", ("weather", {"city": "sky"})),
        ('search({"q": "x"})', ("search", {"q": "x"})),
        ("anything", ("weather", {"city": "anything"})),
        ("stop now", ("stop", {})),
        ("search_all cats", ("search_all", {"q": "cats"})),
        ("broken 1", ("broken", {})),
        ("loose 1", ("loose", {})),
        ("weatherman of the sky", ("weather", {"city": "weatherman of the sky"})),
    ],
)
def test_task_selects_a_function_and_its_arguments(task, expected):
    tools = [
        Tool(type="function", name="weather", parameters={"properties": {"city": {"type": "string"}}}),
        Tool(type="function", name="search", parameters={"properties": {"n": {"type": "integer"}}}),
        Tool(type="function", name="stop"),
        Tool(type="function", name="search_all", parameters={"properties": {"q": {"type": ["string", "null"]}}}),
        Tool(type="function", name="broken", parameters={"required": 5, "properties": {"a": 5}}),
        Tool(type="function", name="loose", parameters={"required": ["a", {}], "properties": {}}),
    ]
    name, arguments = function_call(task, tools)
    assert (name, json.loads(arguments)) == expected


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty", None),
        (session_update(type="transcription"), "invalid_value", "session.type"),
        (session_update(voice="x"), "unknown_parameter", "session.voice"),
        (session_update(model="x"), "model_not_found", "session.model"),
        ({"type": "output_audio_buffer.clear"}, "unsupported_event", "type"),
        ({"type": "response.create", "response": {"input": [{}]}}, "unsupported_parameter", "response.input"),
        ({"type": "conversation.item.create", "item": EMPTY}, "invalid_value", "item.content[0]"),
        ({"type": "nonsense"}, "invalid_event_type", "type"),
    ],
)  # fmt: skip
def test_wrong_message_is_named(slots, engine, message, code, param):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await client.ws.send_str(json.dumps({**message, "event_id": "mine"}))
        error = (await client.event())["error"]
        assert (error["code"], error["param"], error["event_id"]) == (code, param, "mine")
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_sound_formats_can_change_until_there_has_been_sound(slots, engine):
    async def test(serving: Serving) -> None:
        g711 = {"format": {"type": "audio/pcmu"}}
        client = await open_session(serving, audio={"input": g711, "output": g711})
        assert client.events[-1]["session"]["audio"]["output"]["format"] == {"type": "audio/pcmu"}
        await client.send("input_audio_buffer.append", audio=base64.b64encode(bytes(1_600)).decode())
        await eventually(lambda: serving.session().scheduled.jitter_buffer.waiting_samples)
        pcm = {"format": {"type": "audio/pcm", "rate": 24_000}}
        await client.send("session.update", session={"type": "realtime", "audio": {"input": pcm}})
        assert (await client.until("error"))["error"]["param"] == "session.audio"
        await serving.advance(8)
        delta = await client.until("response.output_audio.delta")
        assert len(base64.b64decode(delta["delta"])) == 1_600

    serving(slots, engine, test, model=TALK)


def test_client_that_lost_its_connection_resumes_without_losing_an_event(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await serving.advance(5)
        await client.until("response.output_audio.delta")
        session = serving.session()
        await client.send("input_audio_buffer.append", audio=base64.b64encode(bytes(960)).decode())
        await eventually(lambda: session.protocol.intake.received_bytes)
        await client.cut_off(session)
        last, token = client.events[-1]["sequence_number"], client.started["resume"]["token"]
        back = await serving.open(f"/v1/realtime?session_id={session.id}&resume_token={token}&after={last}")
        async with serving.ticking():
            await back.until("response.done")
        assert back.events_of("session.updated")[0]["session"]["resume"]["input_audio_bytes"] == 960
        client.events += back.events
        check_events(client)
        assert event_types(client).count("response.created") == event_types(client).count("response.done") == 1
        for query, status in (
            (f"session_id={session.id}&resume_token=x&after=0", 403),
            (f"session_id={session.id}&resume_token={token}&after=x", 400),
            ("session_id=other&resume_token=x", 404),
            ("model=gpt-realtime", 404),
            ("model=small_test", 426),
        ):
            async with serving.http.get(f"{serving.url}/v1/realtime?{query}") as refused:
                assert refused.status == status
        assert len(serving.manager.sessions) == 1

    serving(slots, engine, test, model=TALK)


def test_session_that_expires_or_fails_ends_with_an_error(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        async with serving.ticking():
            announced = (await client.until("session.updated"))["session"]["expires_at"]
            assert announced == client.started["expires_at"]
            assert (await client.until("error"))["error"]["code"] == "session_expired"
            assert await client.closed() == 1000
        other = await open_session(serving)
        serving.session().scheduled.end(EndReason.FAILED)
        assert (await other.until("error"))["error"]["type"] == "server_error"
        assert await other.closed() == 1011

    serving(slots, engine, test, model=scripted({}), limits=Limits(session_s=0.5))
