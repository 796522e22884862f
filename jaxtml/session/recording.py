"""Runs a session over a recording of the user. Reads the recording and writes the reply. Called by `jaxtml converse`.

The recording is read whole. Then the model hears it in micro-turns of 200 ms, as it would hear a microphone. With
`realtime`, the session runs at the speed of the recording.

Axis: N samples at 16 kHz.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxtml.errors import InputError
from jaxtml.session.converse import micro_turns_of
from jaxtml.session.library import Model
from jaxtml.session.picture import PICTURE_ENDINGS
from jaxtml.session.records import MicroTurn, Reply
from jaxtml.stream.audio_file import AUDIO_ENDINGS, STDIN, check_ending, read_audio, write_audio
from jaxtml.stream.images import image_patches
from jaxtml.stream.timebase import MICRO_TURN_MS, MICRO_TURN_SAMPLES, SAMPLE_RATE
from jaxtml.stream.video_file import read_frame_pairs
from jaxtml.strict_json import dumps

EVENT_ENDINGS = (".jsonl", ".ndjson", ".json", ".txt")
"""The endings of names for `write_events`."""


def check_formats(out: str, stereo: str | None, events: str | None, picture: str | None) -> None:
    """Raises `InputError` if the name of an output promises a format that is not written. None: no such output."""
    for sound in filter(None, (out, stereo)):
        check_ending(sound, AUDIO_ENDINGS)
    if events:
        check_ending(events, EVENT_ENDINGS)
    if picture:
        check_ending(picture, PICTURE_ENDINGS)


def read_recording(path: str | Path) -> np.ndarray:
    """Returns the recording as `[N]` float32 at 16 kHz, at least one micro-turn long.

    Raises:
      InputError: as `read_audio`, or the recording is shorter than a micro-turn.
    """
    wave = read_audio(path)
    if len(wave) < MICRO_TURN_SAMPLES:
        name = "standard input" if str(path) == STDIN else path
        raise InputError(f"{name} lasts {len(wave) * 1000 // SAMPLE_RATE} ms: give at least {MICRO_TURN_MS} ms")
    return wave


def converse_with(
    model: Model,
    wave: np.ndarray,
    *,
    seed: int = 0,
    video: str | Path | None = None,
    realtime: bool = False,
    on_micro_turn: Callable[[MicroTurn], None] = lambda micro_turn: None,
) -> Reply:
    """Runs a session over a recording, like `Model.converse`.

    It can also take a video file, run at the speed of the recording, and call a function after each micro-turn.

    Args:
      model: the loaded model.
      wave: `[N]` float32 at 16 kHz, from `read_recording`.
      seed: of the sampling.
      video: file of what the camera saw during the recording.
      realtime: whether to wait after each micro-turn until 200 ms have passed.
      on_micro_turn: is called after each micro-turn.

    Raises:
      InputError: the model takes no video, or the video cannot be read; also as `Model.converse`.
    """
    patches = [] if video is None else _video_patches(model, video, micro_turns_of(len(wave)))
    micro_turns = model.stream(wave, seed, patches=patches)  # compiles the step, before the clock starts
    done: list[MicroTurn] = []
    began = time.monotonic()
    for micro_turn in micro_turns:
        done.append(micro_turn)
        on_micro_turn(micro_turn)
        if realtime:
            time.sleep(max(0.0, began + len(done) * MICRO_TURN_MS / 1000 - time.monotonic()))
    return Reply.join(done, len(wave))


def _video_patches(model: Model, video: str | Path, micro_turns: int) -> list[np.ndarray | None]:
    """Returns the patches `[P, 2, 40, 40, 3]` float32 of each micro-turn; None where the video has not begun."""
    config = model.config
    if not config.duplex.max_patches:
        raise InputError(f"--video: the checkpoint {config.name!r} takes no video (duplex.max_patches is 0)")
    pairs = read_frame_pairs(video, micro_turns, config.duplex.max_patches)
    return [None if pair is None else image_patches(pair) for pair in pairs]


def write_reply(path: str | Path, reply: Reply) -> None:
    """Writes what the model said in the format that the name promises, as long as the recording and in time with it."""
    write_audio(path, reply.wave)


def write_stereo(path: str | Path, wave: np.ndarray, reply: Reply) -> None:
    """Writes the user on the left and the model on the right, in the format that the name promises."""
    write_audio(path, np.stack([wave, reply.wave], axis=1))


def write_events(path: str | Path, reply: Reply) -> None:
    """Writes one record per micro-turn: `t_ms, gate, p_speak, heard, text, delegate, step_ms`.

    A file whose name ends in ".json" is one array. Any other has one line of JSON for each record.

    Raises:
      InputError: the file cannot be written.
    """
    records = [micro_turn.event() for micro_turn in reply.turns]
    is_array = Path(path).suffix.lower() == ".json"
    text = dumps(records, indent=1) + "\n" if is_array else "".join(dumps(record) + "\n" for record in records)
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
