"""jaxtml: train, convert, evaluate and serve full-duplex interaction models in JAX.

The library in five calls:

    import jaxtml

    model = jaxtml.load()              # the shipped `tiny` model; load(directory) opens another checkpoint
    wave = jaxtml.read_audio("user.wav")
    reply = model.converse(wave)       # wave: float32 [N] at 16 kHz; reply.wave, reply.heard, reply.text, reply.turns
    session = model.session(seed=0)
    turn = session.step(chunk)         # chunk: float32 [3200], 200 ms; turn.gate, turn.heard, turn.text, turn.wave

A micro-turn is 200 ms of input and output. `heard` is the model's transcript of the user, `text` is what the model
says, and `turn.gate` says whether the model speaks in this micro-turn ("speak" or "listen").
`Model.encode` and `Model.decode` turn a `Conversation` into the tokens of its micro-turns and back. The library raises
`InputError` for an argument that it cannot use.

`import jaxtml` imports neither JAX nor NumPy. A name is imported when it is first used, and `load` is the first call
that uses a device.
"""

from __future__ import annotations

import os

from jaxtml.errors import InputError

# Type checkers treat this name as True. Importing it from `typing` would take longer than the rest of this file.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from jaxtml.session.library import Model, Session, load
    from jaxtml.session.records import MicroTurn, Reply
    from jaxtml.stream.audio_file import read_audio, write_wav
    from jaxtml.stream.conversation import Conversation, Speech, Word

__version__ = "0.2.0"

__all__ = [
    "DEMO_RECORDING",
    "Conversation",
    "InputError",
    "MicroTurn",
    "Model",
    "Reply",
    "Session",
    "Speech",
    "Word",
    "load",
    "read_audio",
    "write_wav",
]

DEMO_RECORDING = os.path.join(os.path.dirname(__file__), "assets", "demo", "human.flac")
"""Path of a 14-second recording in which a person asks two questions. The NOTICE beside it names source and licence."""

_MODULES = {
    "Conversation": "jaxtml.stream.conversation",
    "MicroTurn": "jaxtml.session.records",
    "Model": "jaxtml.session.library",
    "Reply": "jaxtml.session.records",
    "Session": "jaxtml.session.library",
    "Speech": "jaxtml.stream.conversation",
    "Word": "jaxtml.stream.conversation",
    "load": "jaxtml.session.library",
    "read_audio": "jaxtml.stream.audio_file",
    "write_wav": "jaxtml.stream.audio_file",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'jaxtml' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
