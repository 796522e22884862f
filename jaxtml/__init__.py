"""jaxtml: train, convert, evaluate and serve full-duplex interaction models in JAX.

The library in five calls:

    import jaxtml

    model = jaxtml.load()              # the `tiny` model that ships with the package; or a checkpoint directory
    wave = jaxtml.read_audio("user.wav")
    reply = model.converse(wave)       # float32 [N] at 16 kHz; reply.wave, reply.heard, reply.text, reply.turns
    session = model.session(seed=0)
    turn = session.step(chunk)         # float32 [3200], 200 ms; turn.gate, turn.heard, turn.text, turn.wave

`Model.encode` and `Model.decode` turn a `Conversation` into the tokens of its micro-turns and back. What a caller
passes and cannot be used raises `InputError`.

`import jaxtml` imports neither JAX nor NumPy. A name is imported when it is first used, and `load` is the first call
that uses a device.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtml.errors import InputError

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

DEMO_RECORDING = Path(__file__).parent / "assets" / "demo" / "human.flac"
"""A person who asks two questions, 14 seconds. The NOTICE beside the file names its source and licence."""

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


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxtml' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
