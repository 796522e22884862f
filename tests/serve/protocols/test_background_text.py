"""A model that was not trained on background text gets none, and its clients are told so.

Background text is all text that the user does not type: instructions, tools, earlier conversations, results. Text that
the user types does not wait for background text.
"""

from __future__ import annotations

from typing import Any

from jaxtml.stream.tokens import Control
from tests.serve.protocols.realtime.test_realtime import WEATHER, check_events, open_session
from tests.serve.serving import Serving, eventually, serving, unread
from tests.serve.stepped import scripted

HISTORY = [
    {"role": "user", "content": [{"text": "what number", "type": "input_text"}]},
    {"role": "assistant", "content": [{"text": "forty", "type": "output_text"}]},
]


def message(role: str, kind: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": "the sky"}]}


def test_realtime_keeps_background_text_from_a_model_that_cannot_read_it_and_says_so(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, instructions="be kind", tools=[WEATHER])
        session = client.events[-1]["session"]
        assert session["instructions"] == "be kind" and session["tools"][0]["name"] == "weather"
        assert set(session["no_effect"]) == {"instructions", "tools"}
        assert "not trained" in session["no_effect"]["instructions"]
        call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c", "output": "the sky"}
        for item, field in (
            (message("system", "input_text"), "content"),
            (message("assistant", "output_text"), "content"),
            (call, "arguments"),
            (output, "output"),
        ):
            await client.send("conversation.item.create", item=item)
            assert set((await client.until("conversation.item.added"))["item"]["no_effect"]) == {field}
        scheduled = serving.session().scheduled
        assert not scheduled.text_queue
        await client.send("response.create", event_id="r", response={"instructions": "be short"})
        error = (await client.until("error"))["error"]
        assert (error["param"], error["event_id"]) == ("response.instructions", "r") and "not trained" in error[
            "message"
        ]
        await client.send("response.create", response={"tools": [WEATHER]})
        created = (await client.until("response.created"))["response"]
        assert set(created["no_effect"]) == {"tools"} and not scheduled.text_queue
        await client.send("conversation.item.create", item=message("user", "input_text"))
        added = (await client.until("conversation.item.added"))["item"]
        assert "no_effect" not in added and unread(scheduled) == engine.codec.encode("the sky")
        await client.send("session.update", session={"type": "realtime", "instructions": "", "tools": []})
        assert "no_effect" not in (await client.until("session.updated"))["session"]
        check_events(client)

    serving(slots, engine, test, model=scripted({}), reads_background=False)


def test_live_keeps_background_text_from_a_model_that_cannot_read_it_and_says_so(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start(instructions="be kind", input=HISTORY)
        assert client.started["instructions"] == "be kind"
        assert set(client.started["no_effect"]) == {"instructions", "input"}
        info = await client.until("info")
        assert info["code"] == "background_text_unread" and "not trained" in info["message"]
        for kind in ("instructions", "thinking", "commentary"):
            await client.send(f"session.{kind}.append", event_id=kind, content="the sky", delegation_id=None)
            error = (await client.until("error"))["error"]
            assert (error["code"], error["client_event_id"]) == ("unsupported_event", kind)
        scheduled = serving.session().scheduled
        assert not scheduled.text_queue
        await client.send("session.input_text.append", content="the sky")
        await eventually(lambda: scheduled.text_queue)
        assert unread(scheduled) == engine.codec.encode("the sky")
        other = await serving.start()
        assert "no_effect" not in other.started

    serving(slots, engine, test, model=scripted({}), reads_background=False)


def test_models_say_whether_they_read_background_text(slots, engine):
    for reads in (True, False):

        async def test(serving: Serving, reads: bool = reads) -> None:
            async with serving.http.get(f"{serving.url}/v1/models") as answer:
                (model,) = (await answer.json())["data"]
            assert model["capabilities"] == {"background_text": reads, "pictures": True}

        serving(slots, engine, test, model=scripted({}), reads_background=reads)


def test_typed_text_goes_before_instructions_and_tools_that_wait(slots, engine):
    async def test(serving: Serving) -> None:
        client = await open_session(serving, instructions="the number is forty two " * 30, tools=[WEATHER])
        for n in range(2):
            item = message("user", "input_text") | {"id": str(n)}
            await client.send("conversation.item.create", item=item)
            await client.until("conversation.item.done")
        scheduled = serving.session().scheduled
        typed = [piece for piece in scheduled.text_queue if piece.mark is Control.TYPED]
        assert list(scheduled.text_queue)[: len(typed)] == typed and len(scheduled.text_queue) > 20 + len(typed)
        assert [token for piece in typed for token in piece.tokens] == 2 * engine.codec.encode("the sky")
        await serving.advance(3)
        assert {one.mark for one in serving.model_inputs() if one.text} == {Control.TYPED}

    serving(slots, engine, test, model=scripted({}))


def test_full_queue_of_background_text_refuses_no_typed_text(slots, engine):
    async def test(serving: Serving) -> None:
        client = await serving.start()
        scheduled = serving.session().scheduled
        scheduled.queue_text(Control.BACKGROUND, [1] * 24_576, 3)
        await client.send("session.thinking.append", content="the sky", delegation_id=None)
        assert (await client.until("error"))["error"]["code"] == "rate_limit_exceeded"
        await client.send("session.input_text.append", content="the sky")
        await eventually(lambda: scheduled.text_queue[0].mark is Control.TYPED)

    serving(slots, engine, test, model=scripted({}))
