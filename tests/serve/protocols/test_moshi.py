"""Moshi's wire protocol, with Kyutai's own client and the Opus streams of Kyutai's own library (`sphn`)."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import aiohttp
import numpy as np
import pytest
import soxr
import sphn

from jaxtml.serve.protocols.moshi.protocol import ERROR, READY, SOUND, TEXT
from jaxtml.serve.runtime.scheduler import EndReason
from jaxtml.serve.sessions.access import Access, Key
from jaxtml.serve.transport.sound import SoundDecoder, SoundEncoder, SoundFormat
from jaxtml.session.converse import converse
from jaxtml.stream.dmel import DmelStream
from jaxtml.stream.timebase import MICRO_TURN_SAMPLES
from jaxtml.stream.tokens import Control
from tests.serve.serving import Serving, eventually, serving, unread
from tests.serve.stepped import scripted

FRAME = 1920  # 80 ms at 24 kHz
PCM = SoundFormat("pcm", 24_000)
PEERS = Path(sys.prefix) / "peers"  # where tools/test installs Kyutai's client


async def frames(ws: aiohttp.ClientWebSocketResponse, until: float) -> list[bytes]:
    """Returns the frames that the server sends, until they hold `until` seconds of sound."""
    found: list[bytes] = []
    reader, samples = sphn.OpusStreamReader(24_000), 0
    while samples < until * 24_000:
        message = await asyncio.wait_for(ws.receive(), 20)
        assert message.type is aiohttp.WSMsgType.BINARY, ws.close_code
        found.append(message.data)
        if message.data[:1] == SOUND:
            samples += len(reader.append_bytes(message.data[1:]))
    return found


def decoded(found: list[bytes]) -> np.ndarray:
    reader = sphn.OpusStreamReader(24_000)
    return np.concatenate([reader.append_bytes(frame[1:]) for frame in found if frame[:1] == SOUND])


def test_sound_and_text_over_opus_are_those_of_converse(slots, engine, wave):
    writer, reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
    loud = soxr.resample(wave, 16_000, 24_000).astype(np.float32)
    pages = [writer.append_pcm(loud[at : at + FRAME]) for at in range(0, len(loud) - FRAME, FRAME)]
    incoming = SoundDecoder(PCM)
    heard = np.concatenate([incoming.resample(reader.append_bytes(page)) for page in pages])

    async def test(serving: Serving) -> None:
        ws = await serving.http.ws_connect(f"{serving.url}/api/chat?text_temperature=0.7")
        assert (await ws.receive()).data == READY
        for page in pages:
            await ws.send_bytes(SOUND + page)
        session = serving.session()
        await eventually(lambda: session.scheduled.jitter_buffer.waiting_samples == len(heard))
        turns = len(heard) // MICRO_TURN_SAMPLES
        await serving.advance(turns)
        found = await frames(ws, 0.12 + 0.2 * turns - 0.04)
        out, text = SoundEncoder(PCM), ""
        sound = [np.zeros(2880, np.float32)]
        for outputs, (record,) in converse(engine, [heard[: turns * MICRO_TURN_SAMPLES]], seed=session.scheduled.seed):
            sound.append(PCM.decode(out.encode(outputs.wave[0])))
            text += record.text
        assert b"".join(frame[1:] for frame in found if frame[:1] == TEXT).decode() == text != ""
        writer, expected = sphn.OpusStreamWriter(24_000), np.concatenate(sound)
        pages_out = [writer.append_pcm(expected[at : at + 960]) for at in range(0, len(expected) - 959, 960)]
        same = decoded([SOUND + page for page in pages_out])
        got = decoded(found)
        np.testing.assert_allclose(got, same[: len(got)], atol=1e-4)
        assert np.abs(got[:2700]).max() < 1e-3, "120 ms of silence"
        await ws.close()
        await eventually(lambda: session.scheduled.end_reason)
        assert session.scheduled.end_reason is EndReason.LEFT

    serving(slots, engine, test)


def test_text_is_typed_text_and_wrong_frames_get_errors(slots, engine):
    async def test(serving: Serving) -> None:
        ws = await serving.http.ws_connect(f"{serving.url}/api/chat")
        for frame, word in (
            (b"", "nothing"),
            (b"\x09?", "not 9"),
            (TEXT + b"\xff", "utf-8"),
            (TEXT, "no text"),
            (SOUND + b"nonsense" * 100, "no Ogg pages"),
            (SOUND + b"OggS" + bytes(600), "no Ogg pages"),
            (b"\x08picture", "JPEG or PNG"),
            (b"\x04{}", "kind 4"),
        ):
            await ws.send_bytes(frame)
            while (message := await ws.receive()).data[:1] != ERROR:
                pass
            assert word in message.data.decode(), frame
        for frame in (b"\x03\x00", b"\x06"):
            await ws.send_bytes(frame)
        await ws.send_bytes(TEXT + b"the sky")
        scheduled = serving.session().scheduled
        await eventually(lambda: scheduled.text_queue)
        assert scheduled.text_queue[0].mark is Control.TYPED
        assert unread(scheduled) == engine.codec.encode("the sky")
        writer = sphn.OpusStreamWriter(24_000)
        await ws.send_bytes(SOUND + writer.append_pcm(np.zeros(FRAME, np.float32)))
        await ws.send_bytes(SOUND + writer.append_pcm(np.zeros(FRAME, np.float32)))
        await eventually(lambda: scheduled.jitter_buffer.waiting_samples)
        assert serving.counted("duplex_malformed_messages_total", protocol="moshi") == 8

    serving(slots, engine, test, model=scripted({}))


class Card:
    """Stands in for an input or output stream of `sounddevice`, on a machine without a sound card.

    Args:
      sound: `[N]` float32 that the microphone records, block by block; silence follows. Empty for an output stream.
      blocks: a list to which each block is added that the input stream recorded or the output stream played.
    """

    def __init__(
        self,
        sound: np.ndarray,
        blocks: list[np.ndarray],
        *,
        samplerate: int,
        channels: int,
        blocksize: int,
        callback: Callable[..., None],
    ):
        self.sound, self.blocks, self.callback = sound[:, None], blocks, callback
        self.shape, self.block_s = (blocksize, channels), blocksize / samplerate
        self.over, self.thread = threading.Event(), threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.over.wait(self.block_s):
            block = np.zeros(self.shape, np.float32)
            given, self.sound = self.sound[: len(block)], self.sound[len(block) :]
            block[: len(given)] = given
            self.callback(block, len(block), None, None)
            self.blocks.append(block)


@pytest.mark.skipif(not PEERS.exists(), reason="needs Kyutai's client, which tools/test installs")
def test_kyutais_own_client_talks(slots, engine, wave, monkeypatch):
    package, card = ModuleType("moshi"), ModuleType("sounddevice")
    package.__path__ = [str(PEERS / "moshi")]  # not the package itself, which imports torch
    loud, played = soxr.resample(wave, 16_000, 24_000).astype(np.float32), []
    card.InputStream, card.OutputStream = partial(Card, loud, []), partial(Card, loud[:0], played)
    for name, module in (("moshi", package), ("sounddevice", card)):
        monkeypatch.setitem(sys.modules, name, module)
    client = importlib.import_module("moshi.client")
    printer = importlib.import_module("moshi.client_utils").RawPrinter(io.StringIO(), io.StringIO())

    async def test(serving: Serving) -> None:
        talking = asyncio.create_task(client.run(printer, argparse.Namespace(url=serving.url)))
        await eventually(lambda: serving.manager.sessions)
        session = serving.session()
        async with serving.ticking(0.2):
            await eventually(lambda: printer.stream.getvalue() == " it is forty")
            await eventually(lambda: any(block.any() for block in played))
        silence = DmelStream().step(np.zeros(MICRO_TURN_SAMPLES, np.float32))[1]
        assert any((one.bins != silence).any() for one in serving.model_inputs()), "the microphone was heard"
        talking.cancel()
        await eventually(lambda: session.scheduled.end_reason)
        assert "Lost connection" not in printer.err_stream.getvalue()

    talk = {5: (Control.SAY, " it is", Control.SPEAK), 6: (Control.SAY, " forty", Control.SPEAK)}
    serving(slots, engine, test, model=scripted(talk))


def test_lost_connection_ends_the_session_and_a_key_in_use_is_refused_at_once(slots, engine):
    access = Access([Key(name="one", key="sk-first-key", sessions=1)])

    async def test(serving: Serving) -> None:
        url = f"{serving.url}/api/chat?auth_id=sk-first-key"
        ws = await serving.http.ws_connect(url)
        session = serving.session()
        async with serving.http.get(url, headers={"Upgrade": "websocket", "Connection": "Upgrade"}) as refused:
            assert refused.status == 429 and int(refused.headers["Retry-After"]) > 0
        async with serving.http.get(url) as refused:
            assert refused.status == 426
        ws._response.connection.transport.abort()
        await eventually(lambda: session.scheduled.end_reason is EndReason.GONE)
        await eventually(lambda: not serving.manager.sessions)
        await serving.advance()
        ws = await serving.http.ws_connect(url)
        assert (await ws.receive()).data == READY
        serving.session().scheduled.end(EndReason.EXPIRED)
        while (message := await ws.receive()).data[:1] != ERROR:
            pass
        assert b"expired" in message.data

    serving(slots, engine, test, access=access, model=scripted({}))
