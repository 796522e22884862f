"""What a client asks of the Realtime API beyond talking: commits, places of items, truncation, and single responses."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from jaxtml.stream.tokens import Control
from tests.serve.protocols.realtime.test_realtime import (
    HEARD,
    LISTEN,
    SAY,
    SPEAK,
    WEATHER,
    check_events,
    event_types,
    open_session,
)
from tests.serve.serving import Client, Serving, eventually, serving
from tests.serve.stepped import scripted

MANUAL = {"input": {"turn_detection": None}}


async def append(client: Client, ms: int) -> None:
    await client.send("input_audio_buffer.append", audio=base64.b64encode(bytes(48 * ms)).decode())


async def refused(client: Client, kind: str, **fields: Any) -> tuple[str, str | None]:
    """Sends a message and returns the code and the parameter of the error that answers it."""
    await client.send(kind, event_id="mine", **fields)
    error = (await client.until("error"))["error"]
    assert error["event_id"] == "mine" and error["message"]
    return error["code"], error["param"]


async def create(client: Client, name: str, **fields: Any) -> dict[str, Any]:
    """Adds a typed message with the id `name`, and returns the event that shows it."""
    item = {"type": "message", "role": "user", "id": name, "content": [{"type": "input_text", "text": "the sky"}]}
    await client.send("conversation.item.create", item=item, **fields)
    return await client.until("conversation.item.added")


def test_commit_needs_sound_since_the_last_commit_or_clear(slots, engine):
    empty = ("input_audio_buffer_commit_empty", None)

    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio=MANUAL)
        assert await refused(client, "input_audio_buffer.commit") == empty
        await append(client, 400)
        await client.send("input_audio_buffer.commit")
        await client.until("input_audio_buffer.committed")
        assert await refused(client, "input_audio_buffer.commit") == empty
        await append(client, 400)
        await client.send("input_audio_buffer.clear")
        await client.until("input_audio_buffer.cleared")
        assert await refused(client, "input_audio_buffer.commit") == empty
        await append(client, 60)
        assert await refused(client, "input_audio_buffer.commit") == empty
        await append(client, 60)
        await client.send("input_audio_buffer.commit")
        await client.until("input_audio_buffer.committed")
        assert event_types(client).count("input_audio_buffer.committed") == 2
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_cleared_words_are_in_no_transcript(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio=MANUAL)
        await append(client, 400)
        await eventually(lambda: serving.session().scheduled.jitter_buffer.waiting_samples)
        await serving.advance(2)
        await client.send("input_audio_buffer.clear")
        await client.until("input_audio_buffer.cleared")
        await append(client, 400)
        await client.send("input_audio_buffer.commit")
        await client.until("input_audio_buffer.committed")
        await serving.advance(10)
        done = await client.until("conversation.item.input_audio_transcription.completed")
        assert done["transcript"].strip() == "number"

    serving(slots, engine, test, model=scripted({2: (HEARD, " what", LISTEN), 4: (HEARD, " number", LISTEN)}))


def test_half_of_a_sample_does_not_outlast_its_recording(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio=MANUAL)
        decoder = serving.session().protocol.intake.decoder
        for end, ended in (("commit", "committed"), ("clear", "cleared")):
            for size in (4801, 4802):  # inside a sample, and then inside the next one
                data = base64.urlsafe_b64encode(bytes(size)).decode().rstrip("=")
                await client.send("input_audio_buffer.append", audio=data)
            await eventually(lambda: decoder._half_sample)
            await client.send(f"input_audio_buffer.{end}")
            await client.until(f"input_audio_buffer.{ended}")
            assert not decoder._half_sample
        assert not client.events_of("error")

    serving(slots, engine, test, model=scripted({}))


def test_item_is_put_where_the_client_wants_it(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        assert (await create(client, "a"))["previous_item_id"] is None
        assert (await create(client, "b"))["previous_item_id"] == "a"
        assert (await create(client, "first", previous_item_id="root"))["previous_item_id"] is None
        assert (await create(client, "between", previous_item_id="a"))["previous_item_id"] == "a"
        assert (await client.until("conversation.item.done"))["previous_item_id"] == "a"
        assert (await create(client, "last"))["previous_item_id"] == "b"
        item = {"type": "message", "role": "user", "id": "x", "content": [{"type": "input_text", "text": "the sky"}]}
        found = await refused(client, "conversation.item.create", item=item, previous_item_id="nobody")
        assert found == ("item_create_invalid_previous_item_id", "previous_item_id")
        assert list(serving.session().protocol.conversation.items) == ["first", "a", "between", "b", "last"]
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_place_before_all_items_is_there_after_many_items(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        for n in range(256):
            await create(client, f"old{n}")
        assert (await create(client, "first", previous_item_id="root"))["previous_item_id"] is None
        await client.until("conversation.item.done")
        assert (await create(client, "last"))["previous_item_id"] == "old255"
        await client.send("conversation.item.retrieve", item_id="first")
        assert (await client.until("conversation.item.retrieved"))["item"]["id"] == "first"
        for gone in ("old0", "old1"):
            code = ("item_retrieve_invalid_item_id", "item_id")
            assert await refused(client, "conversation.item.retrieve", item_id=gone) == code
        kept = list(serving.session().protocol.conversation.items)
        assert kept == ["first", *(f"old{n}" for n in range(2, 256)), "last"], "the items that were added first go"
        item = {"type": "message", "role": "user", "id": "root", "content": [{"type": "input_text", "text": "a"}]}
        assert await refused(client, "conversation.item.create", item=item) == ("invalid_value", "item.id")
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_item_that_is_deleted_while_it_grows_is_not_heard_of_again(slots, engine):
    """The response itself goes on: its events do not depend on the conversation."""

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await serving.advance(2)
        name = (await client.until("response.output_item.added"))["item"]["id"]
        await client.send("conversation.item.delete", item_id=name)
        await client.until("conversation.item.deleted")
        await serving.advance(6)
        done = (await client.until("response.done"))["response"]
        assert [item["id"] for item in done["output"]] == [name]
        assert event_types(client).count("response.output_item.done") == 1
        assert "conversation.item.done" not in event_types(client)
        where = {"item_id": name, "content_index": 0, "audio_end_ms": 0}
        code = ("item_truncate_invalid_item_id", "item_id")
        assert await refused(client, "conversation.item.truncate", **where) == code
        check_events(client)

    serving(slots, engine, test, model=scripted({2: (SAY, " it is", SPEAK), 3: (SAY, " forty", SPEAK)}))


def test_user_turn_that_is_deleted_before_its_transcript_has_none(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio=MANUAL)
        await append(client, 400)
        await client.send("input_audio_buffer.commit")
        name = (await client.until("input_audio_buffer.committed"))["item_id"]
        await client.send("conversation.item.delete", item_id=name)
        await client.until("conversation.item.deleted")
        await serving.advance(10)
        await append(client, 400)
        await client.send("input_audio_buffer.commit")
        await client.until("input_audio_buffer.committed")
        await serving.advance(10)
        other = await client.until("conversation.item.done")
        assert other["item"]["id"] != name and other["previous_item_id"] is None
        told = client.events_of("conversation.item.input_audio_transcription.completed")
        assert [event["item_id"] for event in told] == [other["item"]["id"]]
        check_events(client)

    serving(slots, engine, test, model=scripted({2: (HEARD, " what", LISTEN), 12: (HEARD, " number", LISTEN)}))


def test_sound_of_the_model_is_cut_where_the_client_stopped_it(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await create(client, "typed")
        await serving.advance(9)
        item = (await client.until("response.done"))["response"]["output"][0]
        kind, where = "conversation.item.truncate", {"item_id": item["id"], "content_index": 0}
        for wrong, code, param in (
            ({"audio_end_ms": -5}, "integer_below_min_value", "audio_end_ms"),
            ({"audio_end_ms": 801}, "invalid_value", "audio_end_ms"),  # four micro-turns
            ({"audio_end_ms": 2**70}, "invalid_value", "audio_end_ms"),
            ({"audio_end_ms": 5, "content_index": 1}, "invalid_value", "content_index"),
            ({"audio_end_ms": 5, "content_index": -1}, "invalid_value", "content_index"),
            ({"audio_end_ms": 5, "item_id": "typed"}, "invalid_value", "item_id"),
            ({"audio_end_ms": 5, "item_id": "nobody"}, "item_truncate_invalid_item_id", "item_id"),
        ):
            assert await refused(client, kind, **(where | wrong)) == (code, param), wrong
        assert not client.events_of("conversation.item.truncated")
        await client.send(kind, audio_end_ms=300, **where)
        assert (await client.until("conversation.item.truncated"))["audio_end_ms"] == 300
        await client.send("conversation.item.retrieve", item_id=item["id"])
        kept = (await client.until("conversation.item.retrieved"))["item"]
        assert kept["content"] == [{"type": "output_audio"}], "the transcript has words that were not played"
        assert await refused(client, kind, audio_end_ms=400, **where) == ("invalid_value", "audio_end_ms")
        check_events(client)

    serving(slots, engine, test, model=scripted({2: (SAY, " it is", SPEAK), 3: (SAY, " forty", SPEAK)}))


def test_item_that_is_cut_while_it_grows_gets_no_transcript(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await serving.advance(3)
        item = (await client.until("response.output_item.added"))["item"]
        await client.until("response.output_audio.delta")
        await client.send("conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=100)
        await client.until("conversation.item.truncated")
        await client.send("conversation.item.delete", item_id="nobody")
        await serving.advance(4)
        done = await client.until("conversation.item.done")
        assert done["item"]["id"] == item["id"] and done["item"]["content"] == [{"type": "output_audio"}]

    serving(slots, engine, test, model=scripted({2: (SAY, " it is", SPEAK), 4: (SAY, " forty", SPEAK)}))


def test_deleted_item_does_not_come_back_when_its_response_ends(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        await serving.advance(2)
        item = (await client.until("response.output_item.added"))["item"]
        await client.send("conversation.item.delete", item_id=item["id"])
        await client.until("conversation.item.deleted")
        await serving.advance(5)
        await client.until("response.done")
        assert await refused(client, "conversation.item.retrieve", item_id=item["id"]) == (
            "item_retrieve_invalid_item_id",
            "item_id",
        )

    serving(slots, engine, test, model=scripted({2: (SAY, " it is", SPEAK)}))


DELEGATION = (SAY, Control.DELEGATE, " the sky", Control.END, LISTEN)


@pytest.mark.parametrize(
    ("session", "response", "called"),
    [
        ({}, {"tools": [WEATHER]}, ["weather"]),
        ({"tools": [WEATHER]}, {"tools": [WEATHER | {"name": "other"}], "tool_choice": "auto"}, ["other"]),
        ({"tools": [WEATHER]}, {"tools": []}, []),
        ({"tools": [WEATHER]}, {"tool_choice": "none"}, []),
        ({"tools": [WEATHER], "tool_choice": "none"}, {}, []),
        ({"tools": [WEATHER], "tool_choice": "none"}, {"tool_choice": "auto"}, ["weather"]),
    ],
)
def test_tools_and_their_choice_hold_for_one_response(slots, engine, session, response, called):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio=MANUAL, **session)
        await client.send("response.create", response=response | {"conversation": "auto"})
        await client.until("response.created")
        await serving.advance(3)
        await client.send("response.cancel")  # for the responses that have no call and would wait for speech
        done = (await client.until("response.done"))["response"]
        assert [item["name"] for item in done["output"]] == called

    serving(slots, engine, test, model=scripted({2: DELEGATION}))


@pytest.mark.parametrize(("parallel", "calls"), [(True, [2]), (False, [1, 1])])
def test_one_response_has_several_calls_only_if_the_client_allows_it(slots, engine, parallel, calls):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, tools=[WEATHER], parallel_tool_calls=parallel)
        await serving.advance(9)
        done = [(await client.until("response.done"))["response"]["output"] for _ in calls]
        assert [sum(item["type"] == "function_call" for item in output) for output in done] == calls

    speaks = (*DELEGATION[:-1], SPEAK)
    serving(slots, engine, test, model=scripted({2: (SAY, " one", SPEAK), 3: speaks, 4: speaks}))


def test_response_ends_at_its_limit_of_tokens(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, max_output_tokens=20)
        assert client.events[-1]["session"]["max_output_tokens"] == 20
        await serving.advance(40)
        done = (await client.until("response.done"))["response"]
        assert done["status"] == "incomplete" and done["status_details"]["reason"] == "max_output_tokens"
        said = done["output"][0]["content"][0]["transcript"]
        assert 0 < said.count(" a") < 20
        await client.send("response.create", response={"max_output_tokens": "inf"})
        await serving.advance(5)
        done = (await client.until("response.done"))["response"]
        assert done["status"] == "completed" and done["output"][0]["content"][0]["transcript"] == " forty"
        check_events(client)

    talk = {at: (SAY, " a", SPEAK) for at in range(2, 35)} | {42: (SAY, " forty", SPEAK)}
    serving(slots, engine, test, model=scripted(talk))


def test_client_that_wants_no_transcript_gets_none(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio={"input": {"transcription": None}})
        assert client.events[-1]["session"]["audio"]["input"]["transcription"] is None
        await serving.advance(9)
        done = (await client.until("conversation.item.done"))["item"]
        assert done["content"] == [{"type": "input_audio", "transcript": None}]
        assert not [kind for kind in event_types(client) if "transcription" in kind]
        check_events(client)

    serving(slots, engine, test, model=scripted({2: (HEARD, " what", LISTEN)}))


def test_part_of_a_message_has_only_the_fields_of_its_type(slots, engine):
    sound = base64.b64encode(bytes(480)).decode()

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        for role, part, param in (
            ("user", {"type": "input_text", "text": "a", "audio": sound}, "item.content[0].audio"),
            ("user", {"type": "input_audio", "audio": sound, "text": "a"}, "item.content[0].text"),
            ("user", {"type": "input_image", "image_url": "https://example.com/a.png"}, "item.content[0].image_url"),
            ("assistant", {"type": "input_audio", "audio": sound}, "item.content[0]"),
            ("assistant", {"type": "output_audio", "transcript": "a", "audio": sound}, "item.content[0].audio"),
            ("system", {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}, "item.content[0]"),
        ):
            item = {"type": "message", "role": role, "content": [part]}
            assert await refused(client, "conversation.item.create", item=item) == ("invalid_value", param)
        part = {"type": "input_audio", "audio": sound, "transcript": "for the client"}
        await client.send("conversation.item.create", item={"type": "message", "role": "user", "content": [part]})
        added = (await client.until("conversation.item.added"))["item"]
        assert added["content"] == [{"type": "input_audio", "transcript": "for the client"}]
        assert not serving.session().scheduled.text_queue, "the model hears the recording"
        assert json.dumps(added)

    serving(slots, engine, test, model=scripted({}))
