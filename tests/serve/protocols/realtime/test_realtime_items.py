"""Items that a client adds to a conversation of the Realtime API: the model gets each of them whole, or not at all."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control
from tests.serve.protocols.realtime.test_realtime import LISTEN, SAY, SPEAK, WEATHER, check_events, open_session
from tests.serve.serving import Client, Serving, eventually, forget_text, jpeg, serving, unread
from tests.serve.stepped import scripted

TEXT = {"type": "input_text", "text": "the sky"}
SECOND = {"type": "input_audio", "audio": base64.b64encode(bytes(48_000)).decode()}


def picture(data: bytes) -> dict[str, str]:
    return {"type": "input_image", "image_url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}


async def create(client: Client, *parts: dict[str, Any], **fields: Any) -> None:
    item = {"type": "message", "role": "user", "content": parts, **fields}
    await client.send("conversation.item.create", item=item)


def test_earlier_conversation_with_function_calls_can_be_added(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, tools=[WEATHER])
        call = {"type": "function_call", "call_id": "c1", "id": "i1", "name": "weather", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c1", "id": "i2", "output": "the sky"}
        for item in (call, output):
            await client.send("conversation.item.create", item=item)
            await client.until("conversation.item.done")
        assert not client.events_of("error") and not serving.counted("duplex_delegation_duration_seconds_count")
        for again, code in ((call, "item_create_duplicate_item_id"), (output | {"id": "i3"}, "item_call_id_not_found")):
            await client.send("conversation.item.create", item=again)
            assert (await client.until("error"))["error"]["code"] == code
        for n in range(300):
            await client.send("conversation.item.create", item=call | {"call_id": f"c{n}", "id": f"j{n}"})
        for _ in range(300):
            await client.until("conversation.item.done")
        conversation = serving.session().protocol.conversation
        assert len(conversation.pending_calls) == len(conversation.items) == 256
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_items_are_kept_retrieved_deleted_and_given_to_the_model(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        scheduled = serving.session().scheduled
        for role, kind, mark in (
            ("user", "input_text", Control.TYPED),
            ("system", "input_text", Control.BACKGROUND),
            ("assistant", "output_text", Control.BACKGROUND),
        ):
            await create(client, {"type": kind, "text": "the sky"}, role=role, id=role)
            await client.until("conversation.item.done")
            assert mark in {piece.mark for piece in scheduled.text_queue}
            forget_text(scheduled)
        await client.send("conversation.item.retrieve", item_id="user")
        assert (await client.until("conversation.item.retrieved"))["item"]["content"][0]["text"] == "the sky"
        await client.send("conversation.item.delete", item_id="user")
        await client.until("conversation.item.deleted")
        await client.send("conversation.item.retrieve", item_id="user")
        assert (await client.until("error"))["error"]["code"] == "item_retrieve_invalid_item_id"
        await create(client, SECOND)
        await client.until("conversation.item.done")
        assert 15_900 <= scheduled.jitter_buffer.waiting_samples <= 16_000
        await client.send("input_audio_buffer.clear")
        await client.until("input_audio_buffer.cleared")
        assert scheduled.jitter_buffer.waiting_samples == 0
        forget_text(scheduled)
        await create(client, TEXT, TEXT)
        await client.until("conversation.item.done")
        tokens = unread(scheduled)
        assert tokens == engine.codec.encode("the sky\nthe sky")
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_message_reaches_the_model_whole_or_not_at_all(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        scheduled = serving.session().scheduled
        await create(client, TEXT, SECOND, picture(b"no picture"))
        assert "JPEG or PNG" in (await client.until("error"))["error"]["message"]
        await create(client, picture(jpeg(20)), {"type": "input_text", "text": "the sky " * 9_000})
        assert (await client.until("error"))["error"]["code"] == "string_above_max_length"
        await create(client, picture(jpeg(20)), {"type": "input_text"})
        await client.until("error")
        assert not scheduled.text_queue and not scheduled.jitter_buffer.waiting_samples and scheduled.patches is None
        assert not client.events_of("conversation.item.added")
        await create(client, picture(jpeg(20)), picture(jpeg(200)))
        item = (await client.until("conversation.item.done"))["item"]
        assert set(item["no_effect"]) == {"content[0].image_url"}, "the model does not see the first picture"
        (before, now) = scheduled.patches[0]
        assert np.array_equal(before, now), (
            "the model sees the last picture paired with itself, not with a refused or an earlier picture"
        )
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_message_whose_connection_is_lost_reaches_the_model_whole_or_not_at_all(slots, engine):
    later = (SECOND, {"type": "input_text", "text": "a number"}, picture(jpeg(20)))

    async def test(serving: Serving) -> None:
        client = await open_session(serving)
        session, events = serving.session(), []
        intake = session.protocol.intake

        async def cut(client: Client) -> Client:
            await client.cut_off(session)
            events.extend(client.events)
            query = f"session_id={session.id}&resume_token={session.resume_token}&after={events[-1]['sequence_number']}"
            return await serving.open(f"/v1/realtime?{query}")

        await create(client, *8 * [SECOND], TEXT, *7 * [SECOND], id="long")
        assert (await client.until("conversation.item.done"))["item"]["id"] == "long"
        client = await cut(client)
        given = intake.waiting_samples
        assert abs(given - 15 * 16_000) < 200, "the jitter buffer has room for ten seconds; the rest waits outside"
        await create(client, *later, id="later")
        await eventually(lambda: intake.images._previous is not None)
        client = await cut(client)
        assert intake.waiting_samples == given and session.scheduled.patches is None
        assert unread(session.scheduled) == engine.codec.encode("the sky")
        await create(client, *later, id="later")
        async with serving.ticking():
            assert (await client.until("conversation.item.done"))["item"]["id"] == "later"
        client.events = events + client.events
        assert not client.events_of("error")
        check_events(client)

    serving(slots, engine, test, model=scripted({}))


def test_speech_that_waits_for_a_response_is_kept_when_an_item_is_refused(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio={"input": {"turn_detection": None}})
        await serving.advance(6)
        await create(client, {"type": "input_text"})
        await client.until("error")
        await client.send("response.create")
        done = (await client.until("response.done"))["response"]
        assert done["output"][0]["content"][0]["transcript"] == " it is"

    serving(slots, engine, test, model=scripted({2: (SAY, " it is", SPEAK), 3: (LISTEN,)}))


def test_response_is_given_up_only_after_everything_that_arrived_is_heard_and_read(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, audio={"input": {"turn_detection": None}})
        await create(client, *9 * [SECOND])
        await client.send("response.create")
        await client.until("response.created")
        session = serving.session()
        for _ in range(94):
            session.scheduled.jitter_buffer.push(
                np.zeros(MICRO_TURN_SAMPLES, np.float32)
            )  # so nine seconds of sound are always waiting
            await serving.advance(1)
        assert session.protocol.responses.current is not None
        await serving.advance(1)
        done = (await client.until("response.done"))["response"]
        assert done["output"] == [] and session.scheduled.micro_turns == 95, (
            "45 micro-turns of sound, and 50 of patience"
        )
        await create(client, {"type": "input_text", "text": "the sky " * 60})
        await client.send("response.create")
        await client.until("response.created")
        pieces = len(session.scheduled.text_queue)
        await serving.advance(pieces + 49)
        assert pieces > 50 and session.protocol.responses.current is not None, (
            "the model reads all text before the response is given up"
        )
        await serving.advance(1)
        await client.until("response.done")

    serving(slots, engine, test, model=scripted({}))
