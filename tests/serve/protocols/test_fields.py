"""Every field that a client may send does what it says, is refused, or is named to the client as without effect.

The table `FIELDS` has each field of each type of message. A new field fails the test until it is in the table. A field
in the column DONE does what it says. A field in the column NO_EFFECT is declared with `no_effect`, so that the client
gets its name back. `REFUSED_BY_LIVE` and `REFUSED_BY_REALTIME` are examples of what the server refuses. Two tests send
them all to a server.
"""

from __future__ import annotations

import base64
import json
from itertools import chain
from typing import Any, get_args, get_origin

import aiohttp
import msgspec
import pytest
from openai import AsyncAzureOpenAI

from jaxtml.serve.protocols.live import messages as live
from jaxtml.serve.protocols.messages import Strict, declared_fields
from jaxtml.serve.protocols.moshi import protocol as moshi
from jaxtml.serve.protocols.realtime import messages as realtime
from jaxtml.serve.sessions.access import Access, Key
from tests.serve.protocols.realtime.test_realtime import WEATHER, open_session
from tests.serve.serving import Serving, serving
from tests.serve.stepped import scripted

DONE, REFUSED, NO_EFFECT = "done", "refused", "no effect"

FIELDS: dict[str, dict[str, str]] = {
    # both protocols: the client's id of a message comes back in errors and acknowledgements
    "Event": {DONE: "event_id"},
    # GPT-Live
    "LivePcm": {DONE: "rate"},
    "LivePcmu": {DONE: "rate"},
    "LivePcma": {DONE: "rate"},
    "LiveVoice": {NO_EFFECT: "voice"},
    "LiveAudio": {DONE: "format output"},
    "Delegation": {DONE: "type", REFUSED: "acknowledgement_delay_ms responses decisions"},
    "TextPart": {DONE: "text type"},
    "HistoryItem": {DONE: "role content type", NO_EFFECT: "id status"},
    "LiveSessionConfig": {
        DONE: "model audio delegation input instructions",
        REFUSED: "client store triggers",
        NO_EFFECT: "safety_identifier",
    },
    "LiveSessionChange": {DONE: "delegation", REFUSED: "triggers"},
    "WebRtcOffer": {DONE: "type sdp"},
    "CreateSession": {DONE: "session transport"},
    "Start": {DONE: "session"},
    "Resume": {DONE: "session_id resume_token after"},
    "LiveUpdate": {DONE: "session"},
    "AppendAudio": {DONE: "audio"},
    "Mute": {},
    "Unmute": {},
    "AppendInstructions": {DONE: "content delegation_id"},
    "AppendThinking": {DONE: "content delegation_id"},
    "AppendCommentary": {DONE: "content delegation_id"},
    "AppendText": {DONE: "content"},
    "AppendImage": {DONE: "image"},
    "Close": {},
    # OpenAI Realtime
    "RealtimePcm": {DONE: "rate"},
    "RealtimePcmu": {DONE: "rate"},
    "RealtimePcma": {DONE: "rate"},
    "TurnDetection": {
        DONE: "type create_response",
        NO_EFFECT: "interrupt_response threshold prefix_padding_ms silence_duration_ms idle_timeout_ms eagerness",
    },
    "AudioInput": {DONE: "format turn_detection", NO_EFFECT: "transcription noise_reduction"},
    "AudioOutput": {DONE: "format", NO_EFFECT: "voice speed"},
    "RealtimeAudio": {DONE: "input output"},
    "Tool": {DONE: "type name description parameters", NO_EFFECT: "strict"},
    "NamedTool": {REFUSED: "type name server_label"},
    "RealtimeSessionConfig": {
        DONE: "type model audio instructions output_modalities tools tool_choice parallel_tool_calls max_output_tokens",
        REFUSED: "include prompt",
        NO_EFFECT: "reasoning tracing truncation",
    },
    "KeyLifetime": {DONE: "anchor seconds"},
    "ClientSecretRequest": {DONE: "expires_after session"},
    "ContentPart": {DONE: "type text audio transcript image_url", NO_EFFECT: "detail"},
    "MessageItem": {DONE: "role content id", NO_EFFECT: "object status phase"},
    "FunctionOutputItem": {DONE: "call_id output id", NO_EFFECT: "object status"},
    "FunctionCallItem": {DONE: "name arguments call_id id", NO_EFFECT: "object status"},
    "RealtimeUpdate": {DONE: "session"},
    "AppendInput": {DONE: "audio"},
    "CommitInput": {},
    "ClearInput": {},
    "ItemCreate": {DONE: "item previous_item_id"},
    "ItemRetrieve": {DONE: "item_id"},
    "ItemDelete": {DONE: "item_id"},
    "ItemTruncate": {DONE: "item_id content_index audio_end_ms"},
    "ClearOutput": {},
    "ResponseAudio": {DONE: "output"},
    "ResponseConfig": {
        DONE: "metadata instructions output_modalities audio conversation max_output_tokens parallel_tool_calls "
        "tool_choice tools",
        REFUSED: "input prompt",
        NO_EFFECT: "reasoning",
    },
    "ResponseCreate": {DONE: "response"},
    "ResponseCancel": {DONE: "response_id"},
}

PICK = {"type": "function", "name": "weather"}
REFUSED_BY_LIVE = [
    ({"delegation": {"type": "client", "acknowledgement_delay_ms": 400}}, "delegation.acknowledgement_delay_ms"),
    ({"delegation": {"type": "client", "responses": {"model": "a"}}}, "delegation.responses"),
    ({"delegation": {"type": "client", "decisions": {}}}, "delegation.decisions"),
    ({"client": {"data_channel": {"allow": []}}}, "client"),
    ({"store": True}, "store"),
    ({"triggers": [{}]}, "triggers"),
]
REFUSED_BY_REALTIME = [
    ("session.update", "session", {"include": ["item.input_audio_transcription.logprobs"]}, "include"),
    ("session.update", "session", {"prompt": {"id": "pmpt_1"}}, "prompt"),
    ("session.update", "session", {"tool_choice": "required"}, "tool_choice"),
    ("session.update", "session", {"tool_choice": PICK}, "tool_choice"),
    ("session.update", "session", {"tool_choice": {"type": "mcp", "server_label": "a"}}, "tool_choice"),
    ("session.update", "session", {"output_modalities": ["text", "audio"]}, "output_modalities"),
    ("session.update", "session", {"max_output_tokens": 0}, "max_output_tokens"),
    ("response.create", "response", {"input": []}, "input"),
    ("response.create", "response", {"prompt": {"id": "pmpt_1"}}, "prompt"),
    ("response.create", "response", {"tool_choice": "required", "tools": [WEATHER]}, "tool_choice"),
    ("response.create", "response", {"conversation": "none"}, "conversation"),
    ("response.create", "response", {"conversation": "conv_other"}, "conversation"),
    ("response.create", "response", {"max_output_tokens": 5000}, "max_output_tokens"),
    (
        "response.create",
        "response",
        {"audio": {"output": {"format": {"type": "audio/pcma"}}}},
        "audio.output.format",
    ),
]


# The types of what clients of each protocol send: messages and bodies of requests. Moshi's frames are bytes, for which
# no type is declared; a test below sends them.
REQUESTS: dict[str, tuple[Any, ...]] = {
    "live": (live.FirstMessage, live.SessionMessage, live.SoundlessMessage, live.CreateSession),
    "realtime": (realtime.WebSocketMessage, realtime.WebRtcMessage, realtime.ClientSecretRequest),
    "moshi": (),
}


def client_types() -> dict[str, type[msgspec.Struct]]:
    """Returns all types that clients' messages and requests are made of, by name."""
    found: dict[str, type[msgspec.Struct]] = {}

    def visit(kind: Any) -> None:
        if get_origin(kind) is not None or get_args(kind):
            for inner in get_args(kind):
                visit(inner)
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__name__ not in found:
            found[kind.__name__] = kind
            for field in msgspec.structs.fields(kind):
                visit(field.type)

    for kind in chain.from_iterable(REQUESTS.values()):
        visit(kind)
    return found


def declared_types(kind: type[msgspec.Struct] = Strict) -> dict[str, type[msgspec.Struct]]:
    """Returns all types that the protocols declare for what clients send, by name."""
    found = {}
    for declared in kind.__subclasses__():
        if declared.__module__.startswith("jaxtml.") and not declared.__name__.startswith("_"):
            found[declared.__name__] = declared
        found |= declared_types(declared)
    return found


def test_every_field_of_every_message_is_done_refused_or_named_as_without_effect():
    types = client_types()
    assert set(types) == set(FIELDS) - {"Event"}
    assert set(declared_types()) == set(FIELDS), "no declared type is missing in REQUESTS"
    for name, kind in types.items():
        table = {field: column for column, fields in FIELDS[name].items() for field in fields.split()}
        fields = declared_fields(kind)
        assert set(fields) - {"event_id"} == set(table), name
        assert {field for field, reason in fields.items() if reason} == {
            field for field, column in table.items() if column == NO_EFFECT
        }, name


def test_fields_that_live_refuses_are_refused_by_name(slots, engine):
    async def test(serving: Serving) -> None:
        for fields, param in REFUSED_BY_LIVE:
            client = await serving.open()
            await client.send("session.start", event_id="mine", session={"model": "small_test", **fields})
            error = (await client.until("error"))["error"]
            assert error["param"] == f"session.{param}" and error["client_event_id"] == "mine", fields
            assert error["code"] in ("unsupported_parameter", "unsupported_value")
            await client.ws.close()
        assert not serving.manager.sessions

    serving(slots, engine, test, model=scripted({}))


def test_fields_that_realtime_refuses_are_refused_by_name_and_change_nothing(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        for kind, field, value, param in REFUSED_BY_REALTIME:
            extra = {"type": "realtime", "instructions": "be kind"} if field == "session" else {}
            await client.send(kind, event_id="mine", **{field: value | extra})
            error = (await client.until("error"))["error"]
            assert error["param"] == f"{field}.{param}" and error["event_id"] == "mine", value
            assert error["code"] in ("unsupported_parameter", "unsupported_value", "invalid_value")
        assert not client.events_of("session.updated") and not client.events_of("response.created")
        assert not serving.session().scheduled.text_queue

    serving(slots, engine, test, model=scripted({}))


# Addresses whose queries are refused, by the code of the refusal. A session in a path need not exist.
REFUSED_QUERIES = {
    "unsupported_parameter": [
        "GET /v1/realtime?model=small_test&intent=transcription",
        "GET /v1/realtime?model=small_test&call_id=rtc_1",
        "GET /v1/realtime?session_id=sess_1&intent=transcription",
    ],
    "unknown_parameter": [
        "GET /v1/realtime?model=small_test&voice=marin",
        "GET /v1/realtime?Model=small_test",
        "GET /v1/realtime?resume_token=abc",  # which says nothing without `session_id`
        "GET /v1/realtime?session_id=sess_1&colour=red",
        "POST /v1/realtime/calls?voice=marin",
        "POST /v1/realtime/calls/sess_1/hangup?model=small_test",
        "POST /v1/realtime/client_secrets?model=small_test",
        "GET /v1/live/sessions?model=small_test",
        "GET /v1/live/sessions?api-version=1",
        "POST /v1/live/sessions?session_id=sess_1",
        "GET /v1/live/sessions/sess_1/attach?voice=marin",
        "POST /v1/live/sessions/sess_1/hangup?reason=late",
        "GET /api/chat?colour=red",
    ],
    "invalid_value": [
        "GET /v1/realtime?model=small_test&model=other",
        "GET /api/chat?auth_id=a&auth_id=b",
    ],
    "model_not_found": [
        "GET /v1/realtime?deployment=other",
        "GET /v1/realtime?session_id=sess_1&model=other",
        "POST /v1/realtime/calls?deployment=other",
    ],
}


def test_query_that_no_address_knows_is_refused_before_anything_begins(slots, engine):
    async def test(serving: Serving) -> None:
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        upgrade["Sec-WebSocket-Key"] = base64.b64encode(bytes(16)).decode()
        for code, addresses in REFUSED_QUERIES.items():
            for address in addresses:
                method, path = address.split()
                headers = upgrade if method == "GET" else {}
                async with serving.http.request(method, serving.url + path, headers=headers) as answer:
                    assert answer.status == (404 if code == "model_not_found" else 400), address
                    error = (await answer.json())["error"]
                    assert error["code"] == code, address
                    assert code != "unknown_parameter" or error["message"].split()[-1] in path
        assert not serving.manager.sessions

    serving(slots, engine, test, model=scripted({}))


def test_query_of_azures_client_is_taken(slots, engine):
    """It names the model `deployment`, sends the version of Azure's API, and the key in a header of its own."""

    key = {"Authorization": "Bearer sk-first-key"}

    async def test(serving: Serving) -> None:
        address = serving.url.replace("http", "ws") + "/v1"
        client = AsyncAzureOpenAI(
            api_key="sk-first-key", api_version="2025-04-01", azure_endpoint=serving.url, websocket_base_url=address
        )
        async with client.realtime.connect(model="small_test") as connection:
            assert (await connection.recv()).type == "session.created"
            assert connection._connection.response.headers["Jaxtml-No-Effect"] == "api-version"
            session = serving.session()
            query = f"session_id={session.id}&resume_token={session.resume_token}&after=1&model=small_test"
            async with serving.http.get(f"{serving.url}/v1/realtime?{query}&api-version=1", headers=key) as answer:
                assert answer.status == 426, "everything is right but the upgrade"
            async with serving.http.post(
                f"{serving.url}/v1/realtime/client_secrets?api-version=1", headers=key
            ) as answer:
                assert answer.status == 200 and answer.headers["Jaxtml-No-Effect"] == "api-version"
            hangup = f"{serving.url}/v1/realtime/calls/{session.id}/hangup?api-version=1"
            async with serving.http.post(hangup, headers=key) as answer:
                assert answer.status == 200 and answer.headers["Jaxtml-No-Effect"] == "api-version"

    access = Access([Key(name="one", key="sk-first-key")])
    serving(slots, engine, test, access=access, model=scripted({}))


def test_session_in_the_query_of_live_is_the_one_that_is_resumed(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.open("/v1/live/sessions?session_id=sess_1")
        resume = {"session_id": "sess_2", "resume_token": "abc", "after": 0}
        for kind, fields in (("session.start", {"session": {"model": "small_test"}}), ("session.resume", resume)):
            await client.send(kind, event_id="mine", **fields)
            error = (await client.until("error"))["error"]
            assert (error["code"], error["param"]) == ("invalid_value", "session_id")
            assert error["client_event_id"] == "mine" and not serving.manager.sessions

    serving(slots, engine, test, model=scripted({}))


def test_request_for_a_short_lived_key_is_checked_like_a_session(slots, engine):
    async def test(serving: Serving) -> None:
        for session, param in (
            ({"prompt": {"id": "p"}}, "session.prompt"),
            ({"tool_choice": PICK}, "session.tool_choice"),
        ):
            body = {"session": {"type": "realtime", **session}}
            async with serving.http.post(f"{serving.url}/v1/realtime/client_secrets", json=body) as answer:
                error = (await answer.json())["error"]
                assert answer.status == 400 and error["code"].startswith("unsupported") and param in error["message"]

    serving(slots, engine, test, model=scripted({}))


def test_wrong_field_in_the_body_of_a_request_is_named(slots, engine):
    update = {"type": "realtime", "output_modalities": ["smell"]}
    live_session = {"model": "small_test", "audio": {"format": {"type": "audio/mp3"}}}
    bodies = {
        "/v1/realtime/client_secrets": ({"session": update}, "session.output_modalities[0]"),
        "/v1/live/sessions": (
            {"session": live_session, "transport": {"type": "webrtc", "sdp": "v=0"}},
            "session.audio.format.type",
        ),
    }

    async def test(serving: Serving) -> None:
        for path, (body, param) in bodies.items():
            async with serving.http.post(serving.url + path, json=body) as answer:
                error = (await answer.json())["error"]
                assert (answer.status, error["code"], error["param"]) == (400, "invalid_value", param)
                assert error["message"].startswith(f"{param} must be ")
        with aiohttp.MultipartWriter("form-data") as form:
            form.append("v=0").set_content_disposition("form-data", name="sdp")
            form.append(json.dumps(update)).set_content_disposition("form-data", name="session")
        async with serving.http.post(f"{serving.url}/v1/realtime/calls", data=form) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["param"]) == (400, "session.output_modalities[0]")

    serving(slots, engine, test, model=scripted({}))


def test_short_lived_key_of_another_version_is_refused_by_name(slots, engine):
    access = Access([Key(name="one", key="sk-first-key")])
    session = {"type": "realtime", "audio": {"input": {"colour": "red"}}}

    async def test(serving: Serving) -> None:
        key = access.create_short_lived_key(access.authenticate("sk-first-key"), 2**40, ("realtime",), session)
        async with serving.http.get(f"{serving.url}/v1/realtime", params={"auth_id": key}) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["param"]) == (400, "session.audio.input.colour")

    serving(slots, engine, test, access=access, model=scripted({}))


@pytest.mark.parametrize(
    ("names", "code"), [(("sdp", "colour"), "unknown_parameter"), (("sdp", "sdp"), "invalid_value")]
)
def test_form_with_an_offer_has_no_other_fields_and_each_field_once(slots, engine, names, code):
    async def test(serving: Serving) -> None:
        with aiohttp.MultipartWriter("form-data") as form:
            for name in names:
                form.append("v=0").set_content_disposition("form-data", name=name)
        async with serving.http.post(f"{serving.url}/v1/realtime/calls", data=form) as answer:
            error = (await answer.json())["error"]
            assert answer.status == 400 and error["code"] == code and names[-1] in error["message"]

    serving(slots, engine, test, model=scripted({}))


def test_moshis_query_and_control_frames_are_done_refused_or_named(slots, engine):
    async def test(serving: Serving) -> None:
        address = f"{serving.url}/api/chat"
        ws = await serving.http.ws_connect(f"{address}?text_temperature=0.7&audio_seed=1&auth_id=a")
        assert ws._response.headers["Jaxtml-No-Effect"] == "audio_seed, text_temperature"
        for frame in (moshi.CONTROL + b"\0", moshi.PING, moshi.CONTROL + b"\1", moshi.METADATA + b"{}"):
            await ws.send_bytes(frame)
        errors = []
        while len(errors) < 2:
            frame = await ws.receive_bytes()
            errors += [frame[1:]] if frame[:1] == moshi.ERROR else []
        assert b"kind 3" in errors[0] and b"kind 4" in errors[1]
        await ws.close()

    serving(slots, engine, test, model=scripted({}))


def test_session_names_the_fields_that_have_no_effect(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        assert "no_effect" not in client.started
        detection = {"type": "server_vad", "threshold": 0.5}
        audio = {"input": {"turn_detection": detection}, "output": {"voice": "marin", "speed": 1.2}}
        await client.send("session.update", session={"type": "realtime", "audio": audio, "tracing": "auto"})
        updated = (await client.until("session.updated"))["session"]
        names = {"audio.input.turn_detection.threshold", "audio.output.voice", "audio.output.speed", "tracing"}
        assert set(updated["no_effect"]) == names and all(updated["no_effect"].values())
        change = {"output_modalities": ["text"], "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
        await client.send("session.update", session={"type": "realtime", **change})
        updated = (await client.until("session.updated"))["session"]
        assert set(updated["no_effect"]) == names | {"audio.input.transcription"}, "earlier fields stay"
        audio = {"input": {"turn_detection": None, "transcription": None}}
        await client.send("session.update", session={"type": "realtime", "audio": audio})
        updated = (await client.until("session.updated"))["session"]
        assert set(updated["no_effect"]) == names - {"audio.input.turn_detection.threshold"}
        await client.send("response.create", response={"audio": {"output": {"voice": "marin"}}})
        created = (await client.until("response.created"))["response"]
        assert set(created["no_effect"]) == {"audio.output.voice"}
        content = [{"type": "input_text", "text": "the sky"}]
        item = {"type": "message", "role": "user", "content": content, "status": "in_progress"}
        await client.send("conversation.item.create", item=item)
        added = (await client.until("conversation.item.added"))["item"]
        assert set(added["no_effect"]) == {"status"} and added["status"] == "completed"
        other = await serving.start(
            audio={"type": "audio/pcmu"},
            safety_identifier="me",
            input=[{"role": "user", "id": "i", "content": content}],
        )
        assert set(other.started["no_effect"]) == {"safety_identifier", "input[0].id"}
        assert json.dumps(other.started)

    serving(slots, engine, test, model=scripted({}))
