"""The Realtime API with OpenAI's own clients, unmodified: `openai` and `openai-agents`."""

from __future__ import annotations

import asyncio
import base64
import json

from agents import function_tool
from agents.realtime import RealtimeAgent, RealtimeRunner
from openai import AsyncOpenAI

from jaxtml.serve.sessions.access import Access, Key
from jaxtml.stream.tokens import Control
from tests.serve.protocols.realtime.test_realtime import HEARD, LISTEN, SAY, SPEAK, TALK
from tests.serve.serving import Serving, serving
from tests.serve.stepped import scripted


def test_short_lived_key_begins_only_the_session_it_was_made_for(slots, engine):
    access = Access([Key(name="one", key="sk-first-key")])

    async def test(serving: Serving) -> None:
        openai = AsyncOpenAI(api_key="sk-first-key", base_url=f"{serving.url}/v1")
        session = {"type": "realtime", "instructions": "be kind", "output_modalities": ["text"]}
        made = await openai.realtime.client_secrets.create(
            expires_after={"anchor": "created_at", "seconds": 60}, session=session
        )
        assert made.value.startswith("ek_") and made.session.instructions == "be kind"
        browser = AsyncOpenAI(api_key=made.value, base_url=f"{serving.url}/v1")
        async with browser.realtime.connect(model="small_test") as connection:
            created = await connection.recv()
            assert created.session.instructions == "be kind" and created.session.output_modalities == ["text"]
        headers = {"Authorization": f"Bearer {made.value}"}
        async with serving.http.post(f"{serving.url}/v1/realtime/client_secrets", headers=headers) as refused:
            assert refused.status == 403
        other = {"type": "realtime", "model": "other"}
        key = access.create_short_lived_key(access.authenticate("sk-first-key"), 2**40, ("realtime",), other)
        async with serving.http.get(f"{serving.url}/v1/realtime", params={"auth_id": key}) as refused:
            assert refused.status == 404, "a key for another model, which this server had before"
        headers = {"Authorization": "Bearer sk-first-key"}
        longer = json.dumps({"session": {"type": "realtime", "instructions": "be kind " * 800}}).encode()
        for body in (b"{", b'{"expires_after": {"seconds": 5}}', b'{"session": {"type": "realtime", "x": 1}}', longer):
            url = f"{serving.url}/v1/realtime/client_secrets"
            async with serving.http.post(url, headers=headers, data=body) as refused:
                assert refused.status == 400

    serving(slots, engine, test, access=access, model=scripted({}))


def test_openai_client_talks(slots, engine):
    async def test(serving: Serving) -> None:
        openai = AsyncOpenAI(api_key="any", base_url=f"{serving.url}/v1")
        async with openai.realtime.connect(model="small_test") as connection:
            await connection.session.update(session={"type": "realtime", "instructions": "be kind"})
            await connection.input_audio_buffer.append(audio=base64.b64encode(bytes(4_800)).decode())
            async with serving.ticking():
                seen = []
                async for event in connection:
                    seen.append(event)
                    if event.type == "response.done":
                        break
        assert seen[-1].response.output[0].content[0].transcript == " it is forty"

    serving(slots, engine, test, model=TALK)


def test_openai_agents_client_runs_an_agent_with_a_function(slots, engine):
    asked: list[str] = []

    @function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "the sky is a number"

    talk = {
        3: (HEARD, " what", LISTEN),
        5: (SAY, " a", SPEAK),
        6: (SAY, " moment", Control.DELEGATE, " weather sky", Control.END, SPEAK),
        14: (SAY, " it is", SPEAK),
    }

    async def test(serving: Serving) -> None:
        agent = RealtimeAgent(name="a", instructions="be kind", tools=[weather])
        config = {"model_settings": {"model_name": "small_test"}}
        runner = RealtimeRunner(agent, config=config)
        url = serving.url.replace("http", "ws") + "/v1/realtime?model=small_test"
        kinds, raw = [], []
        async with await runner.run(model_config={"url": url, "api_key": "any"}) as session:
            await session.send_audio(bytes(9_600))
            async with serving.ticking():
                async with asyncio.timeout(20):
                    async for event in session:
                        kinds.append(event.type)
                        if event.type == "raw_model_event":
                            raw.append(event.data)
                        if kinds.count("agent_end") >= 2 and "tool_end" in kinds:
                            break
        assert asked == ["sky"] and "audio" in kinds and "error" not in kinds
        assert not [one for one in raw if one.type in ("error", "exception")], raw

    serving(slots, engine, test, model=scripted(talk))
