"""What the server's two processes tell each other: MessagePack, each message behind its length, over a Unix socket.

The process that has the network sends a `Tick` and gets a `TickReply`, one at a time; before that, once, a
`WorkerReady` or a line that says why not. Called by `serve.runtime.worker`, `serve.runtime.worker_process` and
`serve.runtime.hosts`."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from jaxtml.session.engine import SlotInput
from jaxtml.session.slots import SlotOutput
from jaxtml.stream.tokens import Control

LENGTH = struct.Struct("<I")
END = LENGTH.pack(0)  # a message of nothing: the other end is to end, in good order


@dataclass(frozen=True)
class SessionStart:
    """A session that begins at this tick: its number, the seed of its sampling, its wall clock (of the week)."""

    session: int
    seed: int
    week_ms: int


@dataclass(frozen=True)
class Tick:
    """One micro-turn of those sessions of a `group` that are in `given`; those in `end` leave before it, those in
    `begin` come."""

    begin: tuple[SessionStart, ...] = ()
    end: tuple[int, ...] = ()
    inputs: dict[int, SlotInput] = field(default_factory=dict)
    group: int = 0


@dataclass(frozen=True)
class TickReply:
    """What came of a tick. `compilations` are those since the one before: none."""

    outputs: dict[int, SlotOutput]
    step_ms: float
    compilations: int = 0


@dataclass(frozen=True)
class WorkerReady:
    """The worker's first word: the config of its model (JSON) and how many groups its sessions are in; or `error`."""

    config: str = ""
    groups: int = 0
    error: str = ""


Message = Tick | TickReply | WorkerReady


def packed(message: Message) -> bytes:
    """The message with its length in front."""
    if isinstance(message, Tick):
        begin = [(one.session, one.seed, one.week_ms) for one in message.begin]
        given = [(session, *_packed_given(one)) for session, one in message.inputs.items()]
        body: Any = ("tick", begin, message.end, given, message.group)
    elif isinstance(message, TickReply):
        gave = [
            (session, one.wave.tobytes(), one.tokens.tobytes(), one.speaking, one.p_speak)
            for session, one in message.outputs.items()
        ]
        body = ("told", gave, message.step_ms, message.compilations)
    else:
        body = ("ready", message.config, message.groups, message.error)
    data: Any = msgpack.packb(body)
    return LENGTH.pack(len(data)) + data


def received(connection: socket.socket) -> bytes | None:
    """What the next message has behind its length; None where the other end is closed."""
    head = exactly(connection, LENGTH.size)
    return None if head is None else exactly(connection, LENGTH.unpack(head)[0])


def exactly(connection: socket.socket, size: int) -> bytes | None:
    """`size` bytes; None where the other end is closed before."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def unpacked(data: bytes) -> Message:
    """The message of which `data` is all behind the length."""
    kind, *parts = msgpack.unpackb(data, use_list=False)
    if kind == "tick":
        begin, end, given, group = parts
        given = {one[0]: _given(*one[1:]) for one in given}
        return Tick(tuple(SessionStart(*one) for one in begin), end, given, group)
    if kind == "told":
        gave, *rest = parts
        return TickReply({one[0]: _gave(*one[1:]) for one in gave}, *rest)
    return WorkerReady(*parts)


def _packed_given(one: SlotInput) -> tuple[Any, ...]:
    patches = None if one.patches is None else np.asarray(one.patches, np.float32).tobytes()
    return one.bins.tobytes(), one.text, int(one.mark), patches


def _given(bins: bytes, text: tuple[int, ...], mark: int, patches: bytes | None) -> SlotInput:
    seen = None if patches is None else np.frombuffer(patches, np.float32).reshape(-1, 2, 40, 40, 3)
    return SlotInput(np.frombuffer(bins, np.uint8).reshape(4, -1), text, Control(mark), seen)


def _gave(wave: bytes, tokens: bytes, speaking: bool, p_speak: float) -> SlotOutput:
    return SlotOutput(np.frombuffer(wave, np.float32), np.frombuffer(tokens, np.int32), speaking, p_speak)
