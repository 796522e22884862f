"""The messages between the server's two processes: the network process and the worker process that runs the model.

A message travels over a Unix socket: first its length, then its content in MessagePack. The worker first sends one
`WorkerReady`, with the model's config or with an error. After that the network process sends a `Tick` and gets a
`TickReply`, one at a time. If a model lies on several hosts, one worker also sends each `Tick` over TCP to the workers
of the other hosts, in the same encoding (`serve.runtime.hosts`).

A worker splits its sessions into groups (`jaxtml.session.slots.slot_groups`). A tick is for one group.

Called by `serve.runtime.worker`, `serve.runtime.worker_process` and `serve.runtime.hosts`. Both ends run the same
version of this file, so the format may change freely.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

import msgpack
import numpy as np

from jaxtml.session.records import SlotInput, SlotOutput
from jaxtml.stream.tokens import Control

LENGTH = struct.Struct("<I")  # in front of each message: its length in bytes
END_FRAME = LENGTH.pack(0)  # an empty message asks the other end to finish in good order


@dataclass(frozen=True)
class SessionStart:
    """A session that begins with a tick.

    Attributes:
      session: the session's number.
      seed: seed of the session's sampling.
      week_ms: wall-clock time since the beginning of the week, in ms.
    """

    session: int
    seed: int
    week_ms: int


@dataclass(frozen=True)
class Tick:
    """A request to the worker: one micro-turn of the sessions of one group.

    Attributes:
      begin: sessions that begin before the micro-turn.
      end: numbers of the sessions that end before the micro-turn, and before any session begins.
      inputs: the input of each session that takes part, by session number.
      group: index of the group among the worker's groups.
    """

    begin: tuple[SessionStart, ...] = ()
    end: tuple[int, ...] = ()
    inputs: dict[int, SlotInput] = field(default_factory=dict)
    group: int = 0


@dataclass(frozen=True)
class TickReply:
    """The worker's answer to a `Tick`.

    Attributes:
      outputs: the output of each session that took part, by session number.
      step_ms: time that the worker needed, in ms.
      compilations: programs compiled since the previous reply. In service this is 0; anything else is a bug.
    """

    outputs: dict[int, SlotOutput]
    step_ms: float
    compilations: int = 0


@dataclass(frozen=True)
class WorkerReady:
    """The worker's first message.

    Attributes:
      config: the model's config as JSON.
      groups: number of groups into which the worker splits its sessions.
      error: why the worker cannot run; empty: it can.
    """

    config: str = ""
    groups: int = 0
    error: str = ""


Message = Tick | TickReply | WorkerReady


def encode(message: Message) -> bytes:
    """Returns the message as bytes, with its length in front."""
    if isinstance(message, Tick):
        begin = [(start.session, start.seed, start.week_ms) for start in message.begin]
        inputs = [(session, *_encode_input(input)) for session, input in message.inputs.items()]
        body: tuple[object, ...] = ("tick", begin, message.end, inputs, message.group)
    elif isinstance(message, TickReply):
        outputs = [
            (session, output.wave.tobytes(), output.tokens.tobytes(), output.speaking, output.p_speak)
            for session, output in message.outputs.items()
        ]
        body = ("reply", outputs, message.step_ms, message.compilations)
    else:
        body = ("ready", message.config, message.groups, message.error)
    data = msgpack.packb(body)
    assert data is not None
    return LENGTH.pack(len(data)) + data


def decode(data: bytes) -> Message:
    """Returns the message in `data`, which is everything after the length."""
    kind, *fields = msgpack.unpackb(data, use_list=False)
    if kind == "tick":
        begin, end, inputs, group = fields
        decoded = {session: _decode_input(*input) for session, *input in inputs}
        return Tick(tuple(SessionStart(*start) for start in begin), end, decoded, group)
    if kind == "reply":
        outputs, *rest = fields
        return TickReply({session: _decode_output(*output) for session, *output in outputs}, *rest)
    return WorkerReady(*fields)


def receive_data(connection: socket.socket) -> bytes | None:
    """Returns the next message without its length, or None if the other end has closed the connection."""
    head = receive_exactly(connection, LENGTH.size)
    return None if head is None else receive_exactly(connection, LENGTH.unpack(head)[0])


def receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    """Returns `size` bytes, or None if the other end closes the connection before they have arrived."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def _encode_input(input: SlotInput) -> tuple[bytes, tuple[int, ...], int, bytes | None]:
    patches = None if input.patches is None else np.asarray(input.patches, np.float32).tobytes()
    return input.bins.tobytes(), input.text, int(input.mark), patches


def _decode_input(bins: bytes, text: tuple[int, ...], mark: int, patches: bytes | None) -> SlotInput:
    grid = None if patches is None else np.frombuffer(patches, np.float32).reshape(-1, 2, 40, 40, 3)
    return SlotInput(np.frombuffer(bins, np.uint8).reshape(4, -1), text, Control(mark), grid)


def _decode_output(wave: bytes, tokens: bytes, speaking: bool, p_speak: float) -> SlotOutput:
    return SlotOutput(np.frombuffer(wave, np.float32), np.frombuffer(tokens, np.int32), speaking, p_speak)
